"""How the shipped rules are trained, stage by stage: one command trains them again, from any seed."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from l2l_fast.experiments.progress import progress
from l2l_fast.experiments.teacher import Relay
from l2l_fast.experiments.teachers import SHIPPED, choose_teacher
from l2l_fast.experiments.training import fit
from l2l_fast.meta import MetaTrainer, Teacher, TrainConfig
from l2l_fast.meta.folder import CHECKPOINT
from l2l_fast.meta.validation import validation_loss
from l2l_fast.problems import PROBLEMS, Problem
from l2l_fast.rule import CoordinatewiseLSTM
from l2l_fast.spec import Identity, LogAndSign, Preprocess

RULE = "rule.safetensors"

# Far enough apart that stages of neighbouring seeds share no training instances.
_SEEDS_APART = 1000

_GREATEST_POWER = 15  # of 1.1: a fourfold scale


@dataclass(frozen=True)
class Stage:
    """A meta-training, from the weights that an earlier one ended with.

    Attributes:
        name: names its folder.
        config: settings; its seed is that of the reproduction, and different in each stage.
        start: name of the stage whose best rule it starts from; ``None`` starts from random weights.
        teacher: whose steps are imitated, if any.
        leader: a stage whose rule takes the first steps in the teacher's place, and how many.
    """

    name: str
    config: TrainConfig
    start: str | None = None
    teacher: Teacher | None = None
    leader: tuple[str, int] | None = None


@dataclass(frozen=True)
class Recipe:
    """All it takes to train a shipped rule.

    Attributes:
        name: of the rule.
        problem: name of what it is trained on.
        stages: one after the other; the rule is that of the last.
        limits: what is known not to work, for the card.
        preprocess: of the rule.
        choose_scale: whether validation chooses ``output_scale`` at the end, see :func:`choose_scale`.
        options: what the command has for it besides the name and a seed.
    """

    name: str
    problem: str
    stages: tuple[Stage, ...]
    limits: str
    preprocess: Callable[[], Preprocess] = LogAndSign
    choose_scale: bool = False
    options: tuple[str, ...] = ()


def _network_stages(teacher: Teacher) -> tuple[Stage, ...]:
    """Learn from a tuned optimizer, then to be faster than it at first, then to be both, at length."""
    whole = TrainConfig(
        horizon=100,
        truncation=100,
        batch_size=1,
        coordinate_fraction=0.08,
        average=0.95,
        warmup=10,
        validate_every=100,
        validation_functions=16,
    )
    sprint = TrainConfig(
        updates=400,
        horizon=25,
        truncation=25,
        batch_size=1,
        second_derivatives=True,
        slope_floor=0.1,
        lr=5e-4,
        final_lr_fraction=0.1,
        clip=None,
        clip_ratio=2.0,
        average=0.95,
        warmup=5,
        validate_every=50,
        validation_functions=16,
    )
    return (
        Stage("imitate", replace(whole, updates=1200, lr=3e-3), teacher=teacher),
        Stage("sprint", sprint, start="imitate"),
        Stage("relay", replace(whole, updates=1500, lr=2e-3), start="imitate", teacher=teacher, leader=("sprint", 8)),
        Stage("finish", replace(whole, updates=1500, lr=1e-3), start="relay", teacher=teacher, leader=("sprint", 8)),
    )


def recipe_for(rule: str, teacher: str = SHIPPED) -> Recipe:
    """The recipe of a shipped rule.

    Args:
        teacher: one in place of the shipped teacher, see :func:`choose_teacher`.

    Raises:
        ValueError: if there is no recipe of that name, it has no teacher to replace, or there is no such teacher.
        OSError: if the teacher's file can't be read.
    """
    if rule == "quadratic":
        if teacher != SHIPPED:
            raise ValueError("the recipe of 'quadratic' imitates no teacher; leave out --teacher")
        config = TrainConfig(updates=12000, second_derivatives=True)
        return Recipe(rule, rule, (Stage("train", config),), _QUADRATIC_LIMITS, Identity)
    if rule in _NETWORK_LIMITS:
        stages = _network_stages(choose_teacher(teacher, rule))
        options = () if teacher == SHIPPED else ("--teacher", teacher)
        return Recipe(rule, rule, stages, _NETWORK_LIMITS[rule], choose_scale=True, options=options)
    raise ValueError(f"there is no recipe for {rule!r}, only for 'quadratic', {', '.join(map(repr, _NETWORK_LIMITS))}")


_QUADRATIC_LIMITS = (
    "Trained for 100 steps and for functions of this scale and dimension. On 2048 functions of dimension 20 the mean "
    "loss at step 100 was 0.35, and from 100 to 1000 steps it still fell on dimensions 5, 10 and 20; nothing else was "
    "tried. Not meant for neural networks."
)
_NETWORK_LIMITS = {
    "mnist": "Trained for 100 steps on this network; see docs/results.md for other networks and longer runs.",
    "digits": "For networks as small as 64-20-10 on 8 x 8 images, 100 steps. See docs/results.md.",
}


def reproduce(recipe: Recipe, seed: int, folder: Path) -> CoordinatewiseLSTM:
    """Train a rule as its recipe says; its card tells what it went through.

    Every stage has a folder of its own in ``folder``. What was interrupted carries on there, and what is done is not
    done again. ``folder/rule.safetensors`` is written at the end.

    Raises:
        BlockingIOError: if another training is at work in the folder.
        OSError: if it can't be written.
        ValueError: if the folder holds stages of another recipe or of another seed.
    """
    problem = PROBLEMS[recipe.problem]()
    rules: dict[str, CoordinatewiseLSTM] = {}
    history: list[dict[str, Any]] = []
    for number, stage in enumerate(recipe.stages):
        config = replace(stage.config, seed=seed + _SEEDS_APART * number)
        rule = _fresh(recipe, seed) if stage.start is None else copy.deepcopy(rules[stage.start])
        trainer = MetaTrainer(
            rule, problem, config, teacher=_teacher(stage, rules), folder=folder / f"{number + 1}-{stage.name}"
        )
        resume = (folder / f"{number + 1}-{stage.name}" / CHECKPOINT).exists()
        best = fit(trainer, description=stage.name, resume=resume).best_rule
        assert isinstance(best, CoordinatewiseLSTM)
        rules[stage.name] = best
        history.append({"stage": stage.name, "start": stage.start, "leader": stage.leader, **best.card})
    chosen, losses = rules[recipe.stages[-1].name], dict[str, float]()
    if recipe.choose_scale:
        chosen, losses = choose_scale(chosen, problem, config)
    chosen.card = {
        "name": recipe.name,
        "command": shlex.join(["l2l-fast", "reproduce", recipe.name, *recipe.options, "--seed", str(seed)]),
        "problem": history[-1]["problem"],
        "stages": history,
        "validation_loss_by_output_scale": losses,
        "limits": recipe.limits,
    }
    chosen.save(folder / RULE)
    return chosen


def _fresh(recipe: Recipe, seed: int) -> CoordinatewiseLSTM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CoordinatewiseLSTM(preprocess=recipe.preprocess())


def _teacher(stage: Stage, rules: dict[str, CoordinatewiseLSTM]) -> Teacher | None:
    if stage.teacher is None or stage.leader is None:
        return stage.teacher
    leader, steps = stage.leader
    return Relay(rules[leader], steps, stage.teacher)


def choose_scale(
    rule: CoordinatewiseLSTM, problem: Problem, config: TrainConfig
) -> tuple[CoordinatewiseLSTM, dict[str, float]]:
    """The rule with the ``output_scale`` of the lowest validation loss.

    Tried are powers of 1.1 times its own, from its neighbours on until the best has a worse one on both sides.

    Returns:
        The rule, and every validation loss by ``output_scale``.
    """
    device = rule.output.weight.device
    losses: dict[int, float] = {}
    best, to_try = 0, [-1, 0, 1]
    with progress("choosing the scale", 1 + 2 * _GREATEST_POWER) as advance:
        while to_try:
            for power in to_try:
                losses[power] = validation_loss(_scaled(rule, power), problem, config, device)
                advance()
            best = min(losses, key=lambda power: losses[power])
            around = (power for power in (best - 1, best + 1) if abs(power) <= _GREATEST_POWER)
            to_try = [power for power in around if power not in losses]
    by_scale = {f"{_scaled(rule, power).spec.output_scale:.4g}": losses[power] for power in sorted(losses)}
    return _scaled(rule, best), by_scale


def _scaled(rule: CoordinatewiseLSTM, power: int) -> CoordinatewiseLSTM:
    spec = rule.spec
    scaled = CoordinatewiseLSTM(spec.hidden_size, spec.preprocess, 1.1**power * spec.output_scale)
    scaled.load_state_dict(rule.state_dict())
    return scaled

"""How the shipped rules are trained: one command trains them again, from any seed."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from l2l_fast.experiments.progress import progress
from l2l_fast.experiments.teachers import SHIPPED, choose_teacher
from l2l_fast.experiments.training import fit
from l2l_fast.meta import MetaTrainer, Teacher, TrainConfig
from l2l_fast.meta.folder import CHECKPOINT
from l2l_fast.meta.validation import validation_loss
from l2l_fast.problems import PROBLEMS, Problem
from l2l_fast.rule import CoordinatewiseLSTM
from l2l_fast.spec import Identity, LogAndSign, Preprocess

RULE = "rule.safetensors"
REFINED = "refined"  # the folder of the second training

_GREATEST_POWER = 15  # of 1.1: a fourfold scale


@dataclass(frozen=True)
class Recipe:
    """All it takes to train a shipped rule.

    Attributes:
        name: of the rule.
        problem: name of what it is trained on.
        preprocess: of the rule.
        config: settings of the training but the seed.
        limits: what is known not to work, for the card.
        teacher: whose steps are imitated, if any.
        refinement: settings of a second training, by backpropagation from where the first ended; ``None`` for none.
        choose_scale: whether validation chooses ``output_scale`` at the end, see :func:`choose_scale`.
        options: what the command has for it besides the name and a seed.
    """

    name: str
    problem: str
    preprocess: Preprocess
    config: TrainConfig
    limits: str
    teacher: Teacher | None = None
    refinement: TrainConfig | None = None
    choose_scale: bool = False
    options: tuple[str, ...] = ()


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
        return Recipe(rule, rule, Identity(), config, _QUADRATIC_LIMITS)
    if rule in _NETWORK_LIMITS:
        return Recipe(
            rule,
            rule,
            LogAndSign(15.0),
            _NETWORK_CONFIG,
            f"{_NETWORK_LIMITS[rule]} {_SHIPPED_LIMITS[rule] if teacher == SHIPPED else _OTHER_TEACHER}",
            choose_teacher(teacher, rule),
            _REFINEMENTS.get(rule),
            choose_scale=True,
            options=() if teacher == SHIPPED else ("--teacher", teacher),
        )
    raise ValueError(f"there is no recipe for {rule!r}, only for 'quadratic', {', '.join(map(repr, _NETWORK_LIMITS))}")


# One run of 100 steps per update, imitated from its start to its end.
_NETWORK_CONFIG = TrainConfig(
    updates=2000,
    horizon=100,
    truncation=100,
    batch_size=1,
    coordinate_fraction=0.08,
    lr=3e-3,
    warmup=10,
    average=0.95,
    validate_every=100,
    validation_functions=16,
)

# Whole runs again, for a lower loss all the way.
_REFINEMENTS = {
    "mnist": TrainConfig(
        updates=250,
        horizon=100,
        truncation=100,
        batch_size=1,
        objective="log",
        second_derivatives=True,
        slope_floor=0.1,
        lr=1e-4,
        final_lr_fraction=0.05,
        warmup=10,
        clip=None,
        clip_ratio=2.0,
        average=0.97,
        validate_every=50,
        validation_functions=16,
        validate_by="run",
    )
}

_QUADRATIC_LIMITS = (
    "Trained for 100 steps and for functions of this scale and dimension. On 2048 functions of dimension 20 the mean "
    "loss at step 100 was 0.35, and from 100 to 1000 steps it still fell on dimensions 5, 10 and 20; nothing else was "
    "tried. Not meant for neural networks."
)
_NETWORK_LIMITS = {
    "mnist": "Taught for 100 steps on 784-20-10, sigmoid, on MNIST.",
    "digits": "Taught for 100 steps on 64-20-10, sigmoid, on 8 x 8 images, which it overfits.",
}
_SHIPPED_LIMITS = {
    "mnist": (
        "Its teacher was tuned on that network alone. Behind tuned baselines on ReLU; see docs/results.md for other "
        "networks and longer runs."
    ),
    "digits": "See docs/results.md.",
}
_OTHER_TEACHER = "By another teacher than the shipped one, and not measured any further."


def reproduce(recipe: Recipe, seed: int, folder: Path) -> CoordinatewiseLSTM:
    """Train a rule as its recipe says; its card tells how.

    What was interrupted carries on, and what is done is not done again. ``folder/rule.safetensors`` is written at the
    end.

    Raises:
        BlockingIOError: if another training is at work in the folder.
        OSError: if it can't be written.
        ValueError: if the folder holds another training, one from another seed, or the second part of one alone.
    """
    if (folder / REFINED / CHECKPOINT).exists() and not (folder / CHECKPOINT).exists():
        raise ValueError(
            f"{folder / REFINED} holds the second part of a training whose first part is gone from {folder}; delete "
            "it, or name another folder"
        )
    problem, config = PROBLEMS[recipe.problem](), replace(recipe.config, seed=seed)
    best = _trained(_fresh(recipe, seed), problem, config, folder, recipe.name, recipe.teacher)
    if recipe.refinement is not None:
        begun = best.card
        refinement = replace(recipe.refinement, seed=seed)
        best = _trained(best, problem, refinement, folder / REFINED, f"{recipe.name}, refined")
        best.card = {**best.card, "begun_from": begun}
    chosen, losses = choose_scale(best, problem, config) if recipe.choose_scale else (best, {})
    chosen.card = {
        "name": recipe.name,
        "command": shlex.join(["l2l-fast", "reproduce", recipe.name, *recipe.options, "--seed", str(seed)]),
        **best.card,
        **({"output_scales": {"validated_by": config.validate_by, "validation_loss": losses}} if losses else {}),
        "limits": recipe.limits,
    }
    chosen.save(folder / RULE)
    return chosen


def _trained(
    rule: CoordinatewiseLSTM,
    problem: Problem,
    config: TrainConfig,
    folder: Path,
    description: str,
    teacher: Teacher | None = None,
) -> CoordinatewiseLSTM:
    """The best rule of a training in ``folder``, which carries on if there is one."""
    trainer = MetaTrainer(rule, problem, config, teacher=teacher, folder=folder)
    best = fit(trainer, description=description, resume=(folder / CHECKPOINT).exists()).best_rule
    assert isinstance(best, CoordinatewiseLSTM)
    return best


def _fresh(recipe: Recipe, seed: int) -> CoordinatewiseLSTM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CoordinatewiseLSTM(preprocess=recipe.preprocess)


def choose_scale(
    rule: CoordinatewiseLSTM, problem: Problem, config: TrainConfig
) -> tuple[CoordinatewiseLSTM, dict[str, float]]:
    """The rule with the ``output_scale`` of the lowest validation loss.

    That is by what ``config`` validates by. Tried are powers of 1.1 times its own, from its neighbours on until the
    best has a worse one on both sides.

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

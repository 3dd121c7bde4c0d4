"""How the shipped rules are trained: one command trains them again, from any seed."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from l2l_fast.experiments.training import fit
from l2l_fast.meta import MetaTrainer, TrainConfig
from l2l_fast.meta.folder import CHECKPOINT
from l2l_fast.problems import PROBLEMS, Problem
from l2l_fast.rule import CoordinatewiseLSTM
from l2l_fast.spec import Identity, LogAndSign, Preprocess

RULE = "rule.safetensors"
REFINED = "refined"  # the folder of the second training


@dataclass(frozen=True)
class Recipe:
    """All it takes to train a shipped rule.

    Attributes:
        name: of the rule.
        problem: what it is trained on.
        preprocess: of the rule.
        config: settings of the training but the seed.
        limits: what is known not to work, for the card.
        refinement: settings of a second training, from where the first ended; ``None`` for none.
    """

    name: str
    problem: Problem
    preprocess: Preprocess
    config: TrainConfig
    limits: str
    refinement: TrainConfig | None = None


# Segments of 20 steps and first derivatives, as in the paper.
_NETWORKS = TrainConfig(updates=5000, batch_size=1, validate_every=200, validation_functions=16)

# Whole runs with second derivatives. Logarithms make what the last steps gain count as much as what the first ones do,
# and where segments were cut the rule now sees what its steps lead to.
_WHOLE_RUNS = TrainConfig(
    updates=800,
    truncation=100,
    batch_size=1,
    objective="log",
    loss_power=1.0,
    second_derivatives=True,
    slope_floor=0.1,
    mirrored=0.0,
    lr=2e-3,
    warmup=10,
    average=0.95,
    validate_every=50,
    validation_functions=16,
)

_RECIPES = (
    Recipe(
        "quadratic",
        PROBLEMS["quadratic"](),
        Identity(),
        TrainConfig(
            updates=12000,
            second_derivatives=True,
            mirrored=0.0,
            hold=0.0,
            clip=1.0,
            clip_ratio=None,
            average=None,
        ),
        "Trained for 100 steps and for functions of this scale and dimension. On 2048 functions of dimension 20 the "
        "mean loss at step 100 was 0.29, and from 100 to 1000 steps it still fell on dimensions 5, 10 and 20; nothing "
        "else was tried. Not meant for neural networks.",
    ),
    Recipe(
        "mnist",
        PROBLEMS["mnist"](),
        LogAndSign(15.0),
        _NETWORKS,
        "Trained for 100 steps on 784-20-10, sigmoid, on MNIST. Behind tuned baselines on ReLU; see docs/results.md "
        "for other networks and longer runs.",
        _WHOLE_RUNS,
    ),
    Recipe(
        "digits",
        PROBLEMS["digits"](held_out=0.5),
        LogAndSign(15.0),
        _NETWORKS,
        "Trained for 100 steps on 64-20-10, sigmoid, on 8 x 8 images, for a low loss on images that were held out. See "
        "docs/results.md.",
        _WHOLE_RUNS,
    ),
)


def recipe_for(rule: str) -> Recipe:
    """The recipe of a shipped rule.

    Raises:
        ValueError: if there is no recipe of that name.
    """
    recipes = {recipe.name: recipe for recipe in _RECIPES}
    if rule not in recipes:
        raise ValueError(f"there is no recipe for {rule!r}, only for {', '.join(map(repr, recipes))}")
    return recipes[rule]


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
    best = _trained(_fresh(recipe, seed), recipe.problem, replace(recipe.config, seed=seed), folder, recipe.name)
    if recipe.refinement is not None:
        begun, refinement = best.card, replace(recipe.refinement, seed=seed)
        best = _trained(best, recipe.problem, refinement, folder / REFINED, f"{recipe.name}, refined")
        best.card = {**best.card, "begun_from": begun}
    best.card = {
        "name": recipe.name,
        "command": shlex.join(["l2l-fast", "reproduce", recipe.name, "--seed", str(seed)]),
        **best.card,
        "limits": recipe.limits,
    }
    best.save(folder / RULE)
    return best


def _trained(
    rule: CoordinatewiseLSTM, problem: Problem, config: TrainConfig, folder: Path, description: str
) -> CoordinatewiseLSTM:
    """The best rule of a training in ``folder``, which carries on if there is one."""
    trainer = MetaTrainer(rule, problem, config, folder=folder)
    best = fit(trainer, description=description, resume=(folder / CHECKPOINT).exists()).best_rule
    assert isinstance(best, CoordinatewiseLSTM)
    return best


def _fresh(recipe: Recipe, seed: int) -> CoordinatewiseLSTM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CoordinatewiseLSTM(preprocess=recipe.preprocess)

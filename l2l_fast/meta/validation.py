"""What a rule is worth on instances that are always the same ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from l2l_fast.meta.config import TrainConfig
from l2l_fast.meta.layout import Layout
from l2l_fast.meta.unroll import unroll
from l2l_fast.problems import Evaluates, Problem

FUNCTIONS = 1024
COORDINATES = 2**18  # so that validating takes a fraction of the time of the hundred updates before it
LEAST_FUNCTIONS = 4

# Of an update. Many updates from few instances train better than few from many.
BATCH = 16
BATCH_COORDINATES = 4096


def affordable_functions(
    rule: nn.Module, problem: Problem, device: torch.device, *, most: int, coordinates: int, least: int
) -> int:
    """How many instances have at most so many ``coordinates`` in all; between ``least`` and ``most``."""
    generator = torch.Generator().manual_seed(0)
    instance = problem.sample(1, generator=generator, device=device)
    each = Layout(instance.init(generator=generator), rule).n
    return max(least, min(most, coordinates // each))


def validation_functions(rule: nn.Module, problem: Problem, device: torch.device) -> int:
    """How many instances to validate on: 1024, or as many as have 262 144 coordinates, but at least 4."""
    return affordable_functions(rule, problem, device, most=FUNCTIONS, coordinates=COORDINATES, least=LEAST_FUNCTIONS)


def batch_size(rule: nn.Module, problem: Problem, device: torch.device) -> int:
    """How many instances to train on at once: 16, or as many as have 4096 coordinates, but at least 1."""
    return affordable_functions(rule, problem, device, most=BATCH, coordinates=BATCH_COORDINATES, least=1)


@dataclass(frozen=True)
class Validation:
    """What a rule was worth.

    Attributes:
        loss: mean over the instances, at the end of the run or over all of it; infinite if it is not finite.
        losses: ``[T + 1, batch]``, of the runs.
    """

    loss: float
    losses: Tensor


@torch.no_grad()
def validate(rule: nn.Module, problem: Problem, config: TrainConfig, device: torch.device) -> Validation:
    """Run ``rule`` on the validation instances.

    The loss at the end is free of minibatch noise where instances allow it.

    Raises:
        ValueError: if a loss is not finite before the first step, or not positive where its logarithm is the objective:
            that is no fault of the rule.
    """
    assert config.validation_functions is not None
    generator = torch.Generator().manual_seed(config.validation_seed)
    instances = problem.sample(config.validation_functions, generator=generator, device=device)
    run = unroll(rule, instances, config.horizon, generator=generator, backend=config.backend)
    first = run.losses[0]
    if not first.isfinite().all():
        bad = first[~first.isfinite()]
        raise ValueError(
            f"the problem has losses that are not finite at the starting points, before the rule has taken a step: "
            f"{len(bad)} of {len(first)} instances, the first of them {bad[0].item()}; look at init and loss of its "
            "instances"
        )
    if config.objective == "log" and first.min() <= 0:
        raise ValueError(
            f"objective='log' needs positive losses, but the problem has {first.min().item():g} at a starting point; "
            "use objective='loss'"
        )
    losses = run.losses.mean(0) if config.validate_by == "run" else run.losses[-1]
    if config.validate_by == "end" and isinstance(instances, Evaluates):
        losses = instances.evaluate(run.params)
        if losses.shape != first.shape:
            raise ValueError(
                f"instances.evaluate must return one loss per instance, shape {tuple(first.shape)}, "
                f"got {tuple(losses.shape)}"
            )
    mean = losses.double().mean().item()
    return Validation(mean if math.isfinite(mean) else math.inf, run.losses)

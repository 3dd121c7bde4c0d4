"""How many functions an evaluation takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from l2l_fast.problems import Evaluates, Problem

FUNCTIONS = 2048
TUNING_FUNCTIONS = 1024


@dataclass(frozen=True)
class Effort:
    """How many functions are worth their time.

    Attributes:
        functions: to compare on.
        tuning: to tune a learning rate on.
        screening: of the first pass of tuning, see :func:`l2l_fast.baselines.tune`.
    """

    functions: int
    tuning: int
    screening: int | None


# Small functions without data: thousands take no longer than one.
_TOY = Effort(FUNCTIONS, TUNING_FUNCTIONS, None)
_TOY_COORDINATES = 500
_NETWORK = Effort(32, 16, 4)
# Of larger ones only a few fit in memory at once: a learned rule keeps 320 bytes for each coordinate.
_LARGE = Effort(8, 4, 2)
_LARGE_COORDINATES = 100_000


def effort_for(problem: Problem) -> Effort:
    """What suits the functions of ``problem``, by their number of coordinates and by whether they have data."""
    generator = torch.Generator().manual_seed(0)
    instances = problem.sample(1, generator=generator, device=generator.device)
    coordinates = sum(tensor.numel() for tensor in instances.init(generator=generator).values())
    if coordinates <= _TOY_COORDINATES and not isinstance(instances, Evaluates):
        return _TOY
    return _NETWORK if coordinates <= _LARGE_COORDINATES else _LARGE

"""What storing the state in fewer bits does to the loss that shipped rules reach on what they were trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from l2l_fast.experiments.precision import STORAGE
from l2l_fast.experiments.progress import progress
from l2l_fast.optim import LearnedOptimizer
from l2l_fast.problems import PROBLEMS
from l2l_fast.rule import load_rule

STEPS = 100
LAST = 5  # losses at the end that are averaged, as they are of minibatches
RUNS = {"quadratic": 512, "digits": 16}  # by the rule, whose problem has its name


@dataclass(frozen=True)
class StateLoss:
    """Loss at the end of the runs of one rule, with the state stored in one form.

    Attributes:
        loss: mean over the runs.
        error: its standard error, in which all forms share their luck: functions and minibatches are the same.
        difference: mean difference to a float32 state.
        difference_error: its standard error.
    """

    rule: str
    form: str
    loss: float
    error: float
    difference: float
    difference_error: float


def measure(*, runs: dict[str, int] | None = None, steps: int = STEPS, seed: int = 0) -> list[StateLoss]:
    """The losses of every rule in ``runs``, so many at a time, under every storage dtype."""
    runs = RUNS if runs is None else runs
    found = []
    with progress("training with rounded states", len(runs) * len(STORAGE)) as advance:
        for rule, count in runs.items():
            exact = None
            for form, dtype in STORAGE.items():
                losses = _losses(rule, dtype, count, steps, seed)
                exact = losses if exact is None else exact
                difference = losses - exact
                found.append(StateLoss(rule, form, *_mean(losses), *_mean(difference)))
                advance()
    return found


def _mean(numbers: Tensor) -> tuple[float, float]:
    return float(numbers.mean()), float(numbers.std() / len(numbers) ** 0.5)


def _losses(rule: str, state_dtype: torch.dtype, runs: int, steps: int, seed: int) -> Tensor:
    """Mean of the last losses of each run ``[runs]``."""
    generator = torch.Generator().manual_seed(seed)
    instances = PROBLEMS[rule]().sample(runs, generator=generator, device=torch.device("cpu"))
    params = {name: nn.Parameter(start) for name, start in instances.init(generator=generator).items()}
    optimizer = LearnedOptimizer(params.values(), rule=load_rule(rule), state_dtype=state_dtype)
    last = []
    for step in range(steps):
        losses = instances.loss(dict(params), generator=generator)
        optimizer.zero_grad()
        torch.autograd.backward(losses.sum())
        optimizer.step()
        if step >= steps - LAST:
            last.append(losses.detach())
    return torch.stack(last).mean(0)

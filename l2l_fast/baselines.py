"""Optimizers of ``torch.optim``, tuned so that a learned rule has something to beat.

All of them work elementwise, so one optimizer over batched parameters runs on every instance of a
problem at once and independently. Learning rates lie on a grid of eight points per decade.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from l2l_fast.problems import Instances, Problem

Factory = Callable[[list[Tensor], float], torch.optim.Optimizer]

# Settings other than the learning rate are torch's defaults; the momentum of NAG is the usual 0.9.
BASELINES: dict[str, Factory] = {
    "sgd": lambda params, lr: torch.optim.SGD(params, lr=lr),
    "nag": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True),
    "rmsprop": lambda params, lr: torch.optim.RMSprop(params, lr=lr),
    "adam": lambda params, lr: torch.optim.Adam(params, lr=lr),
}

POINTS_PER_DECADE = 8
GRID_DECADES = (-4, 2)  # where tuning starts to look
GRID_POINTS = (GRID_DECADES[1] - GRID_DECADES[0]) * POINTS_PER_DECADE + 1
LIMIT_DECADES = (-10, 8)  # where it stops to look further

# A tuned learning rate counts as diverging on other functions if their mean final loss exceeds that in tuning by
# this factor.
DIVERGED = 10.0


@dataclass(frozen=True)
class Tuned:
    """A baseline with its learning rate.

    Attributes:
        optimizer: name in :data:`BASELINES`.
        point: the learning rate is ``10 ** (point / 8)``.
        loss: mean final loss over the tuning functions, at the learning rate found in tuning.
        stepped_down: by how many grid points :func:`settle` lowered the learning rate afterwards.
    """

    optimizer: str
    point: int
    loss: float
    stepped_down: int = 0

    @property
    def lr(self) -> float:
        """The learning rate."""
        return _learning_rate(self.point)


def _learning_rate(point: int) -> float:
    return math.pow(10.0, point / POINTS_PER_DECADE)


def minimize(instances: Instances, optimizer: str, lr: float, steps: int, *, generator: torch.Generator) -> Tensor:
    """Losses ``[steps + 1, batch]`` of a baseline on every instance of a batch.

    A run that leaves the finite numbers ends there; its remaining losses are infinite.

    Args:
        optimizer: name in :data:`BASELINES`.
        generator: where the initial parameters and minibatches come from. It is copied, not
            advanced, so that runs with one generator share their starts and minibatches.

    Raises:
        ValueError: if there is no baseline of that name.
    """
    if optimizer not in BASELINES:
        raise ValueError(f"unknown baseline {optimizer!r}; known baselines: {', '.join(map(repr, BASELINES))}")
    generator = generator.clone_state()
    params = {name: param.requires_grad_() for name, param in instances.init(generator=generator).items()}
    tensors = list(params.values())
    chosen = BASELINES[optimizer](tensors, lr)
    losses: list[Tensor] = []
    for _ in range(steps):
        loss = instances.loss(params, generator=generator)
        losses.append(loss.detach())
        if not loss.isfinite().all():
            break
        for param, grad in zip(tensors, torch.autograd.grad(loss.sum(), tensors), strict=True):
            param.grad = grad
        chosen.step()
    else:
        with torch.no_grad():
            losses.append(instances.loss(params, generator=generator))
    curve = torch.full((steps + 1, losses[0].shape[0]), math.inf, dtype=losses[0].dtype, device=losses[0].device)
    curve[: len(losses)] = torch.stack(losses)
    return curve


def _mean_final(losses: Tensor) -> float:
    """Mean of the last losses; infinite unless all of them are finite."""
    final = float(losses[-1].double().mean())
    return final if math.isfinite(final) else math.inf


def tune(
    problem: Problem,
    optimizer: str,
    *,
    steps: int = 100,
    functions: int = 512,
    generator: torch.Generator,
    on_run: Callable[[], None] | None = None,
) -> Tuned:
    """The learning rate with the lowest mean loss after ``steps`` steps.

    The grid is widened by a decade at a time until its best point has neighbours on both sides.

    Args:
        functions: how many instances to draw and average over.
        generator: draws them; advanced.
        on_run: called after each learning rate tried.

    Raises:
        ValueError: if there is no baseline of that name.
        RuntimeError: if every learning rate diverges, or the best one is still at the edge of the widest grid.
    """
    instances = problem.sample(functions, generator=generator, device=generator.device)
    losses: dict[int, float] = {}

    def try_point(point: int) -> None:
        if point not in losses:
            curve = minimize(instances, optimizer, _learning_rate(point), steps, generator=generator)
            losses[point] = _mean_final(curve)
            if on_run is not None:
                on_run()

    low, high = (decade * POINTS_PER_DECADE for decade in GRID_DECADES)
    lowest, highest = (decade * POINTS_PER_DECADE for decade in LIMIT_DECADES)
    while True:
        for point in range(low, high + 1):
            try_point(point)
        # Of equals the lowest: where everything diverges, the grid is widened downwards.
        best = min(sorted(losses), key=lambda point: losses[point])
        if low < best < high:
            break
        low, high = (low - POINTS_PER_DECADE, high) if best == low else (low, high + POINTS_PER_DECADE)
        if low < lowest or high > highest:
            raise RuntimeError(
                f"{optimizer} can't be tuned: the best mean loss after {steps} steps, {losses[best]:g}, lies at the "
                f"edge of the learning rates from {_learning_rate(min(losses)):g} to {_learning_rate(max(losses)):g}"
            )
    return Tuned(optimizer, best, losses[best])


def settle(tuned: Tuned, instances: Instances, steps: int, *, generator: torch.Generator) -> tuple[Tuned, Tensor]:
    """Run a tuned baseline on other functions than it was tuned on, at a learning rate that does not diverge there.

    A learning rate can be best on one sample of functions and diverge on a single function of the
    next: one that ends above both its own start and the mean start. It is then lowered along the grid
    until it does not, which favours the baseline.

    Args:
        generator: as for :func:`minimize`.

    Returns:
        The baseline, with ``stepped_down`` set, and its losses ``[steps + 1, batch]``.

    Raises:
        RuntimeError: if it still diverges two decades further down.
    """
    for down in range(2 * POINTS_PER_DECADE + 1):
        candidate = replace(tuned, point=tuned.point - down, stepped_down=down)
        losses = minimize(instances, tuned.optimizer, candidate.lr, steps, generator=generator)
        above_start = losses[-1] > losses[0].clamp(min=float(losses[0].mean()))
        if not above_start.any() and _mean_final(losses) <= tuned.loss + (DIVERGED - 1) * abs(tuned.loss):
            return candidate, losses
    raise RuntimeError(
        f"{tuned.optimizer}, tuned to a learning rate of {tuned.lr:g} and a mean loss of {tuned.loss:g}, diverges on "
        f"the evaluation functions, and so it does down to a learning rate of {candidate.lr:g}"
    )

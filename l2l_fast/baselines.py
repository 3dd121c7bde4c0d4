"""Optimizers of ``torch.optim``, tuned so that a learned rule has something to beat.

All of them work elementwise, so one optimizer over batched parameters runs on every instance of a
problem at once and independently. Learning rates lie on a grid of eight points per decade.

A run is judged by its last point: by the loss there on data that are the same for every run, where the instances
have such (:class:`~l2l_fast.problems.Evaluates`), because that of one minibatch is mostly noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from l2l_fast.problems import Evaluates, Instances, Problem

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

# Tuning in two passes looks at every half decade first, then at all points less than a decade away from the best:
# deep networks can have two minima along the learning rate, half a decade apart and hardly different.
COARSE_STRIDE = POINTS_PER_DECADE // 2
FINE_REACH = POINTS_PER_DECADE - 1
COARSE_TO_FINE_POINTS = (GRID_POINTS - 1) // COARSE_STRIDE + 1 + 2 * FINE_REACH + 1

# A tuned learning rate counts as diverging on other functions if their mean final loss exceeds that in tuning by
# this factor,
DIVERGED = 10.0
# or if a single one ends above its start by this share of it; less than that may be the noise of minibatches.
ABOVE_START = 0.1


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


@dataclass(frozen=True)
class Descent:
    """What :func:`minimize` returns.

    Attributes:
        losses: ``[steps + 1, batch]``.
        params: the last point, shaped as the first; detached.
    """

    losses: Tensor
    params: dict[str, Tensor]


def minimize(instances: Instances, optimizer: str, lr: float, steps: int, *, generator: torch.Generator) -> Descent:
    """:func:`descend` with a baseline.

    Args:
        optimizer: name in :data:`BASELINES`.

    Raises:
        ValueError: if there is no baseline of that name.
    """
    if optimizer not in BASELINES:
        raise ValueError(f"unknown baseline {optimizer!r}; known baselines: {', '.join(map(repr, BASELINES))}")
    return descend(instances, lambda params: BASELINES[optimizer](params, lr), steps, generator=generator)


def descend(
    instances: Instances,
    make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    steps: int,
    *,
    generator: torch.Generator,
    on_step: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> Descent:
    """Run an optimizer on every instance of a batch.

    A run that leaves the finite numbers ends there; its remaining losses are infinite.

    Args:
        make_optimizer: makes one for these parameters; it must work elementwise.
        generator: where the initial parameters and minibatches come from. It is copied, not
            advanced, so that runs with one generator share their starts and minibatches.
        on_step: called after every step with how many there were and the parameters.
    """
    generator = generator.clone_state()
    params = {name: param.requires_grad_() for name, param in instances.init(generator=generator).items()}
    tensors = list(params.values())
    chosen = make_optimizer(tensors)
    losses: list[Tensor] = []
    for step in range(1, steps + 1):
        loss = instances.loss(params, generator=generator)
        losses.append(loss.detach())
        if not loss.isfinite().all():
            break
        for param, grad in zip(tensors, torch.autograd.grad(loss.sum(), tensors, materialize_grads=True), strict=True):
            param.grad = grad
        chosen.step()
        if on_step is not None:
            on_step(step, params)
    else:
        with torch.no_grad():
            losses.append(instances.loss(params, generator=generator))
    curve = torch.full((steps + 1, losses[0].shape[0]), math.inf, dtype=losses[0].dtype, device=losses[0].device)
    curve[: len(losses)] = torch.stack(losses)
    return Descent(curve, {name: param.detach() for name, param in params.items()})


def final_losses(instances: Instances, losses: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    """What a run is judged by, ``[batch]``; infinite where its last loss is not finite.

    Args:
        losses: ``[steps + 1, batch]`` of the run.
        params: its last point.
    """
    judged = instances.evaluate(params) if isinstance(instances, Evaluates) else losses[-1]
    return judged.masked_fill(~losses[-1].isfinite(), math.inf)


def _mean(finals: Tensor) -> float:
    """Mean over functions; infinite unless all of them are finite."""
    mean = float(finals.double().mean())
    return mean if math.isfinite(mean) else math.inf


def tune(
    problem: Problem,
    optimizer: str,
    *,
    steps: int = 100,
    functions: int = 512,
    screening: int | None = None,
    generator: torch.Generator,
    on_run: Callable[[], None] | None = None,
) -> Tuned:
    """The learning rate with the lowest mean final loss after ``steps`` steps.

    The grid is widened until its best point has neighbours on both sides. All learning rates are tried from the same
    starts and on the same minibatches.

    Args:
        functions: how many instances to draw and average over.
        screening: where functions are costly, first find the best of every half decade on so many functions, then try
            only the points less than a decade away from it with all. ``None`` tries every point with all.
        generator: draws them; advanced.
        on_run: called after each learning rate tried.

    Raises:
        ValueError: if there is no baseline of that name.
        RuntimeError: if every learning rate diverges, or the best one is still at the edge of the widest grid.
    """

    def search(count: int, low: int, high: int, stride: int, widening: int) -> tuple[int, float]:
        instances = problem.sample(count, generator=generator, device=generator.device)

        def loss_at(point: int) -> float:
            run = minimize(instances, optimizer, _learning_rate(point), steps, generator=generator)
            loss = _mean(final_losses(instances, run.losses, run.params))
            if on_run is not None:
                on_run()
            return loss

        try:
            return _lowest(loss_at, low, high, stride, widening)
        except _AtEdgeError as error:
            raise RuntimeError(
                f"{optimizer} can't be tuned: the best mean loss after {steps} steps, {error.loss:g}, lies at the "
                f"edge of the learning rates from {_learning_rate(error.low):g} to {_learning_rate(error.high):g}"
            ) from None

    low, high = (decade * POINTS_PER_DECADE for decade in GRID_DECADES)
    if screening is None:
        return Tuned(optimizer, *search(functions, low, high, 1, POINTS_PER_DECADE))
    coarse, _ = search(screening, low, high, COARSE_STRIDE, POINTS_PER_DECADE)
    return Tuned(optimizer, *search(functions, coarse - FINE_REACH, coarse + FINE_REACH, 1, COARSE_STRIDE))


class _AtEdgeError(Exception):
    """The lowest loss lies at the edge of the widest grid, from ``low`` to ``high``."""

    def __init__(self, loss: float, low: int, high: int) -> None:
        super().__init__(loss, low, high)
        self.loss, self.low, self.high = loss, low, high


def _lowest(loss_at: Callable[[int], float], low: int, high: int, stride: int, widening: int) -> tuple[int, float]:
    """Point and value of the lowest loss on a grid that is widened until it lies inside.

    Raises:
        _AtEdgeError: if the grid would have to go beyond its limits.
    """
    lowest, highest = (decade * POINTS_PER_DECADE for decade in LIMIT_DECADES)
    losses: dict[int, float] = {}
    while True:
        for point in range(low, high + 1, stride):
            if point not in losses:
                losses[point] = loss_at(point)
        # Of equals the lowest point: where everything diverges, the grid is widened downwards.
        best = min(sorted(losses), key=lambda point: losses[point])
        if low < best < high:
            return best, losses[best]
        low, high = (low - widening, high) if best == low else (low, high + widening)
        if low < lowest or high > highest:
            raise _AtEdgeError(losses[best], min(losses), max(losses))


def settle(tuned: Tuned, instances: Instances, steps: int, *, generator: torch.Generator) -> tuple[Tuned, Descent]:
    """Run a tuned baseline on other functions than it was tuned on, at a learning rate that does not diverge there.

    A learning rate can be best on one sample of functions and diverge on a single function of the
    next: one that ends well above both its own start and the mean start. It is then lowered along the grid
    until it does not, which favours the baseline.

    Args:
        generator: as for :func:`minimize`.

    Returns:
        The baseline, with ``stepped_down`` set, and its run.

    Raises:
        RuntimeError: if it still diverges two decades further down.
    """
    for down in range(2 * POINTS_PER_DECADE + 1):
        candidate = replace(tuned, point=tuned.point - down, stepped_down=tuned.stepped_down + down)
        run = minimize(instances, tuned.optimizer, candidate.lr, steps, generator=generator)
        start = run.losses[0].clamp(min=float(run.losses[0].mean()))
        above_start = run.losses[-1] > start + ABOVE_START * start.abs()
        mean = _mean(final_losses(instances, run.losses, run.params))
        if not above_start.any() and mean <= tuned.loss + (DIVERGED - 1) * abs(tuned.loss):
            return candidate, run
    raise RuntimeError(
        f"{tuned.optimizer}, tuned to a learning rate of {tuned.lr:g} and a mean loss of {tuned.loss:g}, diverges on "
        f"the evaluation functions, and so it does down to a learning rate of {candidate.lr:g}"
    )

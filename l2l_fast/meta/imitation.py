"""Training a rule to take the steps of a teacher, any optimizer of ``torch.optim``: a warm start for meta-training.

Backpropagation through a run only sees what the rule does already; a teacher shows it in minutes what is known. The
gradient of this loss is exact, as a step that the rule takes changes neither the gradients that it is shown nor those
that the teacher answers to.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from l2l_fast import autograd
from l2l_fast.meta.config import TrainConfig
from l2l_fast.meta.fused import FusedUnroll
from l2l_fast.meta.layout import Layout
from l2l_fast.meta.unroll import Unroll
from l2l_fast.problems import Instances
from l2l_fast.rule import CoordinatewiseLSTM


class Teacher(Protocol):
    """What makes the optimizer to imitate, such as ``functools.partial(torch.optim.Adam, lr=0.03)``."""

    def __call__(self, params: list[Tensor], /) -> torch.optim.Optimizer:
        """A fresh optimizer of ``params``.

        Its steps must depend on gradients alone, so it can't decay weights: the values of ``params`` are 0.
        """


def check_teaching(rule: nn.Module, config: TrainConfig) -> None:
    """Make sure that training with a teacher has a meaning.

    Raises:
        TypeError: if the rule is not one that can learn from a teacher.
        ValueError: if a setting has no meaning with a teacher.
    """
    if not isinstance(rule, CoordinatewiseLSTM):
        raise TypeError(f"only a CoordinatewiseLSTM can learn from a teacher, got {type(rule).__name__}")
    if config.truncation != config.horizon:
        raise ValueError(
            f"a teacher is imitated over whole runs; set truncation, which is {config.truncation}, to the horizon of "
            f"{config.horizon}"
        )
    if config.cuda_graph:
        raise ValueError(
            "a CUDA graph can't hold the steps of a teacher, which may be any optimizer; leave cuda_graph out"
        )
    plain = TrainConfig()
    for name in ("objective", "loss_power", "loss_weights", "second_derivatives"):
        if getattr(config, name) != getattr(plain, name):
            raise ValueError(f"{name} has no meaning with a teacher, whose steps are all that counts; leave it out")


def imitate(
    rule: CoordinatewiseLSTM,
    instances: Instances,
    teacher: Teacher,
    steps: int = 100,
    *,
    rule_drives: bool = False,
    coordinate_fraction: float = 1.0,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Unroll:
    """Run ``teacher``, or the rule itself, and compare the steps of the rule with those of the teacher.

    Both are shown the same gradients, those of the run, from its start.

    Args:
        rule_drives: whose steps the run takes; those of the rule show it what comes of its errors.
        coordinate_fraction: share of the coordinates that are compared, chosen at random: of each tensor in proportion
            to the square root of its size, but at least one and at most all.
        generator: source of starting points, minibatches and the coordinates compared.
        backend: name of a backend, or ``None`` for the fastest that works.

    Returns:
        ``loss`` is the error of the rule's updates: their squared distance to the teacher's, relative to the mean
        square of the teacher's in the same tensor and step, averaged over steps and over tensors, which count as the
        square roots of their sizes. Differentiable by the rule's weights. The rest is the run's, but ``state`` is that
        of the coordinates compared.

    Raises:
        TypeError, ValueError: if an argument has the wrong kind, shape, dtype or device.
        RuntimeError: if the named backend can't run this, or in inference mode.

    Source: Chen et al. 2020, "Training stronger baselines for learning to optimize" (imitation of optimizers); Ross et
    al. 2011 (learning on the learner's own runs).
    """
    if not isinstance(rule, CoordinatewiseLSTM):
        raise TypeError(f"only a CoordinatewiseLSTM can imitate, got {type(rule).__name__}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive int, got {steps!r}")
    if not 0 < coordinate_fraction <= 1:
        raise ValueError(f"coordinate_fraction must be above 0 and at most 1, got {coordinate_fraction!r}")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("imitate takes gradients of the instances; leave inference mode")
    params = instances.init(generator=generator)
    layout = Layout(params, rule)
    start = torch.cat([tensor.reshape(-1) for tensor in params.values()])
    fused = FusedUnroll(rule, instances, layout, start, None, generator, backend)
    lessons = _Lessons(teacher, layout)
    grads, taught = start.new_empty(steps + 1, layout.n), start.new_empty(steps, layout.n)
    driver = _Driver(fused, layout.n, layout.dtype, layout.device) if rule_drives else None

    def step(t: int, theta: Tensor, grad: Tensor) -> None:
        update = lessons.give(grad, out=taught[t])
        if driver is None:
            theta.add_(update)
        else:
            driver.step(theta, grad)

    run = fused.roll(steps, grads, lambda t, theta, packed: None, step)
    index, counts = _choose(layout, coordinate_fraction, generator)
    factor = _factors(layout, taught, counts)
    grads, taught = grads[:, index], taught[:, index]
    updates, student = torch.zeros_like(taught), _Driver(fused, len(index), layout.dtype, layout.device)
    for update, grad in zip(updates, grads, strict=False):
        student.step(update, grad)
    error = updates.sub_(taught)
    loss = torch.sum(factor * error * error)
    # The derivative by an update is that by all later points: their differences, then, stand for the points'.
    slopes = (2 * factor).mul_(error)
    d_points = torch.zeros_like(grads)
    d_points[1:] = slopes
    d_points[1:-1] -= slopes[1:]
    ones = torch.ones(steps + 1, dtype=layout.dtype)
    loss = autograd.unroll_loss(rule.spec, loss, fused.weights, start, None, grads, d_points, ones, fused.backend.name)
    state = fused.backend.unpack_state(student.packed, len(index), rule.spec)
    return Unroll(loss, run.losses, layout.views(run.theta), state)


class _Driver:
    """The rule on ``n`` coordinates, from a fresh state."""

    def __init__(self, fused: FusedUnroll, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self._backend, self._spec = fused.backend, fused.spec
        self._prepared = self._backend.prepare(self._spec, fused.weights.detach())
        self.packed = self._backend.init_state(n, self._spec, dtype, device)

    def step(self, theta: Tensor, grad: Tensor) -> None:
        """Add the rule's update for ``grad [n]`` to ``theta [n]``."""
        self._backend.step_(self._spec, self._prepared, [theta], [grad], [self.packed])


class _Lessons:
    """The teacher's answers to one gradient after the other."""

    def __init__(self, teacher: Teacher, layout: Layout) -> None:
        self._layout = layout
        self._flat = torch.zeros(layout.n, dtype=layout.dtype, device=layout.device)
        self._params = [view.detach() for view in layout.views(self._flat).values()]
        if not callable(teacher):
            raise TypeError(
                f"a teacher makes an optimizer when it is called, got {teacher!r}; for example "
                "functools.partial(torch.optim.Adam, lr=0.03)"
            )
        self._optimizer = teacher(self._params)
        if not isinstance(self._optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"a teacher must return a torch.optim.Optimizer, got {type(self._optimizer).__name__}; for example "
                "functools.partial(torch.optim.Adam, lr=0.03)"
            )
        if any(group.get("weight_decay") for group in self._optimizer.param_groups):
            raise ValueError("a teacher can't decay weights, as it sees gradients alone; set its weight_decay to 0")

    @torch.no_grad()
    def give(self, grad: Tensor, out: Tensor) -> Tensor:
        """What the teacher adds to the parameters on seeing ``grad [N]``, in ``out [N]``."""
        self._flat.zero_()
        for param, view in zip(self._params, self._layout.views(grad).values(), strict=True):
            param.grad = view
        self._optimizer.step()
        return out.copy_(self._flat)


def _choose(layout: Layout, fraction: float, generator: torch.Generator | None) -> tuple[Tensor, list[int]]:
    """Coordinates ``[M]`` and how many of them lie in each tensor."""
    if fraction == 1:
        return torch.arange(layout.n, device=layout.device), layout.sizes
    source = "cpu" if generator is None else generator.device
    chosen, begin = [], 0
    for size, share in zip(layout.sizes, _shares(layout), strict=True):
        count = max(1, min(size, round(fraction * layout.n * share)))
        chosen.append(begin + torch.randperm(size, generator=generator, device=source)[:count])
        begin += size
    return torch.cat(chosen).to(layout.device), [len(index) for index in chosen]


def _shares(layout: Layout) -> list[float]:
    """What each tensor counts for."""
    roots = [math.sqrt(size) for size in layout.sizes]
    return [root / sum(roots) for root in roots]


def _factors(layout: Layout, taught: Tensor, counts: list[int]) -> Tensor:
    """``[T, M]``, of each squared error in the loss; 0 where the teacher leaves a whole tensor as it is.

    Where it leaves the finite numbers they are NaN, and with them the loss.
    """
    squares = torch.stack([block.square().mean(1) for block in torch.split(taught, layout.sizes, 1)], 1)
    repeats = torch.tensor(counts, device=taught.device)
    shares = taught.new_tensor(_shares(layout)) / repeats
    factors = torch.where(squares == 0, 0, torch.where(squares.isfinite(), squares.reciprocal(), math.nan))
    factors *= shares / len(taught)
    return factors.repeat_interleave(repeats, 1)

"""Meta-gradients with second derivatives on the fused one-step kernels.

The gradient that enters the rule at a point depends on the point, so the derivative by a point is that by the next one,
plus that of the point's own loss, plus the Hessian times the derivative by the gradient that the rule was fed. Walking
back through the steps asks the optimizee for one Hessian-vector product each, on the minibatch of that step, drawn
again. Kept are points, gradients and every k-th state of the rule, ``k`` about the root of the number of steps; no
activation of the LSTM and no graph of the optimizee outlives its step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from l2l_fast.backends import Backend
from l2l_fast.meta.layout import Layout
from l2l_fast.problems import Instances
from l2l_fast.spec import RuleSpec


class Recorder:
    """Keeps what the walk back needs of a run, while the run goes on.

    Args:
        start: ``[N]``, the first point.
        generator: where the minibatches come from.

    Attributes:
        interval: steps from one state that is kept to the next.
        points: ``[T, N]``, the points that a step was taken from.
        checkpoints: the packed states that are kept.
        generator_states: the generator's state before each step.
    """

    def __init__(self, steps: int, start: Tensor, generator: torch.Generator) -> None:
        self.interval = math.isqrt(steps - 1) + 1
        self.points = start.new_empty(steps, len(start))
        self.checkpoints: list[Tensor] = []
        self.generator = generator
        self.generator_states: list[Tensor] = []

    def record(self, t: int, theta: Tensor, packed: Tensor) -> None:
        """Note the point, the packed state and the generator before step ``t``."""
        self.points[t].copy_(theta)
        self.generator_states.append(self.generator.get_state())
        if t % self.interval == 0:
            self.checkpoints.append(packed.clone())


@dataclass(frozen=True)
class Optimizee:
    """The instances as they were at each step: the same minibatches again.

    Attributes:
        generator_states: before each step, of a generator on ``generator_device``.
    """

    instances: Instances
    layout: Layout
    generator_device: torch.device
    generator_states: list[Tensor]

    def hessian_product(self, t: int, point: Tensor, vector: Tensor) -> Tensor:
        """The Hessians of the losses of step ``t`` at ``point [N]``, times ``vector [N]``."""
        generator = torch.Generator(self.generator_device)
        generator.set_state(self.generator_states[t])
        params = {name: view.detach().requires_grad_() for name, view in self.layout.views(point).items()}
        leaves = tuple(params.values())
        with torch.enable_grad():
            loss = self.instances.loss(params, generator=generator)
            ones = torch.ones_like(loss)
            grads = torch.autograd.grad(loss, leaves, ones, create_graph=True, materialize_grads=True)
        curved = [(g, v) for g, v in zip(grads, self.layout.views(vector).values(), strict=True) if g.requires_grad]
        product = torch.zeros_like(vector)
        if curved:
            outputs, vectors = zip(*curved, strict=True)
            self.layout.gather(torch.autograd.grad(outputs, leaves, vectors, materialize_grads=True), out=product)
        return product


@dataclass(frozen=True)
class Walk:
    """How to walk back along a run.

    Attributes:
        interval: steps from one checkpoint to the next.
        loss_weights: weight of the term of each of the ``T + 1`` points in the meta-loss.
        slope_floor: gradients below this multiple of the root mean square of their tensor count as if they were at
            it in the slope of the preprocessing.
    """

    spec: RuleSpec
    backend: Backend
    optimizee: Optimizee
    interval: int
    loss_weights: list[float]
    slope_floor: float

    def back(
        self,
        weights: Tensor,
        points: Tensor,
        grads: Tensor,
        d_points: Tensor | None,
        checkpoints: list[Tensor],
        need_d_start: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Derivatives ``(d_weights [P], d_start [N], d_state [N, 2, 2, H])``, the first two in float64.

        Args:
            weights: ``[P]``.
            points: ``[T, N]``, the points that a step was taken from.
            grads: ``[T + 1, N]``, gradient of the loss at every point visited.
            d_points: ``[T + 1, N]``, derivative of each term of the meta-loss by its point; ``None`` for ``grads``.
            checkpoints: packed states before every ``interval``-th step.
            need_d_start: ``False`` saves the last Hessian-vector product; ``d_start`` then means nothing.
        """
        d_points = grads if d_points is None else d_points
        # Sums over steps are float64: they are long, and what is added up cancels.
        d_weights = torch.zeros_like(weights, dtype=torch.float64)
        d_point = torch.zeros_like(grads[0], dtype=torch.float64).add_(d_points[-1], alpha=self.loss_weights[-1])
        d_state = weights.new_zeros(grads.shape[1], 2, 2, self.spec.hidden_size)
        # Written again for every checkpoint: the system takes longer to hand out memory than a state takes to copy.
        states = weights.new_empty(self.interval, *d_state.shape)
        for block, checkpoint in reversed(list(enumerate(checkpoints))):
            first, end = block * self.interval, min((block + 1) * self.interval, len(points))
            self._recompute(weights, grads[first : end - 1], checkpoint, states)
            for t in reversed(range(first, end)):
                d_step, d_grad, d_state = self.backend.step_backward(
                    self.spec, weights, grads[t], states[t - first], d_point.to(weights.dtype), d_state
                )
                d_weights += d_step
                if t > 0 or need_d_start:
                    d_point.add_(d_points[t], alpha=self.loss_weights[t])
                    d_point += self.optimizee.hessian_product(t, points[t], self._bound_slope(grads[t], d_grad))
        return d_weights, d_point, d_state

    def _bound_slope(self, grad: Tensor, d_grad: Tensor) -> Tensor:
        """``d_grad [N]`` with the slope of ``log |g|``, which is ``1 / g``, bounded.

        Where a gradient passes through zero the exact slope is large without telling anything of the points nearby.
        Over many steps such slopes multiply, and the meta-gradient drowns in them.
        """
        if not self.slope_floor:
            return d_grad
        floor = self.slope_floor * self.optimizee.layout.root_mean_squares(grad)
        return d_grad * torch.where(floor > 0, grad.abs() / floor, 1.0).clamp(max=1)

    def _recompute(self, weights: Tensor, grads: Tensor, checkpoint: Tensor, states: Tensor) -> None:
        """Fill ``states [k + 1 or more, N, 2, 2, H]``: before, between and after steps with ``grads [k, N]``."""
        states[0].copy_(self.backend.unpack_state(checkpoint, grads.shape[1], self.spec))
        for t, grad in enumerate(grads):
            states[t + 1].copy_(self.backend.step(self.spec, weights, grad, states[t])[1])


class _SecondOrderLoss(torch.autograd.Function):
    """The meta-loss, whose backward walks back along a run."""

    @staticmethod
    def forward(
        ctx: Any,
        walk: Walk,
        loss: Tensor,
        weights: Tensor,
        start: Tensor,
        state: Tensor | None,
        points: Tensor,
        grads: Tensor,
        d_points: Tensor | None,
        *checkpoints: Tensor,
    ) -> Tensor:
        ctx.walk = walk
        # Saved and not merely held, so that the memory is free after the backward.
        ctx.save_for_backward(weights, points, grads, d_points, *checkpoints)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        weights, points, grads, d_points, *checkpoints = ctx.saved_tensors
        _, _, _, need_start, need_state, *others = ctx.needs_input_grad
        d_weights, d_start, d_state = ctx.walk.back(weights, points, grads, d_points, checkpoints, need_start)
        return (
            None,
            None,
            (d_loss * d_weights).to(weights.dtype),
            (d_loss * d_start).to(grads.dtype) if need_start else None,
            d_loss * d_state if need_state else None,
            *(None for _ in others),
        )


def second_order_loss(
    walk: Walk,
    loss: Tensor,
    weights: Tensor,
    start: Tensor,
    state: Tensor | None,
    points: Tensor,
    grads: Tensor,
    d_points: Tensor | None,
    checkpoints: list[Tensor],
) -> Tensor:
    """``loss`` (a scalar), made differentiable once by weights, first point and first state.

    Args:
        weights: ``[P]``.
        start: ``[N]``.
        state: ``[N, 2, 2, H]``, or ``None`` for zeros.
        points, grads, d_points, checkpoints: of the run, see :meth:`Walk.back`.
    """
    result: Tensor = _SecondOrderLoss.apply(  # type: ignore[no-untyped-call]
        walk, loss, weights, start, state, points, grads, d_points, *checkpoints
    )
    return result

"""Meta-gradients with second derivatives on the fused one-step kernels.

The gradient that enters the rule at a point depends on the point, so the derivative by a point is that by the next one,
plus that of the point's own loss, plus the Hessian times the derivative by the gradient that the rule was fed. Walking
back through the steps asks the optimizee for one Hessian-vector product each, on the minibatch of that step, drawn
again. Kept are points, gradients and every k-th state of the rule, ``k`` about the root of the number of steps; no
activation of the LSTM and no graph of the optimizee outlives its step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from l2l_fast.backends import Backend
from l2l_fast.meta.layout import Layout
from l2l_fast.problems import Instances
from l2l_fast.spec import RuleSpec


class Tape:
    """What a run leaves for the walk back.

    Args:
        generator: where the minibatches come from; its state before each step is kept.
        grads: ``[T + 1, N]``, filled during the run.

    Attributes:
        d_points: ``[T + 1, N]``, derivative of each term of the meta-loss by its point; ``None`` if it is ``grads``.
        loss_weights: ``[T + 1]`` in float64 on the CPU, weight of each term.
    """

    d_points: Tensor | None
    loss_weights: Tensor

    def __init__(
        self,
        spec: RuleSpec,
        backend: Backend,
        instances: Instances,
        layout: Layout,
        generator: torch.Generator,
        grads: Tensor,
    ) -> None:
        self.spec = spec
        self.backend = backend
        self.instances = instances
        self.layout = layout
        self.generator = generator
        self.grads = grads
        self.steps = len(grads) - 1
        self.interval = math.isqrt(self.steps - 1) + 1
        self.points = grads.new_empty(self.steps, layout.n)
        self.checkpoints: list[Tensor] = []
        self.generator_states: list[Tensor] = []

    def record(self, t: int, theta: Tensor, packed: Tensor) -> None:
        """Keep what is needed of the point before step ``t``."""
        self.points[t].copy_(theta)
        self.generator_states.append(self.generator.get_state())
        if t % self.interval == 0:
            self.checkpoints.append(packed.clone())

    def states(self, weights: Tensor, block: int) -> list[Tensor]:
        """The states ``[N, 2, 2, H]`` before each step from one checkpoint to the next, computed again."""
        states = [self.backend.unpack_state(self.checkpoints[block], self.layout.n, self.spec)]
        first = block * self.interval
        for t in range(first, min(first + self.interval, self.steps) - 1):
            states.append(self.backend.step(self.spec, weights, self.grads[t], states[-1])[1])
        return states

    def d_point(self, t: int) -> Tensor:
        """Derivative of the meta-loss by point ``t``, of its own term alone ``[N]``."""
        d_points = self.grads if self.d_points is None else self.d_points
        return self.loss_weights[t].item() * d_points[t]

    def hessian_product(self, t: int, vector: Tensor) -> Tensor:
        """The Hessians of the losses at point ``t``, on the minibatches of that step, times ``vector [N]``."""
        generator = torch.Generator(self.generator.device)
        generator.set_state(self.generator_states[t])
        params = {name: view.detach().requires_grad_() for name, view in self.layout.views(self.points[t]).items()}
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


class _SecondOrderLoss(torch.autograd.Function):
    """The meta-loss, whose backward walks back along a tape."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, weights: Tensor, start: Tensor, state: Tensor | None, tape: Tape) -> Tensor:
        ctx.save_for_backward(weights)
        ctx.tape = tape
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        (weights,) = ctx.saved_tensors
        tape: Tape = ctx.tape
        _, _, need_start, need_state, _ = ctx.needs_input_grad
        # Sums over steps are float64: they are long, and what is added up cancels.
        d_weights = torch.zeros_like(weights, dtype=torch.float64)
        d_point = tape.d_point(tape.steps).double()
        d_state = torch.zeros(tape.layout.n, 2, 2, tape.spec.hidden_size, dtype=weights.dtype, device=weights.device)
        for block in reversed(range(len(tape.checkpoints))):
            states = tape.states(weights, block)
            while states:
                t = block * tape.interval + len(states) - 1
                d_step, d_grad, d_state = tape.backend.step_backward(
                    tape.spec, weights, tape.grads[t], states.pop(), d_point.to(weights.dtype), d_state
                )
                d_weights += d_step
                if t > 0 or need_start:
                    d_point += tape.d_point(t)
                    d_point += tape.hessian_product(t, d_grad)
        return (
            None,
            (d_loss * d_weights).to(weights.dtype),
            (d_loss * d_point).to(tape.grads.dtype) if need_start else None,
            d_loss * d_state if need_state else None,
            None,
        )


def second_order_loss(tape: Tape, loss: Tensor, weights: Tensor, start: Tensor, state: Tensor | None) -> Tensor:
    """``loss`` (a scalar), made differentiable once by weights, first point and first state.

    Args:
        weights: ``[P]``.
        start: ``[N]``.
        state: ``[N, 2, 2, H]``, or ``None`` for zeros.
    """
    result: Tensor = _SecondOrderLoss.apply(loss, weights, start, state, tape)  # type: ignore[no-untyped-call]
    return result

"""Unrolls of a :class:`CoordinatewiseLSTM` on a fused backend: steps in place and without a tape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from l2l_fast import autograd
from l2l_fast.backends import Backend, resolve
from l2l_fast.meta.graph import StepGraph
from l2l_fast.meta.layout import Layout
from l2l_fast.meta.objective import MetaLoss
from l2l_fast.meta.point import Point
from l2l_fast.meta.sampling import sample_coordinates
from l2l_fast.meta.second_order import Optimizee, Recorder, Walk, second_order_loss
from l2l_fast.problems import HeldOut, Instances, Replayable
from l2l_fast.rule import CoordinatewiseLSTM


@dataclass(frozen=True)
class Rollout:
    """Where a run went: ``losses [T + 1, batch]``, the last point ``theta [N]`` and the packed state there."""

    losses: Tensor
    theta: Tensor
    packed: Tensor


class FusedUnroll:
    """The pieces that first- and second-order unrolls share.

    Args:
        start: ``[N]``, the first point.
        state: ``[N, 2, 2, H]`` before the first step, or ``None`` for zeros.
    """

    def __init__(
        self,
        rule: CoordinatewiseLSTM,
        instances: Instances,
        layout: Layout,
        start: Tensor,
        state: Tensor | None,
        generator: torch.Generator | None,
        backend: str | None,
    ) -> None:
        self.spec = rule.spec
        self.instances = instances
        self.layout = layout
        self.start = start
        self.state = state
        self.generator = generator
        self.weights = rule.flat_weights()
        self.backend: Backend = resolve(backend, layout.device, layout.dtype, rule.spec)

    @property
    def wanted(self) -> bool:
        """Whether there is anything to take a meta-gradient by."""
        inputs = (self.weights, self.start, self.state)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)

    def roll(
        self,
        steps: int,
        grads: Tensor | None,
        before_step: Callable[[int, Tensor, Tensor], None],
        step: Callable[[int, Tensor, Tensor], None] | None = None,
        outer: Callable[[int, Point], Tensor] | None = None,
    ) -> Rollout:
        """Take the steps.

        Args:
            grads: ``[steps + 1, N]``, filled with the gradient at every point; ``None`` keeps none, and takes none at
                the last point.
            before_step: called with the number of each step, the point and the packed state before it.
            step: called with the number of each step, the point and the gradient there, to move the point in place;
                ``None`` takes the rule's steps.
            outer: called with the number of each point and the point, for the losses ``[batch]`` that count there;
                ``None`` takes those whose gradients the rule is fed.
        """
        spec, layout, chosen = self.spec, self.layout, self.backend
        prepared = chosen.prepare(spec, self.weights.detach())
        theta, packed = self._first_place()
        rows = [theta.new_empty(layout.n)] * steps if grads is None else grads.unbind()
        point = Point(layout, theta)
        loss = partial(self.instances.loss, generator=self.generator)
        losses: list[Tensor] = []
        with torch.enable_grad():
            for t in range(steps):
                before_step(t, theta, packed)
                inner = point.evaluate(loss, out=rows[t])
                losses.append(inner if outer is None else outer(t, point))
                if step is None:
                    chosen.step_(spec, prepared, [theta], [rows[t]], [packed])
                else:
                    step(t, theta, rows[t])
            if outer is not None:
                losses.append(outer(steps, point))
            elif grads is not None:
                losses.append(point.evaluate(loss, out=rows[steps]))
            else:
                with torch.no_grad():
                    losses.append(loss(point.params))
        return Rollout(torch.stack(losses), theta, packed)

    def replay(self, steps: int, grads: Tensor, graph: StepGraph) -> Rollout:
        """The rule's steps as :meth:`roll` takes them, by ``graph``; ``grads [steps + 1, N]`` is filled."""
        assert isinstance(self.instances, Replayable)  # checked by unroll
        theta, packed = self._first_place()
        losses: list[Tensor] = []
        drawn = self.instances.draw(generator=self.generator)
        weights = self.weights.detach()
        graph.begin(self.backend, self.spec, weights, self.instances, self.layout, theta, packed, drawn)
        for t in range(steps):
            losses.append(graph.take(drawn, out=grads[t]))
            drawn = self.instances.draw(generator=self.generator)
        theta, packed = graph.place()
        losses.append(graph.take(drawn, out=grads[steps]))  # for its gradient: where it leads to is of no account
        return Rollout(torch.stack(losses), theta, packed)

    def _first_place(self) -> tuple[Tensor, Tensor]:
        """Copies of the first point and of the state there, packed."""
        spec, layout = self.spec, self.layout
        theta = self.start.detach().clone()
        if self.state is None:
            return theta, self.backend.init_state(layout.n, spec, layout.dtype, layout.device)
        return theta, self.backend.pack_state(self.state.detach(), layout.dtype)

    def _outer(self, rows: Tensor | None) -> Callable[[int, Point], Tensor] | None:
        """The losses on held-out data for :meth:`roll`, their gradients written to ``rows [T + 1, N]``."""
        if not isinstance(self.instances, HeldOut):
            return None
        loss = partial(self.instances.outer_loss, generator=self.generator)

        def value(t: int, point: Point) -> Tensor:
            with torch.no_grad():
                losses = loss(point.params)
                self.layout.check_losses(losses, "outer_loss")
                return losses

        def value_and_gradient(t: int, point: Point) -> Tensor:
            assert rows is not None
            return point.evaluate(loss, out=rows[t], of="outer_loss")

        return value if rows is None else value_and_gradient

    def forward_only(self, steps: int, meta_loss: MetaLoss) -> tuple[Tensor, Rollout]:
        """Meta-loss and run, where no meta-gradient is wanted."""
        run = self.roll(steps, None, lambda t, theta, packed: None, outer=self._outer(None))
        return meta_loss.value(run.losses), run

    def first_order(
        self, steps: int, meta_loss: MetaLoss, coordinate_fraction: float, graph: StepGraph | None = None
    ) -> tuple[Tensor, Rollout]:
        """Meta-loss and run, its steps taken by ``graph`` if there is one; the backward of all steps is one call."""
        grads = self.start.new_empty(steps + 1, self.layout.n)
        outer = torch.empty_like(grads) if isinstance(self.instances, HeldOut) else None
        if graph is None:
            run = self.roll(steps, grads, lambda t, theta, packed: None, outer=self._outer(outer))
        else:
            run = self.replay(steps, grads, graph)
        loss, state = meta_loss.value(run.losses), self.state
        d_points = self._d_points(grads, outer, run.losses, meta_loss)
        if coordinate_fraction < 1:
            every = grads if d_points is None else d_points
            index, factor = sample_coordinates(every, meta_loss.weights, coordinate_fraction, self.generator)
            grads, d_points = grads[:, index], every[:, index] * factor.to(every.dtype)
            state = None if state is None else state.detach()[index]
        weights = meta_loss.weights.to(self.layout.dtype) / self.layout.batch
        loss = autograd.unroll_loss(
            self.spec, loss, self.weights, self.start, state, grads, d_points, weights, self.backend.name
        )
        return loss, run

    def second_order(self, steps: int, meta_loss: MetaLoss, slope_floor: float) -> tuple[Tensor, Rollout]:
        """Meta-loss and run; the backward walks back step by step, and asks the instances for curvature."""
        layout, grads = self.layout, self.start.new_empty(steps + 1, self.layout.n)
        outer = torch.empty_like(grads) if isinstance(self.instances, HeldOut) else None
        if self.generator is None:
            # One whose states can be kept; the global one may be in use elsewhere when the minibatches are drawn again.
            seed = int(torch.randint(2**62, (), device="cpu"))
            self.generator = torch.Generator().manual_seed(seed)
        recorder = Recorder(steps, self.start, self.generator)
        run = self.roll(steps, grads, recorder.record, outer=self._outer(outer))
        optimizee = Optimizee(self.instances, layout, self.generator.device, recorder.generator_states)
        loss_weights = (meta_loss.weights / layout.batch).tolist()
        loss = second_order_loss(
            Walk(self.spec, self.backend, optimizee, recorder.interval, loss_weights, slope_floor),
            meta_loss.value(run.losses),
            self.weights,
            self.start,
            self.state,
            recorder.points,
            grads,
            self._d_points(grads, outer, run.losses, meta_loss),
            recorder.checkpoints,
        )
        return loss, run

    def _d_points(self, grads: Tensor, outer: Tensor | None, losses: Tensor, meta_loss: MetaLoss) -> Tensor | None:
        """``[T + 1, N]``, or ``None`` if they are the gradients ``grads`` that the rule was fed.

        Args:
            outer: gradients of the losses on held-out data, overwritten; ``None`` where there are none.
        """
        slopes = meta_loss.slopes(losses)
        if slopes is None:
            return outer
        d_points = torch.empty_like(grads) if outer is None else outer
        for d_point, grad, slope in zip(d_points, grads if outer is None else outer, slopes, strict=True):
            torch.mul(grad, self.layout.spread(slope), out=d_point)
        return d_points

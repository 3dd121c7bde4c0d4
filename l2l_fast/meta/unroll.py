"""A rule applied to a batch of problem instances for some steps, differentiable by the rule's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from l2l_fast.meta.fused import FusedUnroll
from l2l_fast.meta.graph import StepGraph, check_capturable
from l2l_fast.meta.layout import Layout
from l2l_fast.meta.objective import MetaLoss, Objective, as_meta_loss
from l2l_fast.problems import HeldOut, Instances
from l2l_fast.rule import CoordinatewiseLSTM
from l2l_fast.spec import LogAndSign


@dataclass(frozen=True)
class Unroll:
    """What :func:`unroll` returns. All but ``loss`` is detached, to carry on from.

    Attributes:
        loss: scalar, mean over instances of ``sum_t w_t f(theta_t)``; differentiable.
        losses: ``[steps + 1, batch]``, ``f(theta_t)`` of every instance.
        params: parameters after the last step, shaped as those it started from.
        state: state of the rule after the last step, ``[N, 2, 2, H]`` for a :class:`CoordinatewiseLSTM`.
    """

    loss: Tensor
    losses: Tensor
    params: dict[str, Tensor]
    state: Tensor


def unroll(
    rule: nn.Module,
    instances: Instances,
    steps: int = 20,
    *,
    params: Mapping[str, Tensor] | None = None,
    state: Tensor | None = None,
    generator: torch.Generator | None = None,
    loss_weights: Sequence[float] | Tensor | None = None,
    objective: Objective = "loss",
    second_derivatives: bool = False,
    slope_floor: float = 0.0,
    coordinate_fraction: float = 1.0,
    backend: str | None = None,
    graph: StepGraph | None = None,
) -> Unroll:
    """Apply ``rule`` for ``steps`` steps to ``instances``: ``theta_{t+1} = theta_t + update_t``.

    The gradient fed to the rule at ``theta_t`` is that of each instance's own loss, from the same
    minibatch as ``f(theta_t)``. First-order meta-gradients (the default) treat it as a constant;
    with a :class:`CoordinatewiseLSTM` nothing of the instances' graphs is kept then, only ``steps + 1``
    gradients, and not even these if no meta-gradient is wanted (under ``torch.no_grad()``, say).
    With second derivatives the backward computes the instances' losses again, on the same minibatches.

    Where instances have held-out data (:class:`l2l_fast.problems.HeldOut`), ``f`` is their loss on those.

    Args:
        rule: a :class:`CoordinatewiseLSTM`, or any module with ``init_state(n) -> Tensor`` and
            ``forward(grad [N], state) -> (update [N], state)``.
        params: ``[batch, ...]`` each, where to start; ``None`` is ``instances.init``. Left as they are.
        state: the rule's state at the start, ``[N, 2, 2, H]`` for a :class:`CoordinatewiseLSTM`;
            ``None`` is a fresh one. Left as it is, and must not be changed before the backward.
        generator: source of starting points and minibatches.
        loss_weights: ``[steps + 1]``, the weights ``w_t``; ``None`` is 1 for every step.
        objective: ``"loss"``, or ``"log"`` to sum ``log f(theta_t)``, for positive losses.
        second_derivatives: differentiate through the gradients of the instances as well.
        slope_floor: with second derivatives through :class:`LogAndSign`, gradients below this multiple of the root
            mean square of their tensor count as if they were at it in the slope ``1 / (p g)`` of the logarithm. 0 is
            exact; over a hundred steps the exact meta-gradient of a network explodes, and 0.1 keeps it in bounds.
        coordinate_fraction: share of the coordinates that enter the meta-gradient, chosen at random and so that it
            stays unbiased; the backward takes that share of its time. First order only.
        backend: name of a backend, or ``None`` for the fastest that works.
        graph: takes the steps on a CUDA device, for first-order meta-gradients; see :class:`StepGraph`.

    Raises:
        TypeError, ValueError: if an argument has the wrong kind, shape, dtype or device.
        RuntimeError: if the named backend can't run this, or the graph can't hold it, or in inference mode.

    Source: Andrychowicz et al. 2016, section 2 (equation 3, figure 2).
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive int, got {steps!r}")
    if not (isinstance(rule, nn.Module) and callable(getattr(rule, "init_state", None))):
        raise TypeError(
            f"rule must be a CoordinatewiseLSTM or a module with an init_state(n) method, got {type(rule).__name__}"
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError("unroll takes gradients of the instances; use torch.no_grad() instead of inference mode")
    if backend is not None and not isinstance(rule, CoordinatewiseLSTM):
        raise TypeError(f"backend={backend!r} has no meaning for a {type(rule).__name__}; leave it out")
    meta_loss = as_meta_loss(loss_weights, steps, objective)
    _check_fraction(coordinate_fraction, rule, second_derivatives)
    _check_slope_floor(slope_floor, rule, second_derivatives)
    _check_instances(instances, params is None)
    if graph is not None:
        if not isinstance(graph, StepGraph):
            raise TypeError(f"graph must be a StepGraph or None, got {type(graph).__name__}")
        check_capturable(rule, instances)
    if params is None:
        params = instances.init(generator=generator)
    layout = Layout(params, rule)
    start = torch.cat([tensor.reshape(-1) for tensor in params.values()])
    if not isinstance(rule, CoordinatewiseLSTM):
        return _stepwise(rule, instances, layout, start, state, steps, generator, meta_loss, second_derivatives)
    if state is not None:
        _check_state(state, rule, layout)
    fused = FusedUnroll(rule, instances, layout, start, state, generator, backend)
    if graph is not None and (second_derivatives or not fused.wanted):
        raise ValueError("a graph takes the steps of first-order meta-gradients only; leave it out")
    if not fused.wanted:
        loss, run = fused.forward_only(steps, meta_loss)
    elif second_derivatives:
        loss, run = fused.second_order(steps, meta_loss, slope_floor)
    else:
        if coordinate_fraction < 1 and (start.requires_grad or (state is not None and state.requires_grad)):
            raise ValueError("coordinate_fraction below 1 gives no derivatives by params and state; detach them")
        loss, run = fused.first_order(steps, meta_loss, coordinate_fraction, graph)
    return Unroll(
        loss, run.losses, layout.views(run.theta), fused.backend.unpack_state(run.packed, layout.n, rule.spec)
    )


def _stepwise(
    rule: nn.Module,
    instances: Instances,
    layout: Layout,
    start: Tensor,
    state: Tensor | None,
    steps: int,
    generator: torch.Generator | None,
    meta_loss: MetaLoss,
    second_derivatives: bool,
) -> Unroll:
    """Step by step through autograd: any module."""
    if state is None:
        state = rule.init_state(layout.n)  # type: ignore[operator]  # checked by unroll
    _check_is_tensor(state)
    theta, total = start, None
    ones = start.new_ones(layout.batch)
    losses: list[Tensor] = []
    for t in range(steps + 1):
        tracked = theta.requires_grad  # false until the first update that the meta-gradient reaches
        with torch.enable_grad():
            point = theta if tracked else theta.detach().requires_grad_()
            if t < steps or not isinstance(instances, HeldOut):
                loss = instances.loss(layout.views(point), generator=generator)
                layout.check_losses(loss)
            if t < steps:
                create_graph = second_derivatives and tracked
                (grad,) = torch.autograd.grad(loss, point, ones, retain_graph=tracked, create_graph=create_graph)
            if isinstance(instances, HeldOut):
                loss = instances.outer_loss(layout.views(point), generator=generator)
                layout.check_losses(loss, "outer_loss")
        if tracked:
            term = meta_loss.term(t, loss)
            total = term if total is None else total + term
        losses.append(loss.detach())
        if t < steps:
            update, state = rule(grad if second_derivatives else grad.detach(), state)
            if update.shape != grad.shape:
                raise ValueError(
                    f"the rule must return an update of shape {tuple(grad.shape)}, not {tuple(update.shape)}"
                )
            _check_is_tensor(state)
            theta = theta + update

    assert state is not None
    values = torch.stack(losses)
    value = meta_loss.value(values)
    if total is not None:
        value = total + (value - total.detach())  # also counts the points that no meta-gradient reaches
    return Unroll(value, values, layout.views(theta.detach()), state.detach())


def _check_slope_floor(slope_floor: float, rule: nn.Module, second_derivatives: bool) -> None:
    if isinstance(slope_floor, bool) or not isinstance(slope_floor, int | float) or not 0 <= slope_floor < math.inf:
        raise ValueError(f"slope_floor must be finite and not negative, got {slope_floor!r}")
    logarithm = isinstance(rule, CoordinatewiseLSTM) and isinstance(rule.spec.preprocess, LogAndSign)
    if slope_floor and not (second_derivatives and logarithm):
        raise ValueError(
            "slope_floor bounds the slope of LogAndSign in second derivatives; it needs second_derivatives=True and a "
            "CoordinatewiseLSTM with that preprocessing"
        )


def _check_fraction(fraction: float, rule: nn.Module, second_derivatives: bool) -> None:
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise ValueError(f"coordinate_fraction must be above 0 and at most 1, got {fraction!r}")
    if fraction < 1 and (second_derivatives or not isinstance(rule, CoordinatewiseLSTM)):
        raise ValueError(
            "coordinate_fraction below 1 needs a CoordinatewiseLSTM and first-order meta-gradients, because each "
            "coordinate must reach the meta-loss on its own; leave it at 1"
        )


def _check_instances(instances: Instances, need_init: bool) -> None:
    if isinstance(instances, type) or not all(
        callable(getattr(instances, name, None)) for name in (("init", "loss") if need_init else ("loss",))
    ):
        raise TypeError(
            f"instances must be an object with the methods init and loss, got {type(instances).__name__}; "
            "if that is a problem, pass problem.sample(batch_size, ...)"
        )


def _check_is_tensor(state: object) -> None:
    if not isinstance(state, Tensor):
        raise TypeError(
            f"the state of a rule must be one tensor, got {type(state).__name__}; concatenate what it consists of"
        )


def _check_state(state: Tensor, rule: CoordinatewiseLSTM, layout: Layout) -> None:
    expected = (layout.n, 2, 2, rule.spec.hidden_size)
    if not isinstance(state, Tensor):
        raise TypeError(f"state must be a tensor, got {type(state).__name__}")
    if tuple(state.shape) != expected:
        raise ValueError(
            f"state must have shape {expected} for {layout.n} coordinates, got {tuple(state.shape)}; "
            "take it from the run before, or leave it out for a fresh one"
        )
    if state.dtype != layout.dtype:
        raise TypeError(f"state is {state.dtype} but the parameters are {layout.dtype}; convert one of them with .to()")
    if state.device != layout.device:
        raise ValueError(f"state is on {state.device} but the parameters are on {layout.device}; move one with .to()")

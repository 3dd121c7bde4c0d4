"""The differentiable operators: one step of a rule, and the loss of a whole unroll.

Registered through ``torch.library``, so that ``torch.compile`` treats each as one opaque call.
Backward formulas are the backend's; a second derivative through them is refused with an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l2l_fast.backends import resolve
from l2l_fast.spec import Identity, LogAndSign, RuleSpec


def _spec(hidden_size: int, log_p: float, output_scale: float) -> RuleSpec:
    """The specification from the plain numbers that an operator's schema can carry."""
    return RuleSpec(hidden_size, LogAndSign(log_p) if log_p else Identity(), output_scale)


@torch.library.custom_op("l2l_fast::step", mutates_args=())
def _step(
    weights: Tensor,
    grad: Tensor,
    state: Tensor,
    hidden_size: int,
    log_p: float,
    output_scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    spec = _spec(hidden_size, log_p, output_scale)
    return resolve(backend, grad.device, weights.dtype, spec).step(spec, weights, grad, state)


@_step.register_fake
def _(
    weights: Tensor,
    grad: Tensor,
    state: Tensor,
    hidden_size: int,
    log_p: float,
    output_scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    return weights.new_empty(grad.shape), weights.new_empty(state.shape)


@torch.library.custom_op("l2l_fast::step_backward", mutates_args=())
def _step_backward(
    weights: Tensor,
    grad: Tensor,
    state: Tensor,
    d_update: Tensor,
    d_state: Tensor,
    hidden_size: int,
    log_p: float,
    output_scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    spec = _spec(hidden_size, log_p, output_scale)
    chosen = resolve(backend, grad.device, weights.dtype, spec)
    return chosen.step_backward(spec, weights, grad, state, d_update, d_state)


@_step_backward.register_fake
def _(
    weights: Tensor,
    grad: Tensor,
    state: Tensor,
    d_update: Tensor,
    d_state: Tensor,
    hidden_size: int,
    log_p: float,
    output_scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return weights.new_empty(weights.shape), weights.new_empty(grad.shape), weights.new_empty(state.shape)


def _step_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weights, grad, state, *ctx.options = inputs
    ctx.save_for_backward(weights, grad, state)


def _step_vjp(ctx: Any, d_update: Tensor, d_state: Tensor) -> tuple[Any, ...]:
    weights, grad, state = ctx.saved_tensors
    d_weights, d_grad, d_state_before = torch.ops.l2l_fast.step_backward(
        weights, grad, state, d_update.contiguous(), d_state.contiguous(), *ctx.options
    )
    return d_weights, d_grad.to(grad.dtype), d_state_before.to(state.dtype), None, None, None, None


_step.register_autograd(_step_vjp, setup_context=_step_context)


@torch.library.custom_op("l2l_fast::unroll_loss", mutates_args=())
def _unroll_loss(
    loss: Tensor,
    weights: Tensor,
    params: Tensor,
    state: Tensor | None,
    grads: Tensor,
    d_points: Tensor | None,
    loss_weights: Tensor,
    hidden_size: int,
    log_p: float,
    output_scale: float,
    backend: str | None,
) -> Tensor:
    return loss.clone()


@_unroll_loss.register_fake
def _(
    loss: Tensor,
    weights: Tensor,
    params: Tensor,
    state: Tensor | None,
    grads: Tensor,
    d_points: Tensor | None,
    loss_weights: Tensor,
    hidden_size: int,
    log_p: float,
    output_scale: float,
    backend: str | None,
) -> Tensor:
    return torch.empty_like(loss)


@torch.library.custom_op("l2l_fast::unroll_backward", mutates_args=())
def _unroll_backward(
    weights: Tensor,
    state: Tensor | None,
    grads: Tensor,
    d_points: Tensor | None,
    loss_weights: Tensor,
    need_d_state: bool,
    hidden_size: int,
    log_p: float,
    output_scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    spec = _spec(hidden_size, log_p, output_scale)
    chosen = resolve(backend, grads.device, weights.dtype, spec)
    d_weights, d_state = chosen.unroll_backward(spec, weights, grads, loss_weights, state, need_d_state, d_points)
    return d_weights, weights.new_empty(0) if d_state is None else d_state


@_unroll_backward.register_fake
def _(
    weights: Tensor,
    state: Tensor | None,
    grads: Tensor,
    d_points: Tensor | None,
    loss_weights: Tensor,
    need_d_state: bool,
    hidden_size: int,
    log_p: float,
    output_scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    return weights.new_empty(weights.shape), weights.new_empty(
        state.shape if state is not None and need_d_state else (0,)
    )


def _unroll_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weights, _, state, grads, d_points, loss_weights, *ctx.options = inputs
    ctx.save_for_backward(weights, state, grads, d_points, loss_weights)


def _unroll_vjp(ctx: Any, d_loss: Tensor) -> tuple[Any, ...]:
    weights, state, grads, d_points, loss_weights = ctx.saved_tensors
    _, need_weights, need_params, need_state, *_ = ctx.needs_input_grad
    d_weights = d_params = d_state = None
    if need_weights or need_state:
        d_weights, d_state = torch.ops.l2l_fast.unroll_backward(
            weights, state, grads, d_points, loss_weights, need_state, *ctx.options
        )
        d_weights = d_loss * d_weights
        d_state = d_loss * d_state if need_state else None
    if need_params:
        # Every update is added to the parameters, so they move all later points one to one.
        d_params = d_loss * (loss_weights.to(grads) @ (grads if d_points is None else d_points))
    return None, d_weights, d_params, d_state, None, None, None, None, None, None, None


_unroll_loss.register_autograd(_unroll_vjp, setup_context=_unroll_context)


def step(spec: RuleSpec, weights: Tensor, grad: Tensor, state: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    """One differentiable step: ``(update [N], new state [N, 2, 2, H])`` in the dtype of the weights.

    Differentiable once by ``weights [P]``, ``grad [N]`` and ``state [N, 2, 2, H]``. The backend is chosen
    inside the operator, where the compiler does not look: ``None`` is the fastest that works.
    """
    update, new_state = torch.ops.l2l_fast.step(
        weights, grad, state, spec.hidden_size, spec.log_p, spec.output_scale, backend
    )
    return update, new_state


def unroll_loss(
    spec: RuleSpec,
    loss: Tensor,
    weights: Tensor,
    params: Tensor,
    state: Tensor | None,
    grads: Tensor,
    d_points: Tensor | None,
    loss_weights: Tensor,
    backend: str | None,
) -> Tensor:
    """``loss``, made differentiable by first-order meta-gradients.

    Args:
        loss: scalar, value of the meta-loss.
        weights: ``[P]``.
        params: ``[N]``, parameters before the first step (only their gradient is of interest).
        state: ``[N, 2, 2, H]`` before the first step, or ``None`` for zeros.
        grads: ``[T + 1, N]``, gradient of the loss at every point visited, as the rule saw it.
        d_points: ``[T + 1, N]``, derivative of each term of ``loss`` by its point; ``None`` if it is ``grads``.
        loss_weights: ``[T + 1]`` on the CPU, weight of each term in ``loss``.
    """
    result: Tensor = torch.ops.l2l_fast.unroll_loss(
        loss,
        weights,
        params,
        state,
        grads,
        d_points,
        loss_weights,
        spec.hidden_size,
        spec.log_p,
        spec.output_scale,
        backend,
    )
    return result

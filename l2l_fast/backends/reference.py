"""The plain PyTorch backend: any device, any floating dtype, any size."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from l2l_fast import int8, reference
from l2l_fast.spec import RuleSpec

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _plain(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run ``function`` without a tape, and without autocast, which would take matrix products to 16 bits."""

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run


class ReferenceBackend:
    """Runs :mod:`l2l_fast.reference`. Its packed state is the public one, and that of :mod:`l2l_fast.int8` in int8."""

    name = "reference"

    def unavailable(self, device: torch.device, dtype: torch.dtype, spec: RuleSpec) -> str | None:
        if not dtype.is_floating_point:
            return f"parameters must be floating point, got {dtype}"
        return None

    def prepare(self, spec: RuleSpec, weights: Tensor) -> Tensor:
        return weights.detach().clone()

    def renew(self, spec: RuleSpec, prepared: Tensor, weights: Tensor) -> Tensor:
        return prepared.copy_(weights.detach())

    def init_state(self, n: int, spec: RuleSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
        if dtype == torch.int8:
            return int8.init(n, 4 * spec.hidden_size, device)
        return torch.zeros(n, 2, 2, spec.hidden_size, dtype=dtype, device=device)

    def pack_state(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        return int8.pack(state) if dtype == torch.int8 else state.detach().to(dtype, copy=True).contiguous()

    def unpack_state(self, packed: Tensor, n: int, spec: RuleSpec) -> Tensor:
        return int8.unpack(packed, n, 4 * spec.hidden_size) if packed.dtype == torch.int8 else packed.clone()

    @_plain
    def step_(
        self,
        spec: RuleSpec,
        prepared: Tensor,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[Tensor],
        *,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        for param, grad, stored in zip(params, grads, states, strict=True):
            flat, grad = param.view(-1), grad.reshape(-1)
            narrow = stored.dtype == torch.int8
            state = int8.unpack(stored, len(flat), 4 * spec.hidden_size) if narrow else stored
            update, new_state = reference.step(spec, prepared, -grad if maximize else grad, state)
            new_param = (flat.to(update.dtype) * (1 - lr * weight_decay) + lr * update).to(param.dtype)
            if not narrow:
                new_state = new_state.to(state.dtype)
            if skip_nonfinite:
                keep = ~grad.isfinite()
                new_param = torch.where(keep, flat, new_param)
                new_state = torch.where(keep.view(-1, 1, 1, 1), state, new_state)
            flat.copy_(new_param)
            stored.copy_(int8.pack(new_state) if narrow else new_state)

    @_plain
    def step(self, spec: RuleSpec, weights: Tensor, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return reference.step(spec, weights, grad, state)

    @_plain
    def step_backward(
        self, spec: RuleSpec, weights: Tensor, grad: Tensor, state: Tensor, d_update: Tensor, d_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return reference.step_backward(spec, weights, grad, state, d_update, d_state)

    @_plain
    def unroll_backward(
        self,
        spec: RuleSpec,
        weights: Tensor,
        grads: Tensor,
        loss_weights: Tensor,
        state: Tensor | None,
        need_d_state: bool = True,
        d_points: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        start = state
        if start is None:
            start = torch.zeros(grads.shape[1], 2, 2, spec.hidden_size, dtype=weights.dtype, device=weights.device)
        loss_weights = loss_weights.to(weights.device)
        d_weights, d_state = reference.unroll_backward(spec, weights, grads, loss_weights, start, d_points)
        return d_weights, None if state is None or not need_d_state else d_state


BACKEND = ReferenceBackend()

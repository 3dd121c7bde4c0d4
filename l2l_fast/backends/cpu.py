"""The C++ backend: float32 arithmetic in SIMD registers, for rules of two layers of 20 units on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l2l_fast import int8
from l2l_fast.spec import RuleSpec

_IMPORT_ERROR = ""
try:
    from l2l_fast import _C
except ImportError as error:  # built with L2L_FAST_NO_EXT=1, or not built at all
    _IMPORT_ERROR = str(error)


def instruction_sets() -> tuple[str, ...]:
    """Instruction sets that this build has and this processor runs, fastest last; none without the extension."""
    return () if _IMPORT_ERROR else tuple(_C.instruction_sets())


def instruction_set() -> str:
    """The instruction set in use."""
    return _C.instruction_set()


def use_instruction_set(name: str) -> None:
    """Run every later call of this process on the instruction set ``name``: for tests and benchmarks.

    Raises:
        ValueError: if it is not one of :func:`instruction_sets`.
    """
    _C.use_instruction_set(name)


def fma_peak(iterations: int = 1_000_000) -> float:
    """Float32 operations per second that one thread reaches in fused multiply-adds alone."""
    return _C.fma_peak(iterations)


def _array(tensor: Tensor) -> Any:
    return tensor.detach().to(torch.float32).contiguous().numpy()


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=torch.float32, device="cpu")


class CPUBackend:
    """Calls :mod:`l2l_fast._C`.

    The packed state is ``[ceil(N / 16), 80, 16]``: tiles of 16 coordinates, in which the rows h1, c1,
    h2, c2 of 20 units each run along the coordinates; coordinates that pad the last tile hold no meaning. In int8 it
    is that of :func:`l2l_fast.int8.pack`.
    """

    name = "cpu"

    def unavailable(self, device: torch.device, dtype: torch.dtype, spec: RuleSpec) -> str | None:
        if _IMPORT_ERROR:
            return f"the C++ extension can't be imported ({_IMPORT_ERROR}); reinstall l2l_fast, without L2L_FAST_NO_EXT"
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device}"
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"its arithmetic is float32, which would lose digits of {dtype}"
        if spec.hidden_size != _C.HIDDEN_SIZE:
            return f"it is built for {_C.HIDDEN_SIZE} hidden units, not {spec.hidden_size}"
        return None

    def prepare(self, spec: RuleSpec, weights: Tensor) -> Any:
        return _C.Weights(_array(weights.to(torch.float32)), spec.log_p, spec.output_scale)

    def renew(self, spec: RuleSpec, prepared: Any, weights: Tensor) -> Any:
        return self.prepare(spec, weights)

    def init_state(self, n: int, spec: RuleSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
        if dtype == torch.int8:
            return int8.init(n, 4 * spec.hidden_size, device)
        return torch.zeros(-(-n // _C.TILE), 4 * spec.hidden_size, _C.TILE, dtype=dtype, device=device)

    def pack_state(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype == torch.int8:
            return int8.pack(state)
        n, tile = state.shape[0], _C.TILE
        rows = state.detach().reshape(n, 4 * state.shape[-1])
        packed = torch.zeros(-(-n // tile), rows.shape[1], tile, dtype=dtype, device=state.device)
        whole = n // tile * tile
        packed[: n // tile].copy_(rows[:whole].view(-1, tile, rows.shape[1]).transpose(1, 2))
        if whole < n:
            packed[-1, :, : n - whole].copy_(rows[whole:].t())
        return packed

    def unpack_state(self, packed: Tensor, n: int, spec: RuleSpec) -> Tensor:
        if packed.dtype == torch.int8:
            return int8.unpack(packed, n, 4 * spec.hidden_size)
        # The explicit copy matters for a single tile, of which a reshape would be a view.
        rows = packed.transpose(1, 2).contiguous().view(-1, packed.shape[1])
        return rows[:n].view(n, 2, 2, spec.hidden_size)

    def step_(
        self,
        spec: RuleSpec,
        prepared: Any,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[Tensor],
        *,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        if not params:
            return
        sizes = [param.numel() for param in params]
        # The kernel trusts addresses and sizes; PyTorch lets `grad.data` be replaced by anything.
        if [grad.numel() for grad in grads] != sizes:
            raise RuntimeError("a gradient has another size than its parameter; call zero_grad() and go backward again")
        _C.step_in_place(
            prepared,
            [param.data_ptr() for param in params],
            [grad.data_ptr() for grad in grads],
            [state.data_ptr() for state in states],
            sizes,
            _CODES[params[0].dtype],
            _CODES[states[0].dtype],
            lr,
            weight_decay,
            maximize,
            skip_nonfinite,
            torch.get_num_threads(),
        )
        # Raw writes bypass autograd's record of in-place changes, which guards tensors saved for a backward.
        torch.autograd.graph.increment_version(params)

    def step(self, spec: RuleSpec, weights: Tensor, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        update, new_state = _empty(grad), _empty(state)
        _C.step(
            self.prepare(spec, weights),
            _array(grad),
            _array(state),
            update.numpy(),
            new_state.numpy(),
            torch.get_num_threads(),
        )
        return update.to(weights.dtype), new_state.to(weights.dtype)

    def step_backward(
        self, spec: RuleSpec, weights: Tensor, grad: Tensor, state: Tensor, d_update: Tensor, d_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        d_weights, d_grad, d_state_before = _empty(weights), _empty(grad), _empty(state)
        _C.backward(
            self.prepare(spec, weights),
            _array(grad),
            _array(d_update),
            _array(torch.ones(1, device="cpu")),
            _array(state),
            _array(d_state),
            d_weights.numpy(),
            d_grad.numpy(),
            d_state_before.numpy(),
            torch.get_num_threads(),
        )
        return d_weights.to(weights.dtype), d_grad.to(weights.dtype), d_state_before.to(weights.dtype)

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
        d_weights = _empty(weights)
        d_state = None if state is None or not need_d_state else _empty(state)
        grads = grads.detach().to(torch.float32).contiguous()
        _C.backward(
            self.prepare(spec, weights),
            _array(grads[:-1]),
            _array((grads if d_points is None else d_points)[1:]),
            _array(loss_weights[1:]),
            None if state is None else _array(state),
            None,
            d_weights.numpy(),
            None,
            None if d_state is None else d_state.numpy(),
            torch.get_num_threads(),
        )
        return d_weights.to(weights.dtype), None if d_state is None else d_state.to(weights.dtype)


_CODES = (
    {}
    if _IMPORT_ERROR
    else {
        torch.float32: _C.FLOAT32,
        torch.float16: _C.FLOAT16,
        torch.bfloat16: _C.BFLOAT16,
        torch.int8: _C.INT8,
    }
)

BACKEND = CPUBackend()

"""The Triton backend: one launch for all tensors of a model, for rules of two layers of 20 units on CUDA devices."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from l2l_fast import int8
from l2l_fast.spec import LogAndSign, RuleSpec

_K = TypeVar("_K")
_V = TypeVar("_V")

_IMPORT_ERROR = ""
try:
    import triton
    import triton.language as tl

    from l2l_fast.kernels import backward, launch, scaled, step, tile, weights
except ImportError as error:  # not installed: torch's builds without CUDA do not bring it
    _IMPORT_ERROR = str(error)

_HIDDEN_SIZE = 20
_SMALLEST_P = 0.01  # the logarithm of a float32 number is at most 104
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreted() -> bool:
    """Whether Triton was told, by TRITON_INTERPRET=1, to run kernels on the CPU one operation at a time."""
    return not _IMPORT_ERROR and bool(triton.knobs.runtime.interpret)


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def _multiprocessors(device: torch.device) -> int:
    """The interpreter gets two, so that programs take more than one tile there as well."""
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# What a captured graph reads must outlive it, and graphs tell nobody when they end.
_KEPT_FOR_GRAPHS: list[Any] = []

_CAPTURES = 32  # tables set aside for captured graphs at a time


class _Tiles:
    """Which tile belongs to which tensor, on the device: int32 ``[n_tiles, 2]``, tensor and tile within it."""

    def __init__(self, sizes: tuple[int, ...], device: torch.device) -> None:
        # Said each time, for a global default device would be taken otherwise.
        tiles = torch.tensor([-(-size // tile.TILE) for size in sizes], device="cpu")
        tensor_of = torch.repeat_interleave(tiles)
        first_of = tiles.cumsum(0) - tiles
        self.count = len(tensor_of)
        within = torch.arange(self.count, device="cpu") - first_of[tensor_of]
        self.tiles = torch.stack([tensor_of, within], dim=1).int().to(device)


class _Table:
    """Addresses of the tensors of a call, on the device; renewed when they move, without waiting for the device.

    Attributes:
        tiles: how the tensors are cut.
    """

    def __init__(self, sizes: tuple[int, ...], tiles: _Tiles, device: torch.device) -> None:
        self.tiles = tiles
        self._sizes = sizes
        self._device = device
        self._addresses: list[int] = []
        self._rows = torch.empty(len(sizes), 4, dtype=torch.int64, device=device)
        self._captured: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._set_aside()

    def _set_aside(self) -> None:
        """Allocate, while that is allowed, what captures will need: tables, and pinned memory to copy them from."""
        shape = (_CAPTURES, len(self._sizes), 4)
        pin = self._device.type == "cuda"
        self._spare_host = torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=pin)
        self._spare = torch.empty(shape, dtype=torch.int64, device=self._device)
        self._used = 0

    def _host_rows(self, addresses: list[int]) -> Tensor:
        count = len(self._sizes)
        columns = (addresses[:count], addresses[count : 2 * count], addresses[2 * count :], self._sizes)
        return torch.tensor(columns, dtype=torch.int64, device="cpu").t().contiguous()

    def _check(self, params: list[Tensor], grads: list[Tensor], states: list[Tensor]) -> None:
        """Refuse what the kernel, which trusts addresses, would fault on or race over."""
        spans = []
        for tensors in (params, grads, states):
            for tensor in tensors:
                if not tensor.numel():
                    continue
                start = tensor.data_ptr()
                if start == 0:
                    raise ValueError(
                        f"a {type(tensor).__name__} of shape {tuple(tensor.shape)} has no memory of its own, so "
                        "backend 'triton' can't read it; take backend='reference'"
                    )
                if tensor.device != self._device:
                    raise RuntimeError(
                        f"a tensor of shape {tuple(tensor.shape)} is on {tensor.device}, its parameter's step runs on "
                        f"{self._device}; keep parameters and gradients on one device"
                    )
                if tensors is not grads:
                    spans.append((start, start + tensor.numel() * tensor.element_size()))
        spans.sort()
        for (_, end), (start, _) in pairwise(spans):
            if start < end:
                raise ValueError(
                    "two parameters share memory, and the device would update them at the same time; make one of them "
                    "a copy, or take backend='reference'"
                )

    def rows(self, params: list[Tensor], grads: list[Tensor], states: list[Tensor]) -> Tensor:
        """int64 ``[tensors, 4]``: addresses of parameter, gradient and state, and the number of coordinates.

        Raises:
            ValueError: if a tensor has no memory of its own, or two parameters share theirs.
            RuntimeError: if a tensor is on another device, or captures since the last step outside of one have used
                up what was set aside for them.
        """
        addresses = [tensor.data_ptr() for tensors in (params, grads, states) for tensor in tensors]
        if _capturing(self._device):
            self._check(params, grads, states)
            return self._rows_for_graph(addresses)
        if 2 * self._used > _CAPTURES:
            self._set_aside()
        if addresses != self._addresses:
            self._check(params, grads, states)
            host = self._host_rows(addresses)
            # Pinned memory that a copy still reads is not given out again before the copy is over.
            self._rows.copy_(host.pin_memory() if self._device.type == "cuda" else host, non_blocking=True)
            self._addresses = addresses
        return self._rows

    def _rows_for_graph(self, addresses: list[int]) -> Tensor:
        """A table of the graph's own: every replay copies it again, from memory that is never written again."""
        pair = self._captured.get(tuple(addresses))
        if pair is None:
            if self._used == _CAPTURES:
                raise RuntimeError(
                    f"CUDA graphs have captured {_CAPTURES} steps over these tensors, each with gradients elsewhere; "
                    "take a step outside of a capture before capturing more, or keep the gradients in one place"
                )
            pair = self._captured[tuple(addresses)] = self._spare_host[self._used], self._spare[self._used]
            self._used += 1
            pair[0].copy_(self._host_rows(addresses))
            _KEPT_FOR_GRAPHS.append(pair)
        host, rows = pair
        return rows.copy_(host, non_blocking=True)


class _Prepared:
    """A rule's weights in the kernels' form, and the tables of the tensors that are updated with them."""

    _LIMIT = 256  # parameter groups of an optimizer, with room for parameters that move

    def __init__(self, packed: Any) -> None:
        self.weights = packed
        self._tiles: dict[tuple[int, ...], _Tiles] = {}
        self._tables: dict[tuple[Any, ...], _Table] = {}

    def table(self, params: list[Tensor]) -> _Table:
        """That of ``params``; a group is known by the sizes of its tensors and where the first of them lies."""
        sizes = tuple([param.numel() for param in params])
        key = (params[0].data_ptr(), sizes)
        table = self._tables.pop(key, None)
        if table is not None:
            self._tables[key] = table  # the last used is the last to go
        else:
            device = params[0].device
            if _capturing(device):
                raise RuntimeError(
                    "the first step over these tensors allocates, so a CUDA graph can't capture it; take a step before"
                )
            tiles = self._tiles.get(sizes) or _keep(self._tiles, sizes, _Tiles(sizes, device), self._LIMIT)
            table = _keep(self._tables, key, _Table(sizes, tiles, device), self._LIMIT)
        return table


def _keep(cache: dict[_K, _V], key: _K, value: _V, limit: int) -> _V:
    """Put ``value`` in ``cache``, the oldest out if it holds ``limit``."""
    if len(cache) == limit:
        del cache[next(iter(cache))]
    cache[key] = value
    return value


def _preprocessing(spec: RuleSpec) -> tuple[float, float, float]:
    """What the kernels take of :class:`LogAndSign`: the threshold ``exp(-p)``, ``p`` and ``exp(p)``."""
    return math.exp(-spec.log_p), float(spec.log_p), math.exp(spec.log_p)


class TritonBackend:
    """Runs :mod:`l2l_fast.kernels`.

    Packed states are ``[ceil(N / 64), 5, 1024]``, see :mod:`l2l_fast.kernels.tile`; in int8 they are
    ``[ceil(N / 64), 5, 1088]``, see :mod:`l2l_fast.kernels.scaled`.
    """

    name = "triton"

    def unavailable(self, device: torch.device, dtype: torch.dtype, spec: RuleSpec) -> str | None:
        if _IMPORT_ERROR:
            return f"Triton can't be imported ({_IMPORT_ERROR}); pip install 'l2l_fast[triton]'"
        if device.type == "cuda":
            if torch.version.hip is not None:
                return "its kernels are made for NVIDIA's tensor cores, and this PyTorch is built for AMD"
            if not torch.cuda.is_available():
                return f"there is no CUDA device, so no {device}"
            capability = _capability(device)
            if capability < launch.MINIMUM_CAPABILITY:
                return f"it needs compute capability 8.0 (Ampere) or newer, {device} has {capability / 10}"
            if capability in launch.BROKEN_CAPABILITIES:
                return f"Triton miscompiles its kernels for compute capability {capability / 10}, which {device} has"
        elif device.type != "cpu" or not interpreted():
            present = "" if torch.cuda.is_available() else "; this machine has none"
            return f"it runs on CUDA devices, not on {device}{present}"
        if dtype not in _DTYPES:
            return f"its arithmetic is float32, which would lose digits of {dtype}"
        if spec.hidden_size != _HIDDEN_SIZE:
            return f"it is built for {_HIDDEN_SIZE} hidden units, not {spec.hidden_size}"
        if 0 < spec.log_p < _SMALLEST_P:
            return (
                f"with LogAndSign(p={spec.log_p}) a feature may be too large for float16; it takes {_SMALLEST_P} and up"
            )
        return None

    def prepare(self, spec: RuleSpec, weights_: Tensor) -> Any:
        return _Prepared(weights.pack(weights_, spec.features))

    def renew(self, spec: RuleSpec, prepared: Any, weights_: Tensor) -> Any:
        for old, new in zip(prepared.weights, weights.pack(weights_, spec.features), strict=True):
            old.copy_(new)
        return prepared

    def init_state(self, n: int, spec: RuleSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
        if _capturing(device):
            raise RuntimeError(
                "a CUDA graph that makes a parameter's state resets it at every replay; take a step before capture"
            )
        plane = scaled.SCALED_PLANE if dtype == torch.int8 else tile.PLANE
        return torch.zeros(-(-n // tile.TILE), 5, plane, dtype=dtype, device=device)

    def pack_state(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        packed: Tensor = scaled.pack(*int8.encode(state)) if dtype == torch.int8 else tile.pack(state.detach(), dtype)
        return packed

    def unpack_state(self, packed: Tensor, n: int, spec: RuleSpec) -> Tensor:
        if packed.dtype == torch.int8:
            numbers, scales = scaled.unpack(packed)
            return int8.decode(numbers, scales, n)
        state: Tensor = tile.unpack(packed, n)
        return state

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
        table = prepared.table(params)
        tiles = table.tiles
        # The kernel trusts addresses and sizes; PyTorch lets `grad.data` be replaced by anything.
        if any(grad.numel() != param.numel() for param, grad in zip(params, grads, strict=True)):
            raise RuntimeError("a gradient has another size than its parameter; call zero_grad() and go backward again")
        if tiles.count == 0:
            return
        device = params[0].device
        if _capturing(device):
            _KEPT_FOR_GRAPHS.append((prepared.weights, tiles))
        self._launch(
            step.step_in_place_kernel,
            launch.step_in_place_config,
            tiles.count,
            device,
            table.rows(params, grads, states),
            tiles.tiles,
            tiles.count,
            *prepared.weights,
            *_preprocessing(spec),
            -1.0 if maximize else 1.0,
            lr * spec.output_scale,
            1.0 - lr * weight_decay,
            PARAM=_TRITON_DTYPES[params[0].dtype],
            STATE=_TRITON_DTYPES[states[0].dtype],
            LOG=isinstance(spec.preprocess, LogAndSign),
            SKIP_NONFINITE=skip_nonfinite,
            PREFETCH=launch.step_in_place_config(_capability_or_newest(device)).prefetch,
        )
        # Raw writes bypass autograd's record of in-place changes, which guards tensors saved for a backward.
        torch.autograd.graph.increment_version(params)

    def step(self, spec: RuleSpec, weights_: Tensor, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        grad, state = _float32(grad), _float32(state)
        update, new_state = torch.empty_like(grad), torch.empty_like(state)
        if grad.numel():
            self._launch(
                step.step_kernel,
                launch.step_config,
                -(-grad.numel() // tile.TILE),
                grad.device,
                grad,
                state,
                update,
                new_state,
                grad.numel(),
                *weights.pack(weights_, spec.features),
                *_preprocessing(spec),
                spec.output_scale,
                LOG=isinstance(spec.preprocess, LogAndSign),
            )
        return update.to(weights_.dtype), new_state.to(weights_.dtype)

    def step_backward(
        self, spec: RuleSpec, weights_: Tensor, grad: Tensor, state: Tensor, d_update: Tensor, d_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, state, d_update, d_state = map(_float32, (grad, state, d_update, d_state))
        d_grad, d_state_before = torch.empty_like(grad), torch.empty_like(state)
        d_weights = self._backward(
            spec, weights_, grad[None], d_update[None], grad.new_ones(1), state, d_state, d_grad, d_state_before
        )
        return d_weights, d_grad.to(weights_.dtype), d_state_before.to(weights_.dtype)

    def unroll_backward(
        self,
        spec: RuleSpec,
        weights_: Tensor,
        grads: Tensor,
        loss_weights: Tensor,
        state: Tensor | None,
        need_d_state: bool = True,
        d_points: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        grads, state = _float32(grads), None if state is None else _float32(state)
        d_points = grads if d_points is None else _float32(d_points)
        d_state = None if state is None or not need_d_state else torch.empty_like(state)
        point_weights = _float32(loss_weights[1:]).to(grads.device, non_blocking=True)
        d_weights = self._backward(spec, weights_, grads[:-1], d_points[1:], point_weights, state, None, None, d_state)
        return d_weights, None if d_state is None else d_state.to(weights_.dtype)

    def _backward(
        self,
        spec: RuleSpec,
        weights_: Tensor,
        grads: Tensor,
        d_points: Tensor,
        point_weights: Tensor,
        state: Tensor | None,
        d_new_state: Tensor | None,
        d_grads: Tensor | None,
        d_state: Tensor | None,
    ) -> Tensor:
        """Derivative by the weights, in their dtype; fills ``d_grads`` and ``d_state``. See the kernel for shapes."""
        (steps, n), device = grads.shape, grads.device
        tiles = -(-n // tile.TILE)
        programs = launch.backward_config(_capability_or_newest(device)).grid(tiles, _multiprocessors(device))
        sums = torch.zeros(programs, weights.SUMS, dtype=torch.float64, device=device)
        if n:
            scratch = torch.empty(programs, steps + 1, tile.PACKED, dtype=torch.float32, device=device)
            self._launch(
                backward.backward_kernel,
                launch.backward_config,
                tiles,
                device,
                grads,
                d_points,
                point_weights,
                # An absent argument is never dereferenced.
                grads if state is None else state,
                grads if d_new_state is None else d_new_state,
                grads if d_grads is None else d_grads,
                grads if d_state is None else d_state,
                scratch,
                sums,
                n,
                steps,
                *weights.pack(weights_, spec.features),
                *_preprocessing(spec),
                spec.output_scale,
                LOG=isinstance(spec.preprocess, LogAndSign),
                HAS_STATE=state is not None,
                HAS_D_NEW_STATE=d_new_state is not None,
                STORE_D_STATE=d_state is not None,
                STORE_D_GRAD=d_grads is not None,
            )
        d_weights: Tensor = weights.unpack_sums(sums.sum(0), spec.features)
        return d_weights.to(weights_.dtype)

    def _launch(
        self,
        kernel: Any,
        configure: Callable[[int], Any],
        tiles: int,
        device: torch.device,
        *args: Any,
        **constants: Any,
    ) -> None:
        config = configure(_capability_or_newest(device))
        with _on(device):
            kernel[(config.grid(tiles, _multiprocessors(device)),)](*args, **constants, **config.options())


def _capability_or_newest(device: torch.device) -> int:
    """The interpreter runs what Hopper runs."""
    return 90 if device.type == "cpu" else _capability(device)


_TRITON_DTYPES: dict[torch.dtype, Any] = (
    {}
    if _IMPORT_ERROR
    else {
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
        torch.int8: tl.int8,
    }
)

BACKEND = TritonBackend()

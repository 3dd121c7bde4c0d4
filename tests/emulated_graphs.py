"""CUDA graphs on the CPU, as a device replays them: the same operators on the same memory, and nothing of Python.

What a step took from the host (numbers, generators, tensors made since the capture) is then as wrong as on a device.
Memory that a graph reads but nobody keeps is an error, where a device would read what has come there since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from l2l_fast.backends.triton import TritonBackend
from l2l_fast.meta import graph as graphs

_NOT_PERMITTED = "operation not permitted when stream is capturing"


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Place:
    """Where a tensor lies, without keeping its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._dtype = tensor.dtype
        self._geometry = tensor.storage_offset(), tensor.shape, tensor.stride()

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            raise RuntimeError("a graph works on memory that has been freed since its capture")
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._geometry)


def _place(leaf: object) -> object:
    return _Place(leaf) if isinstance(leaf, Tensor) else leaf


def _back(leaf: object) -> object:
    return leaf.tensor() if isinstance(leaf, _Place) else leaf


class EmulatedGraph:
    """In place of :class:`torch.cuda.CUDAGraph`.

    Attributes:
        replays: how often it was replayed.
    """

    def __init__(self) -> None:
        self.replays = 0
        self._calls: list[tuple[Callable[..., object], object, list[tuple[int, _Place]]]] = []
        self._pool: list[torch.UntypedStorage] = []  # what is made during the capture lives as long as the graph

    def record(self, function: Callable[..., object], arguments: tuple[Any, Any], result: object) -> None:
        """Keep a call; of its result that which is neither an argument nor a view of one."""
        before = {tensor.untyped_storage()._cdata for tensor in _tensors(arguments)}
        made = []
        for index, tensor in enumerate(_tensors(result)):
            if tensor.untyped_storage()._cdata not in before:
                self._pool.append(tensor.untyped_storage())
                made.append((index, _Place(tensor)))
        self._calls.append((function, tree_map(_place, arguments), made))

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for function, places, made in self._calls:
            args, kwargs = tree_map(_back, places)
            results = _tensors(function(*args, **kwargs))
            for index, place in made:
                place.tensor().copy_(results[index])


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operators; memory from before the capture is in the end as it was, for a capture runs nothing."""

    def __init__(self, graph: EmulatedGraph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = graph
        self._saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default or torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError(_NOT_PERMITTED)
        return self.run(func, args, kwargs or {})

    def run(self, function: Callable[..., object], args: Any, kwargs: Any) -> object:
        inside = {storage._cdata for storage in self.graph._pool}
        for tensor in _tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            if storage._cdata not in inside and storage._cdata not in self._saved:
                self._saved[storage._cdata] = storage, storage.clone()  # type: ignore[no-untyped-call]
        result = function(*args, **kwargs)
        self.graph.record(function, (args, kwargs), result)
        return result

    def restore(self) -> None:
        for storage, before in self._saved.values():
            storage.copy_(before)


class _Stream:
    """A stream that knows whether a warm-up has run on it."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.warm = False

    def wait_stream(self, other: _Stream) -> None:
        assert isinstance(other, _Stream)


class Emulator:
    """What patches :mod:`torch.cuda` and the Triton backend's launches.

    Attributes:
        graphs: those that were captured.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.graphs: list[EmulatedGraph] = []
        self._recording: _Recording | None = None
        self._current = _Stream()
        patch.setattr(graphs, "_DEVICE_TYPE", "cpu")
        for name, stand_in in (
            ("CUDAGraph", EmulatedGraph),
            ("Stream", _Stream),
            ("current_stream", lambda: self._current),
            ("device", lambda device: nullcontext()),
            ("stream", self._on_stream),
            ("graph", self._capture),
        ):
            patch.setattr(torch.cuda, name, stand_in)
        patch.setattr(TritonBackend, "_launch", self._launches(TritonBackend._launch))

    @contextmanager
    def _on_stream(self, stream: _Stream) -> Iterator[None]:
        yield
        stream.warm = True

    @contextmanager
    def _capture(self, graph: EmulatedGraph, *, stream: _Stream) -> Iterator[None]:
        assert stream.warm, "nothing has run on this stream before the capture"
        self._recording = _Recording(graph)
        try:
            with self._recording:
                yield
        finally:
            self._recording.restore()
            self._recording = None
        self.graphs.append(graph)

    def _launches(self, launch: Callable[..., None]) -> Callable[..., None]:
        def recorded(backend: TritonBackend, *args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                if self._recording is None:
                    launch(backend, *args, **kwargs)
                else:
                    self._recording.run(partial(launch, backend), args, kwargs)

        return recorded

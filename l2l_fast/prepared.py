"""A rule as optimizers run it: its weights prepared once per backend and device, and its fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2l_fast.backends import Backend, resolve
from l2l_fast.rule import CoordinatewiseLSTM
from l2l_fast.spec import LogAndSign, RuleSpec


class Layout:
    """Whose packed layout a state has, where it lies, and of what rule it is.

    Neither a tuple nor a dataclass, as frameworks walk through what optimizers keep: Lightning takes such containers
    apart, and refuses frozen ones like the specification.
    """

    __slots__ = ("backend", "device", "spec")

    def __init__(self, backend: str, device: torch.device, spec: RuleSpec) -> None:
        self.backend = backend
        self.device = device
        self.spec = spec

    def __iter__(self) -> Iterator[Any]:
        return iter((self.backend, self.device, self.spec))


class Runner(NamedTuple):
    """What serves the parameters of one rule, device and dtype."""

    backend: Backend
    prepared: Any
    layout: Layout


class PreparedRule:
    """A rule's weights in the form that backends take, made at first use and again when they change.

    Args:
        rule: is read, never changed.
        backend: name of a backend, or ``None`` for the fastest that works.
    """

    def __init__(self, rule: CoordinatewiseLSTM, backend: str | None) -> None:
        self.rule = rule
        self._backend = backend
        self._stamp: tuple[tuple[int, int, int], ...] = ()
        self._weights: Tensor
        self._prepared: dict[tuple[str, torch.device], Any] = {}
        self._runners: dict[tuple[torch.device, torch.dtype], Runner] = {}
        self.sync()

    def sync(self) -> None:
        """Drop what was prepared from the rule's weights if they have changed since."""
        stamp = tuple((id(w), w._version, w.data_ptr()) for w in self.rule.parameters())
        if stamp != self._stamp:
            with torch.no_grad():
                self._weights = self.rule.flat_weights()
            self._prepared.clear()
            self._runners.clear()
            self._stamp = stamp

    def runner(self, device: torch.device, dtype: torch.dtype) -> Runner:
        """What serves parameters of ``dtype`` on ``device``; the same object until the weights change.

        Raises:
            ValueError: if the backend is unknown.
            RuntimeError: if the named backend can't run this.
        """
        runner = self._runners.get((device, dtype))
        if runner is None:
            spec, weights = self.rule.spec, self._weights
            # Arithmetic is in the dtype of the weights, so float64 weights need a backend for float64.
            backend = resolve(self._backend, device, weights.dtype if weights.dtype == torch.float64 else dtype, spec)
            if (backend.name, device) not in self._prepared:
                self._prepared[backend.name, device] = backend.prepare(spec, weights.to(device))
            prepared = self._prepared[backend.name, device]
            runner = Runner(backend, prepared, Layout(backend.name, device, spec))
            self._runners[device, dtype] = runner
        return runner


def fingerprint(rule: CoordinatewiseLSTM) -> str:
    """What tells rules apart in a checkpoint: the specification and a checksum of the weights, in one line.

    A plain string in the parameter groups survives every tool that rewrites optimizer state.
    """
    spec = rule.spec
    preprocess = f"log_and_sign({spec.preprocess.p!r})" if isinstance(spec.preprocess, LogAndSign) else "identity"
    weights = rule.flat_weights().detach().to("cpu", torch.float32)
    digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16]
    return f"hidden_size={spec.hidden_size} preprocess={preprocess} output_scale={spec.output_scale!r} sha256={digest}"

"""Which implementation runs a rule, and why the others do not.

A backend is an object with the methods of :class:`Backend`. ``resolve`` picks one: an explicit
choice works or raises with the reason, the automatic choice takes the fastest for the device that works.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from l2l_fast.spec import RuleSpec

logger = logging.getLogger("l2l_fast")

ENVIRONMENT_VARIABLE = "L2L_FAST_BACKEND"

# Each is a module of this package with one object called BACKEND.
NAMES = ("cpu", "triton", "reference")

# Which one the automatic choice tries first, by type of device; the reference runs everywhere.
_FASTEST = {"cpu": "cpu", "cuda": "triton"}


class Backend(Protocol):
    """What an implementation of the rule provides. All tensors of a call are on one device.

    Shapes: ``weights [P]``, ``grad [N]``, ``state [N, 2, 2, H]`` (layer; h, c; unit). A *packed*
    state holds the same numbers in the backend's own layout, with any storage dtype: float32, float16, bfloat16, or
    int8 as :mod:`l2l_fast.int8` defines it.

    An operand, a result or a term of a sum that is subnormal in float32 may count as zero; see docs/numerics.md.
    """

    name: str

    def unavailable(self, device: torch.device, dtype: torch.dtype, spec: RuleSpec) -> str | None:
        """Why a rule of this ``spec`` can't run here on parameters or weights of ``dtype``; ``None`` if it can."""

    def prepare(self, spec: RuleSpec, weights: Tensor) -> Any:
        """The weights in the form that :meth:`step_` takes; valid until the weights change."""

    def renew(self, spec: RuleSpec, prepared: Any, weights: Tensor) -> Any:
        """What :meth:`prepare` gives for other ``weights``; on a CUDA device in the memory of ``prepared``.

        So a CUDA graph that reads it goes on with the new weights.
        """

    def init_state(self, n: int, spec: RuleSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A packed state of ``n`` coordinates, all zero, stored as ``dtype``."""

    def pack_state(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        """``state [N, 2, 2, H]`` packed and stored as ``dtype``; a copy."""

    def unpack_state(self, packed: Tensor, n: int, spec: RuleSpec) -> Tensor:
        """The packed state of ``n`` coordinates as ``[N, 2, 2, H]``, a copy in its storage dtype, bfloat16 for int8."""

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
        """``param <- (1 - lr * weight_decay) * param + lr * update``, many tensors, in place, no tape.

        Args:
            params: contiguous, any shape, all of one dtype, changed in place.
            grads: contiguous, like ``params`` in shape and dtype; left as they are.
            states: packed, one per parameter, all of one storage dtype, changed in place.
            maximize: feed the rule the negated gradient.
            skip_nonfinite: leave parameter and state untouched where the gradient is not finite; an int8 state is
                stored again beside its neighbours' new ones.
        """

    def step(self, spec: RuleSpec, weights: Tensor, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """``(update [N], new state [N, 2, 2, H])``, both in the dtype of the weights."""

    def step_backward(
        self, spec: RuleSpec, weights: Tensor, grad: Tensor, state: Tensor, d_update: Tensor, d_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Derivatives of :meth:`step`: ``(d_weights [P], d_grad [N], d_state [N, 2, 2, H])``."""

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
        """First-order meta-gradient of an unroll: ``(d_weights [P], d_state)``.

        Args:
            grads: ``[T + 1, N]``, gradient of the loss at every point visited, as the rule saw it.
            loss_weights: ``[T + 1]`` on the CPU, weight of each point in the meta-loss.
            state: ``[N, 2, 2, H]`` before the first step, or ``None`` for zeros; then ``d_state`` is ``None``.
            need_d_state: ``False`` leaves ``d_state`` out, which saves its memory.
            d_points: ``[T + 1, N]``, derivative of each term of the meta-loss by its point; ``None`` for ``grads``.
        """


@cache
def get(name: str) -> Backend:
    """The backend called ``name``.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; known backends: {', '.join(map(repr, NAMES))}")
    backend: Backend = import_module(f"l2l_fast.backends.{name}").BACKEND
    return backend


def resolve(name: str | None, device: torch.device, dtype: torch.dtype, spec: RuleSpec) -> Backend:
    """The backend to use: ``name``, else ``$L2L_FAST_BACKEND``, else the fastest that works on ``device``.

    Raises:
        ValueError: if the name is unknown.
        RuntimeError: if the named backend can't run this, with the reason and the remedy.
    """
    source = "backend" if name else ENVIRONMENT_VARIABLE
    name = name or os.environ.get(ENVIRONMENT_VARIABLE) or None
    if name is not None:
        if name not in NAMES:
            known = ", ".join(map(repr, NAMES))
            raise ValueError(f"unknown backend {name!r}; known backends: {known} (it was named by {source})")
        backend = get(name)
        reason = backend.unavailable(device, dtype, spec)
        if reason is not None:
            raise RuntimeError(
                f"{source}={name!r} can't be used: {reason}. Leave the choice open (backend=None) or take "
                "'reference', which runs everything"
            )
        return backend
    fastest = _FASTEST.get(device.type, "reference")
    reason = get(fastest).unavailable(device, dtype, spec)
    if reason is None:
        return get(fastest)
    _report_fallback(fastest, reason)
    return get("reference")


@cache
def _report_fallback(name: str, reason: str) -> None:
    """Say once per reason that a faster backend is passed over."""
    logger.warning("backend %r is not used: %s", name, reason)


def backends() -> dict[str, str | None]:
    """Every backend by name, with ``None`` if it works on this machine, else the reason why it does not."""
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    reasons = {name: [get(name).unavailable(device, torch.float32, RuleSpec()) for device in devices] for name in NAMES}
    return {name: None if None in reasons[name] else reasons[name][-1] for name in sorted(reasons)}

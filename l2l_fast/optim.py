"""A learned rule as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from numbers import Real
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT, StateDict

from l2l_fast.backends import Backend, get, resolve
from l2l_fast.rule import CoordinatewiseLSTM, as_rule
from l2l_fast.spec import LogAndSign, RuleSpec

_PARAM_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_STATE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Layout(NamedTuple):
    """Whose packed layout a state has, and where it lies."""

    backend: str
    device: torch.device


class _Runner(NamedTuple):
    """What serves the parameters of one device and dtype."""

    backend: Backend
    prepared: Any
    layout: _Layout


class _Batch:
    """What one call of a backend updates: parameters of one group, one device and one dtype."""

    __slots__ = ("copies", "grads", "params", "runner", "states")

    def __init__(self, runner: _Runner) -> None:
        self.runner = runner
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.states: list[Tensor] = []
        self.copies: list[tuple[Tensor, Tensor]] = []

    def add_as_copies(self, param: Tensor, grad: Tensor) -> None:
        """Take what a backend can't read in place."""
        if grad.layout != torch.strided:
            raise TypeError(
                f"LearnedOptimizer needs dense gradients, got layout {grad.layout} for a parameter of shape "
                f"{tuple(param.shape)}; build the module without sparse=True or set p.grad = p.grad.to_dense()"
            )
        copy = param.contiguous()
        if not param.is_contiguous():
            self.copies.append((param, copy))
        self.params.append(copy)
        self.grads.append(grad.resolve_neg().to(param.dtype).contiguous())

    def step_(self, spec: RuleSpec, options: dict[str, Any]) -> None:
        backend, prepared, _ = self.runner
        backend.step_(spec, prepared, self.params, self.grads, self.states, **options)
        for param, copy in self.copies:
            param.copy_(copy)


class LearnedOptimizer(torch.optim.Optimizer):
    """Trains parameters with a learned rule: ``param <- (1 - lr * weight_decay) * param + lr * update``.

    Every coordinate of every parameter has a state of its own, ``4 * H`` numbers, made at the first step
    at which the parameter has a gradient. The rule's weights are read, never changed; a change of them
    counts from the next step on (one through ``.data``, which PyTorch does not record, may not). Parameter
    groups may set their own ``lr``, ``weight_decay``, ``maximize`` and ``skip_nonfinite``.

    :meth:`state_dict` holds the state of a parameter under ``"lstm"``, shape ``[*param.shape, 2, 2, H]``
    (layer; h, c; unit) in the dtype ``state_dtype``, as a copy, whatever the backend; ``"rule"`` in every
    group identifies the rule. ``optimizer.state`` holds it in the private layout of the backend.

    Args:
        params: parameters, named parameters or group dictionaries, as in ``torch.optim``; float32, float16,
            bfloat16 or float64, any strides. Changed in place by :meth:`step`.
        rule: a :class:`CoordinatewiseLSTM` on any device, the name of a shipped rule or the path of a file.
        lr: factor on the update, a number or a 0-dimensional CPU tensor; rules are trained for 1.
        weight_decay: decoupled weight decay.
        maximize: ascend: feed the rule the negated gradient.
        skip_nonfinite: leave a coordinate and its state untouched where its gradient is not finite. By
            default both become NaN.
        backend: name of a backend, or ``None`` for the fastest that works on each parameter.
        state_dtype: float32, float16 or bfloat16, how the state is stored between steps.

    Raises:
        TypeError: if a parameter is not a dense tensor of one of the dtypes above, or ``lr``,
            ``weight_decay``, ``state_dtype`` or ``rule`` is of the wrong kind.
        ValueError: if there are no parameters, one occurs twice, ``lr`` or ``weight_decay`` is negative or
            not finite, the rule or backend is unknown, or a group asks for a rule of its own.
        RuntimeError: if the named backend can't run this.

    Source: Andrychowicz et al. 2016, section 2.1.
    """

    def __init__(
        self,
        params: ParamsT,
        rule: CoordinatewiseLSTM | str | os.PathLike[str],
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        skip_nonfinite: bool = False,
        backend: str | None = None,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        if state_dtype not in _STATE_DTYPES:
            raise TypeError(f"state_dtype must be one of {', '.join(map(str, _STATE_DTYPES))}, got {state_dtype!r}")
        self.rule = as_rule(rule)
        self.backend = backend
        self.state_dtype = state_dtype
        self._forget_weights()
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "skip_nonfinite": skip_nonfinite,
            "rule": _fingerprint(self.rule),
        }
        _options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in ``torch.optim``; nothing is added if the group is refused.

        Raises:
            TypeError, ValueError, RuntimeError: as the constructor does.
        """
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        _options(group)
        if group["rule"] != self.defaults["rule"]:
            raise ValueError(
                f"all groups of an optimizer share its rule [{self.defaults['rule']}], but a group asks for "
                f"[{group['rule']}]; make one LearnedOptimizer per rule"
            )
        if len(set(group["params"])) != len(group["params"]):
            raise ValueError("a parameter occurs twice in one parameter group; list it once")
        self._sync_weights()
        for param in group["params"]:
            if param.dtype not in _PARAM_DTYPES:
                remedy = "optimize torch.view_as_real of it" if param.is_complex() else "convert it first"
                raise TypeError(
                    f"parameters must be float32, float16, bfloat16 or float64, got {param.dtype} for one of shape "
                    f"{tuple(param.shape)}; {remedy}"
                )
            if param.layout != torch.strided:
                raise TypeError(f"parameters must be dense, got layout {param.layout}; call .to_dense() first")
            if torch._debug_has_internal_overlap(param) == 1:
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} and strides {param.stride()} shares memory between its "
                    "elements; make it contiguous first"
                )
            self._runner(param.device, param.dtype)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # The compiler would find one call that it can't see into, and much Python around it that it need not trace.
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, and its state, in place.

        Args:
            closure: evaluates the model again, calls ``backward`` and returns the loss.

        Returns:
            What ``closure`` returned.

        Raises:
            TypeError: if a gradient is sparse.
            ValueError: if ``lr`` or ``weight_decay`` of a group is negative or not finite.
            RuntimeError: if a parameter's device or size is not that of its state or gradient. On any of
                these errors nothing has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        self._sync_weights()
        calls: list[tuple[_Batch, dict[str, Any]]] = []
        entries: dict[Tensor, dict[str, Any]] = {}
        for group in self.param_groups:
            options = _options(group)
            calls += [(batch, options) for batch in self._gather(group["params"], entries)]
        # Everything has been checked and nothing changed so far.
        for param, entry in entries.items():
            self.state[param].update(entry)
        for batch, options in calls:
            batch.step_(self.rule.spec, options)
        return loss

    def _gather(self, params: list[Tensor], entries: dict[Tensor, dict[str, Any]]) -> list[_Batch]:
        """The parameters that have a gradient, by device and dtype; entries of the state to renew go to ``entries``.

        For small tensors this loop costs as much as the arithmetic, so it asks only what may change from
        step to step. That a gradient has the shape and device of its parameter is PyTorch's promise as
        long as the parameter stays what it was, which an entry remembers; else :meth:`_entry` checks.
        """
        batches: dict[tuple[torch.device, torch.dtype], _Batch] = {}
        state = self.state
        device: torch.device | None = None
        dtype: torch.dtype | None = None
        for param in params:
            grad = param.grad
            if grad is None:
                continue
            if param.dtype is not dtype or param.device != device:
                device, dtype = param.device, param.dtype
                if (device, dtype) not in batches:
                    batches[device, dtype] = _Batch(self._runner(device, dtype))
                batch = batches[device, dtype]
                layout = batch.runner.layout
            entry = state.get(param)
            if (
                entry is None
                or entry.get("layout") is not layout
                or entry["numel"] != param.numel()
                or entry["id"] != id(entry["lstm"])
            ):
                entry = entries[param] = self._entry(param, grad, entry, batch.runner)
            batch.states.append(entry["lstm"])
            if param.is_contiguous() and grad.is_contiguous() and grad.dtype is dtype and not grad.is_neg():
                batch.params.append(param)
                batch.grads.append(grad)
            else:
                batch.add_as_copies(param, grad)
        return list(batches.values())

    def _entry(self, param: Tensor, grad: Tensor, entry: dict[str, Any] | None, runner: _Runner) -> dict[str, Any]:
        """The state of ``param`` as its runner takes it: a new one, or the one in ``entry``, repacked if need be."""
        backend, _, layout = runner
        if grad.shape != param.shape or grad.device != param.device:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} on {param.device} has a gradient of shape "
                f"{tuple(grad.shape)} on {grad.device}; call zero_grad() after replacing a parameter's data"
            )
        if not entry or "lstm" not in entry:
            packed = backend.init_state(param.numel(), self.rule.spec, self.state_dtype, param.device)
        elif entry["numel"] != param.numel():
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} has a state of {entry['numel']} coordinates; to start it "
                "afresh after replacing its data, del optimizer.state[param]"
            )
        elif entry["lstm"].device != param.device:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} is on {param.device} but its state is on "
                f"{entry['lstm'].device}; take state_dict() before moving the model and load it afterwards"
            )
        elif entry["id"] != id(entry["lstm"]):
            raise RuntimeError(
                "the packed state of a parameter was replaced in optimizer.state; its layout, size and dtype are "
                "private, so change it through state_dict() and load_state_dict()"
            )
        elif entry["layout"].backend == layout.backend:
            packed = entry["lstm"]
        else:
            packed = backend.pack_state(self._unpack(param, entry), self.state_dtype)
        return {"lstm": packed, "layout": layout, "numel": param.numel(), "id": id(packed)}

    def _pack(self, param: Tensor, state: Tensor) -> dict[str, Any]:
        """The entry of ``param`` in ``self.state`` for a state ``[*param.shape, 2, 2, H]``."""
        backend, _, layout = self._runner(param.device, param.dtype)
        flat = state.detach().to(param.device).reshape(param.numel(), *state.shape[-3:])
        packed = backend.pack_state(flat, self.state_dtype)
        # An equal layout but another object: the next step checks the parameter and its gradient once.
        return {"lstm": packed, "layout": _Layout(*layout), "numel": param.numel(), "id": id(packed)}

    def _unpack(self, param: Tensor, entry: dict[str, Any]) -> Tensor:
        """State of ``param`` as ``[N, 2, 2, H]``, a copy."""
        return get(entry["layout"].backend).unpack_state(entry["lstm"], param.numel(), self.rule.spec)

    def _public(self, param: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
        """An entry of ``self.state`` with the state as ``[*param.shape, 2, 2, H]``, a copy."""
        public = _without_packed(entry)
        if "lstm" in entry:
            public["lstm"] = self._unpack(param, entry).view(*param.shape, 2, 2, self.rule.spec.hidden_size)
        return public

    def _forget_weights(self) -> None:
        self._stamp: tuple[tuple[int, int, int], ...] = ()
        self._runners: dict[tuple[torch.device, torch.dtype], _Runner] = {}

    def _sync_weights(self) -> None:
        """Drop what was prepared from the rule's weights if they have changed since."""
        stamp = tuple((id(w), w._version, w.data_ptr()) for w in self.rule.parameters())
        if stamp != self._stamp:
            with torch.no_grad():
                self._weights = self.rule.flat_weights()
            self._runners.clear()
            self._stamp = stamp

    def _runner(self, device: torch.device, dtype: torch.dtype) -> _Runner:
        runner = self._runners.get((device, dtype))
        if runner is None:
            spec, weights = self.rule.spec, self._weights
            # Arithmetic is in the dtype of the weights, so float64 weights need a backend for float64.
            backend = resolve(self.backend, device, weights.dtype if weights.dtype == torch.float64 else dtype, spec)
            runner = _Runner(backend, backend.prepare(spec, weights.to(device)), _Layout(backend.name, device))
            self._runners[device, dtype] = runner
        return runner

    def state_dict(self) -> StateDict:
        """Groups and state as in ``torch.optim``; states ``[*param.shape, 2, 2, H]`` are copies.

        Moves between backends, devices and, as every state has the leading dimensions of its parameter,
        between shardings.
        """

        def publish(_: torch.optim.Optimizer, state_dict: StateDict) -> StateDict:
            params = dict(enumerate(chain.from_iterable(group["params"] for group in self.param_groups)))
            rule = _fingerprint(self.rule)
            return {
                "state": {
                    key: self._public(params[key], entry) if key in params else entry
                    for key, entry in state_dict["state"].items()
                },
                "param_groups": [{**group, "rule": rule} for group in state_dict["param_groups"]],
            }

        # Ahead of the user's hooks, which see the public layout.
        handle = self.register_state_dict_post_hook(publish, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take groups and state from a :meth:`state_dict`; the state keeps ``state_dtype``.

        Raises:
            TypeError: if a state is not a tensor, or of a dtype that ``state_dtype`` can't hold exactly.
            ValueError: if the groups differ in number or size, the rule is another one, or a state has
                another shape than its parameter asks for. On any error the optimizer is as before.
        """
        entries: dict[Tensor, dict[str, Any]] = {}

        def take(_: torch.optim.Optimizer, state_dict: StateDict) -> StateDict:
            self._sync_weights()
            params = self._checked_params(state_dict)
            rest = {}
            for key, entry in state_dict["state"].items():
                if key in params and "lstm" in entry:
                    self._check_state(key, params[key], entry["lstm"])
                    entries[params[key]] = self._pack(params[key], entry["lstm"])
                rest[key] = _without_packed(entry) if key in params else entry
            return {**state_dict, "state": rest}

        def install(_: torch.optim.Optimizer) -> None:
            for param, entry in entries.items():
                self.state[param].update(entry)

        # The base class would convert states to the dtype of their parameter, so they go around it: taken
        # out after the user's hooks have had their say, put in before the hooks that look at the result.
        handles = (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(install, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _checked_params(self, state_dict: StateDict) -> dict[Any, Tensor]:
        """Parameters by their key in ``state_dict``, after its groups have been checked."""
        if not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(
                f"an optimizer's state dict has the keys 'state' and 'param_groups', got {sorted(map(str, state_dict))}"
            )
        groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        found = [len(group["params"]) for group in groups]
        if found != sizes:
            raise ValueError(
                f"the state dict has parameter groups of {found} parameters, this optimizer of {sizes}; build it "
                "with the same groups"
            )
        rule = _fingerprint(self.rule)
        for group in groups:
            if group.get("rule") != rule:
                raise ValueError(
                    f"the state dict was written with the rule [{group.get('rule', 'none: by another optimizer')}], "
                    f"this optimizer runs [{rule}]; build it with the rule of the checkpoint or start afresh"
                )
        keys = chain.from_iterable(group["params"] for group in groups)
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        return dict(zip(keys, params, strict=True))

    def _check_state(self, key: Any, param: Tensor, state: Any) -> None:
        if not isinstance(state, Tensor):
            raise TypeError(f"the state of parameter {key} must be a tensor, got {type(state).__name__}")
        expected = (*param.shape, 2, 2, self.rule.spec.hidden_size)
        if tuple(state.shape) != expected:
            raise ValueError(
                f"the state of parameter {key} must have shape {expected} for a parameter of shape "
                f"{tuple(param.shape)}, got {tuple(state.shape)}; build the model of the checkpoint"
            )
        if state.dtype not in _STATE_DTYPES or torch.promote_types(state.dtype, self.state_dtype) != self.state_dtype:
            raise TypeError(
                f"the state of parameter {key} is {state.dtype}, which state_dtype={self.state_dtype} can't hold "
                "exactly; build the optimizer with the checkpoint's dtype or convert its states first"
            )

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle or a deep copy holds: states in the public layout, as another machine may read them."""
        return {
            **super().__getstate__(),
            "state": defaultdict(
                dict,
                {
                    key: self._public(key, entry) if isinstance(key, Tensor) else entry
                    for key, entry in self.state.items()
                },
            ),
            "rule": self.rule,
            "backend": self.backend,
            "state_dtype": self.state_dtype,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "rule" in state:  # a pickle or a deep copy; load_state_dict passes no more than groups and state
            self._forget_weights()
            self._sync_weights()
            for param, entry in self.state.items():
                if isinstance(param, Tensor) and "lstm" in entry:
                    entry.update(self._pack(param, entry["lstm"]))


def _without_packed(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of the state less what :class:`LearnedOptimizer` keeps there."""
    return {key: value for key, value in entry.items() if key not in ("lstm", "layout", "numel", "id")}


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a group as a backend takes them, checked."""
    return {
        "lr": _nonnegative("lr", group["lr"]),
        "weight_decay": _nonnegative("weight_decay", group["weight_decay"]),
        "maximize": group["maximize"],
        "skip_nonfinite": group["skip_nonfinite"],
    }


def _nonnegative(name: str, value: Any) -> float:
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or value.dim() != 0:
            raise ValueError(
                f"{name} as a tensor must be 0-dimensional and on the CPU, where reading it waits for no device; got "
                f"shape {tuple(value.shape)} on {value.device}. Pass a float"
            )
    elif not isinstance(value, Real):
        raise TypeError(f"{name} must be a number or a 0-dimensional CPU tensor, got {type(value).__name__}")
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {number}")
    return number


def _fingerprint(rule: CoordinatewiseLSTM) -> str:
    """What tells rules apart in a checkpoint: the specification and a checksum of the weights, in one line.

    A plain string in the parameter groups survives every tool that rewrites optimizer state.
    """
    spec = rule.spec
    preprocess = f"log_and_sign({spec.preprocess.p!r})" if isinstance(spec.preprocess, LogAndSign) else "identity"
    weights = rule.flat_weights().detach().to("cpu", torch.float32)
    digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16]
    return f"hidden_size={spec.hidden_size} preprocess={preprocess} output_scale={spec.output_scale!r} sha256={digest}"

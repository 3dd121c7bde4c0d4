"""A learned rule as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, cast, overload

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT, StateDict
from torch.utils.hooks import RemovableHandle

from l2l_fast import sharding
from l2l_fast.backends import get
from l2l_fast.batch import Batch, StagedBatch, Workspace, step_all
from l2l_fast.loading import checked_params, has_state
from l2l_fast.options import OFF, Options, read_options
from l2l_fast.patterns import groups_by_pattern
from l2l_fast.prepared import Layout, PreparedRule, Runner, fingerprint
from l2l_fast.rounding import ROUNDED
from l2l_fast.rule import CoordinatewiseLSTM, as_rule
from l2l_fast.storage import check_state_dtype, overflows

_PARAM_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class LearnedOptimizer(torch.optim.Optimizer):
    """Trains parameters with a learned rule: ``param <- (1 - lr * weight_decay) * param + lr * update``.

    Every coordinate of every parameter has a state of its own, ``4 * H`` numbers, made at the first step
    at which the parameter has a gradient. A rule's weights are read, never changed; a change of them
    counts from the next step on (one through ``.data``, which PyTorch does not record, may not). Parameter
    groups may set their own ``rule`` and all options but ``backend`` and ``state_dtype``; groups that name
    the same rule share it. :meth:`from_module` makes groups from the names of parameters.

    :meth:`state_dict` holds the state of a parameter under ``"lstm"``, shape ``[*param.shape, 2, 2, H]``
    (layer; h, c; unit) in the dtype ``state_dtype``, bfloat16 for int8, as a copy, whatever the backend; ``"rule"`` in
    every group identifies its rule, and ``"step"`` counts the steps it has taken. ``optimizer.state`` holds the state
    in the private layout of the backend, and ``"rule"`` in ``optimizer.param_groups`` is the module.

    Args:
        params: parameters, named parameters or group dictionaries, as in ``torch.optim``; float32, float16,
            bfloat16 or float64, any strides. Changed in place by :meth:`step`.
        rule: a :class:`CoordinatewiseLSTM` on any device, the name of a shipped rule or the path of a file;
            ``None`` if every group names its own.
        lr: factor on the update, a number or a 0-dimensional CPU tensor; rules are trained for 1.
        weight_decay: decoupled weight decay.
        maximize: ascend: feed the rule the negated gradient.
        skip_nonfinite: leave a coordinate and its state untouched where its gradient is not finite, but that an int8
            state is stored again beside its neighbours' new ones. By default both become NaN.
        warmup: number of steps over which ``lr`` rises to its value, in equal parts, from the group's first step.
        max_update_norm: how far one step may move a tensor, in the Euclidean norm, weight decay included; a
            longer move is shortened. Of a tensor with a change that is not finite, all other coordinates rest.
        update_norm: ``"tensor"`` if that holds for each tensor, ``"global"`` if for all tensors together of all
            groups that say so.
        stochastic_rounding: round float16 and bfloat16 parameters at random to one of their two neighbours, so
            that the expectation of a step is that step in float32; other dtypes are stepped as ever.
        rounding_seed: with it, with the number of the group and with ``"step"`` the random numbers are the
            same again, on the same type of device.
        backend: name of a backend, or ``None`` for the fastest that works on each parameter.
        state_dtype: how the state is stored between steps: float32, float16, bfloat16, or int8 with a scale for every
            16 numbers, in 8.5 bits each.

    The cost of ``max_update_norm``, and of ``stochastic_rounding`` for 16-bit parameters: parameters are stepped
    in a copy, which is kept, in float32 (float64 for those of float64), with their gradients in that dtype. For
    ``DTensor`` parameters the limit is on the whole tensor, so that ranks communicate, and all of them have to step the
    same parameters.

    Raises:
        TypeError: if a parameter is not a dense tensor of one of the dtypes above, or an option or rule is
            of the wrong kind.
        ValueError: if there are no parameters, one occurs twice, an option is out of range, a group has no rule,
            or a rule or the backend is unknown.
        RuntimeError: if the named backend can't run this.

    Source: Andrychowicz et al. 2016, section 2.1.
    """

    # Whether a first step that moves nothing makes the states and no more.
    _may_rest = True
    # By whose number random rounding tells groups apart; above 0 where groups are optimizers of their own.
    _first_group = 0

    def __init__(
        self,
        params: ParamsT,
        rule: CoordinatewiseLSTM | str | os.PathLike[str] | None = None,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        skip_nonfinite: bool = False,
        warmup: int = 0,
        max_update_norm: float | None = None,
        update_norm: str = "tensor",
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        backend: str | None = None,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        check_state_dtype(state_dtype)
        self.backend = backend
        self._state_dtype = state_dtype
        self._forget()
        defaults = {
            "rule": None if rule is None else self._module(rule),
            "lr": lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "skip_nonfinite": skip_nonfinite,
            "warmup": warmup,
            "max_update_norm": max_update_norm,
            "update_norm": update_norm,
            "stochastic_rounding": stochastic_rounding,
            "rounding_seed": rounding_seed,
            "step": 0,
        }
        read_options(defaults)
        super().__init__(params, defaults)

    @classmethod
    def from_module(
        cls,
        model: nn.Module,
        rules: Mapping[str, CoordinatewiseLSTM | str | os.PathLike[str]],
        **options: Any,
    ) -> LearnedOptimizer:
        """An optimizer of all parameters of ``model``, with rules by the names of the parameters.

        Args:
            model: its ``named_parameters()``; a shared parameter goes by the first of its names, and one of a module
                that ``torch.compile`` has wrapped by its name with or without ``_orig_mod.``.
            rules: pattern on the name to rule, such as ``{"conv*.weight": "a.safetensors", "*": "mnist"}``; ``*``
                matches any characters, dots too, ``?`` one and ``[ab]`` one of these. The first pattern that
                matches counts. Each makes one parameter group, in this order.
            options: of the constructor, for all groups.

        Raises:
            ValueError: if a parameter is matched by no pattern, or a pattern is left without a parameter.
            TypeError, ValueError, RuntimeError: as the constructor does.
        """
        groups = [{"params": named, "rule": rule} for rule, named in groups_by_pattern(model, rules)]
        return cls(groups, **options)

    @property
    def rule(self) -> CoordinatewiseLSTM | None:
        """The rule of groups that name none."""
        rule: CoordinatewiseLSTM | None = self.defaults["rule"]
        return rule

    @property
    def state_dtype(self) -> torch.dtype:
        """How the state is stored between steps; :meth:`convert_state` changes it."""
        return self._state_dtype

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for number, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {number}")
            shown = {**group, "rule": fingerprint(group["rule"])}
            lines += [f"    {key}: {shown[key]}" for key in sorted(shown) if key != "params"]
        return "\n".join([*lines, ")"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in ``torch.optim``; nothing is added if the group is refused.

        Raises:
            TypeError, ValueError, RuntimeError: as the constructor does.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        rule = group["rule"]
        try:
            if rule is None:
                raise ValueError(
                    "a parameter group names no rule, and the optimizer has none for such groups; put 'rule' into the "
                    "group or pass rule= to the optimizer"
                )
            group["rule"] = self._module(rule)
            self._check_group(group)
        except Exception:
            self.param_groups.pop()
            group["rule"] = rule
            raise

    def _module(self, rule: CoordinatewiseLSTM | str | os.PathLike[str]) -> CoordinatewiseLSTM:
        """``rule`` as a module; one for all groups that name the same, so that it is prepared once."""
        module = as_rule(rule)
        if module is rule:
            return module
        for known in self._loaded:
            if fingerprint(known) == fingerprint(module) and known.output.weight.dtype == module.output.weight.dtype:
                return known
        self._loaded.append(module)
        return module

    def _check_group(self, group: dict[str, Any]) -> None:
        read_options(group)
        if len(set(group["params"])) != len(group["params"]):
            raise ValueError("a parameter occurs twice in one parameter group; list it once")
        rule = self._sync_rules()[-1]
        for param in group["params"]:
            if param.dtype not in _PARAM_DTYPES:
                remedy = "optimize torch.view_as_real of it" if param.is_complex() else "convert it first"
                raise TypeError(
                    f"parameters must be float32, float16, bfloat16 or float64, got {param.dtype} for one of shape "
                    f"{tuple(param.shape)}; {remedy}"
                )
            if param.layout != torch.strided:
                raise TypeError(f"parameters must be dense, got layout {param.layout}; call .to_dense() first")
            if torch._debug_has_internal_overlap(sharding.local_param(param)) == 1:
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} and strides {param.stride()} shares memory between its "
                    "elements; make it contiguous first"
                )
            rule.runner(param.device, param.dtype)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # The compiler would find one call that it can't see into, and much Python around it that it need not trace.
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, and its state, in place.

        A first step with a learning rate of 0 and gradients that are all 0 makes the states and counts for nothing:
        so ``torch.distributed.checkpoint`` has an optimizer make them.

        Args:
            closure: evaluates the model again, calls ``backward`` and returns the loss.

        Returns:
            What ``closure`` returned.

        Raises:
            TypeError: if a gradient is sparse.
            TypeError, ValueError: if an option of a group is of the wrong kind or out of range.
            RuntimeError: if a parameter's device or size is not that of its state or gradient, or a CUDA graph
                captures random rounding. On any of these errors nothing has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        batches: list[Batch] = []
        stepped: list[dict[str, Any]] = []
        entries: dict[Tensor, dict[str, Any]] = {}
        groups = zip(self.param_groups, self._sync_rules(), strict=True)
        for number, (group, rule) in enumerate(groups, start=self._first_group):
            batch_of = partial(self._batch, number, rule, read_options(group))
            found = self._gather(group["params"], batch_of, entries)
            if found:
                batches += found
                stepped.append(group)
        # Everything has been checked and nothing changed so far.
        makes_states = self._may_rest and not self.state and _makes_states(batches)
        for param, entry in entries.items():
            self.state[param].update(entry)
        if makes_states:
            return loss
        step_all(batches)
        for group in stepped:
            group["step"] += 1
        return loss

    def _batch(
        self, number: int, rule: PreparedRule, options: Options, device: torch.device, dtype: torch.dtype
    ) -> Batch:
        """A batch, empty yet, for parameters of one device and dtype in a group."""
        randomly = options.rounding is not None and dtype in ROUNDED
        if options.limit is None and not randomly:
            return Batch(rule.runner(device, dtype), options, dtype)
        wide = torch.float32 if dtype in ROUNDED else dtype
        workspace = self._workspaces.setdefault((number, device, dtype), Workspace())
        return StagedBatch(rule.runner(device, wide), options, wide, number, workspace)

    def _gather(
        self,
        params: list[Tensor],
        batch_of: Callable[[torch.device, torch.dtype], Batch],
        entries: dict[Tensor, dict[str, Any]],
    ) -> list[Batch]:
        """The parameters that have a gradient, by device and dtype; entries of the state to renew go to ``entries``.

        For small tensors this loop costs as much as the arithmetic, so it asks only what may change from
        step to step. That a gradient has the shape and device of its parameter is PyTorch's promise as
        long as the parameter stays what it was, which an entry remembers; else :meth:`_entry` checks.
        """
        batches: dict[tuple[torch.device, torch.dtype], Batch] = {}
        state = self.state
        device: torch.device | None = None
        dtype: torch.dtype | None = None
        plain, sharded = nn.Parameter, sharding.types()
        for param in params:
            grad = param.grad
            if grad is None:
                continue
            own = param  # what this process holds of it
            if type(param) is not plain and isinstance(param, sharded):
                own, grad = sharding.local_pair(param, grad)
            if own.dtype is not dtype or own.device != device:
                device, dtype = own.device, own.dtype
                if (device, dtype) not in batches:
                    batches[device, dtype] = batch_of(device, dtype)
                batch = batches[device, dtype]
                layout = batch.runner.layout
            entry = state.get(param)
            if (
                entry is None
                or entry.get("layout") is not layout
                or entry["shape"] != own.shape
                or entry["id"] != id(entry["lstm"])
            ):
                entry = entries[param] = self._entry(own, grad, entry, batch.runner)
            if own is not param:
                batch.sharded[len(batch.params)] = cast(Any, param)
            batch.states.append(entry["lstm"])
            if (
                type(grad) is Tensor
                and own.is_contiguous()
                and grad.is_contiguous()
                and grad.dtype is dtype
                and not grad.is_neg()
            ):
                batch.params.append(own)
                batch.grads.append(grad)
            else:
                batch.add_as_copies(own, grad)
        return list(batches.values())

    def _entry(self, param: Tensor, grad: Tensor, entry: dict[str, Any] | None, runner: Runner) -> dict[str, Any]:
        """The state of ``param`` as its runner takes it: a new one, or the one in ``entry``, repacked if need be."""
        backend, _, layout = runner
        sharding.check_plain(param, grad)
        if grad.shape != param.shape or grad.device != param.device:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} on {param.device} has a gradient of shape "
                f"{tuple(grad.shape)} on {grad.device}; call zero_grad() after replacing a parameter's data"
            )
        if entry and "lstm" in entry:
            packed = self._kept(param, entry, runner)
        else:
            packed = backend.init_state(param.numel(), layout.spec, self.state_dtype, param.device)
        return {"lstm": packed, "layout": layout, "shape": param.shape, "id": id(packed)}

    def _kept(self, param: Tensor, entry: dict[str, Any], runner: Runner) -> Tensor:
        """The packed state in ``entry``, in the layout of ``runner``."""
        backend, _, layout = runner
        _check_shape(param, entry)
        if entry["lstm"].device != param.device:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} is on {param.device} but its state is on "
                f"{entry['lstm'].device}; take state_dict() before moving the model and load it afterwards"
            )
        if entry["id"] != id(entry["lstm"]):
            raise RuntimeError(
                "the packed state of a parameter was replaced in optimizer.state; its layout, size and dtype are "
                "private, so change it through state_dict() and load_state_dict()"
            )
        if entry["layout"].spec.hidden_size != layout.spec.hidden_size:
            raise RuntimeError(
                f"the state of a parameter of shape {tuple(param.shape)} is of a rule of "
                f"{entry['layout'].spec.hidden_size} hidden units, but the rule of its group has "
                f"{layout.spec.hidden_size}; to start it afresh under another rule, del optimizer.state[param]"
            )
        if entry["layout"].backend == layout.backend and entry["lstm"].dtype == self.state_dtype:
            return cast(Tensor, entry["lstm"])
        return backend.pack_state(self._unpack(entry), self.state_dtype)

    def _pack(self, param: Tensor, state: Tensor, rule: PreparedRule) -> dict[str, Any]:
        """The entry of ``param`` in ``self.state`` for a state ``[*param.shape, 2, 2, H]``."""
        own, state = sharding.local_param(param), sharding.local_state(param, state)
        backend, _, layout = rule.runner(own.device, own.dtype)
        flat = state.detach().to(own.device).reshape(own.numel(), 2, 2, layout.spec.hidden_size)
        packed = backend.pack_state(flat, self.state_dtype)
        # The same layout but another object: the next step checks the parameter and its gradient once.
        return {"lstm": packed, "layout": copy.copy(layout), "shape": own.shape, "id": id(packed)}

    def _unpack(self, entry: dict[str, Any]) -> Tensor:
        """The state in ``entry`` as ``[N, 2, 2, H]``, a copy."""
        layout: Layout = entry["layout"]
        return get(layout.backend).unpack_state(entry["lstm"], entry["shape"].numel(), layout.spec)

    def _public(self, param: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
        """An entry of ``self.state`` with the state as ``[*param.shape, 2, 2, H]``, a copy."""
        public = _without_packed(entry)
        if "lstm" in entry:
            own = sharding.local_param(param)
            _check_shape(own, entry)
            shape = (*own.shape, 2, 2, entry["layout"].spec.hidden_size)
            public["lstm"] = sharding.like_param(param, self._unpack(entry).view(shape))
        return public

    def _forget(self) -> None:
        """Start without what is made at need."""
        self._rules: dict[CoordinatewiseLSTM, PreparedRule] = {}
        self._loaded: list[CoordinatewiseLSTM] = []
        self._workspaces: dict[tuple[int, torch.device, torch.dtype], Workspace] = {}

    def _sync_rules(self) -> list[PreparedRule]:
        """The rule of every group, with its weights of the moment; rules that no group has any more are forgotten."""
        used: dict[CoordinatewiseLSTM, PreparedRule] = {}
        for group in self.param_groups:
            rule = group["rule"]
            if not isinstance(rule, CoordinatewiseLSTM):
                raise TypeError(
                    "the rule of a parameter group must be a CoordinatewiseLSTM once the group has been added, got "
                    f"{rule!r}; set it to l2l_fast.load_rule(name) or CoordinatewiseLSTM.load(path)"
                )
            if rule not in used:
                used[rule] = self._rules.get(rule) or PreparedRule(rule, self.backend)
                used[rule].sync()
        self._rules = used
        return [used[group["rule"]] for group in self.param_groups]

    @torch.no_grad()
    def convert_state(self, state_dtype: torch.dtype) -> None:
        """Store the state as ``state_dtype`` from now on, what there is of it rounded to nearest, in place.

        Args:
            state_dtype: float32, float16, bfloat16 or int8.

        Raises:
            TypeError: if it is another dtype.
            ValueError: if a number of the state is too large for it; nothing has changed then, on this rank: of sharded
                parameters each rank judges what it holds.
        """
        self._check_conversion(state_dtype)
        for entry in self.state.values():
            if "lstm" in entry:
                layout: Layout = entry["layout"]
                packed = get(layout.backend).pack_state(self._unpack(entry), state_dtype)
                entry.update(lstm=packed, layout=copy.copy(layout), id=id(packed))
        self._state_dtype = state_dtype

    def _check_conversion(self, state_dtype: torch.dtype) -> None:
        check_state_dtype(state_dtype)
        for param, entry in self.state.items():
            if "lstm" not in entry:
                continue
            state = self._unpack(entry)
            if overflows(state_dtype, state):
                raise ValueError(
                    f"the state of a parameter of shape {tuple(param.shape)} reaches {state.abs().max()}, too large "
                    f"for {state_dtype}; keep {self.state_dtype}"
                )

    def state_dict(self) -> StateDict:
        """Groups and state as in ``torch.optim``; states ``[*param.shape, 2, 2, H]`` are copies.

        Moves between backends, devices and, as every state has the leading dimensions of its parameter,
        between shardings.
        """

        def publish(_: torch.optim.Optimizer, state_dict: StateDict) -> StateDict:
            params = dict(enumerate(chain.from_iterable(group["params"] for group in self.param_groups)))
            rules = [fingerprint(group["rule"]) for group in self.param_groups]
            return {
                "state": {
                    key: self._public(params[key], entry) if key in params else entry
                    for key, entry in state_dict["state"].items()
                },
                "param_groups": [
                    {**group, "rule": rule} for group, rule in zip(state_dict["param_groups"], rules, strict=True)
                ],
            }

        # Ahead of the user's hooks, which see the public layout.
        with for_one_call(self.register_state_dict_post_hook(publish, prepend=True)):
            return super().state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take groups and state from a :meth:`state_dict`; the state keeps ``state_dtype``.

        Raises:
            TypeError: if a state is not a tensor, or of a dtype that ``state_dtype`` can't hold exactly.
            ValueError: if the groups differ in number or size, the rule is another one, or a state has
                another shape than its parameter asks for. On any error the optimizer is as before. Of sharded
                parameters each rank judges what it holds.
        """
        entries: dict[Tensor, dict[str, Any]] = {}

        rules = [group["rule"] for group in self.param_groups]

        def take(_: torch.optim.Optimizer, state_dict: StateDict) -> StateDict:
            params = checked_params(state_dict, self.param_groups, self._sync_rules())
            rest = {}
            for key, entry in state_dict["state"].items():
                if key not in params:
                    rest[key] = entry
                    continue
                param, rule = params[key]
                if has_state(key, entry, param, rule.rule.spec, self.state_dtype):
                    entries[param] = self._pack(param, entry["lstm"], rule)
                rest[key] = _without_packed(entry)
            return {**state_dict, "state": rest}

        def install(_: torch.optim.Optimizer) -> None:
            for group, rule in zip(self.param_groups, rules, strict=True):
                group["rule"] = rule  # the state dict has no more than its fingerprint
            for param, entry in entries.items():
                self.state[param].update(entry)

        # The base class would convert states to the dtype of their parameter, so they go around it: taken
        # out after the user's hooks have had their say, put in before the hooks that look at the result.
        with for_one_call(
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(install, prepend=True),
        ):
            super().load_state_dict(state_dict)

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
            "backend": self.backend,
            "_state_dtype": self.state_dtype,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for option, off in OFF.items():
                group.setdefault(option, off)
        if "backend" in state:  # a pickle or a deep copy; load_state_dict passes no more than groups and state
            self._forget()
            for group, rule in zip(self.param_groups, self._sync_rules(), strict=True):
                for param in group["params"]:
                    entry = self.state.get(param, {})
                    if "lstm" in entry:
                        entry.update(self._pack(param, entry["lstm"], rule))


@contextmanager
def for_one_call(*hooks: RemovableHandle) -> Iterator[None]:
    """Take hooks away again after the call that they were registered for."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _makes_states(batches: list[Batch]) -> bool:
    """Whether a first step has nothing to do but to make the states."""
    if any(batch.options.backend["lr"] for batch in batches):
        return False
    rests = [batch.rests() for batch in batches]  # of all, as ranks may have to take part in each answer
    return all(rests)


def _check_shape(param: Tensor, entry: dict[str, Any]) -> None:
    if entry["shape"] != param.shape:
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} has a state for shape {tuple(entry['shape'])}; to start it "
            "afresh after replacing its data, del optimizer.state[param]"
        )


def _without_packed(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of the state less what :class:`LearnedOptimizer` keeps there."""
    return {key: value for key, value in entry.items() if key not in ("lstm", "layout", "shape", "id")}

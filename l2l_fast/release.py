"""The update inside the backward: every parameter is stepped as its gradient arrives, and the gradient is freed."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any, NoReturn, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT, StateDict

from l2l_fast import sharding
from l2l_fast.optim import LearnedOptimizer, for_one_call
from l2l_fast.options import OFF
from l2l_fast.rule import CoordinatewiseLSTM, as_rule


class OptimizerInBackward(torch.optim.Optimizer):
    """What :func:`optimizer_in_backward` returns: the handle of updates that ``backward()`` makes by itself.

    Schedulers, ``zero_grad``, ``add_param_group`` and checkpoints work on it as on any optimizer. Every parameter
    is a group of its own in ``param_groups``; its options count from the next backward on. Copies and pickles are
    refused, as they would not take the hooks along.
    """

    def __init__(
        self, params: ParamsT, rule: CoordinatewiseLSTM | str | os.PathLike[str], options: dict[str, Any]
    ) -> None:
        self.rule = as_rule(rule)
        self._places: list[tuple[weakref.ref[nn.Module], str, Tensor]] = []
        self._options = options
        self._singles: list[LearnedOptimizer] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        try:
            super().__init__(params, {})
        except Exception:
            self.remove()
            raise

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the parameters of a group, each as a group of its own with the group's options; all of them or none.

        Raises:
            TypeError, ValueError, RuntimeError: as :class:`LearnedOptimizer` does.
        """
        whole = LearnedOptimizer([dict(param_group)], self.rule, **self._options).param_groups[0]
        _check_norm(whole)
        for param in whole["params"]:
            if not param.requires_grad:
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} requires no gradient, so no backward reaches it; leave "
                    "it out"
                )
        known = {param for group in self.param_groups for param in group["params"]}
        if not known.isdisjoint(whole["params"]):
            raise ValueError("some parameters appear in more than one parameter group")
        own = {key: value for key, value in param_group.items() if key not in ("params", "param_names")}
        names = whole.get("param_names")
        for index, param in enumerate(whole["params"]):
            named = param if names is None else (names[index], param)
            single = LearnedOptimizer([{**_cloned(own), "params": [named]}], self.rule, **_cloned(self._options))
            single._first_group = len(self._singles)
            hook = self._hook(len(self._singles))
            self._singles.append(single)
            self._handles.append(param.register_post_accumulate_grad_hook(hook))
        self._share_groups()

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        # Garbage collection can't see into the hooks of a tensor, so a strong reference would keep model and state.
        reference = weakref.ref(self)

        def update(param: Tensor) -> None:
            optimizer = reference()
            if optimizer is None:
                raise RuntimeError(
                    "what optimizer_in_backward returned is gone, and the state with it; keep it as long as the model "
                    "is trained, or call its remove() when it has done its work"
                )
            if param.grad is None:
                raise RuntimeError(
                    f"the gradient of a parameter of shape {tuple(param.shape)} was taken before its update: another "
                    "hook frees it too. Call remove() of the first optimizer_in_backward before making a second"
                )
            optimizer._step_one(index, in_backward=True)

        return update

    def _step_one(self, index: int, *, in_backward: bool) -> None:
        single = self._singles[index]
        # A gradient of 0 among others that are not does not make this a step that only makes states.
        single._may_rest = not in_backward
        _check_norm(single.param_groups[0])
        (param,) = single.param_groups[0]["params"]
        single.step()
        param.grad = None
        self.state[param] = single.state[param]

    def _share_groups(self) -> None:
        """The groups here are those of the single optimizers, so that a change of an option reaches them."""
        self.param_groups = [single.param_groups[0] for single in self._singles]

    __repr__ = LearnedOptimizer.__repr__

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update what still has a gradient, as one that was set by hand; after a backward that is nothing.

        So a training loop may stay as it is, and ``torch.distributed.checkpoint`` can have the states made.

        Args:
            closure: evaluates the model again, calls ``backward`` and returns the loss.

        Returns:
            What ``closure`` returned.
        """
        self._check_places()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._handles:
            for index, single in enumerate(self._singles):
                if any(param.grad is not None for param in single.param_groups[0]["params"]):
                    self._step_one(index, in_backward=False)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in ``torch.optim``; after a backward there is nothing to do."""
        self._check_places()
        super().zero_grad(set_to_none)

    def _watch(self, model: nn.Module) -> None:
        """Note where in ``model`` the parameters are that are not sharded yet."""
        self._places = [
            (weakref.ref(module), name, param)
            for module in model.modules()
            for name, param in module.named_parameters(recurse=False)
            if param.requires_grad and not sharding.is_sharded(param)
        ]

    def _check_places(self) -> None:
        """Refuse to go on where the model has been sharded since: its parameters are others now, without hooks."""
        if not self._handles:
            return
        for reference, name, param in self._places:
            module = reference()
            if module is not None and sharding.is_sharded(module._parameters.get(name)):
                raise RuntimeError(
                    f"the parameter {name!r} of shape {tuple(param.shape)} was sharded after optimizer_in_backward, so "
                    "that no backward updates it any more; call fully_shard or parallelize_module first, then "
                    "optimizer_in_backward"
                )

    @property
    def state_dtype(self) -> torch.dtype:
        """How states are stored between steps; :meth:`convert_state` changes it."""
        return self._singles[0].state_dtype

    def convert_state(self, state_dtype: torch.dtype) -> None:
        """:meth:`LearnedOptimizer.convert_state` for every parameter."""
        for single in self._singles:
            single._check_conversion(state_dtype)
        for single in self._singles:
            single.convert_state(state_dtype)
        self._options = {**self._options, "state_dtype": state_dtype}

    def remove(self) -> None:
        """Let ``backward()`` keep the gradients again and update nothing; the state stays to be saved."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def state_dict(self) -> StateDict:
        """State and groups in the form of a :class:`LearnedOptimizer` that has a group for every parameter.

        States ``[*param.shape, 2, 2, H]`` are copies.
        """

        def fill(_: torch.optim.Optimizer, state_dict: StateDict) -> StateDict:
            self._check_places()
            parts = [single.state_dict() for single in self._singles]
            return {
                "state": {key: part["state"][0] for key, part in enumerate(parts) if part["state"]},
                "param_groups": [{**part["param_groups"][0], "params": [key]} for key, part in enumerate(parts)],
            }

        # Ahead of the user's hooks, as in LearnedOptimizer.
        with for_one_call(self.register_state_dict_post_hook(fill, prepend=True)):
            return super().state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take groups and state from a :meth:`state_dict`.

        Raises:
            TypeError, ValueError: as :meth:`LearnedOptimizer.load_state_dict` does, also if the groups are not one
                for every parameter. On any error everything is as before.
        """
        loaded: list[LearnedOptimizer] = []

        def take(_: torch.optim.Optimizer, state_dict: StateDict) -> StateDict:
            # Checks the groups as a whole; a fresh optimizer for every parameter then takes its part.
            groups = [{"params": group["params"], "rule": group["rule"]} for group in self.param_groups]
            stateless = {key: {} if key == "state" else value for key, value in state_dict.items()}
            LearnedOptimizer([dict(group) for group in groups], self.rule, **self._options).load_state_dict(stateless)
            for group in state_dict["param_groups"]:
                _check_norm({**OFF, **group})
            for single, group in zip(groups, state_dict["param_groups"], strict=True):
                (key,) = group["params"]
                fresh = LearnedOptimizer([dict(single)], self.rule, **self._options)
                fresh._first_group = len(loaded)
                state = {0: state_dict["state"][key]} if key in state_dict["state"] else {}
                fresh.load_state_dict({"state": state, "param_groups": [{**group, "params": [0]}]})
                loaded.append(fresh)
            return {**state_dict, "state": {}}

        def install(_: torch.optim.Optimizer) -> None:
            self._singles[:] = loaded
            self._share_groups()
            for single in loaded:
                self.state.update(single.state)

        with for_one_call(
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(install, prepend=True),
        ):
            super().load_state_dict(state_dict)

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "an optimizer in the backward can't be copied or pickled, as its hooks sit on the parameters; save its "
            "state_dict() and load it into optimizer_in_backward(copy_of_the_model, ...)"
        )


def _check_norm(group: dict[str, Any]) -> None:
    if group["update_norm"] == "global" and group["max_update_norm"] is not None:
        raise ValueError(
            "update_norm='global' limits all updates together, which here come one after the other; use "
            "update_norm='tensor'"
        )


def _cloned(options: dict[str, Any]) -> dict[str, Any]:
    """With tensors of their own: a scheduler changes a tensor ``lr`` in place, once for every group."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in options.items()}


def optimizer_in_backward(
    model: nn.Module, rule: CoordinatewiseLSTM | str | os.PathLike[str], **options: Any
) -> OptimizerInBackward:
    """Let ``loss.backward()`` train ``model``: every parameter is updated as its gradient arrives, which is then freed.

    So the gradients of a model are never in memory all at once; parameters come out as from
    ``LearnedOptimizer(...).step()`` after the backward, bit for bit. Whatever needs all gradients before the update
    is out of reach: their accumulation over several backwards, clipping by their common norm, ``GradScaler``,
    averaging over processes by ``DistributedDataParallel``. Random rounding is that of groups of one parameter each.
    Shard a model first: ``fully_shard`` puts other parameters into it, which this would not update. ``step``,
    ``zero_grad`` and ``state_dict`` of the handle notice that, a loop of nothing but backwards does not.

    Args:
        model: its parameters that require a gradient are changed in place by every backward through them.
        rule: as for :class:`LearnedOptimizer`.
        options: as for :class:`LearnedOptimizer`.

    Returns:
        The handle for schedulers and checkpoints, which holds the state: keep it as long as the model is trained.
        Its :meth:`~OptimizerInBackward.remove` ends it.

    Raises:
        TypeError: if ``model`` is not a module, or an option is of the wrong kind.
        ValueError: if the model has no parameter that requires a gradient, or averages gradients over processes.

    Source: ``torch.Tensor.register_post_accumulate_grad_hook``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimizer_in_backward takes the module that it trains, got {type(model).__name__}")
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "DistributedDataParallel averages gradients after the hooks that would use them here; shard the model with "
            "torch.distributed.fsdp.fully_shard, or use LearnedOptimizer"
        )
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not trained:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient, so there is nothing to do")
    optimizer = OptimizerInBackward(trained, rule, options)
    optimizer._watch(model)
    return optimizer

"""What a state dict must be for :class:`l2l_fast.LearnedOptimizer` to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from l2l_fast import sharding
from l2l_fast.options import OFF, read_options
from l2l_fast.prepared import PreparedRule, fingerprint
from l2l_fast.spec import RuleSpec
from l2l_fast.storage import holds


def checked_params(
    state_dict: Mapping[str, Any], own_groups: Sequence[Mapping[str, Any]], rules: Sequence[PreparedRule]
) -> dict[Any, tuple[Tensor, PreparedRule]]:
    """Parameters and their rules by their key in ``state_dict``, after its groups have been checked.

    Args:
        own_groups: parameter groups of the optimizer that loads.
        rules: one for each of them.

    Raises:
        TypeError, ValueError: if the groups are not as many, as large or of the same rules, or an option is wrong.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f"an optimizer's state dict has the keys 'state' and 'param_groups', got {sorted(map(str, state_dict))}"
        )
    groups = state_dict["param_groups"]
    sizes = [len(group["params"]) for group in own_groups]
    found = [len(group["params"]) for group in groups]
    if found != sizes:
        raise ValueError(
            f"the state dict has parameter groups of {found} parameters, this optimizer of {sizes}; build it "
            "with the same groups"
        )
    for number, (group, rule) in enumerate(zip(groups, rules, strict=True)):
        runs = fingerprint(rule.rule)
        if group.get("rule") != runs:
            raise ValueError(
                f"group {number} of the state dict was written with the rule "
                f"[{group.get('rule', 'none: by another optimizer')}], this optimizer runs [{runs}]; build it "
                "with the rule of the checkpoint or start afresh"
            )
        missing = {"lr", "weight_decay"} - group.keys()
        if missing:
            raise ValueError(f"group {number} of the state dict lacks {', '.join(sorted(missing))}")
        read_options({**OFF, **group})
    keys = chain.from_iterable(group["params"] for group in groups)
    params = [(param, rule) for group, rule in zip(own_groups, rules, strict=True) for param in group["params"]]
    return dict(zip(keys, params, strict=True))


def has_state(key: Any, entry: Any, param: Tensor, spec: RuleSpec, state_dtype: torch.dtype) -> bool:
    """Whether an entry of a state dict has a state of ``param`` under its rule, rather than nothing at all.

    Raises:
        TypeError: if it is no dictionary, or its state no dense tensor that ``state_dtype`` can hold exactly.
        ValueError: if it has something but no state, or one of another shape or placement than ``param`` asks for.
    """
    if not isinstance(entry, Mapping):
        raise TypeError(f"the entry of parameter {key} must be a dictionary, got {type(entry).__name__}")
    if not entry:
        return False
    if "lstm" not in entry:
        raise ValueError(
            f"the state of parameter {key} has {', '.join(map(repr, entry))} but no 'lstm', the state of the rule; "
            "take the entry out to start the parameter afresh"
        )
    state = entry["lstm"]
    if not isinstance(state, Tensor):
        raise TypeError(f"the state of parameter {key} must be a tensor, got {type(state).__name__}")
    expected = (*param.shape, 2, 2, spec.hidden_size)
    if tuple(state.shape) != expected:
        raise ValueError(
            f"the state of parameter {key} must have shape {expected} for a parameter of shape {tuple(param.shape)}, "
            f"got {tuple(state.shape)}; build the model of the checkpoint"
        )
    if state.layout != torch.strided or state.is_meta:
        raise TypeError(
            f"the state of parameter {key} must be dense and in memory, got {state.layout} on {state.device}"
        )
    if not holds(state_dtype, state.to_local() if sharding.is_sharded(state) else state):
        hint = " (an int8 state is bfloat16 here, with numbers of at most 7 bits)" if state_dtype == torch.int8 else ""
        raise TypeError(
            f"the state of parameter {key} is {state.dtype}, which state_dtype={state_dtype} can't hold exactly{hint}; "
            f"build the optimizer with the checkpoint's dtype, load, and call convert_state({state_dtype}) if digits "
            "may go"
        )
    sharding.check_state(key, param, state)
    return True

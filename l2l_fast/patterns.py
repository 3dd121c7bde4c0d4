"""Parameters of a module sorted by patterns on their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

_T = TypeVar("_T")

_SHOWN = 10


def groups_by_pattern(model: nn.Module, rules: Mapping[str, _T]) -> list[tuple[_T, list[tuple[str, nn.Parameter]]]]:
    """For every pattern its rule and the named parameters it is the first to match, in the order of ``rules``.

    A pattern may match the name as it is, or less the ``_orig_mod.`` that ``torch.compile`` puts into it.

    Raises:
        TypeError: if ``model`` is no module or ``rules`` no mapping of patterns.
        ValueError: if there are no patterns or no parameters, a pattern is left without a parameter, or a parameter
            is matched by none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"from_module takes a module, got {type(model).__name__}")
    if not isinstance(rules, Mapping) or not all(isinstance(pattern, str) for pattern in rules):
        raise TypeError(f"rules must map patterns on names to rules, such as {{'*': 'mnist'}}, got {rules!r}")
    if not rules:
        raise ValueError("rules names no pattern; {'*': rule} gives all parameters one rule")
    named = list(model.named_parameters())
    if not named:
        raise ValueError(f"the {type(model).__name__} has no parameters")
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {pattern: [] for pattern in rules}
    missed = []
    for name, param in named:
        pattern = next((pattern for pattern in rules if _matches(name, pattern)), None)
        if pattern is None:
            missed.append(name)
        else:
            groups[pattern].append((name, param))
    if missed:
        raise ValueError(
            f"no pattern of {_listed(rules)} matches the parameters {_listed(missed)}; add one for them, '*' comes last"
        )
    empty = [pattern for pattern, found in groups.items() if not found]
    if empty:
        names = [name for name, _ in named]
        shadowed = [pattern for pattern in empty if any(_matches(name, pattern) for name in names)]
        reason = (
            f"earlier patterns take all parameters that {_listed(shadowed)} matches; put narrow patterns first"
            if shadowed
            else f"the parameters are {_listed(names)}"
        )
        raise ValueError(f"the patterns {_listed(empty)} are left without a parameter: {reason}")
    return [(rule, groups[pattern]) for pattern, rule in rules.items()]


def _matches(name: str, pattern: str) -> bool:
    uncompiled = ".".join(part for part in name.split(".") if part != "_orig_mod")
    return fnmatchcase(name, pattern) or fnmatchcase(uncompiled, pattern)


def _listed(names: Iterable[str]) -> str:
    quoted = [repr(name) for name in names]
    more = len(quoted) - _SHOWN
    return ", ".join(quoted[:_SHOWN]) + (f" and {more} more" if more > 0 else "")

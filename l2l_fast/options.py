"""What a parameter group may ask for, checked."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor

_SCOPES = ("tensor", "global")

# What a group does not say; groups of older checkpoints do not say it either.
OFF: dict[str, Any] = {
    "maximize": False,
    "skip_nonfinite": False,
    "warmup": 0,
    "max_update_norm": None,
    "update_norm": "tensor",
    "stochastic_rounding": False,
    "rounding_seed": 0,
    "step": 0,
}


class Options(NamedTuple):
    """What a group asks for at its next step.

    Attributes:
        backend: keyword arguments of a backend's ``step_``.
        limit: how far a tensor, or all of them, may move; ``None`` for any distance.
        joint: whether ``limit`` is for all tensors together.
        rounding: seed of random rounding and number of the step; ``None`` for rounding to nearest.
    """

    backend: dict[str, Any]
    limit: float | None
    joint: bool
    rounding: tuple[int, int] | None


def read_options(group: dict[str, Any]) -> Options:
    """The options of ``group`` for its next step.

    Raises:
        TypeError, ValueError: if one is of the wrong kind or out of range.
    """
    lr, step, warmup = _nonnegative("lr", group["lr"]), _count("step", group["step"]), _count("warmup", group["warmup"])
    if step < warmup:
        lr *= (step + 1) / warmup
    if group["update_norm"] not in _SCOPES:
        raise ValueError(
            f"update_norm must be 'tensor' (max_update_norm is for each tensor) or 'global' (for all tensors "
            f"together), got {group['update_norm']!r}"
        )
    seed = _count("rounding_seed", group["rounding_seed"])
    return Options(
        {
            "lr": lr,
            "weight_decay": _nonnegative("weight_decay", group["weight_decay"]),
            "maximize": _flag("maximize", group["maximize"]),
            "skip_nonfinite": _flag("skip_nonfinite", group["skip_nonfinite"]),
        },
        None if group["max_update_norm"] is None else _limit(group["max_update_norm"]),
        group["update_norm"] == "global",
        (seed, step) if _flag("stochastic_rounding", group["stochastic_rounding"]) else None,
    )


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


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value


def _limit(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"max_update_norm must be a number or None, got {value!r}")
    limit = float(value)
    if not 0 < limit < math.inf:
        raise ValueError(f"max_update_norm must be finite and positive, got {value}; None sets no limit")
    return limit

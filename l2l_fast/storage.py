"""The dtypes in which a state is stored between steps, and what fits into which."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STATE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


def check_state_dtype(state_dtype: Any) -> None:
    """Raises TypeError if ``state_dtype`` is none."""
    if state_dtype not in STATE_DTYPES:
        raise TypeError(f"state_dtype must be one of {', '.join(map(str, STATE_DTYPES))}, got {state_dtype!r}")


def public_dtype(state_dtype: torch.dtype) -> torch.dtype:
    """That of a state ``[N, 2, 2, H]`` as a backend hands it out; it has all numbers of the stored one."""
    return torch.bfloat16 if state_dtype == torch.int8 else state_dtype


def holds(state_dtype: torch.dtype, state: Tensor) -> bool:
    """Whether all digits of a public ``state`` have room in ``state_dtype``.

    In int8 they have if none has more digits than its seven bits; in which company they lie is not asked, for that
    changes when a parameter is sharded anew, and then numbers are rounded to what their new company shares.
    """
    if state_dtype != torch.int8:
        is_public = state.dtype in {public_dtype(dtype) for dtype in STATE_DTYPES}
        return is_public and torch.promote_types(state.dtype, state_dtype) == state_dtype
    if state.dtype != torch.bfloat16:
        return False
    last_digits = state.contiguous().view(torch.int16).bitwise_and(1)
    return not bool((last_digits.bool() & state.isfinite()).any())


def overflows(state_dtype: torch.dtype, state: Tensor) -> bool:
    """Whether a finite number of ``state`` is too large for ``state_dtype``, or an infinite one for int8."""
    if state_dtype == torch.int8:
        return bool(state.isinf().any())
    stored = state.to(public_dtype(state_dtype))
    return bool((state.isfinite() & ~stored.isfinite()).any())

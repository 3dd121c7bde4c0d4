"""The yardstick of every numerical test: float64 says what is right, float32 eager how right is possible."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float32).eps
# Subnormal operands and results may count as zero: what a sum of a thousand of them may lack.
FLUSHED = 1000 * torch.finfo(torch.float32).tiny


def _first(mask: Tensor) -> tuple[int, ...]:
    """Index of the first true element."""
    return tuple(int(index[0]) for index in mask.nonzero(as_tuple=True))


def assert_as_good_as_eager(name: str, actual: Tensor, eager32: Tensor, exact64: Tensor, factor: float = 2.0) -> None:
    """Assert that ``actual`` is at most ``factor`` times as wrong as float32 eager, plus one ulp of the scale.

    Wrong is the largest absolute difference to ``exact64``, the scale is the largest magnitude in it. Elements
    that float32 can't hold as finite numbers (NaN, infinite) must come out as just that.

    Args:
        name: what is compared, for the message.
        actual: the tensor under test, any floating dtype.
        eager32: the same computed by PyTorch in float32.
        exact64: the same computed in float64.
        factor: how many times eager's error is allowed.

    Raises:
        AssertionError: if it is worse, with where and by how much; or if eager has lost numbers that exist.
    """
    assert exact64.dtype == torch.float64, f"{name}: the oracle must be float64, got {exact64.dtype}"
    assert eager32.dtype == torch.float32, f"{name}: the yardstick must be float32, got {eager32.dtype}"
    assert actual.shape == eager32.shape == exact64.shape, (
        f"{name}: shapes differ: {tuple(actual.shape)}, eager {tuple(eager32.shape)}, exact {tuple(exact64.shape)}"
    )
    rounded = exact64.float()
    finite = rounded.isfinite()
    actual, eager32 = actual.double(), eager32.double()

    wrong = ~torch.where(finite, actual.isfinite(), (actual == rounded) | (actual.isnan() & rounded.isnan()))
    if wrong.any():
        at = _first(wrong)
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements differ in being finite, infinite or NaN; "
            f"first at {at}: {actual[at].item()}, expected {exact64[at].item()}"
        )
    if not finite.any():
        return
    lost = finite & ~eager32.isfinite()
    assert not lost.any(), f"{name}: float32 eager is not finite at {_first(lost)}, so it is no yardstick for this case"

    error = torch.where(finite, (actual - exact64).abs(), 0.0)
    eager_error = torch.where(finite, (eager32 - exact64).abs(), 0.0)
    scale = torch.where(finite, exact64.abs(), 0.0).max().item()
    bound = factor * eager_error.max().item() + EPSILON * scale + FLUSHED
    if error.max().item() > bound:
        at = _first(error == error.max())
        raise AssertionError(
            f"{name}: error {error.max().item():.3e} exceeds {bound:.3e} = {factor:g} x eager's "
            f"{eager_error.max().item():.3e} + 1 ulp of {scale:.3e}; at {at}: {actual[at].item():.9g}, "
            f"expected {exact64[at].item():.9g}, eager {eager32[at].item():.9g}"
        )


def in_storage(state: Tensor, dtype: torch.dtype) -> Tensor:
    """What is read back of ``state [N, ...]`` after it has been stored as ``dtype``: bfloat16 for int8."""
    return in_int8(state)[0] if dtype == torch.int8 else state.to(dtype)


def in_int8(state: Tensor) -> tuple[Tensor, Tensor]:
    """What is read back of ``state [N, ...]`` in bfloat16, and the steps ``[N, ...]`` between numbers it is made of."""
    values, steps = state.double().clone(), torch.zeros(state.shape, dtype=torch.float64)
    for start in range(0, len(values), 16):
        value, step = values[start : start + 16], steps[start : start + 16]
        finite = value.isfinite()
        _, exponent = np.frexp(torch.where(finite, value.abs(), 0).amax(0).numpy())
        step[:] = torch.from_numpy(np.ldexp(1.0, exponent - 7)).clamp(min=2.0**-126)
        value.copy_(torch.where(finite, (value / step).round().clamp(-127, 127) * step, torch.nan))
    return values.to(torch.bfloat16), steps


def ulps_apart(actual: Tensor, expected: Tensor) -> Tensor:
    """How many representable numbers of their 16-bit dtype lie between two tensors; NaN equals NaN."""
    assert actual.dtype == expected.dtype
    assert actual.element_size() == 2

    def ordinal(x: Tensor) -> Tensor:
        bits = x.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    both_nan = actual.isnan() & expected.isnan()
    return torch.where(both_nan, 0, (ordinal(actual) - ordinal(expected)).abs())

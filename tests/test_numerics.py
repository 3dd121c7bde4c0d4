"""The yardstick itself: it passes what it should and, above all, fails what it should."""

import pytest
import torch
from numerics import EPSILON, assert_as_good_as_eager, ulps_apart

EXACT = torch.tensor([1.0, -4.0, 0.25], dtype=torch.float64)
EAGER = EXACT.float() + torch.tensor([1e-5, 0.0, 0.0])


def test_accepts_up_to_the_bound() -> None:
    assert_as_good_as_eager("exact", EXACT.float(), EAGER, EXACT)
    assert_as_good_as_eager("twice eager's error, elsewhere", EXACT + torch.tensor([0.0, 0.0, 2e-5]), EAGER, EXACT)
    assert_as_good_as_eager("one ulp of the scale", EXACT + 0.99 * 4 * EPSILON, EXACT.float(), EXACT)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rejects_what_is_worse_and_says_where(sign: float) -> None:
    actual = EXACT + sign * torch.tensor([0.0, 0.0, 2.3e-5])
    with pytest.raises(AssertionError, match=r"update: error 2\.300e-05 exceeds 2\.\d+e-05 .*at \(2,\)"):
        assert_as_good_as_eager("update", actual, EAGER, EXACT)
    assert_as_good_as_eager("update", actual, EAGER, EXACT, factor=3.0)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_as_good_as_eager("one ulp too many", EXACT + 1.01 * 4 * EPSILON, EXACT.float(), EXACT)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_special_values_must_match_both_ways(special: float) -> None:
    exact = EXACT.clone()
    exact[1] = special
    assert_as_good_as_eager("same", exact.float(), exact.float(), exact)
    with pytest.raises(AssertionError, match=r"1 of 3 elements.*first at \(1,\)"):
        assert_as_good_as_eager("missing", EXACT.float(), exact.float(), exact)
    with pytest.raises(AssertionError, match=r"1 of 3 elements.*first at \(1,\)"):
        assert_as_good_as_eager("invented", exact.float(), EXACT.float(), EXACT)
    with pytest.raises(AssertionError, match="1 of 3 elements"):
        assert_as_good_as_eager("other sign or kind", torch.where(exact.isfinite(), exact, -1.0), exact.float(), exact)


def test_infinities_of_opposite_sign_differ() -> None:
    infinite = torch.tensor([float("inf")], dtype=torch.float64)
    with pytest.raises(AssertionError, match="expected inf"):
        assert_as_good_as_eager("sign", -infinite, infinite.float(), infinite)


def test_overflow_of_float32_counts_as_infinite() -> None:
    exact = torch.tensor([1e60, 1.0], dtype=torch.float64)
    assert_as_good_as_eager("overflow", exact.float(), exact.float(), exact)
    with pytest.raises(AssertionError, match="expected 1e\\+60"):
        assert_as_good_as_eager("overflow", torch.ones(2), exact.float(), exact)


def test_errors_next_to_special_values_are_still_seen() -> None:
    exact = torch.tensor([float("nan"), 1.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"at \(1,\)"):
        assert_as_good_as_eager("off", exact + 1e-3, exact.float(), exact)


def test_refuses_a_yardstick_that_is_none() -> None:
    with pytest.raises(AssertionError, match="no yardstick"):
        assert_as_good_as_eager("eager overflows", EXACT.float(), EAGER * float("inf"), EXACT)
    with pytest.raises(AssertionError, match="must be float64"):
        assert_as_good_as_eager("dtype", EXACT, EAGER, EXACT.float())
    with pytest.raises(AssertionError, match="must be float32"):
        assert_as_good_as_eager("dtype", EXACT, EXACT, EXACT)
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_as_good_as_eager("shape", EXACT[:2], EAGER, EXACT)


def test_accepts_empty_tensors() -> None:
    assert_as_good_as_eager("empty", EXACT[:0].float(), EAGER[:0], EXACT[:0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ulps_apart(dtype: torch.dtype) -> None:
    one, zero = torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)
    above = one + torch.finfo(dtype).eps
    tiny = torch.nextafter(zero, one) if dtype == torch.bfloat16 else torch.tensor([5.9604645e-08], dtype=dtype)
    assert ulps_apart(one, one).item() == 0
    assert ulps_apart(above, one).item() == 1
    assert ulps_apart(-tiny, tiny).item() == 2
    assert ulps_apart(-zero, zero).item() == 0
    assert ulps_apart(one * float("nan"), one * float("nan")).item() == 0
    assert ulps_apart(one * float("nan"), one).item() > 1000

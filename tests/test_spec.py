"""The specification of a rule as a value."""

from __future__ import annotations

import json
from typing import Any

import pytest

from l2l_fast import Identity, LogAndSign, RuleSpec


@pytest.mark.parametrize("p", [0.0, 1e-40, -1.0, float("nan"), float("inf"), 81.0])
def test_log_and_sign_refuses_what_has_no_meaning(p: float) -> None:
    with pytest.raises(ValueError, match=r"finite number in \[0.001, 80\].*the paper uses 10"):
        LogAndSign(p)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "at least 1, got 0"),
        ({"hidden_size": -3}, ValueError, "at least 1, got -3"),
        ({"hidden_size": 20.0}, TypeError, "must be an int, got float"),
        ({"hidden_size": True}, TypeError, "must be an int, got bool"),
        ({"output_scale": float("nan")}, ValueError, "must be finite, got nan"),
        ({"output_scale": float("inf")}, ValueError, "must be finite, got inf"),
        ({"preprocess": "log"}, TypeError, r"must be l2l_fast.LogAndSign\(p=...\).*got str"),
        ({"preprocess": LogAndSign}, TypeError, "got type"),
    ],
)
def test_refuses_what_has_no_meaning(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RuleSpec(**arguments)


def test_no_preprocessing_is_the_identity() -> None:
    assert RuleSpec(preprocess=None).preprocess == Identity()  # type: ignore[arg-type]
    assert RuleSpec(preprocess=None).log_p == 0.0  # type: ignore[arg-type]


def test_is_a_value() -> None:
    assert RuleSpec() == RuleSpec(20, LogAndSign(10.0), 0.1)
    assert hash(RuleSpec()) == hash(RuleSpec(20, LogAndSign(10.0), 0.1))
    assert RuleSpec() != RuleSpec(20, LogAndSign(5.0), 0.1)
    with pytest.raises(AttributeError):
        RuleSpec().hidden_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(("preprocess", "features"), [(LogAndSign(10.0), 2), (Identity(), 1)], ids=str)
@pytest.mark.parametrize("hidden_size", [1, 20])
def test_number_of_weights(hidden_size: int, preprocess: Any, features: int) -> None:
    spec = RuleSpec(hidden_size, preprocess)
    h = hidden_size
    assert spec.features == features
    assert spec.num_weights == 4 * h * (features + h + 1) + 4 * h * (h + h + 1) + h + 1


@pytest.mark.parametrize("spec", [RuleSpec(), RuleSpec(7, LogAndSign(2.5), 1.0), RuleSpec(1, Identity())], ids=str)
def test_survives_json(spec: RuleSpec) -> None:
    assert RuleSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": None},
        {"hidden_size": "20"},
        {"hidden_size": 0},
        {"output_scale": "wide"},
        {"output_scale": None},
        {"preprocess": None},
        {"preprocess": "log_and_sign"},
        {"preprocess": {"name": "log_and_sign"}},
        {"preprocess": {"name": "log_and_sign", "p": -1}},
        {"preprocess": {"name": "square"}},
        {"preprocess": {"p": 10.0}},
    ],
    ids=str,
)
def test_refuses_foreign_values(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        RuleSpec.from_dict({**RuleSpec().to_dict(), **change})


@pytest.mark.parametrize("key", ["hidden_size", "preprocess", "output_scale"])
def test_refuses_missing_keys(key: str) -> None:
    values = RuleSpec().to_dict()
    del values[key]
    with pytest.raises(ValueError, match=f"not a rule specification.*{key}"):
        RuleSpec.from_dict(values)


@pytest.mark.parametrize("value", ["a", None, True])
def test_what_is_not_a_number_is_named(value: object) -> None:
    with pytest.raises(TypeError, match=r"LogAndSign\.p must be a number"):
        LogAndSign(p=value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="output_scale must be a number"):
        RuleSpec(output_scale=value)  # type: ignore[arg-type]

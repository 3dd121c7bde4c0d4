"""Weights of the published code: the rule they make against the network stated in NumPy, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from l2l_fast import CoordinatewiseLSTM, Identity, LogAndSign, reference
from l2l_fast.backends import Backend
from l2l_fast.spec import Preprocess

pytestmark = pytest.mark.usefixtures("one_thread")

Array = NDArray[Any]

EPS = float(np.finfo(np.float32).eps)  # what the published preprocessing adds to |g| before its logarithm
STEPS = 6

preprocesses = pytest.mark.parametrize("preprocess", [LogAndSign(5.0), LogAndSign(10.0), None], ids=str)


def make_weights(h: int = 20, features: int = 2, dtype: Any = np.float64) -> dict[str, Array]:
    """Weights of a network that is neither linear nor saturated, every block with numbers of its own."""
    rng = np.random.default_rng(20160614)
    shapes = {
        "lstm_1/w_gates": (features + h, 4 * h),
        "lstm_1/b_gates": (4 * h,),
        "lstm_2/w_gates": (2 * h, 4 * h),
        "lstm_2/b_gates": (4 * h,),
        "linear/w": (h, 1),
        "linear/b": (1,),
    }
    return {name: rng.normal(0, 0.5, shape).astype(dtype) for name, shape in shapes.items()}


def make_gradients() -> Array:
    """``[steps, coordinates]`` in float32's numbers: magnitudes from 1e-12 to 100, both signs, and zeros."""
    rng = np.random.default_rng(1)
    magnitude = 10.0 ** rng.uniform(-12, 2, (STEPS, 37))
    gradients: Array = magnitude * rng.choice([-1.0, 1.0], magnitude.shape)
    gradients[:, 0] = 0.0
    return gradients.astype(np.float32).astype(np.float64)


# The network in NumPy


def sigmoid(x: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-x))
    return result


def features(gradient: Array, k: float, eps: float) -> Array:
    with np.errstate(divide="ignore"):  # log 0, which the clamp takes to -1
        log = np.log(np.abs(gradient) + eps) / k
    return np.stack([np.maximum(log, -1), np.clip(gradient * np.exp(k), -1, 1)], axis=-1)


def run_network(
    weights: Mapping[str, Array], gradients: Array, preprocess: LogAndSign | None, scale: float, eps: float
) -> tuple[Array, Array]:
    """Updates ``[T, N]`` and last state ``[N, 2, 2, H]`` in float64, from a state of zeros."""
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    n, units = gradients.shape[1], len(wide["linear/w"])
    state = np.zeros((n, 2, 2, units))
    updates = []
    for gradient in gradients:
        x = gradient[:, None] if preprocess is None else features(gradient, preprocess.p, eps)
        for layer in (0, 1):
            hidden, cell = state[:, layer, 0], state[:, layer, 1]
            joined = np.concatenate([x, hidden], axis=1)
            gates = joined @ wide[f"lstm_{layer + 1}/w_gates"] + wide[f"lstm_{layer + 1}/b_gates"]
            i, j, f, o = np.split(gates, 4, axis=1)
            cell = sigmoid(f + 1.0) * cell + sigmoid(i) * np.tanh(j)
            x = np.tanh(cell) * sigmoid(o)
            state[:, layer, 0], state[:, layer, 1] = x, cell
        updates.append(scale * (x @ wide["linear/w"] + wide["linear/b"])[:, 0])
    return np.stack(updates), state


def run_rule(rule: CoordinatewiseLSTM, gradients: Array, backend: str) -> tuple[Array, Array]:
    dtype = rule.output.weight.dtype
    state = rule.init_state(gradients.shape[1], dtype=dtype)
    updates = []
    with torch.no_grad():
        for gradient in torch.from_numpy(gradients).to(dtype):
            update, state = rule(gradient, state, backend=backend)
            updates.append(update)
    return torch.stack(updates).double().numpy(), state.double().numpy()


@pytest.mark.parametrize("hidden_size", [20, 3])
@preprocesses
def test_the_rule_is_the_network(hidden_size: int, preprocess: LogAndSign | None) -> None:
    """To float64's rounding, once the eps in the logarithm is left out."""
    weights = make_weights(hidden_size, 1 if preprocess is None else 2)
    rule = CoordinatewiseLSTM.from_sonnet(weights, preprocess, 0.3)
    gradients = make_gradients()
    for actual, expected in zip(
        run_rule(rule, gradients, "reference"), run_network(weights, gradients, preprocess, 0.3, eps=0.0), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-13)


@preprocesses
def test_every_backend_computes_the_network(preprocess: LogAndSign | None, backend: Backend) -> None:
    """To float32's rounding without the eps, and as near as the next test says with it."""
    weights = make_weights(20, 1 if preprocess is None else 2, np.float32)
    rule = CoordinatewiseLSTM.from_sonnet(weights, preprocess, 1.0)
    gradients = make_gradients()
    updates, state = run_rule(rule, gradients, backend.name)
    change = 0.0 if preprocess is None else EPS * np.exp(preprocess.p) / preprocess.p
    for eps, tolerance in ((0.0, 5e-6), (EPS, 5e-6 + change)):
        expected_updates, expected_state = run_network(weights, gradients, preprocess, 1.0, eps)
        np.testing.assert_allclose(updates, expected_updates, rtol=0, atol=tolerance)
        np.testing.assert_allclose(state, expected_state, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("k", "largest"), [(5.0, 3.54e-6), (10.0, 2.62e-4)])
def test_what_eps_in_the_logarithm_changes(k: float, largest: float) -> None:
    """The log feature rises by at most ``log(1 + eps exp(k)) / k``, at ``|g| = exp(-k)``; nothing else differs."""
    rule = CoordinatewiseLSTM.from_sonnet(make_weights(), LogAndSign(k))
    gradient = np.concatenate([make_gradients().ravel(), np.exp(-k) * np.array([0.999, 1, 1.001, -1])])
    published = features(gradient, k, EPS)
    difference = published - reference.features(rule.spec, torch.from_numpy(gradient)).numpy()
    assert difference[:, 0].min() >= -1e-15
    assert difference[:, 0].max() == pytest.approx(np.log1p(EPS * np.exp(k)) / k, rel=1e-6)
    assert difference[:, 0].max() == pytest.approx(largest, rel=2e-3)
    np.testing.assert_allclose(difference[:, 1], 0, atol=1e-15)


# What weights may look like


def nested(weights: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for name, array in weights.items():
        module, variable = name.split("/")
        result.setdefault(module, {})[variable] = array
    return result


def unusual_memory(array: Array) -> Array:
    """The same numbers in foreign byte order, walked backwards, and read-only."""
    backwards = array.astype(array.dtype.newbyteorder())[::-1].copy()[::-1]
    backwards.flags.writeable = False
    return backwards


@pytest.mark.parametrize(
    "arrange",
    [
        nested,
        lambda weights: {"./mnist/cw.l2l": nested(weights)},
        lambda weights: {f"vars_optimizer/cw/{name}:0": array for name, array in weights.items()},
        lambda weights: dict(reversed(weights.items())),
        lambda weights: {name: torch.from_numpy(array) for name, array in weights.items()},
        lambda weights: {name: torch.nn.Parameter(torch.from_numpy(array)) for name, array in weights.items()},
        lambda weights: {name: unusual_memory(array) for name, array in weights.items()},
    ],
    ids=["nested", "nested in nested", "scoped", "any order", "tensors", "parameters", "unusual memory"],
)
def test_arrangements(arrange: Callable[[dict[str, Array]], dict[str, Any]]) -> None:
    weights = make_weights(dtype=np.float32)
    expected = CoordinatewiseLSTM.from_sonnet(weights)
    actual = CoordinatewiseLSTM.from_sonnet(arrange(weights))
    assert torch.equal(actual.flat_weights(), expected.flat_weights())
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in actual.parameters())


def test_arrays_saved_by_the_line_of_the_documentation(tmp_path: Path) -> None:
    weights = make_weights()
    saved = nested(weights)
    np.savez(tmp_path / "cw.npz", **{m + "/" + v: a for m, d in saved.items() for v, a in d.items()})
    with np.load(tmp_path / "cw.npz") as file:
        rule = CoordinatewiseLSTM.from_sonnet(file)
    assert torch.equal(rule.flat_weights(), CoordinatewiseLSTM.from_sonnet(weights).flat_weights())


@pytest.mark.parametrize(
    ("given", "expected"),
    [(np.float16, torch.float32), (np.float32, torch.float32), (np.float64, torch.float64)],
)
def test_dtype_of_the_rule(given: Any, expected: torch.dtype) -> None:
    rule = CoordinatewiseLSTM.from_sonnet(make_weights(dtype=given))
    assert {parameter.dtype for parameter in rule.parameters()} == {expected}


def test_one_narrower_weight_makes_a_float32_rule() -> None:
    weights = make_weights() | {"linear/b": np.zeros(1, np.float32)}
    assert CoordinatewiseLSTM.from_sonnet(weights).flat_weights().dtype == torch.float32


def test_defaults_are_those_of_the_published_code() -> None:
    spec = CoordinatewiseLSTM.from_sonnet(make_weights()).spec
    assert (spec.hidden_size, spec.preprocess, spec.output_scale) == (20, LogAndSign(5.0), 0.01)


def test_importing_draws_no_random_numbers_and_shares_no_memory() -> None:
    weights = {name: torch.from_numpy(array) for name, array in make_weights().items()}
    before = {name: tensor.clone() for name, tensor in weights.items()}
    random_state = torch.get_rng_state()
    rule = CoordinatewiseLSTM.from_sonnet(weights)
    assert torch.equal(torch.get_rng_state(), random_state)
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter.fill_(7.0)
    for name, tensor in weights.items():
        assert torch.equal(tensor, before[name]), name


def test_imported_rule_survives_its_file(tmp_path: Path) -> None:
    rule = CoordinatewiseLSTM.from_sonnet(make_weights())
    rule.save(tmp_path / "rule.safetensors")
    loaded = CoordinatewiseLSTM.load(tmp_path / "rule.safetensors")
    assert loaded.spec == rule.spec
    assert torch.equal(loaded.flat_weights(), rule.flat_weights())


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear/w": None}, r"linear output; missing: linear/w; unexpected: none"),
        ({"lstm_3/w_gates": np.zeros((40, 80))}, r"missing: none; unexpected: lstm_3/w_gates"),
        ({"w_gates": np.zeros((22, 80))}, r"unexpected: w_gates"),
        ({"lstm_1/w_f_diag": np.zeros(20)}, r"unexpected: lstm_1/w_f_diag"),
        ({"fc/linear/b:0": np.zeros(1)}, r"linear/b comes twice, the second time as fc/linear/b:0.*one network"),
        ({"lstm_1/b_gates": np.zeros(81)}, r"lstm_1/b_gates must have shape \(4 \* units,\), got \(81,\)"),
        ({"lstm_2/b_gates": np.zeros(0)}, r"lstm_2/b_gates must have shape \(4 \* units,\), got \(0,\)"),
        ({"lstm_2/b_gates": np.zeros((80, 1))}, r"lstm_2/b_gates must have shape \(4 \* units,\), got \(80, 1\)"),
        ({"lstm_2/b_gates": np.zeros(40)}, r"lstm_1 has 20 units and lstm_2 has 10"),
        ({"lstm_1/w_gates": np.zeros((80, 22))}, r"lstm_1/w_gates must have shape \(22, 80\).*got \(80, 22\)"),
        ({"lstm_2/w_gates": np.zeros((22, 80))}, r"lstm_2/w_gates must have shape \(40, 80\).*got \(22, 80\)"),
        ({"linear/w": np.zeros((1, 20))}, r"linear/w must have shape \(20, 1\).*got \(1, 20\)"),
        ({"linear/b": np.zeros(())}, r"linear/b must have shape \(1,\).*got \(\)"),
        ({"linear/b": np.array([np.nan])}, r"linear/b is not finite in torch\.float64"),
        ({"lstm_1/b_gates": np.full(80, -np.inf)}, r"lstm_1/b_gates is not finite"),
        ({"linear/w": np.full((20, 1), 1e300), "linear/b": np.zeros(1, np.float32)}, r"linear/w .* in torch\.float32"),
    ],
)
def test_weights_of_no_rule(changes: dict[str, Any], message: str) -> None:
    weights = {name: array for name, array in (make_weights() | changes).items() if array is not None}
    with pytest.raises(ValueError, match=message):
        CoordinatewiseLSTM.from_sonnet(weights)


@pytest.mark.parametrize(
    ("width", "preprocess", "message"),
    [
        (1, LogAndSign(5.0), r"takes 1 feature\(s\).*LogAndSign\(p=5.0\) makes 2; pass preprocess=None"),
        (2, None, r"takes 2 feature\(s\).*Identity\(\) makes 1; pass preprocess=LogAndSign"),
        (2, Identity(), r"takes 2 feature\(s\).*Identity\(\) makes 1; pass preprocess=LogAndSign"),
    ],
)
def test_preprocessing_of_another_width(width: int, preprocess: Preprocess | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoordinatewiseLSTM.from_sonnet(make_weights(features=width), preprocess)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ([0.0], "list"),
        (None, "NoneType"),
        (np.zeros(1, np.int64), "ndarray of int64"),
        (np.zeros(1, np.complex64), "ndarray of complex64"),
        (np.array([None]), "ndarray of object"),
        (torch.zeros(1, dtype=torch.int32), r"Tensor of torch\.int32"),
    ],
)
def test_no_array_of_floats(value: object, kind: str) -> None:
    with pytest.raises(TypeError, match=f"linear/b must be a floating-point NumPy array or tensor, got {kind}"):
        CoordinatewiseLSTM.from_sonnet(make_weights() | {"linear/b": value})


@pytest.mark.parametrize("weights", [None, [], "cw.l2l"], ids=str)
def test_no_mapping(weights: Any) -> None:
    with pytest.raises(TypeError, match="weights must be a mapping of names to arrays"):
        CoordinatewiseLSTM.from_sonnet(weights)

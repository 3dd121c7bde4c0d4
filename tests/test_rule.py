"""The rule as a module: what it computes, how it is saved, and what it says to wrong arguments."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from l2l_fast import CoordinatewiseLSTM, Identity, LogAndSign, RuleSpec, available_rules, load_rule, reference
from l2l_fast import rule as rule_module
from l2l_fast.files import load_tensors, save_atomically
from l2l_fast.rule import FORMAT, as_rule

pytestmark = pytest.mark.usefixtures("one_thread")

RULES: dict[str, dict[str, Any]] = {
    "default": {},
    "identity": {"preprocess": None, "output_scale": 1.0},
    "small": {"hidden_size": 3, "preprocess": LogAndSign(5.0)},
}


@pytest.fixture(params=list(RULES.values()), ids=list(RULES))
def rule(request: pytest.FixtureRequest) -> CoordinatewiseLSTM:
    torch.manual_seed(0)
    return CoordinatewiseLSTM(**request.param)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rule.safetensors"


def assert_same_rule(actual: CoordinatewiseLSTM, expected: CoordinatewiseLSTM) -> None:
    """Same specification, card, weights to the bit, and dtype."""
    assert actual is not expected
    assert actual.spec == expected.spec
    assert actual.card == expected.card
    mine, others = actual.state_dict(), expected.state_dict()
    assert mine.keys() == others.keys()
    for name in mine:
        assert mine[name].dtype == others[name].dtype
        assert torch.equal(mine[name], others[name]), name
        assert mine[name].data_ptr() != others[name].data_ptr()
    assert all(parameter.requires_grad for parameter in actual.parameters())


# Weights and state


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("preprocess", [None, LogAndSign(), LogAndSign(15.0)])
def test_a_fresh_rule_moves_by_little(preprocess: LogAndSign | None, seed: int) -> None:
    torch.manual_seed(seed)
    rule = CoordinatewiseLSTM(preprocess=preprocess)
    state = rule.init_state(784)
    assert rule.output.bias == 0
    with torch.no_grad():
        for _ in range(20):
            update, state = rule(0.01 * torch.randn(784), state)
            assert 0 < update.abs().max() < 0.02 * rule.spec.output_scale


def test_defaults_are_those_of_the_paper() -> None:
    spec = CoordinatewiseLSTM().spec
    assert (spec.hidden_size, spec.preprocess, spec.output_scale) == (20, LogAndSign(10.0), 0.1)
    assert CoordinatewiseLSTM(preprocess=None).spec.preprocess == Identity()


def test_flat_weights_hold_every_parameter(rule: CoordinatewiseLSTM) -> None:
    flat = rule.flat_weights()
    assert flat.shape == (rule.spec.num_weights,)
    blocks = reference.split_weights(rule.spec, flat)
    for layer, cell in enumerate(rule.cells, start=1):
        assert isinstance(cell, nn.LSTMCell)
        assert torch.equal(blocks[f"weight_ih_{layer}"], cell.weight_ih)
        assert torch.equal(blocks[f"weight_hh_{layer}"], cell.weight_hh)
        assert torch.equal(blocks[f"bias_{layer}"], cell.bias_ih + cell.bias_hh)
    assert torch.equal(blocks["weight_out"], rule.output.weight[0])
    assert torch.equal(blocks["bias_out"], rule.output.bias)
    flat.sum().backward()  # type: ignore[no-untyped-call]
    for parameter in rule.parameters():
        torch.testing.assert_close(parameter.grad, torch.ones_like(parameter), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_initial_state(rule: CoordinatewiseLSTM, dtype: torch.dtype) -> None:
    state = rule.init_state(5, dtype=dtype)
    assert state.shape == (5, 2, 2, rule.spec.hidden_size)
    assert state.dtype == dtype
    assert not state.any()
    assert rule.init_state(5, device="meta").device.type == "meta"


def test_zeroed_output_layer_gives_exactly_no_update(rule: CoordinatewiseLSTM) -> None:
    nn.init.zeros_(rule.output.weight)
    nn.init.zeros_(rule.output.bias)
    update, _ = rule(torch.linspace(-2, 2, 33), rule.init_state(33))
    assert (update == 0).all()


def test_double_precision(rule: CoordinatewiseLSTM) -> None:
    single = copy.deepcopy(rule)
    grad = torch.linspace(-2, 2, 33)
    update, state = rule.double()(grad.double(), rule.init_state(33, dtype=torch.float64), backend="reference")
    assert update.dtype == state.dtype == torch.float64
    assert rule.flat_weights().dtype == torch.float64
    torch.testing.assert_close((update.float(), state.float()), single(grad, single.init_state(33)))


def test_repr_tells_the_specification() -> None:
    assert "preprocess=LogAndSign(p=5.0), output_scale=0.3" in repr(
        CoordinatewiseLSTM(preprocess=LogAndSign(5.0), output_scale=0.3)
    )


# Copies and files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_file_round_trip_is_exact(rule: CoordinatewiseLSTM, dtype: torch.dtype, path: Path) -> None:
    rule.to(dtype)
    rule.card = {"problem": "quadratic", "steps": 100, "ratio": 0.42, "note": "ünïcode", "seeds": [1, 2]}
    rule.save(path)
    assert_same_rule(CoordinatewiseLSTM.load(path), rule)
    assert_same_rule(CoordinatewiseLSTM.load(str(path)), rule)


def test_file_is_readable_without_the_library(path: Path) -> None:
    rule = CoordinatewiseLSTM()
    rule.card = {"problem": "quadratic"}
    rule.save(path)
    assert load_file(path).keys() == rule.state_dict().keys()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == FORMAT == "l2l_fast.rule.v1"
    assert metadata["card"] == '{"problem": "quadratic"}'
    assert '"p": 10.0' in metadata["spec"]


def test_deepcopy_and_pickle(rule: CoordinatewiseLSTM) -> None:
    rule.card = {"seeds": [1]}
    assert_same_rule(copy.deepcopy(rule), rule)
    assert_same_rule(pickle.loads(pickle.dumps(rule)), rule)


def test_state_dict_round_trip(rule: CoordinatewiseLSTM) -> None:
    buffer = io.BytesIO()
    torch.save(rule.state_dict(), buffer)
    buffer.seek(0)
    other = CoordinatewiseLSTM(rule.spec.hidden_size, rule.spec.preprocess, rule.spec.output_scale)
    assert not torch.equal(other.flat_weights(), rule.flat_weights())
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_rule(other, rule)


def test_a_failing_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = CoordinatewiseLSTM(), CoordinatewiseLSTM()
    old.save(path)
    before = path.read_bytes()

    def fail(tensors: Any, filename: Any, metadata: Any = None) -> None:
        Path(filename).write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr("l2l_fast.files.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        new.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_missing_folder(path: Path) -> None:
    target = path.parent / "missing" / "rule.safetensors"
    with pytest.raises(FileNotFoundError, match=r"can't write.*folder.*missing does not exist"):
        CoordinatewiseLSTM().save(target)
    assert not target.parent.exists()


def test_missing_file(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*rule\.safetensors"):
        CoordinatewiseLSTM.load(path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(path: Path, keep: int) -> None:
    CoordinatewiseLSTM().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"rule\.safetensors is not a complete safetensors file"):
        CoordinatewiseLSTM.load(path)


def test_pickled_file(path: Path) -> None:
    torch.save(CoordinatewiseLSTM().state_dict(), path)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        CoordinatewiseLSTM.load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "l2l_fast.rule.v2"}], ids=str)
def test_foreign_format(path: Path, metadata: dict[str, str] | None) -> None:
    save_file(CoordinatewiseLSTM().state_dict(), path, metadata=metadata)
    found = (metadata or {}).get("format", "unknown")
    with pytest.raises(ValueError, match=f"has the format '{found}', expected '{FORMAT}'"):
        CoordinatewiseLSTM.load(path)


@pytest.mark.parametrize(
    "spec", [None, "not json", "{}", '"text"', "[]", '{"hidden_size": 0, "preprocess": {"name": "identity"}}'], ids=str
)
def test_unreadable_specification(path: Path, spec: str | None) -> None:
    metadata = {"format": FORMAT, "card": "{}"} | ({} if spec is None else {"spec": spec})
    save_file(CoordinatewiseLSTM().state_dict(), path, metadata=metadata)
    with pytest.raises(ValueError, match="no readable rule specification"):
        CoordinatewiseLSTM.load(path)


def _edit(path: Path, **changes: torch.Tensor | None) -> None:
    """Rewrite a rule's file with tensors replaced, added, or (``None``) taken away."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output__bias": torch.zeros(2)}, r"output.bias: expected \(1,\), found \(2,\)"),
        ({"output__bias": None}, r"output.bias: expected \(1,\), found nothing"),
        ({"extra": torch.zeros(3)}, r"extra: expected nothing, found \(3,\)"),
    ],
)
def test_other_shapes(path: Path, changes: dict[str, Any], message: str) -> None:
    CoordinatewiseLSTM().save(path)
    _edit(path, **changes)
    with pytest.raises(ValueError, match=f"does not hold a rule of RuleSpec.*{message}"):
        CoordinatewiseLSTM.load(path)


def test_refused_tensors_change_nothing() -> None:
    rule = CoordinatewiseLSTM()
    before = rule.flat_weights().detach().clone()
    tensors = CoordinatewiseLSTM(hidden_size=3).state_dict()
    with pytest.raises(ValueError, match="a checkpoint does not hold a rule"):
        rule.load_tensors(tensors, source="a checkpoint")
    assert torch.equal(rule.flat_weights(), before)


# Names


def test_shipped_rules_load() -> None:
    assert "quadratic" in available_rules()
    for name in available_rules():
        rule = load_rule(name)
        assert rule.card, f"{name} must say how it was trained"
        assert rule.flat_weights().isfinite().all()
        assert_same_rule(as_rule(name), rule)


def test_unknown_rule() -> None:
    with pytest.raises(ValueError, match=r"unknown rule 'adam'; shipped rules: .*\.safetensors"):
        load_rule("adam")
    with pytest.raises(ValueError, match="unknown rule 'adam'"):
        as_rule("adam")


def test_shipped_rules_are_the_files_of_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rule = CoordinatewiseLSTM()
    for name in ("zeta", "alpha"):
        rule.save(tmp_path / f"{name}.safetensors")
    (tmp_path / "notes.txt").touch()
    monkeypatch.setattr(rule_module, "_WEIGHTS", tmp_path)
    assert available_rules() == ("alpha", "zeta")
    assert_same_rule(load_rule("zeta"), rule)
    with pytest.raises(ValueError, match="shipped rules: 'alpha', 'zeta'"):
        load_rule("beta")


def test_as_rule(path: Path) -> None:
    rule = CoordinatewiseLSTM()
    rule.save(path)
    assert as_rule(rule) is rule
    assert_same_rule(as_rule(path), rule)
    assert_same_rule(as_rule(str(path)), rule)
    with pytest.raises(FileNotFoundError):
        as_rule("missing.safetensors")
    with pytest.raises(TypeError, match="CoordinatewiseLSTM, a shipped name or a path, got Linear"):
        as_rule(nn.Linear(1, 1))  # type: ignore[arg-type]


# Wrong arguments

GRAD, STATE = torch.ones(3), torch.zeros(3, 2, 2, 20)


@pytest.mark.parametrize(
    ("grad", "state", "error", "message"),
    [
        ([1.0, 2.0, 3.0], STATE, TypeError, "grad must be a tensor, got list"),
        (GRAD, None, TypeError, "state must be a tensor, got NoneType"),
        (GRAD.int(), STATE, TypeError, r"grad must be real floating point, got torch\.int32"),
        (GRAD.bool(), STATE, TypeError, r"grad must be real floating point, got torch\.bool"),
        (GRAD.to(torch.complex64), STATE, TypeError, r"grad must be real floating point, got torch\.complex64"),
        (GRAD, STATE.long(), TypeError, r"state must be real floating point, got torch\.int64"),
        (GRAD.to_sparse(), STATE, TypeError, r"grad must be dense, got layout torch\.sparse_coo.*to_dense"),
        (GRAD, STATE.to_sparse(), TypeError, r"state must be dense, got layout torch\.sparse_coo.*to_dense"),
        (GRAD.to("meta"), STATE, ValueError, "grad is on meta but the rule is on cpu; move one"),
        (GRAD, STATE.to("meta"), ValueError, "state is on meta but the rule is on cpu; move one"),
        (GRAD, STATE[:2], ValueError, r"shape \(3, 2, 2, 20\).*got \(2, 2, 2, 20\).*init_state\(n\)"),
        (GRAD, STATE[..., :19], ValueError, r"shape \(3, 2, 2, 20\).*got \(3, 2, 2, 19\)"),
        (GRAD, STATE.flatten(1), ValueError, r"shape \(3, 2, 2, 20\).*got \(3, 80\)"),
        (GRAD.view(3, 1), STATE, ValueError, r"shape \(3, 1, 2, 2, 20\) for a gradient of shape \(3, 1\)"),
        (GRAD[0], STATE, ValueError, r"shape \(2, 2, 20\) for a gradient of shape \(\)"),
    ],
)
def test_wrong_arguments(grad: Any, state: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CoordinatewiseLSTM()(grad, state)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="unknown backend 'abacus'; known backends"):
        CoordinatewiseLSTM()(GRAD, STATE, backend="abacus")


def test_backend_that_cannot_run_it() -> None:
    rule = CoordinatewiseLSTM(hidden_size=7)
    with pytest.raises(RuntimeError, match=r"backend='cpu' can't be used: .*20 hidden units, not 7"):
        rule(GRAD, rule.init_state(3), backend="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight.int(), "torch.int32"),
        (lambda weight: weight.half(), "torch.float16, torch.float32"),
        (lambda weight: weight.fill_(float("nan")), "not finite"),
    ],
    ids=["integers", "mixed", "nan"],
)
def test_weights_that_mean_nothing_are_refused(
    tmp_path: Path, change: Callable[[Tensor], Tensor], message: str
) -> None:
    rule = CoordinatewiseLSTM()
    tensors = {name: tensor.detach().clone() for name, tensor in rule.state_dict().items()}
    tensors["output.weight"] = change(tensors["output.weight"])
    before = rule.flat_weights()
    with pytest.raises(ValueError, match=message):
        rule.load_tensors(tensors, source=str(tmp_path))
    torch.testing.assert_close(rule.flat_weights(), before, rtol=0, atol=0)


def test_a_specification_is_compared_before_anything_is_allocated(tmp_path: Path) -> None:
    path = tmp_path / "rule.safetensors"
    CoordinatewiseLSTM().save(path)
    tensors, metadata = load_tensors(path, FORMAT)
    metadata["spec"] = json.dumps({**RuleSpec().to_dict(), "hidden_size": 10**6})
    save_atomically(tensors, metadata, path)
    with pytest.raises(ValueError, match="does not hold a rule of"):
        CoordinatewiseLSTM.load(path)

"""Which backend is chosen, and what is said when it can't be."""

from __future__ import annotations

import logging

import pytest
import torch

import l2l_fast
from l2l_fast import Identity, LogAndSign, RuleSpec
from l2l_fast.backends import ENVIRONMENT_VARIABLE, NAMES, Backend, _report_fallback, cpu, get, resolve

CPU = torch.device("cpu")
SPEC = RuleSpec()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def fresh_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Nothing has been reported yet."""
    _report_fallback.cache_clear()
    caplog.set_level(logging.WARNING, logger="l2l_fast")
    return caplog


def test_every_backend_works_here() -> None:
    assert l2l_fast.backends() == dict.fromkeys(sorted(NAMES))


def test_the_fastest_for_the_device_is_chosen(fresh_log: pytest.LogCaptureFixture) -> None:
    assert resolve(None, CPU, torch.float32, SPEC).name == "cpu"
    assert resolve(None, torch.device("meta"), torch.float32, SPEC).name == "reference"
    assert not fresh_log.records


@pytest.mark.parametrize("name", NAMES)
def test_a_named_backend_is_obeyed(name: str) -> None:
    assert resolve(name, CPU, torch.float32, SPEC).name == name
    assert resolve(name, CPU, torch.float32, SPEC) is get(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_environment_names_a_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, name)
    assert resolve(None, CPU, torch.float32, SPEC).name == name


def test_an_argument_outranks_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cpu")
    assert resolve("reference", CPU, torch.float32, SPEC).name == "reference"


def test_an_empty_environment_variable_names_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert resolve(None, CPU, torch.float32, SPEC).name == "cpu"


UNSERVED = [
    (torch.float64, SPEC, "float32.*float64"),
    (torch.float32, RuleSpec(hidden_size=7), "20 hidden units, not 7"),
    (torch.float64, RuleSpec(7, Identity()), "float64"),
]


@pytest.mark.parametrize(("dtype", "spec", "reason"), UNSERVED, ids=str)
def test_a_named_backend_that_cannot_run_says_why(dtype: torch.dtype, spec: RuleSpec, reason: str) -> None:
    with pytest.raises(RuntimeError, match=f"backend='cpu' can't be used: .*{reason}.*'reference'"):
        resolve("cpu", CPU, dtype, spec)


def test_the_environment_is_blamed_for_its_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cpu")
    with pytest.raises(RuntimeError, match=f"{ENVIRONMENT_VARIABLE}='cpu' can't be used"):
        resolve(None, CPU, torch.float64, SPEC)


@pytest.mark.parametrize("source", ["argument", "environment"])
def test_an_unknown_name_lists_the_known(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if source == "environment":
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "abacus")
    with pytest.raises(ValueError, match="unknown backend 'abacus'; known backends: 'cpu', 'triton', 'reference'"):
        resolve("abacus" if source == "argument" else None, CPU, torch.float32, SPEC)


def test_the_automatic_choice_falls_back_and_says_so_once(fresh_log: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        assert resolve(None, CPU, torch.float64, SPEC).name == "reference"
    (record,) = fresh_log.records
    assert record.name == "l2l_fast"
    assert record.levelno == logging.WARNING
    assert "'cpu' is not used" in record.getMessage()
    assert "float64" in record.getMessage()
    resolve(None, CPU, torch.float32, RuleSpec(hidden_size=7))
    assert len(fresh_log.records) == 2


def test_the_rule_module_falls_back_in_float64(fresh_log: pytest.LogCaptureFixture) -> None:
    rule = l2l_fast.CoordinatewiseLSTM().double()
    update, state = rule(torch.ones(3, dtype=torch.float64), rule.init_state(3, dtype=torch.float64))
    assert update.dtype == state.dtype == torch.float64
    assert len(fresh_log.records) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_rule_module_works_in_16_bit(dtype: torch.dtype) -> None:
    """The automatic choice must serve it, by whatever backend."""
    rule = l2l_fast.CoordinatewiseLSTM().to(dtype)
    grad = torch.ones(3, dtype=dtype, requires_grad=True)
    update, state = rule(grad, rule.init_state(3, dtype=dtype))
    assert update.dtype == state.dtype == dtype
    (update.sum() + state.sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == dtype for parameter in rule.parameters())


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_cpu_refuses_other_devices(device: str) -> None:
    reason = get("cpu").unavailable(torch.device(device), torch.float32, SPEC)
    assert reason is not None
    assert device in reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("spec", [SPEC, RuleSpec(1, Identity()), RuleSpec(40, LogAndSign(5.0))], ids=str)
def test_reference_serves_everything_that_floats(dtype: torch.dtype, spec: RuleSpec) -> None:
    assert get("reference").unavailable(CPU, dtype, spec) is None


def test_reference_refuses_integers() -> None:
    reason = get("reference").unavailable(CPU, torch.int32, SPEC)
    assert reason is not None
    assert "floating point, got torch.int32" in reason


def test_backend_goes_by_its_name(backend: Backend) -> None:
    assert get(backend.name) is backend
    assert backend.name in NAMES


def test_instruction_sets() -> None:
    available = cpu.instruction_sets()
    before = cpu.instruction_set()
    assert available[0] == "baseline"
    assert before == available[-1]
    try:
        for name in available:
            cpu.use_instruction_set(name)
            assert cpu.instruction_set() == name
        with pytest.raises(ValueError, match="mmx"):
            cpu.use_instruction_set("mmx")
        assert cpu.instruction_set() == available[-1]
    finally:
        cpu.use_instruction_set(before)

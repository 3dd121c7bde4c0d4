"""One step without a tape: what ``optimizer.step()`` runs for every coordinate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import report
from numerics import assert_as_good_as_eager
from torch import Tensor

from l2l_fast import CoordinatewiseLSTM, reference
from l2l_fast.backends import cpu, get
from l2l_fast.experiments.speed import Step, eager_step, zero_state

SIZES = (1_000, 10_000, 100_000, 1_000_000)
CHECKED = 1_000  # coordinates that are compared with float64 before anything is timed


def _gate(rule: CoordinatewiseLSTM, update: Tensor, grad: Tensor) -> None:
    """The first step from a fresh state must be as good as float32 eager."""
    weights, grad = rule.flat_weights().detach(), grad[:CHECKED]
    state = rule.init_state(grad.numel())
    eager, _ = reference.step(rule.spec, weights, grad, state)
    exact, _ = reference.step(rule.spec, weights.double(), grad.double(), state.double())
    assert_as_good_as_eager("update", update[:CHECKED], eager, exact)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("state_dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("instruction_set", cpu.instruction_sets(), indirect=True)
def test_cpu(benchmark: Any, rule: CoordinatewiseLSTM, instruction_set: str, state_dtype: str, n: int) -> None:
    benchmark.group = f"forward n={n}"
    backend, grad, param = get("cpu"), torch.randn(n), torch.zeros(n)
    prepared = backend.prepare(rule.spec, rule.flat_weights())
    state = backend.init_state(n, rule.spec, getattr(torch, state_dtype), grad.device)

    def run() -> None:
        backend.step_(rule.spec, prepared, [param], [grad], [state])

    run()
    _gate(rule, param, grad)
    report(benchmark, n, run)


def _baseline(benchmark: Any, rule: CoordinatewiseLSTM, step: Step, n: int) -> None:
    benchmark.group = f"forward n={n}"
    grad, state = torch.randn(n), zero_state(rule, n)
    param = torch.zeros(n)

    @torch.no_grad()
    def run() -> None:
        update, _ = step(grad, state)
        param.add_(update)

    run()
    _gate(rule, param, grad)
    report(benchmark, n, run)


@pytest.mark.parametrize("n", SIZES)
def test_eager(benchmark: Any, rule: CoordinatewiseLSTM, n: int) -> None:
    _baseline(benchmark, rule, eager_step(rule), n)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("n", SIZES)
def test_compile(benchmark: Any, rule: CoordinatewiseLSTM, n: int) -> None:
    torch.compiler.reset()  # compiled for this size alone, which is when it is fastest
    _baseline(benchmark, rule, torch.compile(eager_step(rule)), n)

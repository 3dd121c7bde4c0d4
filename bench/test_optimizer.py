"""``optimizer.step()`` on few and many tensors, with Adam for scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import report
from numerics import assert_as_good_as_eager
from torch import Tensor

import l2l_fast
from l2l_fast import reference

CASES = [(n, tensors) for n in (10_000, 100_000, 1_000_000) for tensors in (1, 100, 1000)]
IDS = [f"{n}-{tensors}" for n, tensors in CASES]


def _parameters(n: int, tensors: int) -> list[Tensor]:
    """``n`` coordinates in equal tensors, with gradients."""
    params = [torch.zeros(n // tensors, requires_grad=True) for _ in range(tensors)]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def _name(n: int, tensors: int) -> str:
    return f"optimizer n={n} tensors={tensors}"


@pytest.mark.parametrize(("n", "tensors"), CASES, ids=IDS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_learned(benchmark: Any, rule: l2l_fast.CoordinatewiseLSTM, backend: str, n: int, tensors: int) -> None:
    benchmark.group = _name(n, tensors)
    params = _parameters(n, tensors)
    optimizer = l2l_fast.LearnedOptimizer(params, rule, backend=backend)
    optimizer.step()
    weights, grad = rule.flat_weights().detach(), params[0].grad
    assert grad is not None
    eager, _ = reference.step(rule.spec, weights, grad, rule.init_state(grad.numel()))
    exact, _ = reference.step(rule.spec, weights.double(), grad.double(), rule.init_state(grad.numel()).double())
    assert_as_good_as_eager("parameter", params[0].detach(), eager, exact)
    slow = backend == "reference" and (n > 100_000 or tensors > 100)
    report(benchmark, n, optimizer.step, rounds=5 if slow else 0)


@pytest.mark.parametrize(("n", "tensors"), CASES, ids=IDS)
@pytest.mark.parametrize("name", ["tensor", "global"])
def test_limited(benchmark: Any, rule: l2l_fast.CoordinatewiseLSTM, name: str, n: int, tensors: int) -> None:
    """With ``max_update_norm``, at a limit that most steps exceed."""
    benchmark.group = _name(n, tensors)
    params = _parameters(n, tensors)
    optimizer = l2l_fast.LearnedOptimizer(params, rule, max_update_norm=1e-3, update_norm=name, backend="cpu")
    optimizer.step()
    norms = torch.stack([param.detach().norm() for param in params])
    moved = norms.max() if name == "tensor" else norms.norm()
    assert moved.item() == pytest.approx(1e-3, rel=1e-4)
    report(benchmark, n, optimizer.step)


OTHERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "adam-foreach": lambda params: torch.optim.Adam(params, foreach=True),
    "adam-fused": lambda params: torch.optim.Adam(params, fused=True),
}


@pytest.mark.parametrize(("n", "tensors"), CASES, ids=IDS)
@pytest.mark.parametrize("name", OTHERS)
def test_adam(benchmark: Any, name: str, n: int, tensors: int) -> None:
    benchmark.group = _name(n, tensors)
    optimizer = OTHERS[name](_parameters(n, tensors))
    optimizer.step()
    report(benchmark, n, optimizer.step, macs=0)

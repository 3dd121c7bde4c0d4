"""``optimizer.step()`` over the parameters of whole models, with AdamW for scale.

Run with ``--bench-max=200000000``: the default leaves them out, as a state takes 320 bytes per coordinate in float32,
160 in float16 and 85 in int8. What takes more than 16 GB is left to ``bench/gpu.py``: ViT-B/16 with a float32 state,
and GPT-2 but in int8.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import report
from numerics import assert_as_good_as_eager
from shapes import MODELS
from torch import Tensor

import l2l_fast
from l2l_fast import reference

ROUNDS = 3
LARGEST_STATE = 16e9  # bytes

SIZES = {name: sum(math.prod(shape) for shape in shapes) for name, shapes in MODELS.items()}
CASES = [
    (name, SIZES[name], dtype)
    for name in MODELS
    for dtype in ("float32", "float16", "int8")
    if 80 * getattr(torch, dtype).itemsize * SIZES[name] <= LARGEST_STATE
]
FITTING = list(dict.fromkeys((name, n) for name, n, _ in CASES))


def _parameters(model: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.zeros(shape, requires_grad=True) for shape in MODELS[model]]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.nbytes for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)
    )


def _group(model: str, n: int) -> str:
    return f"{model} n={n} tensors={len(MODELS[model])}"


@pytest.mark.parametrize(("model", "n", "state_dtype"), CASES, ids=[f"{m}-{d}" for m, _, d in CASES])
def test_learned(benchmark: Any, rule: l2l_fast.CoordinatewiseLSTM, model: str, n: int, state_dtype: str) -> None:
    benchmark.group = _group(model, n)
    params = _parameters(model)
    optimizer = l2l_fast.LearnedOptimizer(params, rule, backend="cpu", state_dtype=getattr(torch, state_dtype))
    optimizer.step()
    for param in (params[0], params[-1]):
        assert param.grad is not None
        moved, grad = param.detach().view(-1)[-1000:], param.grad.view(-1)[-1000:]
        weights, state = rule.flat_weights().detach(), rule.init_state(grad.numel())
        eager, _ = reference.step(rule.spec, weights, grad, state)
        exact, _ = reference.step(rule.spec, weights.double(), grad.double(), state.double())
        assert_as_good_as_eager("parameter", moved, eager, exact)
    benchmark.extra_info["state_bytes"] = _state_bytes(optimizer)
    report(benchmark, n, optimizer.step, rounds=ROUNDS)


OTHERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "fused": lambda params: torch.optim.AdamW(params, fused=True),
}


@pytest.mark.parametrize(("model", "n"), FITTING, ids=[model for model, _ in FITTING])
@pytest.mark.parametrize("name", OTHERS)
def test_adamw(benchmark: Any, name: str, model: str, n: int) -> None:
    benchmark.group = _group(model, n)
    optimizer = OTHERS[name](_parameters(model))
    optimizer.step()
    benchmark.extra_info["state_bytes"] = _state_bytes(optimizer)
    report(benchmark, n, optimizer.step, macs=0, rounds=ROUNDS)

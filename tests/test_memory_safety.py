"""The C++ backend is handed addresses: whatever replaces a tensor behind its back must be an error, not a crash."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import l2l_fast
from l2l_fast.backends import get


def _optimizer(sizes: tuple[int, ...] = (40, 7)) -> tuple[l2l_fast.LearnedOptimizer, list[Tensor]]:
    torch.manual_seed(0)
    params = [torch.zeros(size, requires_grad=True) for size in sizes]
    for param in params:
        param.grad = torch.ones_like(param)
    return l2l_fast.LearnedOptimizer(params, l2l_fast.CoordinatewiseLSTM(), backend="cpu"), params


def _halve_state(optimizer: l2l_fast.LearnedOptimizer, params: list[Tensor]) -> None:
    optimizer.state[params[0]]["lstm"] = optimizer.state[params[0]]["lstm"].half()


def _shorten_state(optimizer: l2l_fast.LearnedOptimizer, params: list[Tensor]) -> None:
    optimizer.state[params[0]]["lstm"] = optimizer.state[params[0]]["lstm"][:1]


def _shorten_gradient(optimizer: l2l_fast.LearnedOptimizer, params: list[Tensor]) -> None:
    assert params[0].grad is not None
    params[0].grad.data = torch.ones(3)


def _free_gradient(optimizer: l2l_fast.LearnedOptimizer, params: list[Tensor]) -> None:
    assert params[0].grad is not None
    params[0].grad.untyped_storage().resize_(0)


@pytest.mark.parametrize("replace", [_halve_state, _shorten_state, _shorten_gradient, _free_gradient])
def test_replaced_memory_is_refused(
    replace: Callable[[l2l_fast.LearnedOptimizer, list[Tensor]], None],
) -> None:
    optimizer, params = _optimizer()
    optimizer.step()
    before = [param.detach().clone() for param in params]
    replace(optimizer, params)
    with pytest.raises((RuntimeError, ValueError), match=r"size|replaced|memory"):
        optimizer.step()
    for param, value in zip(params, before, strict=True):
        torch.testing.assert_close(param.detach(), value, rtol=0, atol=0)


def test_overlapping_parameters_are_refused() -> None:
    param = torch.zeros(1).expand(50).requires_grad_()
    with pytest.raises(ValueError, match="shares memory"):
        l2l_fast.LearnedOptimizer([param], l2l_fast.CoordinatewiseLSTM())


def test_negated_views_keep_their_sign() -> None:
    (one, (param,)), (other, (expected,)) = _optimizer((40,)), _optimizer((40,))
    grad = torch.linspace(-1, 1, 40)
    param.grad, expected.grad = torch._neg_view(-grad), grad
    one.step()
    other.step()
    torch.testing.assert_close(param, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_operators_keep_16_bit_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rule = l2l_fast.CoordinatewiseLSTM()
    weights = rule.flat_weights().detach().to(dtype)
    grad, state = torch.ones(20, dtype=dtype), torch.zeros(20, 2, 2, 20, dtype=dtype)
    for tensor in (
        *get("cpu").step(rule.spec, weights, grad, state),
        *get("cpu").step_backward(rule.spec, weights, grad, state, grad, state),
    ):
        assert tensor.dtype == dtype
        assert tensor.isfinite().all()


def test_default_dtype_has_no_influence() -> None:
    torch.manual_seed(0)
    rule = l2l_fast.CoordinatewiseLSTM()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        update, _ = rule(torch.ones(5, dtype=torch.float32), rule.init_state(5), backend="cpu")
        torch.autograd.backward(update.sum())
    finally:
        torch.set_default_dtype(before)
    assert rule.output.weight.grad is not None

"""The C++ kernels take subnormal numbers for zero, in every thread, and leave the caller's arithmetic as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import SPECS, UnrollCase, make_state, make_weights
from conftest import BACKEND_IDS
from torch import Tensor

from l2l_fast import RuleSpec
from l2l_fast.backends import Backend

pytestmark = pytest.mark.parametrize("backend", [name for name in BACKEND_IDS if name.startswith("cpu")], indirect=True)

SUBNORMAL = 1e-40
N = 4097  # work for several threads


@pytest.fixture(params=[False, True], ids=["kept", "flushed"])
def flush(request: pytest.FixtureRequest) -> Iterator[bool]:
    """What PyTorch is told to do with subnormal numbers on this thread."""
    torch.set_flush_denormal(request.param)
    yield request.param
    torch.set_flush_denormal(False)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def arithmetic_keeps_subnormals() -> bool:
    return bool((torch.tensor([SUBNORMAL]) * 0.5).view(torch.int32) != 0)


def everything(backend: Backend, spec: RuleSpec, grads: Tensor, generator: torch.Generator) -> list[Tensor]:
    """All that the backend computes from ``grads [T + 1, N]``."""
    weights, state = make_weights(spec, generator), make_state(grads.shape[1], spec, generator)
    param, packed = torch.zeros(grads.shape[1]), backend.pack_state(state, torch.float32)
    backend.step_(spec, backend.prepare(spec, weights), [param], [grads[0]], [packed])
    update, new_state = backend.step(spec, weights, grads[0], state)
    d_weights, d_state = backend.unroll_backward(spec, weights, grads, torch.ones(len(grads)), state)
    assert d_state is not None
    return [param, packed, update, new_state, d_weights, d_state]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.usefixtures("threads")
def test_a_subnormal_gradient_counts_as_zero(backend: Backend, spec: RuleSpec, flush: bool) -> None:
    seeded = torch.Generator().manual_seed
    tiny = torch.full((4, N), SUBNORMAL)
    assert arithmetic_keeps_subnormals() is not flush
    with_tiny = everything(backend, spec, tiny, seeded(0))
    assert arithmetic_keeps_subnormals() is not flush  # the caller's setting is back
    for found, expected in zip(with_tiny, everything(backend, spec, tiny * 0, seeded(0)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("threads")
def test_what_the_caller_does_with_subnormals_changes_no_bit(backend: Backend, flush: bool) -> None:
    case = UnrollCase(n=N, steps=20)
    weights, _, loss_weights, state = case.draws[0]
    for magnitude in (1.0, 1e-22, 1e-34):
        grads = magnitude * torch.randn(21, N, generator=torch.Generator().manual_seed(1))
        found = backend.unroll_backward(case.spec, weights, grads, loss_weights, state)
        torch.set_flush_denormal(not flush)
        expected = backend.unroll_backward(case.spec, weights, grads, loss_weights, state)
        torch.set_flush_denormal(flush)
        for one, other in zip(found, expected, strict=True):
            assert one is not None
            assert other is not None
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert found[0].count_nonzero() > len(found[0]) // 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_subnormal_halves_are_numbers_like_any_other(backend: Backend, dtype: torch.dtype) -> None:
    """Those of float16 are normal in float32; those of bfloat16 are not."""
    spec = SPECS["identity"]
    weights = make_weights(spec, torch.Generator().manual_seed(0))
    smallest = torch.finfo(dtype).smallest_normal
    grad = torch.tensor([smallest / 2, -smallest / 4, smallest, 0.0], dtype=dtype)
    param, state = grad.clone(), backend.init_state(4, spec, dtype, grad.device)
    weights[-spec.hidden_size - 1 :] = 0  # no update: what is left is reading and writing
    backend.step_(spec, backend.prepare(spec, weights), [param], [grad], [state])
    expected = grad if dtype == torch.float16 else torch.where(grad.abs() < smallest, 0.0, grad)
    torch.testing.assert_close(param, expected, rtol=0, atol=0)

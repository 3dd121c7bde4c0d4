"""One differentiable step with its backward, and a whole meta-step: unroll and meta-gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import MACS_BACKWARD, MACS_FORWARD, report
from numerics import assert_as_good_as_eager
from torch import Tensor

from l2l_fast import CoordinatewiseLSTM, reference
from l2l_fast.backends import cpu, get
from l2l_fast.experiments.speed import eager_step, zero_state

STEP_SIZES = (1_000, 10_000, 100_000)
# Autograd keeps about 1.4 KB per coordinate and step, so eager can't follow beyond this.
META_SIZES = (1_000, 10_000, 100_000)
META_STEPS = 20
CHECKED = 1_000
# Down to where everything that the backward multiplies is subnormal; they shall take the same time.
MAGNITUDES = (1e-2, 1e-22, 1e-38, 0.0)


def _gradients(rule: CoordinatewiseLSTM) -> Tensor:
    """The gradients of the rule's parameters as one vector in the order of its flat weights."""
    # The two biases of a cell are summed into one block; the gradient of either is the block's.
    parts = [p.grad.reshape(-1) for name, p in rule.named_parameters() if "bias_hh" not in name and p.grad is not None]
    return torch.cat(parts)


@pytest.mark.parametrize("n", STEP_SIZES)
@pytest.mark.parametrize("instruction_set", cpu.instruction_sets(), indirect=True)
def test_step_backward_cpu(benchmark: Any, rule: CoordinatewiseLSTM, instruction_set: str, n: int) -> None:
    benchmark.group = f"one-step backward n={n}"
    backend, weights = get("cpu"), rule.flat_weights().detach()
    grad, state, d_update, d_state = torch.randn(n), rule.init_state(n), torch.randn(n), torch.randn(n, 2, 2, 20)

    def run(count: int = n) -> tuple[Tensor, Tensor, Tensor]:
        return backend.step_backward(rule.spec, weights, grad[:count], state[:count], d_update[:count], d_state[:count])

    inputs = (weights, grad[:CHECKED], state[:CHECKED], d_update[:CHECKED], d_state[:CHECKED])
    eager = reference.step_backward(rule.spec, *inputs)
    exact = reference.step_backward(rule.spec, *(x.double() for x in inputs))
    for name, result, by_eager, right in zip(("weights", "grad", "state"), run(CHECKED), eager, exact, strict=True):
        assert_as_good_as_eager(name, result, by_eager, right)
    report(benchmark, n, run, macs=MACS_FORWARD + MACS_BACKWARD)


@pytest.mark.parametrize("n", STEP_SIZES)
def test_step_backward_eager(benchmark: Any, rule: CoordinatewiseLSTM, n: int) -> None:
    """Forward and backward: the fused backward recomputes the forward, so this is what it replaces."""
    benchmark.group = f"one-step backward n={n}"
    step = eager_step(rule)
    grad, state = torch.randn(n), tuple(s.requires_grad_() for s in zero_state(rule, n))
    d_update, d_state = torch.randn(n), [torch.randn(n, 20) for _ in range(4)]

    def run() -> None:
        update, new_state = step(grad, state)
        torch.autograd.backward([update, *new_state], [d_update, *d_state])

    report(benchmark, n, run, macs=MACS_FORWARD + MACS_BACKWARD)
    rule.zero_grad()


@pytest.mark.parametrize("n", META_SIZES)
@pytest.mark.parametrize("instruction_set", cpu.instruction_sets(), indirect=True)
@pytest.mark.parametrize("part", ["unroll backward", "meta-step"])
def test_meta_step_cpu(benchmark: Any, rule: CoordinatewiseLSTM, instruction_set: str, part: str, n: int) -> None:
    """The backward alone (its recompute included), and together with the steps it belongs to."""
    benchmark.group = f"{part} n={n} T={META_STEPS}"
    backend, weights = get("cpu"), rule.flat_weights().detach()
    grads, loss_weights, param = 0.1 * torch.randn(META_STEPS + 1, n), torch.ones(META_STEPS + 1), torch.zeros(n)

    def backward(count: int = n) -> Tensor:
        return backend.unroll_backward(rule.spec, weights, grads[:, :count], loss_weights, None)[0]

    def meta_step() -> None:
        prepared = backend.prepare(rule.spec, weights)
        state = backend.init_state(n, rule.spec, torch.float32, param.device)
        for grad in grads[:-1]:
            backend.step_(rule.spec, prepared, [param], [grad], [state])
        backward()

    zeros = rule.init_state(CHECKED)
    eager = reference.unroll_backward(rule.spec, weights, grads[:, :CHECKED], loss_weights, zeros)[0]
    exact = reference.unroll_backward(
        rule.spec, weights.double(), grads[:, :CHECKED].double(), loss_weights, zeros.double()
    )[0]
    assert_as_good_as_eager("weights", backward(CHECKED), eager, exact)
    macs = MACS_FORWARD + MACS_BACKWARD + (MACS_FORWARD if part == "meta-step" else 0)
    run = meta_step if part == "meta-step" else backward
    report(benchmark, n, run, steps=META_STEPS, macs=macs, rounds=5 if n > 10_000 else 0)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("instruction_set", cpu.instruction_sets(), indirect=True)
def test_unroll_backward_of_small_gradients(
    benchmark: Any, rule: CoordinatewiseLSTM, instruction_set: str, magnitude: float
) -> None:
    n = 4_000
    benchmark.group = f"unroll backward by magnitude of the gradients n={n} T={META_STEPS}"
    backend, weights, loss_weights = get("cpu"), rule.flat_weights().detach(), torch.ones(META_STEPS + 1)
    grads = magnitude * torch.randn(META_STEPS + 1, n)

    def run() -> Tensor:
        return backend.unroll_backward(rule.spec, weights, grads, loss_weights, None)[0]

    if not magnitude:
        assert run().count_nonzero() == 0
    report(benchmark, n, run, steps=META_STEPS, macs=MACS_FORWARD + MACS_BACKWARD)


@pytest.mark.parametrize("n", META_SIZES)
def test_meta_step_eager(benchmark: Any, rule: CoordinatewiseLSTM, n: int) -> None:
    """The same meta-gradient through autograd's graph of the unroll."""
    benchmark.group = f"meta-step n={n} T={META_STEPS}"
    step = eager_step(rule)
    grads = 0.1 * torch.randn(META_STEPS + 1, n)
    d_updates = grads[1:].flip(0).cumsum(0).flip(0)

    def run(count: int = n) -> None:
        rule.zero_grad()
        state, loss = zero_state(rule, count), torch.zeros(())
        for grad, d_update in zip(grads[:-1, :count], d_updates[:, :count], strict=True):
            update, state = step(grad, state)
            loss = loss + update @ d_update
        torch.autograd.backward(loss)

    run(CHECKED)
    exact = reference.unroll_backward(
        rule.spec,
        rule.flat_weights().detach().double(),
        grads[:, :CHECKED].double(),
        torch.ones(META_STEPS + 1),
        rule.init_state(CHECKED).double(),
    )[0]
    torch.testing.assert_close(_gradients(rule).double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())
    macs = 2 * MACS_FORWARD + MACS_BACKWARD
    report(benchmark, n, run, steps=META_STEPS, macs=macs, rounds=3 if n > 10_000 else 0)
    rule.zero_grad()

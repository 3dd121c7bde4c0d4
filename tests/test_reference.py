"""The oracle itself: against independent implementations, against autograd, against facts about the rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import REGIMES, autograd_of_unroll, make_state, make_weights
from torch import Tensor, nn

from l2l_fast import Identity, LogAndSign, RuleSpec, reference
from l2l_fast.spec import Preprocess

pytestmark = pytest.mark.usefixtures("one_thread")

N = 5
PREPROCESSES = [LogAndSign(10.0), LogAndSign(2.0), Identity()]

hidden_sizes = pytest.mark.parametrize("hidden_size", [1, 4, 20])
preprocesses = pytest.mark.parametrize("preprocess", PREPROCESSES, ids=str)


def double_inputs(spec: RuleSpec, generator: torch.Generator, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, gradients on both sides of the threshold, and a state; all float64 and requiring grad."""
    grad = REGIMES["normal"](n, spec, generator)
    grad[1::2] *= 0.1 * math.exp(-(spec.log_p or 10.0))
    inputs = (make_weights(spec, generator, "large"), grad, make_state(n, spec, generator))
    return tuple(tensor.double().requires_grad_() for tensor in inputs)  # type: ignore[return-value]


def lstm_cells(
    spec: RuleSpec, weights: Tensor, grad: Tensor, state: Tensor
) -> tuple[tuple[Tensor, Tensor], list[nn.Module]]:
    """The rule out of ``torch.nn`` modules, the biases of each cell shared out unevenly between its two."""
    blocks = reference.split_weights(spec, weights.detach())
    cells = [nn.LSTMCell(spec.features, spec.hidden_size), nn.LSTMCell(spec.hidden_size, spec.hidden_size)]
    output = nn.Linear(spec.hidden_size, 1)
    for module in (*cells, output):
        module.double()
    with torch.no_grad():
        for layer, cell in enumerate(cells, start=1):
            cell.weight_ih.copy_(blocks[f"weight_ih_{layer}"])
            cell.weight_hh.copy_(blocks[f"weight_hh_{layer}"])
            cell.bias_ih.copy_(0.3 * blocks[f"bias_{layer}"])
            cell.bias_hh.copy_(0.7 * blocks[f"bias_{layer}"])
        output.weight.copy_(blocks["weight_out"])
        output.bias.copy_(blocks["bias_out"])
    x = grad[:, None]
    if isinstance(spec.preprocess, LogAndSign):
        k = spec.preprocess.p
        x = torch.stack([(grad.abs().log() / k).clamp(min=-1), (grad * math.exp(k)).clamp(-1, 1)], dim=1)
    h1, c1 = cells[0](x, (state[:, 0, 0], state[:, 0, 1]))
    h2, c2 = cells[1](h1, (state[:, 1, 0], state[:, 1, 1]))
    update = spec.output_scale * output(h2).squeeze(1)
    new_state = torch.stack([torch.stack([h1, c1], 1), torch.stack([h2, c2], 1)], 1)
    return (update, new_state), [*cells, output]


@hidden_sizes
@preprocesses
def test_step_equals_torch_modules(hidden_size: int, preprocess: Preprocess, generator: torch.Generator) -> None:
    spec = RuleSpec(hidden_size, preprocess, 0.3)
    weights, grad, state = double_inputs(spec, generator)
    expected, modules = lstm_cells(spec, weights, grad, state)
    actual = reference.step(spec, weights, grad, state)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)

    directions = tuple(torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in actual)
    d_weights, *d_inputs = torch.autograd.grad(actual, (weights, grad, state), directions)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    expected_gradients = torch.autograd.grad(expected, (*parameters, grad, state), directions)
    ih1, hh1, bias1, bias1_again, ih2, hh2, bias2, bias2_again, out, bias_out, *expected_inputs = expected_gradients
    torch.testing.assert_close(bias1, bias1_again)
    torch.testing.assert_close(bias2, bias2_again)
    flat = torch.cat([block.reshape(-1) for block in (ih1, hh1, bias1, ih2, hh2, bias2, out, bias_out)])
    torch.testing.assert_close(d_weights, flat, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(tuple(d_inputs), tuple(expected_inputs), rtol=1e-10, atol=1e-12)


class HandDerivedStep(torch.autograd.Function):
    """``reference.step`` with ``reference.step_backward`` for its derivative, so that gradcheck can judge it."""

    @staticmethod
    def forward(ctx, spec, weights, grad, state):  # type: ignore[no-untyped-def]
        ctx.spec = spec
        ctx.save_for_backward(weights, grad, state)
        return reference.step(spec, weights, grad, state)

    @staticmethod
    def backward(ctx, d_update, d_state):  # type: ignore[no-untyped-def]
        weights, grad, state = ctx.saved_tensors
        return None, *reference.step_backward(ctx.spec, weights, grad, state, d_update, d_state)


@hidden_sizes
@preprocesses
def test_gradcheck_of_step_backward(hidden_size: int, preprocess: Preprocess, generator: torch.Generator) -> None:
    spec = RuleSpec(hidden_size, preprocess, 0.3)
    weights, grad, state = double_inputs(spec, generator, n=2)
    # Differences of the second feature need a step that is small against exp(-p).
    eps = 1e-4 * math.exp(-(spec.log_p or 5.0))

    def step(weights: Tensor, grad: Tensor, state: Tensor) -> Any:
        return HandDerivedStep.apply(spec, weights, grad, state)  # type: ignore[no-untyped-call]

    assert torch.autograd.gradcheck(lambda g: step(weights.detach(), g, state.detach()), (grad,), eps=eps, atol=1e-5)
    assert torch.autograd.gradcheck(
        lambda w, s: step(w, grad.detach(), s), (weights, state), fast_mode=hidden_size == 20
    )


@hidden_sizes
@preprocesses
def test_step_backward_equals_autograd(hidden_size: int, preprocess: Preprocess, generator: torch.Generator) -> None:
    spec = RuleSpec(hidden_size, preprocess, 0.3)
    inputs = double_inputs(spec, generator)
    outputs = reference.step(spec, *inputs)
    directions = tuple(torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs)
    expected = torch.autograd.grad(outputs, inputs, directions)
    actual = reference.step_backward(spec, *inputs, directions[0], directions[1])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@hidden_sizes
@preprocesses
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("apart", [False, True], ids=["gradients", "points"])
def test_unroll_backward_equals_autograd(
    hidden_size: int, preprocess: Preprocess, steps: int, apart: bool, generator: torch.Generator
) -> None:
    """Also where the derivatives by the points are not the gradients that the rule saw."""
    spec = RuleSpec(hidden_size, preprocess, 0.3)
    weights, _, state = (tensor.detach() for tensor in double_inputs(spec, generator))
    grads = torch.randn(steps + 1, N, generator=generator, dtype=torch.float64)
    loss_weights = torch.rand(steps + 1, generator=generator, dtype=torch.float64)
    d_points = torch.randn(steps + 1, N, generator=generator, dtype=torch.float64) if apart else None
    expected = autograd_of_unroll(spec, weights, grads, loss_weights, state, d_points)
    actual = reference.unroll_backward(spec, weights, grads, loss_weights, state, d_points)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@preprocesses
def test_unroll_backward_by_finite_differences(preprocess: Preprocess, generator: torch.Generator) -> None:
    """Independent of any derivative: the linearised loss, moved along one direction of weights and state."""
    spec = RuleSpec(4, preprocess, 0.3)
    weights, _, state = (tensor.detach() for tensor in double_inputs(spec, generator))
    grads = torch.randn(6, N, generator=generator, dtype=torch.float64)
    loss_weights = torch.rand(6, generator=generator, dtype=torch.float64)
    along_weights = torch.randn(weights.shape, generator=generator, dtype=torch.float64)
    along_state = torch.randn(state.shape, generator=generator, dtype=torch.float64)

    def loss(eps: float) -> float:
        current, moved, total = state + eps * along_state, torch.zeros(N, dtype=torch.float64), 0.0
        for t in range(5):
            update, current = reference.step(spec, weights + eps * along_weights, grads[t], current)
            moved += update
            total += (loss_weights[t + 1] * grads[t + 1] @ moved).item()
        return total

    d_weights, d_state = reference.unroll_backward(spec, weights, grads, loss_weights, state)
    predicted = (d_weights @ along_weights + (d_state * along_state).sum()).item()
    assert predicted == pytest.approx((loss(1e-6) - loss(-1e-6)) / 2e-6, rel=1e-6)


def test_loss_weight_and_gradient_of_the_first_point_play_their_parts(generator: torch.Generator) -> None:
    """``w_0`` weighs a loss that no update can change; ``G_0`` is seen by the rule alone, ``G_T`` by the sum alone."""
    spec = RuleSpec(4, Identity(), 0.3)
    weights, _, state = (tensor.detach() for tensor in double_inputs(spec, generator))
    grads = torch.randn(4, N, generator=generator, dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.float64)
    d_weights, _ = reference.unroll_backward(spec, weights, grads, ones, state)
    other_first_weight, _ = reference.unroll_backward(
        spec, weights, grads, torch.tensor([9.0, 1, 1, 1], dtype=torch.float64), state
    )
    torch.testing.assert_close(other_first_weight, d_weights, rtol=0, atol=0)
    last_only = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)
    once, _ = reference.unroll_backward(spec, weights, grads, last_only, state)
    doubled = grads.clone()
    doubled[-1] *= 2
    twice, _ = reference.unroll_backward(spec, weights, doubled, last_only, state)
    torch.testing.assert_close(twice, 2 * once, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@preprocesses
def test_zeroed_output_layer_gives_exactly_no_update(
    preprocess: Preprocess, dtype: torch.dtype, generator: torch.Generator
) -> None:
    spec = RuleSpec(20, preprocess)
    weights = make_weights(spec, generator).to(dtype)
    weights[-21:] = 0
    update, state = reference.step(spec, weights, torch.randn(9, generator=generator), make_state(9, spec, generator))
    assert (update == 0).all()
    assert state.any()


# Preprocessing


def test_features_of_one() -> None:
    x = reference.features(RuleSpec(preprocess=LogAndSign(10.0)), torch.tensor([1.0, -1.0]))
    assert x.tolist() == [[0.0, 1.0], [0.0, -1.0]]


def test_features_of_zero() -> None:
    x = reference.features(RuleSpec(preprocess=LogAndSign(10.0)), torch.zeros(1))
    assert x.tolist() == [[-1.0, 0.0]]


@pytest.mark.parametrize("p", [1.0, 5.0, 10.0, 80.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_are_continuous_at_the_threshold(p: float, dtype: torch.dtype) -> None:
    at = torch.tensor([math.exp(-p)], dtype=dtype)
    around = torch.cat([torch.nextafter(at, at * 0), at, torch.nextafter(at, at * 2)])
    x = reference.features(RuleSpec(preprocess=LogAndSign(p)), torch.cat([around, -around]))
    # exp(-p) is rounded, which moves its log by one unit in the last place of the exponential.
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(x[:, 0], torch.full((6,), -1.0, dtype=dtype), rtol=0, atol=tolerance)
    torch.testing.assert_close(x[:, 1], torch.tensor([1, 1, 1, -1, -1, -1], dtype=dtype), rtol=0, atol=tolerance)


@pytest.mark.parametrize("regime", ["normal", "decades", "threshold", "denormal", "huge"])
@pytest.mark.parametrize("k", [5.0, 10.0])
def test_features_equal_the_branch_free_formula(k: float, regime: str, generator: torch.Generator) -> None:
    """``(clamp(log|g| / k, -1), clamp(g e^k, -1, 1))``, the form in which the paper's authors computed them."""
    spec = RuleSpec(preprocess=LogAndSign(k))
    grad = REGIMES[regime](1000, spec, generator).double()
    eps = torch.finfo(torch.float64).eps
    expected = torch.stack([(grad.abs().log() / k).clamp(min=-1), (grad * math.exp(k)).clamp(-1, 1)], dim=1)
    torch.testing.assert_close(reference.features(spec, grad), expected, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@preprocesses
def test_narrow_gradients_are_preprocessed_in_float32(
    preprocess: Preprocess, dtype: torch.dtype, generator: torch.Generator
) -> None:
    spec = RuleSpec(20, preprocess)
    weights, state = make_weights(spec, generator), make_state(100, spec, generator)
    grad = (torch.randn(100, generator=generator) * 10 ** (-6 * torch.rand(100, generator=generator))).to(dtype)
    update, new_state = reference.step(spec, weights, grad, state)
    assert update.dtype == new_state.dtype == torch.float32
    torch.testing.assert_close((update, new_state), reference.step(spec, weights, grad.float(), state), rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@preprocesses
def test_nonfinite_gradients_make_their_coordinate_nan_and_no_other(
    preprocess: Preprocess, value: float, generator: torch.Generator
) -> None:
    spec = RuleSpec(20, preprocess)
    weights, state = make_weights(spec, generator), make_state(4, spec, generator)
    grad = torch.randn(4, generator=generator)
    update, new_state = reference.step(spec, weights, grad, state)
    grad[2] = value
    bad_update, bad_state = reference.step(spec, weights, grad, state)
    others = [0, 1, 3]
    assert reference.features(spec, grad)[2].isnan().all()
    assert bad_update[2].isnan()
    assert bad_state[2].isnan().all()
    torch.testing.assert_close(bad_update[others], update[others], rtol=0, atol=0)
    torch.testing.assert_close(bad_state[others], new_state[others], rtol=0, atol=0)


def test_backward_at_zero_gradient_is_finite(generator: torch.Generator) -> None:
    """The logarithm's infinite slope at zero belongs to the branch not taken."""
    spec = RuleSpec(20, LogAndSign(10.0))
    grad = torch.zeros(3, requires_grad=True)
    update, _ = reference.step(spec, make_weights(spec, generator), grad, make_state(3, spec, generator))
    update.sum().backward()  # type: ignore[no-untyped-call]
    assert grad.grad is not None
    assert grad.grad.isfinite().all()
    assert grad.grad.any()


def test_split_weights_are_views_in_order() -> None:
    spec = RuleSpec(3, LogAndSign(10.0))
    flat = torch.arange(float(spec.num_weights))
    blocks = reference.split_weights(spec, flat)
    assert {name: tuple(block.shape) for name, block in blocks.items()} == spec.weight_shapes
    assert torch.equal(torch.cat([block.reshape(-1) for block in blocks.values()]), flat)
    blocks["bias_out"].fill_(-1)
    assert flat[-1] == -1

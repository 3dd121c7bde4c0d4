"""The differentiable operators: every gradient that is asked for is right, or refused with an error."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import SPECS, StepCase, UnrollCase, autograd_of_unroll, make_state, make_weights
from torch import Tensor

from l2l_fast import CoordinatewiseLSTM, Identity, LogAndSign, RuleSpec, autograd, reference
from l2l_fast.backends import Backend

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = SPECS["log10"]
SMALL = RuleSpec(4, LogAndSign(2.0), 0.3)
PREPROCESSES = pytest.mark.parametrize("spec", [SMALL, RuleSpec(4, Identity(), 0.3)], ids=["log", "identity"])


def double_inputs(spec: RuleSpec, generator: torch.Generator, n: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    weights, state = make_weights(spec, generator), make_state(n, spec, generator)
    grad = torch.tensor([1.0, -0.01, 0.3, 0.05, -2.0])[:n]
    return tuple(tensor.double().requires_grad_() for tensor in (weights, grad, state))  # type: ignore[return-value]


# One step


@PREPROCESSES
def test_gradcheck_of_the_step(spec: RuleSpec, generator: torch.Generator) -> None:
    assert torch.autograd.gradcheck(
        lambda w, g, s: autograd.step(spec, w, g, s, "reference"), double_inputs(spec, generator)
    )


@PREPROCESSES
def test_gradcheck_of_the_module(spec: RuleSpec, generator: torch.Generator) -> None:
    rule = CoordinatewiseLSTM(spec.hidden_size, spec.preprocess, spec.output_scale).double()
    _, grad, state = double_inputs(spec, generator)
    parameters = tuple(rule.parameters())
    assert torch.autograd.gradcheck(lambda *_: rule(grad, state), (*parameters, grad, state))


def test_second_derivatives_are_refused(generator: torch.Generator) -> None:
    inputs = double_inputs(SMALL, generator)
    weights, grad, state = inputs
    update, _ = autograd.step(SMALL, weights, grad, state, "reference")
    with pytest.raises(RuntimeError, match="step_backward"):
        torch.autograd.gradgradcheck(lambda w, g, s: autograd.step(SMALL, w, g, s, "reference"), inputs)
    (first,) = torch.autograd.grad(update.sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="step_backward"):
        first.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("wanted", [w for w in itertools.product([False, True], repeat=3) if any(w)], ids=str)
@pytest.mark.parametrize("used", ["update", "state", "both"])
def test_every_input_that_wants_a_gradient_gets_it(backend: Backend, wanted: tuple[bool, ...], used: str) -> None:
    inputs = StepCase(n=33).draws[0]

    def leaves() -> tuple[Tensor, Tensor, Tensor]:
        weights, grad, state = inputs.weights.clone(), inputs.grad.clone(), inputs.state.clone()
        for tensor, want in zip((weights, grad, state), wanted, strict=True):
            tensor.requires_grad_(want)
        return weights, grad, state

    expected, actual = leaves(), leaves()

    def loss(outputs: tuple[Tensor, Tensor]) -> Tensor:
        update, state = outputs
        return {"update": update.sum(), "state": state.square().sum(), "both": update.sum() + state.sum()}[used]

    loss(reference.step(SPEC, *expected)).backward()  # type: ignore[no-untyped-call]
    loss(autograd.step(SPEC, *actual, backend.name)).backward()  # type: ignore[no-untyped-call]
    for mine, right, want in zip(actual, expected, wanted, strict=True):
        assert (mine.grad is not None) == want
        if want:
            assert right.grad is not None
            torch.testing.assert_close(mine.grad, right.grad, rtol=1e-3, atol=1e-5 * right.grad.abs().max().item())


def test_chained_steps_equal_autograd(backend: Backend, generator: torch.Generator) -> None:
    """Several steps through the module, the parameters moving and their gradient a function of them."""
    rule = CoordinatewiseLSTM()

    def loss(step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        theta, state = torch.linspace(-1, 1, 33).requires_grad_(), rule.init_state(33)
        total = torch.zeros(())
        for _ in range(4):
            update, state = step(2 * theta, state)
            theta = theta + update
            total = total + theta.square().sum()
        return total

    through_ops = torch.autograd.grad(loss(lambda g, s: rule(g, s, backend.name)), tuple(rule.parameters()))
    plain = torch.autograd.grad(
        loss(lambda g, s: reference.step(SPEC, rule.flat_weights(), g, s)), [*rule.parameters()]
    )
    for mine, right in zip(through_ops, plain, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-5 * right.abs().max().item())


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_module_keeps_shape_and_dtype(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rule = CoordinatewiseLSTM()
    grad = torch.ones(shape, dtype=dtype, requires_grad=True)
    state = torch.zeros(*shape, 2, 2, 20, dtype=dtype, requires_grad=True)
    update, new_state = rule(grad, state, backend=backend.name)
    assert (update.shape, update.dtype) == (grad.shape, dtype)
    assert (new_state.shape, new_state.dtype) == (state.shape, dtype)
    (update.sum() + new_state.sum()).backward()
    assert grad.grad is not None
    assert grad.grad.dtype == dtype
    assert state.grad is not None
    assert state.grad.dtype == dtype
    assert all(parameter.grad is not None for parameter in rule.parameters())


def test_module_takes_any_strides(backend: Backend, generator: torch.Generator) -> None:
    rule = CoordinatewiseLSTM()
    grad = torch.randn(12, 10, generator=generator)[::2].t()
    state = make_state(60, SPEC, generator).view(6, 10, 2, 2, 20).transpose(0, 1)
    assert not grad.is_contiguous()
    strided = rule(grad, state, backend=backend.name)
    torch.testing.assert_close(strided, rule(grad.contiguous(), state.contiguous(), backend=backend.name))


def test_no_tape_without_need(backend: Backend) -> None:
    rule = CoordinatewiseLSTM()
    with torch.no_grad():
        update, state = rule(torch.ones(3), rule.init_state(3), backend=backend.name)
    assert not update.requires_grad
    assert not state.requires_grad


# The loss of an unroll


def _quadratic(theta: Tensor) -> Tensor:
    return ((theta - 0.5) ** 2 * torch.arange(1.0, 1.0 + len(theta), dtype=theta.dtype)).sum()


def _unrolled_by_autograd(
    spec: RuleSpec, weights: Tensor, params: Tensor, state: Tensor | None, loss_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The meta-loss with gradients cut out of the graph, and the gradients at every point visited."""
    theta = params
    current = torch.zeros(len(params), 2, 2, spec.hidden_size, dtype=params.dtype) if state is None else state
    total, grads = torch.zeros((), dtype=params.dtype), []
    for t in range(len(loss_weights)):
        point = theta.detach().requires_grad_()
        (grad,) = torch.autograd.grad(_quadratic(point), point)
        grads.append(grad)
        total = total + loss_weights[t] * _quadratic(theta)
        if t + 1 < len(loss_weights):
            update, current = reference.step(spec, weights, grad, current)
            theta = theta + update
    return total, torch.stack(grads)


@pytest.mark.parametrize("with_state", [False, True])
@PREPROCESSES
def test_unroll_loss_equals_autograd(spec: RuleSpec, with_state: bool, generator: torch.Generator) -> None:
    weights, params, state = double_inputs(spec, generator, n=5)
    inputs = (weights, params, state) if with_state else (weights, params)
    start = state if with_state else None
    loss_weights = torch.rand(8, generator=generator, dtype=torch.float64)
    total, grads = _unrolled_by_autograd(spec, weights, params, start, loss_weights)
    expected = torch.autograd.grad(3 * total, inputs)

    loss = autograd.unroll_loss(spec, total.detach(), weights, params, start, grads, None, loss_weights, "reference")
    assert loss.item() == total.item()
    torch.testing.assert_close(torch.autograd.grad(3 * loss, inputs), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("wanted", [w for w in itertools.product([False, True], repeat=3) if any(w)], ids=str)
def test_unroll_loss_gives_every_gradient_that_is_wanted(backend: Backend, wanted: tuple[bool, ...]) -> None:
    weights, grads, loss_weights, state = UnrollCase(n=33, steps=5).draws[0]
    assert state is not None
    inputs = weights, params, start = weights.clone(), torch.zeros(33), state.clone()
    for tensor, want in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(want)
    loss = autograd.unroll_loss(
        SPEC, torch.tensor(2.5), weights, params, start, grads, None, loss_weights, backend.name
    )
    assert loss.item() == 2.5
    (3 * loss).backward()  # type: ignore[no-untyped-call]
    d_weights, d_state = autograd_of_unroll(SPEC, weights.detach(), grads, loss_weights, state)
    assert d_state is not None
    for mine, right, want in zip(inputs, (d_weights, loss_weights @ grads, d_state), wanted, strict=True):
        assert (mine.grad is not None) == want
        if want:
            torch.testing.assert_close(mine.grad, 3 * right, rtol=1e-3, atol=1e-5 * right.abs().max().item())


# torch.library and torch.compile


def _operator_calls(backend: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every operator with arguments for it; those that are differentiable want gradients."""
    options = (SPEC.hidden_size, SPEC.log_p, SPEC.output_scale, backend)
    step, unroll = StepCase(n=17).draws[0], UnrollCase(n=17, steps=3).draws[0]
    weights, grads, loss_weights, state = unroll
    assert state is not None
    wanting = [tensor.clone().requires_grad_() for tensor in (*step[:3], weights, torch.zeros(17), state)]
    ops = torch.ops.l2l_fast
    return {
        "step": (ops.step.default, (*wanting[:3], *options)),
        "step_backward": (ops.step_backward.default, (*step, *options)),
        "unroll_loss": (
            ops.unroll_loss.default,
            (torch.tensor(1.0), *wanting[3:], grads, None, loss_weights, *options),
        ),
        "unroll_loss from zeros": (
            ops.unroll_loss.default,
            (torch.tensor(1.0), *wanting[3:5], None, grads, grads.flip(0), loss_weights, *options),
        ),
        "unroll_backward": (ops.unroll_backward.default, (weights, state, grads, None, loss_weights, True, *options)),
        "unroll_backward from zeros": (
            ops.unroll_backward.default,
            (weights, None, grads, grads.flip(0), loss_weights, True, *options),
        ),
    }


@pytest.mark.parametrize("name", list(_operator_calls("reference")))
def test_operators_are_registered_properly(backend: Backend, name: str) -> None:
    operator, arguments = _operator_calls(backend.name)[name]
    torch.library.opcheck(operator, arguments)


def test_all_operators_are_checked() -> None:
    checked = {operator for operator, _ in _operator_calls("reference").values()}
    registered = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("l2l_fast::")]
    assert {operator.name() for operator in checked} == set(registered)


def test_compiled_module_equals_eager(backend: Backend, generator: torch.Generator) -> None:
    """The operators are opaque to compilers, so one that only traces shows all there is to see."""
    torch.compiler.reset()
    rule = CoordinatewiseLSTM()
    grad, state = torch.randn(33, generator=generator), make_state(33, SPEC, generator)

    def two_steps(grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        update, state = rule(grad, state, backend=backend.name)
        second, state = rule(grad + update, state, backend=backend.name)
        return update + second, state

    results = []
    for function in (two_steps, torch.compile(two_steps, fullgraph=True, backend="aot_eager")):
        leaf = grad.clone().requires_grad_()
        outputs = function(leaf, state)
        (outputs[0].sum() + outputs[1].square().sum()).backward()  # type: ignore[no-untyped-call]
        results.append((*outputs, leaf.grad, *(parameter.grad for parameter in rule.parameters())))
        rule.zero_grad()
    torch.testing.assert_close(results[1], results[0])

"""``unroll``: values, meta-gradients of first and second order, carried state, and bad input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from l2l_fast.meta.unroll import Unroll, unroll
from l2l_fast.problems.quadratic import Quadratic, QuadraticInstances
from l2l_fast.rule import CoordinatewiseLSTM
from l2l_fast.spec import LogAndSign

BATCH, DIM, STEPS = 3, 4, 6

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_rule(preprocess: LogAndSign | None = None, *, seed: int = 0) -> CoordinatewiseLSTM:
    torch.manual_seed(seed)
    rule = CoordinatewiseLSTM(hidden_size=5, preprocess=preprocess).double()
    rule.output.reset_parameters()  # updates of some size, where a fresh rule takes tiny ones
    return rule


class Network:
    """Small regression networks on minibatches: two parameters of different shape, and data from the generator."""

    def __init__(self, batch: int = BATCH) -> None:
        self.batch = batch

    def init(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        def draw(*shape: int) -> Tensor:
            return torch.randn(self.batch, *shape, generator=generator, dtype=torch.float64)

        return {"weight": draw(2, 3), "bias": draw(2)}

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        x = torch.randn(self.batch, 7, 3, generator=generator, dtype=torch.float64)
        output = torch.tanh(x @ params["weight"].mT + params["bias"].unsqueeze(1))
        return (output - x[..., :2]).square().mean((1, 2))


class Wrapped(nn.Module):
    """Another module around an LSTM rule, so that ``unroll`` takes it for a rule of unknown make."""

    def __init__(self, rule: CoordinatewiseLSTM) -> None:
        super().__init__()
        self.rule = rule

    def init_state(self, n: int) -> Tensor:
        return self.rule.init_state(n, dtype=torch.float64)

    def forward(self, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        update, state = self.rule(grad, state, backend="reference")
        return update, state


def quadratics() -> QuadraticInstances:
    source = seeded(1)
    instances = Quadratic(DIM).sample(BATCH, generator=source)
    return QuadraticInstances(instances.w.double(), instances.y.double())


def lstm_step(rule: CoordinatewiseLSTM, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The rule from ``torch.nn`` alone."""
    if isinstance(rule.spec.preprocess, LogAndSign):
        p = rule.spec.preprocess.p
        large = grad.abs() >= torch.tensor(-p, dtype=grad.dtype).exp()
        first = torch.where(large, torch.where(large, grad.abs(), 1.0).log() / p, -1.0)
        second = torch.where(large, grad.sign(), grad * torch.tensor(p, dtype=grad.dtype).exp())
        x = torch.stack([first, second], dim=1)
    else:
        x = grad.unsqueeze(1)
    rows = []
    for layer, cell in enumerate(rule.cells):
        h, c = cell(x, (state[:, layer, 0], state[:, layer, 1]))
        rows.append(torch.stack([h, c], dim=1))
        x = h
    return rule.spec.output_scale * rule.output(x).squeeze(1), torch.stack(rows, dim=1)


def from_scratch(
    rule: CoordinatewiseLSTM, instances: QuadraticInstances, theta: Tensor, weights: Tensor, second: bool
) -> Tensor:
    """The meta-loss of a quadratic, with its gradient ``2 W^T (W theta - y)`` written out."""
    state = torch.zeros(theta.numel(), 2, 2, rule.spec.hidden_size, dtype=theta.dtype)
    total = theta.new_zeros(())
    for t in range(len(weights)):
        residual = (instances.w @ theta.unsqueeze(-1)).squeeze(-1) - instances.y
        total = total + weights[t] * residual.square().sum(1).mean()
        if t + 1 < len(weights):
            grad = 2 * (instances.w.mT @ residual.unsqueeze(-1)).reshape(-1)
            update, state = lstm_step(rule, grad if second else grad.detach(), state)
            theta = theta + update.view_as(theta)
    return total


def meta_gradients(rule: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    return dict(zip(dict(rule.named_parameters()), torch.autograd.grad(loss, list(rule.parameters())), strict=True))


def assert_same_run(actual: Unroll, expected: Unroll, tolerance: float) -> None:
    for name in ("loss", "losses", "params", "state"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("preprocess", [None, LogAndSign()])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("weights", [None, [0.0, 0.5, 0.0, 2.0, 1.0, 0.25, 3.0]])
def test_meta_gradient_against_autograd_from_scratch(
    preprocess: LogAndSign | None, second: bool, weights: list[float] | None
) -> None:
    rule, instances = make_rule(preprocess), quadratics()
    params = instances.init(generator=seeded(2))
    run = unroll(
        rule,
        instances,
        STEPS,
        params=params,
        loss_weights=weights,
        second_derivatives=second,
        backend="reference",
    )
    w = torch.ones(STEPS + 1, dtype=torch.float64) if weights is None else torch.tensor(weights, dtype=torch.float64)
    expected = from_scratch(rule, instances, params["theta"], w, second)
    torch.testing.assert_close(run.loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        meta_gradients(rule, run.loss), meta_gradients(rule, expected), rtol=1e-10, atol=1e-10 * expected.item()
    )


def test_second_derivatives_make_a_difference() -> None:
    rule, instances = make_rule(), quadratics()
    params = instances.init(generator=seeded(2))
    first, second = (
        meta_gradients(rule, unroll(rule, instances, STEPS, params=params, second_derivatives=kept).loss)
        for kept in (False, True)
    )
    assert (first["output.weight"] - second["output.weight"]).norm() > 1e-3 * first["output.weight"].norm()


@pytest.mark.parametrize("preprocess", [None, LogAndSign()])
def test_fused_path_equals_stepwise_path(preprocess: LogAndSign | None) -> None:
    rule = make_rule(preprocess)
    weights = torch.linspace(0.5, 1.5, STEPS + 1)
    fused, stepwise = (
        unroll(candidate, Network(), STEPS, generator=seeded(3), loss_weights=weights, backend=backend)
        for candidate, backend in ((rule, "reference"), (Wrapped(rule), None))
    )
    assert_same_run(fused, stepwise, 1e-12)
    torch.testing.assert_close(
        meta_gradients(rule, fused.loss), meta_gradients(rule, stepwise.loss), rtol=1e-12, atol=1e-12
    )


def test_second_derivatives_of_another_module() -> None:
    rule = make_rule()
    runs = [
        unroll(candidate, Network(), STEPS, generator=seeded(3), second_derivatives=True)
        for candidate in (rule, Wrapped(rule))
    ]
    torch.testing.assert_close(
        meta_gradients(rule, runs[0].loss), meta_gradients(rule, runs[1].loss), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("second", [False, True])
def test_gradients_of_start_and_state(second: bool) -> None:
    rule = make_rule()
    start = Network().init(generator=seeded(4))
    state = 0.3 * torch.randn(BATCH * 8, 2, 2, 5, generator=seeded(5), dtype=torch.float64)

    def gradients(candidate: nn.Module) -> list[Tensor]:
        params = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
        begin = state.clone().requires_grad_()
        run = unroll(
            candidate,
            Network(),
            STEPS,
            params=params,
            state=begin,
            generator=seeded(6),
            second_derivatives=second,
        )
        return list(torch.autograd.grad(run.loss, [*params.values(), begin]))

    actual = gradients(rule)
    torch.testing.assert_close(actual, gradients(Wrapped(rule)), rtol=1e-11, atol=1e-12)
    assert all(grad.norm() > 0 for grad in actual)


@pytest.mark.parametrize("second", [False, True])
def test_half_and_half_is_the_whole(second: bool) -> None:
    rule, instances = make_rule(), quadratics()
    params = instances.init(generator=seeded(2))
    whole = unroll(rule, instances, 2 * STEPS, params=params, second_derivatives=second)
    first = unroll(rule, instances, STEPS, params=params, second_derivatives=second)
    second_half = unroll(rule, instances, STEPS, params=first.params, state=first.state, second_derivatives=second)
    torch.testing.assert_close(torch.cat([first.losses, second_half.losses[1:]]), whole.losses)
    torch.testing.assert_close(second_half.params, whole.params)
    torch.testing.assert_close(second_half.state, whole.state)


def test_results_are_detached_and_inputs_unchanged() -> None:
    rule, instances = make_rule(), quadratics()
    params = instances.init(generator=seeded(2))
    state = torch.zeros(BATCH * DIM, 2, 2, 5, dtype=torch.float64)
    before = params["theta"].clone()
    for second in (False, True):
        run = unroll(rule, instances, STEPS, params=params, state=state, second_derivatives=second)
        assert run.loss.requires_grad
        assert run.losses.shape == (STEPS + 1, BATCH)
        assert run.params["theta"].shape == before.shape
        assert run.state.shape == state.shape
        assert not any(tensor.requires_grad for tensor in (run.losses, run.params["theta"], run.state))
        assert torch.equal(params["theta"], before)
        assert not state.any()


def test_changing_the_state_before_the_backward_is_an_error() -> None:
    rule, instances = make_rule(), quadratics()
    state = torch.zeros(BATCH * DIM, 2, 2, 5, dtype=torch.float64)
    run = unroll(rule, instances, STEPS, state=state)
    state += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run.loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("second", [False, True])
def test_without_meta_gradient(second: bool) -> None:
    rule, instances = make_rule(), quadratics()
    params = instances.init(generator=seeded(2))
    wanted = unroll(rule, instances, STEPS, params=params, second_derivatives=second)
    with torch.no_grad():
        run = unroll(rule, instances, STEPS, params=params, second_derivatives=second)
    frozen = unroll(rule.requires_grad_(False), instances, STEPS, params=params, second_derivatives=second)
    for other in (run, frozen):
        assert not other.loss.requires_grad
        assert_same_run(other, wanted, 1e-14)


def test_gradient_fed_to_the_rule_does_not_depend_on_the_batch() -> None:
    rule, instances = make_rule(), quadratics()
    theta = instances.init(generator=seeded(2))["theta"]
    whole = unroll(rule, instances, STEPS, params={"theta": theta})
    for b in range(BATCH):
        alone = QuadraticInstances(instances.w[b : b + 1], instances.y[b : b + 1])
        run = unroll(rule, alone, STEPS, params={"theta": theta[b : b + 1]})
        torch.testing.assert_close(run.losses[:, 0], whole.losses[:, b], rtol=1e-12, atol=0)
    assert whole.loss.item() == pytest.approx(whole.losses.mean(1).sum().item(), rel=1e-12)


def test_unused_parameter_gets_zero_gradient() -> None:
    class Idle(QuadraticInstances):
        def init(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
            return {**super().init(generator=generator), "idle": torch.zeros(BATCH, 2, dtype=torch.float64)}

    instances = quadratics()
    rule = make_rule()
    idle = Idle(instances.w, instances.y)
    fused = unroll(rule, idle, STEPS, generator=seeded(2), backend="reference")
    stepwise = unroll(Wrapped(rule), idle, STEPS, generator=seeded(2))
    assert_same_run(fused, stepwise, 1e-12)


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else [result]
        self.numel = max([self.numel, *(output.numel() for output in outputs if isinstance(output, Tensor))])
        return result


def test_evaluation_does_not_grow_with_the_horizon() -> None:
    rule, instances = CoordinatewiseLSTM(hidden_size=2), Quadratic(2).sample(5, generator=seeded())
    params = instances.init(generator=seeded(1))

    def largest(steps: int, wanted: bool) -> int:
        with torch.set_grad_enabled(wanted), LargestTensor() as watch:
            unroll(rule, instances, steps, params=params)
        return int(watch.numel)

    n, steps = 10, 300
    assert largest(steps, wanted=True) == (steps + 1) * n  # gradients are kept for the backward
    assert largest(steps, wanted=False) == (steps + 1) * 5  # only the losses are kept
    assert largest(10, wanted=False) == rule.flat_weights().numel()


def test_same_bits_twice() -> None:
    rule = CoordinatewiseLSTM(preprocess=None)
    instances = Quadratic().sample(5, generator=seeded())
    first, second = (unroll(rule, instances, STEPS, generator=seeded(1)) for _ in range(2))
    assert torch.equal(first.losses, second.losses)
    gradients = [meta_gradients(rule, run.loss) for run in (first, second)]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


class Misshapen(QuadraticInstances):
    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        return super().loss(params).sum()


class Constant(QuadraticInstances):
    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        return self.y.sum(1)


class Grumpy(Wrapped):
    def forward(self, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return grad.sum().view(1), state


class TwoStates(Wrapped):
    def init_state(self, n: int) -> Tensor:
        return (super().init_state(n), super().init_state(n))  # type: ignore[return-value]


class ListAsState(Wrapped):
    def forward(self, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return grad, [state]  # type: ignore[return-value]


def test_bad_input() -> None:
    rule, instances = make_rule(), quadratics()
    theta = instances.init(generator=seeded(2))["theta"]
    state = torch.zeros(BATCH * DIM, 2, 2, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="steps must be a positive int, got 0"):
        unroll(rule, instances, 0)
    with pytest.raises(TypeError, match=r"module with an init_state\(n\) method, got Linear"):
        unroll(nn.Linear(1, 1), instances)
    with pytest.raises(TypeError, match="has no meaning for a Wrapped"):
        unroll(Wrapped(rule), instances, backend="reference")
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        unroll(rule, instances, backend="gpu")
    with pytest.raises(ValueError, match=r"each of the 7 points of 6 steps.*got shape \(6,\)"):
        unroll(rule, instances, STEPS, loss_weights=[1.0] * STEPS)
    with pytest.raises(ValueError, match="loss_weights must be finite"):
        unroll(rule, instances, 1, loss_weights=[1.0, float("nan")])
    with pytest.raises(TypeError, match="params must be a dict of tensors, got list"):
        unroll(rule, instances, params=[theta])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="params is empty"):
        unroll(rule, instances, params={})
    for problem in (Quadratic(), Quadratic, QuadraticInstances):
        with pytest.raises(TypeError, match=r"methods init and loss, got .*pass problem\.sample\(batch_size, \.\.\.\)"):
            unroll(rule, problem)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the state of a rule must be one tensor, got tuple"):
        unroll(TwoStates(rule), instances)
    with pytest.raises(TypeError, match="the state of a rule must be one tensor, got list"):
        unroll(ListAsState(rule), instances)
    with pytest.raises(TypeError, match=r"is torch.float32 but the rule is torch.float64; convert one"):
        unroll(rule, instances, params={"theta": theta.float()})
    with pytest.raises(TypeError, match=r"params\['theta'\] must be a dense tensor of real floating point"):
        unroll(rule, instances, params={"theta": theta.long()})
    with pytest.raises(ValueError, match="is on meta but the rule is on cpu; move one"):
        unroll(rule, instances, params={"theta": theta.to("meta")})
    with pytest.raises(ValueError, match="must have the instances as leading dimension"):
        unroll(rule, instances, params={"theta": theta, "other": theta[:2]})
    with pytest.raises(ValueError, match=r"state must have shape \(12, 2, 2, 5\) for 12 coordinates, got \(11"):
        unroll(rule, instances, params={"theta": theta}, state=state[1:])
    with pytest.raises(TypeError, match=r"state is torch.float32 but the parameters are torch.float64"):
        unroll(rule, instances, params={"theta": theta}, state=state.float())
    with pytest.raises(ValueError, match=r"one loss per instance, shape \(3,\), got \(\)"):
        unroll(rule, Misshapen(instances.w, instances.y))
    with pytest.raises(ValueError, match="do not depend on the parameters"):
        unroll(rule, Constant(instances.w, instances.y))
    with pytest.raises(ValueError, match=r"update of shape \(12,\), not \(1,\)"):
        unroll(Grumpy(rule), instances)
    with pytest.raises(RuntimeError, match=r"use torch.no_grad\(\) instead of inference mode"), torch.inference_mode():
        unroll(rule, instances)


def test_loss_weights_that_want_a_gradient_are_refused() -> None:
    instances = Quadratic().sample(2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"run\.losses\[t\]\.mean"):
        unroll(CoordinatewiseLSTM(preprocess=None), instances, 3, loss_weights=torch.ones(4, requires_grad=True))

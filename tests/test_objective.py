"""Meta-losses: their values and slopes, the log objective's meta-gradient, and bad input."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from cases import make_weights
from conftest import BACKEND_IDS
from numerics import assert_as_good_as_eager
from torch import Tensor, nn

from l2l_fast import CoordinatewiseLSTM, LogAndSign, RuleSpec, reference, unroll
from l2l_fast.backends import Backend
from l2l_fast.meta.layout import Layout
from l2l_fast.meta.objective import Objective, as_meta_loss

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, STEPS = 3, 4
LOSSES = torch.tensor([[8.0, 1.0], [2.0, 0.5], [1.0, 0.25]], dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Network:
    """Two parameters of different shapes; the losses of the instances are orders of magnitude apart."""

    def init(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {
            "weight": torch.randn(BATCH, 2, 3, generator=generator, dtype=torch.float64),
            "bias": torch.randn(BATCH, 2, generator=generator, dtype=torch.float64),
        }

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        x = torch.randn(BATCH, 7, 3, generator=generator, dtype=torch.float64).to(params["bias"].dtype)
        output = torch.tanh(x @ params["weight"].mT + params["bias"].unsqueeze(1))
        return (output - x[..., :2]).square().mean((1, 2)) * torch.tensor([1e-3, 1.0, 1e2]).to(output)


class Plain(nn.Module):
    """The rule as autograd sees it, which ``unroll`` takes step by step."""

    def __init__(self, rule: CoordinatewiseLSTM) -> None:
        super().__init__()
        self.rule = rule

    def init_state(self, n: int) -> Tensor:
        return self.rule.init_state(n, dtype=self.rule.output.weight.dtype)

    def forward(self, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return reference.step(self.rule.spec, self.rule.flat_weights(), grad, state)


def make_rule(hidden_size: int = 4) -> CoordinatewiseLSTM:
    torch.manual_seed(0)
    return CoordinatewiseLSTM(hidden_size, LogAndSign(5.0)).double()


def plain_loss(
    spec: RuleSpec,
    weights: Tensor,
    params: Mapping[str, Tensor],
    state: Tensor,
    loss_weights: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """``sum_t w_t log f(theta_t)``, averaged over instances; gradients enter the rule as constants."""
    total = torch.zeros((), dtype=weights.dtype)
    for t, loss_weight in enumerate(loss_weights.tolist()):
        losses = Network().loss(params, generator=generator)
        total = total + loss_weight * losses.log().mean()
        if t + 1 < len(loss_weights):
            grads = torch.autograd.grad(losses.sum(), list(params.values()), retain_graph=True)
            update, state = reference.step(spec, weights, torch.cat([grad.reshape(-1) for grad in grads]), state)
            parts = torch.split(update, [tensor.numel() for tensor in params.values()])
            params = {name: old + part.view_as(old) for (name, old), part in zip(params.items(), parts, strict=True)}
    return total


def test_value_and_terms() -> None:
    weights = [1.0, 0.0, 3.0]
    expected = {
        "loss": (1 * (8 + 1) + 3 * (1 + 0.25)) / 2,
        "log": (1 * math.log(8 * 1) + 3 * math.log(1 * 0.25)) / 2,
    }
    for objective, right in expected.items():
        meta_loss = as_meta_loss(weights, 2, objective)
        assert meta_loss.value(LOSSES).item() == pytest.approx(right, rel=1e-14)
        terms = [meta_loss.term(t, losses) for t, losses in enumerate(LOSSES)]
        assert sum(terms).item() == pytest.approx(right, rel=1e-14)  # type: ignore[union-attr]
    assert as_meta_loss(None, 2, "loss").weights.tolist() == [1, 1, 1]


def test_slopes_are_the_derivatives_of_the_terms() -> None:
    meta_loss = as_meta_loss(None, 2, "log")
    losses = LOSSES.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(meta_loss.value(losses), losses)
    slopes = meta_loss.slopes(LOSSES)
    assert slopes is not None
    torch.testing.assert_close(slopes / 2, derivative, rtol=1e-14, atol=0)
    assert as_meta_loss(None, 2, "loss").slopes(LOSSES) is None


def test_spread_gives_every_coordinate_the_value_of_its_instance() -> None:
    params = {"a": torch.zeros(2, 3), "b": torch.zeros(2), "c": torch.zeros(2, 1, 2)}
    layout = Layout(params, CoordinatewiseLSTM())
    flat = layout.spread(torch.tensor([1.0, 2.0]))
    assert flat.tolist() == [1, 1, 1, 2, 2, 2, 1, 2, 1, 1, 2, 2]
    for name, view in layout.views(flat).items():
        assert view.shape == params[name].shape
        assert (view[0] == 1).all()
        assert (view[1] == 2).all()


def test_log_objective_against_autograd_from_scratch() -> None:
    rule = make_rule()
    loss_weights = torch.tensor([0.5, 0.0, 2.0, 0.0, 1.0], dtype=torch.float64)
    start = Network().init(generator=seeded(1))
    n = sum(tensor.numel() for tensor in start.values())
    state = 0.3 * torch.randn(n, 2, 2, 4, generator=seeded(2), dtype=torch.float64)
    weights = rule.flat_weights()
    leaves = [*(tensor.requires_grad_() for tensor in start.values()), state.requires_grad_()]
    inputs = [*rule.parameters(), *leaves]

    expected = plain_loss(rule.spec, weights, start, state, loss_weights, seeded(3))
    for candidate, backend in ((rule, "reference"), (Plain(rule), None)):
        run = unroll(
            candidate,
            Network(),
            STEPS,
            params=start,
            state=state,
            generator=seeded(3),
            loss_weights=loss_weights,
            objective="log",
            backend=backend,
        )
        torch.testing.assert_close(run.loss, expected, rtol=1e-12, atol=0)
        for actual, right in zip(
            torch.autograd.grad(run.loss, inputs),
            torch.autograd.grad(expected, inputs, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(actual, right, rtol=1e-9, atol=1e-11 * right.abs().max().item())


@pytest.mark.parametrize("backend", [name for name in BACKEND_IDS if name != "reference"], indirect=True)
def test_log_objective_on_fused_backends(backend: Backend) -> None:
    spec = RuleSpec(20, LogAndSign(5.0), 0.1)
    weights, start = make_weights(spec, seeded(4)), Network().init(generator=seeded(5))
    state = torch.zeros(BATCH * 8, 2, 2, 20, dtype=torch.float64)

    def by_autograd(dtype: torch.dtype) -> Tensor:
        leaf = weights.to(dtype).requires_grad_()
        params = {name: tensor.to(dtype).requires_grad_() for name, tensor in start.items()}
        loss = plain_loss(spec, leaf, params, state.to(dtype), torch.ones(STEPS + 1), seeded(6))
        return torch.autograd.grad(loss, leaf)[0]

    rule = CoordinatewiseLSTM(20, LogAndSign(5.0))
    parameters = [parameter for name, parameter in rule.named_parameters() if "bias_hh" not in name]
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter.zero_()
        for parameter, part in zip(parameters, torch.split(weights, [p.numel() for p in parameters]), strict=True):
            parameter.copy_(part.view_as(parameter))
    params = {name: tensor.float() for name, tensor in start.items()}
    run = unroll(rule, Network(), STEPS, params=params, generator=seeded(6), objective="log", backend=backend.name)
    actual = torch.cat([grad.reshape(-1) for grad in torch.autograd.grad(run.loss, parameters)])
    assert_as_good_as_eager("d_weights", actual, by_autograd(torch.float32), by_autograd(torch.float64))


@pytest.mark.parametrize("objective", ["loss", "log"])
def test_values_are_reported_as_losses_whatever_the_objective(objective: Objective) -> None:
    rule = make_rule()
    run = unroll(rule, Network(), STEPS, generator=seeded(8), objective=objective)
    plain = unroll(rule, Network(), STEPS, generator=seeded(8))
    assert torch.equal(run.losses, plain.losses)
    terms = run.losses.log() if objective == "log" else run.losses
    assert run.loss.item() == pytest.approx(terms.mean(1).sum().item(), rel=1e-12)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="unknown objective 'mean'; known objectives: 'loss', 'log'"):
        as_meta_loss(None, 2, "mean")
    with pytest.raises(ValueError, match="unknown objective 'mean'"):
        unroll(make_rule(), Network(), 2, objective="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"each of the 3 points of 2 steps.*got shape \(2,\)"):
        as_meta_loss([1, 1], 2, "loss")
    with pytest.raises(ValueError, match="loss_weights must be finite"):
        as_meta_loss([1, math.inf, 1], 2, "log")
    with pytest.raises(ValueError, match=r"run\.losses\[t\]\.mean"):
        as_meta_loss(torch.ones(3, requires_grad=True), 2, "loss")

"""Meta-gradients with second derivatives: against autograd through everything, finite differences, and what is kept."""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import make_state, make_weights, pool
from conftest import BACKEND_IDS
from numerics import assert_as_good_as_eager
from torch import Tensor

from l2l_fast import CoordinatewiseLSTM, Identity, LogAndSign, RuleSpec, reference, unroll
from l2l_fast.backends import Backend
from l2l_fast.meta.objective import Objective
from l2l_fast.meta.unroll import Unroll
from l2l_fast.problems import ImageClassifier, Instances, Quadratic
from l2l_fast.problems.quadratic import QuadraticInstances
from l2l_fast.spec import Preprocess

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = 2
STEPS = (1, 2, 5, 11, 20)
PREPROCESSES: dict[str, Preprocess] = {"log": LogAndSign(5.0), "identity": Identity()}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quadratics(dtype: torch.dtype) -> Instances:
    instances = Quadratic(dim=4).sample(BATCH, generator=seeded(1))
    return QuadraticInstances(instances.w.to(dtype), instances.y.to(dtype))


def digits(dtype: torch.dtype) -> Instances:
    """Few images at a time, so that the Hessians of two minibatches have little in common."""
    return ImageClassifier("digits", hidden=(3,), minibatch=4, init_std=0.3).sample(BATCH)


class Odd:
    """One parameter with a Hessian, one that the loss is linear in, and one that it does not depend on."""

    def __init__(self, dtype: torch.dtype, names: tuple[str, ...] = ("idle", "linear", "curved")) -> None:
        self.dtype = dtype
        self.names = names

    def init(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {
            name: torch.randn(BATCH, 3, generator=generator, dtype=torch.float64).to(self.dtype) for name in self.names
        }

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        x = torch.rand(BATCH, 3, generator=generator, dtype=torch.float64).to(self.dtype)
        loss = 20 + (x * params["linear"]).sum(1)
        return loss + (x * params["curved"]).sum(1).square() if "curved" in params else loss


PROBLEMS = {"quadratics": quadratics, "digits": digits, "odd": Odd}


@dataclass(frozen=True)
class Case:
    """An unroll and all that it starts from, in float64."""

    problem: str = "digits"
    preprocess: str = "log"
    steps: int = 5
    objective: Objective = "loss"
    weighted: bool = False
    hidden_size: int = 20
    seed: int = 0

    def __str__(self) -> str:
        weights = "weighted" if self.weighted else "even"
        return f"{self.problem}-{self.preprocess}-T{self.steps}-{self.objective}-{weights}"

    @property
    def spec(self) -> RuleSpec:
        return RuleSpec(self.hidden_size, PREPROCESSES[self.preprocess], 0.1)

    @property
    def loss_weights(self) -> Tensor | None:
        if not self.weighted:
            return None
        weights = 0.5 + torch.rand(self.steps + 1, generator=seeded(self.seed + 5), dtype=torch.float64)
        weights[:-1:3] = 0
        return weights

    @property
    def weights(self) -> Tensor:
        return make_weights(self.spec, seeded(self.seed + 2)).double()

    def start(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
        """Parameters and a state as another run left them; leaves that want gradients."""
        params = PROBLEMS[self.problem](torch.float64).init(generator=seeded(self.seed + 3))
        n = sum(tensor.numel() for tensor in params.values())
        state = make_state(n, self.spec, seeded(self.seed + 4))
        return (
            {name: tensor.to(dtype).requires_grad_() for name, tensor in params.items()},
            state.to(dtype).requires_grad_(),
        )


def make_rule(spec: RuleSpec, weights: Tensor) -> CoordinatewiseLSTM:
    """The rule with the flat ``weights [P]``, in their dtype."""
    rule = CoordinatewiseLSTM(spec.hidden_size, spec.preprocess, spec.output_scale).to(weights.dtype)
    parameters = flat_parameters(rule)
    with torch.no_grad():
        for cell in rule.cells:
            cell.bias_hh.zero_()  # type: ignore[operator]  # an nn.LSTMCell
        for parameter, part in zip(parameters, torch.split(weights, [p.numel() for p in parameters]), strict=True):
            parameter.copy_(part.view_as(parameter))
    return rule


def flat_parameters(rule: CoordinatewiseLSTM) -> list[Tensor]:
    """Parameters in the order of the flat weights, in which a cell has one bias."""
    return [parameter for name, parameter in rule.named_parameters() if "bias_hh" not in name]


def named(d_weights: Tensor, d_params: Mapping[str, Tensor], d_state: Tensor) -> dict[str, Tensor]:
    return {"weights": d_weights, "state": d_state} | {f"start {name}": grad for name, grad in d_params.items()}


def by_autograd(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Meta-gradients by weights, start and state, as autograd makes them of the plain loop."""
    weights = case.weights.to(dtype).requires_grad_()
    params, state = case.start(dtype)
    loss = plain_loss(case, dtype, weights, params, state)
    d_weights, d_state, *d_params = torch.autograd.grad(
        loss, (weights, state, *params.values()), materialize_grads=True
    )
    return named(d_weights, dict(zip(params, d_params, strict=True)), d_state)


def plain_loss(case: Case, dtype: torch.dtype, weights: Tensor, params: Mapping[str, Tensor], state: Tensor) -> Tensor:
    """The meta-loss by ``reference.step`` alone; all of it is differentiable."""
    instances, generator = PROBLEMS[case.problem](dtype), seeded(case.seed + 6)
    loss_weights = torch.ones(case.steps + 1) if case.loss_weights is None else case.loss_weights
    total = torch.zeros((), dtype=dtype)
    for t in range(case.steps + 1):
        losses = instances.loss(params, generator=generator)
        total = total + loss_weights[t].item() * (losses.log() if case.objective == "log" else losses).mean()
        if t == case.steps:
            break
        grads = torch.autograd.grad(losses.sum(), list(params.values()), create_graph=True, materialize_grads=True)
        update, state = reference.step(case.spec, weights, torch.cat([grad.reshape(-1) for grad in grads]), state)
        parts = torch.split(update, [tensor.numel() for tensor in params.values()])
        params = {name: old + part.view_as(old) for (name, old), part in zip(params.items(), parts, strict=True)}
    return total


def by_unroll(case: Case, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """The same by ``unroll``."""
    rule, (params, state) = make_rule(case.spec, case.weights.to(dtype)), case.start(dtype)
    run = run_of(case, dtype, rule, params, state, backend)
    inputs = [*flat_parameters(rule), *params.values(), state]
    *gradients, d_state = torch.autograd.grad(run.loss, inputs)
    d_params = dict(zip(params, gradients[-len(params) :], strict=True))
    return named(torch.cat([grad.reshape(-1) for grad in gradients[: -len(params)]]), d_params, d_state)


def run_of(
    case: Case,
    dtype: torch.dtype,
    rule: CoordinatewiseLSTM,
    params: Mapping[str, Tensor],
    state: Tensor | None,
    backend: str,
) -> Unroll:
    return unroll(
        rule,
        PROBLEMS[case.problem](dtype),
        case.steps,
        params=params,
        state=state,
        generator=seeded(case.seed + 6),
        loss_weights=case.loss_weights,
        objective=case.objective,
        second_derivatives=True,
        backend=backend,
    )


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def flat_gradient(rule: CoordinatewiseLSTM) -> Tensor:
    return torch.cat([gradient(parameter).reshape(-1) for parameter in flat_parameters(rule)])


OBJECTIVES: tuple[Objective, ...] = ("loss", "log")
EXACT_CASES = [
    Case(problem, preprocess, steps, objective, weighted=objective == "log", hidden_size=3)
    for problem, preprocess, steps, objective in itertools.product(PROBLEMS, PREPROCESSES, STEPS, OBJECTIVES)
] + [Case(weighted=True, hidden_size=3)]


@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
def test_equals_autograd_through_everything(case: Case) -> None:
    actual, expected = by_unroll(case, torch.float64, "reference"), by_autograd(case, torch.float64)
    for name, right in expected.items():
        torch.testing.assert_close(actual[name], right, rtol=1e-9, atol=1e-10 * right.abs().max().item())
    moving = {"weights", "state"} | {name for name in expected if "idle" not in name}
    assert all(expected[name].abs().max() > 0 for name in moving)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("preprocess", PREPROCESSES)
@pytest.mark.parametrize("problem", ["quadratics", "digits"])
def test_equals_finite_differences(problem: str, preprocess: str, objective: Objective) -> None:
    """Independent of any derivative of the rule: the meta-loss moved along random directions."""
    case = Case(problem, preprocess, 5, objective, weighted=True, hidden_size=3)
    params, state = case.start(torch.float64)
    points = named(case.weights, params, state)
    gradients = by_unroll(case, torch.float64, "reference")

    @torch.no_grad()
    def meta_loss(moved: dict[str, Tensor]) -> float:
        rule = make_rule(case.spec, moved["weights"])
        start = {name: moved[f"start {name}"] for name in params}
        return run_of(case, torch.float64, rule, start, moved["state"], "reference").loss.item()

    eps = 1e-6
    for name, point in points.items():
        direction = torch.randn(point.shape, generator=seeded(7), dtype=torch.float64)
        after, before = (meta_loss({**points, name: point + sign * eps * direction}) for sign in (1, -1))
        predicted = (gradients[name] * direction).sum().item()
        assert predicted == pytest.approx((after - before) / (2 * eps), rel=1e-5), name


FUSED_CASES = [
    *(Case("quadratics", preprocess, steps) for preprocess in PREPROCESSES for steps in STEPS),
    *(Case("digits", preprocess, steps) for preprocess in PREPROCESSES for steps in (2, 5, 20)),
    Case("digits", "log", 5, "log", weighted=True),
    Case("quadratics", "identity", 11, "log", weighted=True),
    Case("odd", "log", 5, weighted=True),
]


def draws(case: Case) -> list[Case]:
    """The case with other random numbers, so that what is judged is not the luck of a few."""
    return [replace(case, seed=seed) for seed in (0, 100, 200)]


@functools.cache
def oracle(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By autograd in float32 and in float64."""
    return (
        pool([by_autograd(draw, torch.float32) for draw in draws(case)]),
        pool([by_autograd(draw, torch.float64) for draw in draws(case)]),
    )


# Triton's interpreter takes 40 milliseconds and more per tile and step.
SHORT_CASES = [Case("quadratics", "log", 5), Case("odd", "identity", 2, "log", weighted=True)]


def cases_of(backend: str) -> list[Case]:
    return SHORT_CASES if backend == "triton" and not torch.cuda.is_available() else FUSED_CASES


@pytest.mark.parametrize(
    ("backend", "case"),
    [(name, case) for name in BACKEND_IDS if name != "reference" for case in cases_of(name)],
    indirect=["backend"],
    ids=str,
)
def test_as_good_as_float32_autograd(backend: Backend, case: Case) -> None:
    eager, exact = oracle(case)
    actual = pool([by_unroll(draw, torch.float32, backend.name) for draw in draws(case)])
    for name, right in exact.items():
        assert_as_good_as_eager(name, actual[name], eager[name], right)


class Watched(QuadraticInstances):
    """Quadratics with noise, which remember what they have drawn."""

    def __init__(self, w: Tensor, y: Tensor) -> None:
        super().__init__(w, y)
        self.drawn: list[float] = []

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.rand(len(self.y), generator=generator, dtype=self.y.dtype)
        self.drawn.append(noise[0].item())
        return (1 + noise) * super().loss(params)


def watched(dtype: torch.dtype = torch.float64) -> Watched:
    instances = Quadratic(dim=4).sample(BATCH, generator=seeded(1))
    return Watched(instances.w.to(dtype), instances.y.to(dtype))


def small_rule(dtype: torch.dtype = torch.float64) -> CoordinatewiseLSTM:
    spec = RuleSpec(3, LogAndSign(5.0), 0.1)
    return make_rule(spec, make_weights(spec, seeded(0)).to(dtype))


def test_every_minibatch_is_drawn_again_and_nothing_else() -> None:
    """The backward takes them last to first, the last point's and (nobody asks for its curvature) the first one's left
    out, and leaves the generator where the run has left it."""
    instances, generator = watched(), seeded(3)
    run = unroll(small_rule(), instances, 7, generator=generator, second_derivatives=True)
    forward, after = list(instances.drawn), generator.get_state()
    assert len(set(forward)) == 8
    instances.drawn.clear()
    run.loss.backward()  # type: ignore[no-untyped-call]
    assert instances.drawn == forward[6:0:-1]
    assert torch.equal(generator.get_state(), after)


def test_without_a_generator_minibatches_come_back_whatever_happens_to_the_global_one() -> None:
    def gradient(disturb: bool) -> tuple[Tensor, list[float]]:
        torch.manual_seed(4)
        rule, instances = small_rule(), watched()
        run = unroll(rule, instances, 5, second_derivatives=True)
        if disturb:
            torch.rand(9)
        before = torch.get_rng_state()
        run.loss.backward()  # type: ignore[no-untyped-call]
        assert torch.equal(torch.get_rng_state(), before)
        return flat_gradient(rule), instances.drawn

    (calm, drawn), (disturbed, _) = gradient(False), gradient(True)
    assert torch.equal(calm, disturbed)
    assert len(set(drawn[:6])) == 6
    assert drawn[6:] == drawn[4:0:-1]


def test_losses_without_curvature_need_no_second_derivatives() -> None:
    """The loss is linear in all that there is: the gradients are constants, with nothing to differentiate."""
    rule = small_rule()
    gradients = []
    for second in (False, True):
        rule.zero_grad()
        instances = Odd(torch.float64, names=("idle", "linear"))
        unroll(rule, instances, 5, generator=seeded(5), second_derivatives=second).loss.backward()  # type: ignore[no-untyped-call]
        gradients.append(flat_gradient(rule))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=0)
    assert gradients[0].norm() > 0


def saved_tensors(loss: Tensor) -> list[Tensor]:
    """What the backward of ``loss`` has been left."""
    return [tensor for tensor in loss.grad_fn.saved_tensors if tensor is not None]  # type: ignore[union-attr]


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 100])
def test_what_is_kept(steps: int) -> None:
    """Points and gradients, and every k-th state with k about the root of the steps: nothing of the LSTM's inside."""
    rule = small_rule()
    saved = saved_tensors(unroll(rule, watched(), steps, second_derivatives=True, backend="reference").loss)
    n, state, interval = BATCH * 4, 4 * rule.spec.hidden_size, math.ceil(math.sqrt(steps))
    checkpoints = math.ceil(steps / interval)
    assert interval + checkpoints <= 2 * math.sqrt(steps) + 1
    assert sum(map(Tensor.numel, saved)) == rule.spec.num_weights + n * (steps + steps + 1 + checkpoints * state)


def test_what_is_kept_is_let_go_by_the_backward() -> None:
    run = unroll(small_rule(), watched(), 5, second_derivatives=True)
    kept = [weakref.ref(tensor) for tensor in saved_tensors(run.loss)]
    run.loss.backward()  # type: ignore[no-untyped-call]
    assert [tensor() for tensor in kept] == [None] * len(kept)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        run.loss.backward()  # type: ignore[no-untyped-call]


def test_backward_twice_and_scaled(backend: Backend) -> None:
    rule = make_rule(RuleSpec(), make_weights(RuleSpec(), seeded(0)))
    instances = watched(torch.float32)
    run = unroll(rule, instances, 3, generator=seeded(1), second_derivatives=True, backend=backend.name)
    parameters = list(rule.parameters())
    once, again, doubled = (
        torch.autograd.grad(factor * run.loss, parameters, retain_graph=True) for factor in (1, 1, 2)
    )
    for first, second, twice in zip(once, again, doubled, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(twice, 2 * first, rtol=1e-6, atol=0)


@pytest.mark.parametrize("wanted", [w for w in itertools.product([False, True], repeat=3) if any(w)], ids=str)
def test_every_gradient_that_is_wanted(wanted: tuple[bool, bool, bool]) -> None:
    case = Case("digits", "log", 5, hidden_size=3)
    rule, (params, state) = make_rule(case.spec, case.weights), case.start(torch.float64)
    want_weights, want_start, want_state = wanted
    rule.requires_grad_(want_weights)
    for tensor in params.values():
        tensor.requires_grad_(want_start)
    state.requires_grad_(want_state)
    run_of(case, torch.float64, rule, params, state, "reference").loss.backward()  # type: ignore[no-untyped-call]
    expected = by_autograd(case, torch.float64)
    actual = {"weights": flat_gradient(rule)} if want_weights else {}
    actual |= {f"start {name}": gradient(tensor) for name, tensor in params.items()} if want_start else {}
    actual |= {"state": gradient(state)} if want_state else {}
    for name, right in actual.items():
        torch.testing.assert_close(right, expected[name], rtol=1e-9, atol=1e-10 * right.abs().max().item())
    leaves = [*rule.parameters(), *params.values(), state]
    assert {id(leaf) for leaf in leaves if leaf.grad is not None} == {id(leaf) for leaf in leaves if leaf.requires_grad}


def test_values_are_those_of_first_order(backend: Backend) -> None:
    """To the bit, with and without a meta-gradient to come; and each draws the same from the generator."""
    rule = make_rule(RuleSpec(), make_weights(RuleSpec(), seeded(0)))
    runs, ends = [], []
    for second, wanted in ((False, True), (True, True), (True, False)):
        generator = seeded(2)
        with torch.set_grad_enabled(wanted):
            instances = watched(torch.float32)
            runs.append(
                unroll(rule, instances, 5, generator=generator, second_derivatives=second, backend=backend.name)
            )
        ends.append(generator.get_state())
    assert [run.loss.requires_grad for run in runs] == [True, True, False]
    for run, end in zip(runs[1:], ends[1:], strict=True):
        assert torch.equal(run.losses, runs[0].losses)
        assert torch.equal(run.params["theta"], runs[0].params["theta"])
        assert torch.equal(run.state, runs[0].state)
        assert torch.equal(end, ends[0])


def test_no_third_derivative() -> None:
    rule = small_rule()
    run = unroll(rule, watched(), 2, second_derivatives=True)
    (grad,) = torch.autograd.grad(run.loss, rule.output.bias, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()  # type: ignore[no-untyped-call]


# The bounded slope of the preprocessing


def _bounded_by_autograd(floor: float) -> tuple[Tensor, Tensor]:
    """Meta-gradients of two steps: by :func:`unroll`, and by autograd with the bound written out."""
    spec = RuleSpec()
    rule = make_rule(spec, make_weights(spec, seeded(0)).double())
    instances = Quadratic(dim=6).sample(3, generator=torch.Generator().manual_seed(1))
    instances.w, instances.y = instances.w.double(), instances.y.double()
    instances._minus_y = instances._minus_y.double()
    params = {name: p.double() for name, p in instances.init(generator=torch.Generator().manual_seed(2)).items()}
    run = unroll(rule, instances, 2, params=params, second_derivatives=True, slope_floor=floor, backend="reference")
    actual = torch.autograd.grad(run.loss, list(rule.parameters()))

    weights, theta = rule.flat_weights(), params["theta"]
    state, total = rule.init_state(18, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for t in range(3):
        theta = theta if theta.requires_grad else theta.requires_grad_()
        loss = instances.loss({"theta": theta})
        total = total + loss.mean()
        if t == 2:
            break
        (grad,) = torch.autograd.grad(loss.sum(), theta, create_graph=True)
        rms = grad.detach().square().mean(1, keepdim=True).sqrt()
        share = (grad.detach().abs() / (floor * rms)).clamp(max=1) if floor else torch.ones_like(grad)
        fed = grad.detach() + share * (grad - grad.detach())
        update, state = reference.step(rule.spec, weights, fed.reshape(-1), state)
        theta = theta + update.view(3, 6)
    expected = torch.autograd.grad(total, list(rule.parameters()))
    return torch.cat([g.reshape(-1) for g in actual]), torch.cat([g.reshape(-1) for g in expected])


@pytest.mark.parametrize("floor", [0.0, 0.5, 3.0])
def test_slope_floor_equals_autograd_with_the_bound_written_out(floor: float) -> None:
    actual, expected = _bounded_by_autograd(floor)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def test_slope_floor_matters() -> None:
    exact, _ = _bounded_by_autograd(0.0)
    bounded, _ = _bounded_by_autograd(3.0)
    assert (exact - bounded).norm() > 1e-6 * exact.norm()


@pytest.mark.parametrize(
    ("preprocess", "options"),
    [
        (LogAndSign(), {"slope_floor": 0.1}),
        (None, {"slope_floor": 0.1, "second_derivatives": True}),
        (LogAndSign(), {"slope_floor": -1.0, "second_derivatives": True}),
        (LogAndSign(), {"slope_floor": math.nan, "second_derivatives": True}),
    ],
)
def test_slope_floor_is_refused_where_it_has_no_meaning(preprocess: LogAndSign | None, options: dict[str, Any]) -> None:
    instances = Quadratic().sample(2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="slope_floor"):
        unroll(CoordinatewiseLSTM(preprocess=preprocess), instances, 2, **options)

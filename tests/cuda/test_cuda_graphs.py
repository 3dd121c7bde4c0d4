"""CUDA graphs and streams: a replay is a step, and work goes where the caller's work goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from cuda_models import Model, assert_same, ragged_shapes
from meta_training import network
from plain_loop import make_rule

from l2l_fast import CoordinatewiseLSTM, MetaTrainer, TrainConfig, unroll
from l2l_fast.meta import StepGraph
from l2l_fast.problems import Problem, Quadratic
from l2l_fast.problems.classification import ImageClassifierInstances

pytestmark = pytest.mark.hardware

SHAPES = [(5,), (70,), (3, 4), (700,)]


@pytest.fixture
def rule(generator: torch.Generator, device: torch.device) -> CoordinatewiseLSTM:
    return make_rule(generator).to(device)


@pytest.fixture(autouse=True)
def current_device(device: torch.device) -> None:
    """Graphs are captured on the current device."""
    torch.cuda.set_device(device)


def capture(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The work of ``function`` as a graph; it is not run."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def on_the_side(function: Callable[[], object]) -> None:
    """Run ``function`` on another stream, as a warm-up before a capture has to."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("shapes", [SHAPES, ragged_shapes()], ids=["few", "ragged"])
def test_a_replay_is_a_step(rule: CoordinatewiseLSTM, device: torch.device, shapes: list[tuple[int, ...]]) -> None:
    graphed, eager = (Model(rule, device, shapes) for _ in range(2))
    for model in (graphed, eager):
        on_the_side(partial(model.steps, 2))
    graph = capture(graphed.step)
    assert_same(graphed, eager)
    for seed in range(3):
        for model in (graphed, eager):
            model.fill_gradients(seed)
        graph.replay()
        eager.step()
    assert_same(graphed, eager)


def test_gradients_from_the_pool_of_the_graph(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    """Forward, backward and step in one graph, the gradients made inside it."""
    graphed, eager = (Model(rule, device, SHAPES) for _ in range(2))
    factor = torch.ones((), device=device)

    def train(model: Model) -> None:
        model.optimizer.zero_grad(set_to_none=True)
        loss = torch.stack([(factor * param.square()).sum() for param in model.params]).sum()
        torch.autograd.backward(loss)
        model.step()

    for model in (graphed, eager):
        for _ in range(3):
            on_the_side(partial(train, model))
    graph = capture(partial(train, graphed))
    assert_same(graphed, eager)
    for value in (1.0, 0.5, -2.0):
        factor.fill_(value)
        graph.replay()
        train(eager)
    assert_same(graphed, eager)


def test_a_graph_survives_eager_steps_with_other_gradients(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    graphed, eager = (Model(rule, device, SHAPES) for _ in range(2))
    for model in (graphed, eager):
        on_the_side(partial(model.steps, 2))
    captured = [param.grad for param in graphed.params]
    graph = capture(graphed.step)
    for model in (graphed, eager):
        model.steps(2, first=7)
    graph.replay()
    for param, grad in zip(eager.params, captured, strict=True):
        assert grad is not None
        param.grad = grad.clone()
    eager.step()
    assert_same(graphed, eager)


def test_two_graphs_of_one_optimizer(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    graphed, eager = (Model(rule, device, SHAPES) for _ in range(2))
    for model in (graphed, eager):
        on_the_side(partial(model.steps, 2))
    kept, graphs = [], []
    for seed in (5, 6):
        graphed.move_gradients(seed)
        kept.append([param.grad for param in graphed.params])
        graphs.append(capture(graphed.step))
    for graph in (graphs[0], graphs[1], graphs[0]):
        graph.replay()
    for seed in (5, 6, 5):
        eager.move_gradients(seed)
        eager.step()
    assert_same(graphed, eager)


def test_several_steps_in_one_graph(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    graphed, eager = (Model(rule, device, SHAPES) for _ in range(2))
    for model in (graphed, eager):
        on_the_side(partial(model.steps, 2))
    draws = [graphed.gradients(seed) for seed in (5, 6, 7)]

    def three_steps() -> None:
        for draw in draws:
            for param, grad in zip(graphed.params, draw, strict=True):
                param.grad = grad
            graphed.step()

    graph = capture(three_steps)
    graph.replay()
    eager.steps(3, first=5)
    assert_same(graphed, eager)


def test_a_graph_keeps_the_weights_it_was_captured_with(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    graphed, eager = (Model(rule, device, SHAPES) for _ in range(2))
    for model in (graphed, eager):
        on_the_side(partial(model.steps, 2))
    captured = [param.grad for param in graphed.params]
    graph = capture(graphed.step)
    before = [weight.detach().clone() for weight in rule.parameters()]
    with torch.no_grad():
        for weight in rule.parameters():
            weight.mul_(0.5)
    for model in (graphed, eager):
        model.move_gradients(5)
        model.step()  # drops what was made of the old weights
    with torch.no_grad():
        for weight, old in zip(rule.parameters(), before, strict=True):
            weight.copy_(old)
    graph.replay()
    for param, grad in zip(eager.params, captured, strict=True):
        assert grad is not None
        param.grad = grad.clone()
    eager.step()
    assert_same(graphed, eager)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_the_first_step_can_not_be_captured(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    """It makes the state; a replay would reset it."""
    model = Model(rule, device, SHAPES)
    model.move_gradients(0)
    with pytest.raises(RuntimeError, match="step before"):
        capture(model.step)


def test_work_goes_to_the_current_stream(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    """A step on another stream comes after what was put there before, and only the other stream knows when."""
    sideways, plain = (Model(rule, device, SHAPES) for _ in range(2))
    for model in (sideways, plain):
        model.steps(2)
    fresh = sideways.gradients(9)
    torch.cuda.synchronize()

    def late_gradients() -> None:
        torch.cuda._sleep(500_000_000)  # type: ignore[no-untyped-call]
        for param, grad in zip(sideways.params, fresh, strict=True):
            assert param.grad is not None
            param.grad.copy_(grad)
        sideways.step()

    on_the_side(late_gradients)
    plain.fill_gradients(9)
    plain.step()
    assert_same(sideways, plain)


def test_the_device_of_the_tensors_need_not_be_current(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    """With several devices the tests run on the last one; here the first is current."""
    torch.cuda.set_device(0)
    elsewhere, here = (Model(rule, device, SHAPES) for _ in range(2))
    elsewhere.steps(2)
    assert torch.cuda.current_device() == 0
    torch.cuda.set_device(device)
    here.steps(2)
    assert_same(elsewhere, here)


# Steps of meta-training


class Networks:
    """Networks on random images, for which no file is needed."""

    def sample(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> ImageClassifierInstances:
        return network(hidden=3, batch=batch_size, device=None if device is None else torch.device(device))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("problem", [Quadratic(), Networks()], ids=["quadratics", "networks"])
def test_training_has_the_same_bits(
    generator: torch.Generator, device: torch.device, problem: Problem, backend: str
) -> None:
    """Segments of four steps and a last one of one, three runs, two shards."""
    config = TrainConfig(
        updates=9, horizon=9, truncation=4, batch_size=2, shards=2, backend=backend, validation_functions=4
    )
    results = []
    start = make_rule(generator).state_dict()
    for cuda_graph in (False, True):
        rule = CoordinatewiseLSTM().to(device)
        rule.load_state_dict(start)
        losses: list[float] = []
        trainer = MetaTrainer(rule, problem, replace(config, cuda_graph=cuda_graph))
        trainer.fit(on_update=lambda event, losses=losses: losses.append(event.loss))  # type: ignore[misc]
        results.append((rule.flat_weights().detach().cpu(), losses))
    (weights, losses), (graphed, graphed_losses) = results
    assert losses == graphed_losses
    assert torch.equal(weights, graphed)


def test_a_replayed_step_does_not_wait(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    """Neither for the minibatch to reach the device nor for the step."""
    graph, instances, source = StepGraph(), network(device=device), torch.Generator().manual_seed(0)
    run = unroll(rule, instances, 2, generator=source, graph=graph)
    coordinates = sum(tensor.numel() for tensor in run.params.values())
    grad = torch.zeros(coordinates, device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            losses = graph.take(instances.draw(generator=source), out=grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.isfinite().all()
    assert grad.any()

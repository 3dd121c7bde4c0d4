"""Steps replayed as a CUDA graph lead to the same bits, on an emulator of graphs; and what a graph can't hold."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import json
import math
import pickle
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_graphs import EmulatedGraph, Emulator
from test_cli import SMALL as TRAINING
from test_cli import run
from torch import Tensor, nn
from trainings import SMALL, LinearRule, SquareProblem, Stop, contents, make_rule, stop_after

from l2l_fast.meta import MetaTrainer, StepGraph, TrainConfig, unroll
from l2l_fast.meta.graph import capture, check_graph
from l2l_fast.problems import ImageClassifier, Problem, Quadratic, Replayable, module_problem
from l2l_fast.problems.quadratic import QuadraticInstances
from l2l_fast.rule import CoordinatewiseLSTM
from l2l_fast.spec import LogAndSign

CPU = torch.device("cpu")
PLAIN = replace(SMALL, backend="reference")
GRAPHED = replace(PLAIN, cuda_graph=True)
DIGITS = ImageClassifier("digits", hidden=(3,), minibatch=5)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Emulator:
    return Emulator(monkeypatch)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same_numbers(first: Path, second: Path) -> None:
    """All of two trainings but their settings: rule, moments, states, parameters, generators, losses."""
    left, right = contents(first), contents(second)
    assert left["tensors"].keys() == right["tensors"].keys()
    for name, tensor in left["tensors"].items():
        assert torch.equal(tensor, right["tensors"][name]), name
    assert (left["progress"], left["log"]) == (right["progress"], right["log"])


# The emulator


def test_a_replay_repeats_what_was_recorded(emulator: Emulator) -> None:
    """With the memory as it is now and the host as it was then; a capture itself runs nothing."""
    source, target, factor = torch.ones(3), torch.zeros(3), 2.0

    def work() -> None:
        torch.add(factor * source, source.sum(), out=target)

    target.zero_()
    graph = capture(work, CPU)
    target.zero_()
    with torch.no_grad():
        source.mul_(10)
    factor = 100.0
    graph.replay()
    assert target.tolist() == [50.0, 50.0, 50.0]
    assert len(emulator.graphs) == 1


def test_a_capture_runs_nothing(emulator: Emulator) -> None:
    counter = torch.zeros(())
    capture(lambda: counter.add_(1), CPU)
    assert counter == 3  # the warm-up


def test_memory_that_nobody_keeps_is_found(emulator: Emulator) -> None:
    target, factors = torch.ones(3), [torch.ones(3)]
    graph = capture(lambda: target.mul_(factors[0]), CPU)
    graph.replay()
    factors[0] = torch.ones(3)
    with pytest.raises(RuntimeError, match="freed"):
        graph.replay()


# The same bits


@pytest.mark.parametrize(
    ("problem", "settings"),
    [
        (Quadratic(), {}),
        pytest.param(
            Quadratic(),
            {"backend": "triton"},
            marks=pytest.mark.skipif(
                torch.cuda.is_available(), reason="kernels run on the device then: see tests/cuda"
            ),
        ),
        (Quadratic(3, "deepmind"), {"shards": 2, "objective": "log", "loss_power": 1.0}),
        (DIGITS, {"mirrored": 0.5}),
        (Quadratic(), {"mirrored": 1.0, "shards": 2}),
        (DIGITS, {}),
        (DIGITS, {"coordinate_fraction": 0.5, "truncation": 9, "batch_size": 1}),
    ],
    ids=["quadratic", "triton", "shards", "half mirrored", "mirrored", "digits", "whole runs"],
)
def test_training_has_the_same_bits(
    emulator: Emulator, tmp_path: Path, problem: Problem, settings: dict[str, Any]
) -> None:
    for config, folder in ((PLAIN, "plain"), (GRAPHED, "graphed")):
        MetaTrainer(make_rule(), problem, replace(config, **settings), folder=tmp_path / folder).fit()
    assert_same_numbers(tmp_path / "plain", tmp_path / "graphed")
    config = replace(GRAPHED, **settings)
    runs, more = divmod(config.updates, math.ceil(config.horizon / config.truncation))
    assert not more
    (graph,) = emulator.graphs
    assert graph.replays == config.shards * (runs * config.horizon + config.updates)


def test_the_rule_with_its_preprocessing(emulator: Emulator) -> None:
    def train(graph: StepGraph | None) -> list[Tensor]:
        torch.manual_seed(0)
        rule, results = CoordinatewiseLSTM(hidden_size=5, preprocess=LogAndSign()), []
        for seed in range(2):
            instances = DIGITS.sample(3, generator=seeded(seed))
            result = unroll(rule, instances, 4, generator=seeded(seed), backend="reference", graph=graph)
            results += [result.losses, *result.params.values(), result.state]
            results += torch.autograd.grad(result.loss, list(rule.parameters()))
        return results

    for graphed, plain in zip(train(StepGraph()), train(None), strict=True):
        assert torch.equal(graphed, plain)


@pytest.mark.parametrize("again", [GRAPHED, PLAIN], ids=["graphed", "plain"])
@pytest.mark.parametrize("cut", [2, 5])
def test_resume_in_the_middle_of_a_run(emulator: Emulator, tmp_path: Path, cut: int, again: TrainConfig) -> None:
    MetaTrainer(make_rule(), DIGITS, PLAIN, folder=tmp_path / "whole").fit()
    with pytest.raises(Stop):
        MetaTrainer(make_rule(), DIGITS, GRAPHED, folder=tmp_path / "cut").fit(on_update=stop_after(cut))
    MetaTrainer(make_rule(seed=1), DIGITS, again, folder=tmp_path / "cut").fit(resume=True)
    assert_same_numbers(tmp_path / "whole", tmp_path / "cut")


def test_the_next_segment_leaves_the_last_one_alone(emulator: Emulator) -> None:
    """Its results, and the instances that it was captured with."""
    graph = StepGraph()
    instances, others = (Quadratic().sample(2, generator=seeded(seed)) for seed in (0, 1))
    first = unroll(make_rule(), instances, 3, generator=seeded(), backend="reference", graph=graph)
    results = first.losses, first.params["theta"], first.state, instances.w, instances.y
    before = [result.clone() for result in results]
    unroll(make_rule(seed=1), others, 3, generator=seeded(1), backend="reference", graph=graph)
    for now, then in zip(results, before, strict=True):
        assert torch.equal(now, then)


def test_runs_that_leave_the_finite_numbers(emulator: Emulator) -> None:
    """They are the same runs, and the next one knows nothing of it."""
    torch.manual_seed(0)
    wild = CoordinatewiseLSTM(preprocess=None, output_scale=1e25)
    graph = StepGraph()
    for start in (1e10, 1e-30, 1e10):
        instances = Quadratic().sample(2, generator=seeded())
        params = {"theta": start * torch.ones(2, 10)}
        graphed, plain = (
            unroll(wild, instances, 5, params=params, backend="reference", graph=chosen) for chosen in (graph, None)
        )
        assert not graphed.losses.isfinite().all()
        for name in ("losses", "params", "state"):
            torch.testing.assert_close(getattr(graphed, name), getattr(plain, name), rtol=0, atol=0, equal_nan=True)


def test_training_that_breaks_down_says_so(emulator: Emulator) -> None:
    rule = CoordinatewiseLSTM(preprocess=None, output_scale=1e30)
    with pytest.raises(FloatingPointError, match="none of 12 meta-updates"):
        MetaTrainer(rule, Quadratic(), GRAPHED).fit()
    assert emulator.graphs[0].replays


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda graph: pickle.loads(pickle.dumps(graph))])
def test_a_copy_captures_anew(emulator: Emulator, copied: Callable[[StepGraph], StepGraph]) -> None:
    def train(graph: StepGraph) -> Tensor:
        instances = Quadratic().sample(2, generator=seeded())
        return unroll(make_rule(), instances, 3, generator=seeded(), backend="reference", graph=graph).losses

    graph = StepGraph()
    first = train(graph)
    assert torch.equal(train(copied(graph)), first)
    assert len(emulator.graphs) == 2


def test_the_command_line_captures_a_graph(emulator: Emulator, tmp_path: Path) -> None:
    options = ["--backend", "reference", "--validation-functions", "4", "--cuda-graph"]
    assert run("train", "quadratic", *TRAINING, *options, "--out", tmp_path)[0] == 0
    assert json.loads((tmp_path / "summary.json").read_text())["config"]["cuda_graph"] is True
    assert [graph.replays for graph in emulator.graphs] == [12]


# What a graph can't hold


@pytest.mark.parametrize("problem", [Quadratic(), DIGITS])
def test_on_the_cpu_it_is_refused(problem: Problem) -> None:
    with pytest.raises(ValueError, match=r"on a CUDA device, it is on cpu.*leave cuda_graph out"):
        MetaTrainer(make_rule(), problem, GRAPHED)
    instances = problem.sample(2, generator=seeded())
    with pytest.raises(ValueError, match="on a CUDA device, it is on cpu"):
        unroll(make_rule(), instances, 2, graph=StepGraph())


def test_other_rules_are_refused(emulator: Emulator) -> None:
    with pytest.raises(TypeError, match="steps of a CoordinatewiseLSTM only, got LinearRule"):
        MetaTrainer(LinearRule(), Quadratic(), replace(GRAPHED, backend=None))


def test_problems_without_draw_are_refused(emulator: Emulator) -> None:
    data = torch.randn(8, 3, generator=seeded()), torch.zeros(8, 1)
    problem = module_problem(lambda: nn.Linear(3, 1), nn.functional.mse_loss, data)
    with pytest.raises(TypeError, match="ModuleInstances has no methods draw and loss_of"):
        MetaTrainer(make_rule(), problem, GRAPHED)
    with pytest.raises(TypeError, match="Square has no methods draw and loss_of"):
        MetaTrainer(make_rule(), SquareProblem(), GRAPHED)


def test_second_derivatives_and_teachers_are_refused() -> None:
    with pytest.raises(ValueError, match="first-order meta-gradients only"):
        replace(GRAPHED, second_derivatives=True)
    config = replace(GRAPHED, truncation=GRAPHED.horizon)
    with pytest.raises(ValueError, match="steps of a teacher"):
        MetaTrainer(make_rule(), Quadratic(), config, teacher=functools.partial(torch.optim.SGD, lr=0.1))


@pytest.mark.parametrize("second", [False, True])
def test_only_steps_of_first_order(emulator: Emulator, second: bool) -> None:
    instances = Quadratic().sample(2, generator=seeded())
    with pytest.raises(ValueError, match="first-order"), torch.set_grad_enabled(second):
        unroll(make_rule(), instances, 2, second_derivatives=second, graph=StepGraph())


def test_a_graph_that_is_none(emulator: Emulator) -> None:
    instances = Quadratic().sample(2, generator=seeded())
    with pytest.raises(TypeError, match="graph must be a StepGraph or None, got bool"):
        unroll(make_rule(), instances, 2, graph=True)  # type: ignore[arg-type]


def test_a_graph_serves_what_it_was_captured_for(emulator: Emulator) -> None:
    graph = StepGraph()
    for batch_size, expected in ((2, None), (3, "captured for")):
        instances = Quadratic().sample(batch_size, generator=seeded())
        if expected is None:
            unroll(make_rule(), instances, 2, backend="reference", graph=graph)
        else:
            with pytest.raises(ValueError, match=expected):
                unroll(make_rule(), instances, 2, backend="reference", graph=graph)


def test_a_graph_knows_the_order_of_the_coordinates_and_its_problem(emulator: Emulator) -> None:
    instances, graph, rule = DIGITS.sample(2, generator=seeded()), StepGraph(), make_rule()
    params = instances.init(generator=seeded())
    unroll(rule, instances, 2, params=params, generator=seeded(), backend="reference", graph=graph)
    turned = dict(reversed(params.items()))
    with pytest.raises(ValueError, match="captured for"):
        unroll(rule, instances, 2, params=turned, generator=seeded(), backend="reference", graph=graph)
    other = replace(DIGITS, activation="relu").sample(2, generator=seeded())
    with pytest.raises(ValueError, match=r"captured for .*sigmoid.*, not for .*relu"):
        unroll(rule, other, 2, params=params, generator=seeded(), backend="reference", graph=graph)


class Changed(QuadraticInstances):
    """Quadratics whose losses on what was drawn are ``change`` of what they should be."""

    change: Callable[[Changed, Tensor], Tensor]

    def loss_of(self, params: Mapping[str, Tensor], drawn: Mapping[str, Tensor]) -> Tensor:
        return type(self).change(self, super().loss_of(params, drawn))


class ChangedProblem:
    def __init__(self, change: Callable[[Changed, Tensor], Tensor]) -> None:
        self._instances = type("Changed", (Changed,), {"change": change})

    def sample(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Changed:
        instances = Quadratic().sample(batch_size, generator=generator, device=device)
        changed: Changed = self._instances(instances.w, instances.y)
        return changed


def test_losses_that_depend_on_more_than_was_drawn_are_refused(emulator: Emulator) -> None:
    problem = ChangedProblem(lambda instances, losses: losses + instances.y.square().sum(1))
    with pytest.raises(ValueError, match="loss and loss_of of Changed differ"):
        MetaTrainer(make_rule(), problem, GRAPHED)


def test_losses_that_wait_for_the_device_can_not_be_captured(emulator: Emulator) -> None:
    waiting = ChangedProblem(lambda _, losses: losses / losses.detach().max().item() * 3)
    instances = waiting.sample(2, generator=seeded())
    with pytest.raises(RuntimeError, match=r"can't be captured as a CUDA graph.*not permitted.*Leave cuda_graph out"):
        unroll(make_rule(), instances, 2, backend="reference", graph=StepGraph())


def test_losses_that_draw_are_refused(emulator: Emulator) -> None:
    instances = ChangedProblem(lambda _, losses: losses + 0 * torch.rand(2)).sample(2, generator=seeded())
    with pytest.raises(ValueError, match=r"draws random numbers.*draw them in draw"):
        unroll(make_rule(), instances, 2, backend="reference", graph=StepGraph())
    assert not emulator.graphs


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (torch.OutOfMemoryError("no memory is left"), "^no memory is left"),
        (ValueError("one loss per instance"), "^one loss per instance"),
        (KeyboardInterrupt("Ctrl-C"), "^Ctrl-C"),
        (RuntimeError("a copy to the host"), r"can't be captured.*\(a copy to the host\)"),
    ],
    ids=["memory", "value", "interrupt", "other"],
)
def test_the_first_error_of_a_capture_is_the_one_that_is_told(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, first: BaseException, expected: str
) -> None:
    """A capture that something went wrong in fails once more where it ends."""

    @contextmanager
    def failing(graph: EmulatedGraph, *, stream: object) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("capture was invalidated")

    monkeypatch.setattr(torch.cuda, "graph", failing)
    calls = itertools.count(1)

    def work() -> None:
        if next(calls) > 3:  # the warm-up
            raise first

    try:
        raise KeyError("handled before, and of no account")
    except KeyError:
        with pytest.raises(type(first), match=expected):
            capture(work, CPU)


def test_a_failed_capture_lets_go_of_what_it_allocated(emulator: Emulator) -> None:
    """At once, for those who go on with less after they ran out of memory."""
    kept: list[weakref.ref[Tensor]] = []
    calls = itertools.count(1)

    def work() -> None:
        allocated = torch.zeros(3)
        kept.append(weakref.ref(allocated))
        if next(calls) > 3:  # the warm-up
            raise torch.OutOfMemoryError("no memory is left")

    gc.disable()
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            capture(work, CPU)
        del caught
        assert [reference() for reference in kept] == [None] * 4
    finally:
        gc.enable()


@pytest.mark.parametrize("drawn", [None, [torch.zeros(2)], {"noise": 1.0}])
def test_what_is_drawn_is_tensors_by_name(emulator: Emulator, drawn: object) -> None:
    class Drawing(QuadraticInstances):
        def draw(self, *, generator: torch.Generator | None = None) -> Any:
            return drawn

    instances = Quadratic().sample(2, generator=seeded())
    instances.__class__ = Drawing
    with pytest.raises(TypeError, match=r"draw must return a dictionary of tensors by name, got"):
        unroll(make_rule(), instances, 2, backend="reference", graph=StepGraph())


def test_what_is_drawn_keeps_its_shape(emulator: Emulator) -> None:
    class Growing(type(DIGITS.sample(1))):  # type: ignore[misc]
        """Networks on minibatches that grow by an image each time."""

        count = 5

        def draw(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
            self.count += 1
            return {"chosen": torch.zeros(2, self.count, dtype=torch.int64)}

    instances = DIGITS.sample(2)
    instances.__class__ = Growing
    with pytest.raises(ValueError, match=r"once gave.*\(2, 6\).* and now .*\(2, 7\)"):
        unroll(make_rule(), instances, 3, backend="reference", graph=StepGraph())


# Problems that a graph can hold


@pytest.mark.parametrize("problem", [Quadratic(), Quadratic(4, "deepmind"), DIGITS], ids=str)
def test_what_is_drawn_makes_the_loss(emulator: Emulator, problem: Problem) -> None:
    check_graph(make_rule(), problem)
    instances = problem.sample(3, generator=seeded())
    assert isinstance(instances, Replayable)
    params = instances.init(generator=seeded(1))
    one, other = seeded(2), seeded(2)
    for _ in range(2):
        assert torch.equal(
            instances.loss(params, generator=one), instances.loss_of(params, instances.draw(generator=other))
        )
    assert torch.equal(one.get_state(), other.get_state())

"""What the settings of ``TrainConfig`` do, that each of them survives an interruption, and problems at fault."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from trainings import (
    SMALL,
    DigitsProblem,
    Square,
    SquareProblem,
    Stop,
    assert_same_training,
    contents,
    make_rule,
    stop_after,
)

from l2l_fast.meta import MetaTrainer, TrainConfig, TrainEvent, unroll
from l2l_fast.problems import Quadratic
from l2l_fast.problems.classification import digits
from l2l_fast.rule import CoordinatewiseLSTM

WHOLE = replace(SMALL, truncation=SMALL.horizon, mirrored=0.0)

pytestmark = pytest.mark.usefixtures("one_thread")


def events_of(config: TrainConfig, problem: Any = None) -> list[TrainEvent]:
    events: list[TrainEvent] = []
    MetaTrainer(make_rule(), problem or Quadratic(), config).fit(on_update=events.append)
    return events


def first_losses(config: TrainConfig) -> Tensor:
    """``[horizon + 1]``, mean losses of the run that the first update is made from."""
    generator = torch.Generator().manual_seed(config.seed)
    assert config.batch_size is not None
    instances = Quadratic().sample(config.batch_size, generator=generator)
    with torch.no_grad():
        run = unroll(make_rule(), instances, config.horizon, generator=generator)
    return run.losses.double()


def test_the_objective_may_be_the_logarithm() -> None:
    config = replace(WHOLE, updates=1, objective="log")
    assert events_of(config)[0].loss == pytest.approx(first_losses(config).log().sum(0).mean().item(), rel=1e-5)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_loss_power_weighs_the_end_of_a_run(power: float) -> None:
    config = replace(WHOLE, updates=1, loss_power=power)
    t = torch.arange(config.horizon + 1, dtype=torch.float64)
    weights = (power + 1) * (t / config.horizon) ** power
    expected = (weights @ first_losses(config)).mean().item()
    assert events_of(config)[0].loss == pytest.approx(expected, rel=1e-5)
    explicit = replace(WHOLE, updates=1, loss_weights=tuple(weights.tolist()))
    assert events_of(explicit)[0].loss == pytest.approx(expected, rel=1e-5)


def test_a_rule_is_validated_by_the_end_of_a_run_or_all_of_it() -> None:
    """That of the end is of all the training images, that of the run as the rule meets them."""
    problem = digits()
    found = {}
    for by in ("end", "run"):
        config = replace(SMALL, updates=0, validate_by=by)
        found[by] = MetaTrainer(make_rule(), problem, config).fit().best_validation_loss
    generator = torch.Generator().manual_seed(config.validation_seed)
    assert config.validation_functions is not None
    instances = problem.sample(config.validation_functions, generator=generator)
    with torch.no_grad():
        run = unroll(make_rule(), instances, config.horizon, generator=generator)
    assert found["end"] == pytest.approx(instances.evaluate(run.params).double().mean().item(), rel=1e-6)
    assert found["run"] == pytest.approx(run.losses.double().mean().item(), rel=1e-6)


def test_the_average_is_validated_and_kept() -> None:
    rule = make_rule()
    mean = [weight.detach().double().clone() for weight in rule.parameters()]
    means = []

    def follow(event: TrainEvent) -> None:
        decay = min(0.8, event.update / (event.update + 10))
        for kept, weight in zip(mean, rule.parameters(), strict=True):
            kept.mul_(decay).add_(weight.detach().double(), alpha=1 - decay)
        means.append([kept.clone() for kept in mean])

    trainer = MetaTrainer(rule, Quadratic(), replace(SMALL, average=0.8))
    result = trainer.fit(on_update=follow)
    assert result.best_update > 0
    for weight, expected in zip(result.best_rule.parameters(), means[result.best_update - 1], strict=True):
        torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)
    assert not all(map(torch.equal, result.best_rule.parameters(), rule.parameters()))
    again = MetaTrainer(result.best_rule, Quadratic(), replace(SMALL, updates=0)).fit()
    assert again.best_validation_loss == result.best_validation_loss
    plain = events_of(SMALL)
    assert [event.loss for event in events_of(replace(SMALL, average=0.8))] == [event.loss for event in plain]


class Normalised(nn.Module):
    """``update = weight * grad / root of the running mean square``, which is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((), -0.01))
        self.register_buffer("square", torch.ones(()))

    def init_state(self, n: int) -> Tensor:
        return torch.zeros(n, 0)

    def forward(self, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        square = self.get_buffer("square")
        with torch.no_grad():
            square.lerp_(grad.square().mean(), 0.1)
        return self.weight * grad / square.sqrt(), state


def test_buffers_are_those_of_the_rule_and_no_average() -> None:
    rule = Normalised()
    trainer = MetaTrainer(rule, Quadratic(dim=3), replace(SMALL, updates=9, validate_every=10, average=0.9))
    same: list[bool] = []

    def compare(event: TrainEvent) -> None:
        same.append(torch.equal(trainer._judged.get_buffer("square"), rule.get_buffer("square")))

    trainer.fit(on_update=compare)
    assert rule.get_buffer("square") != 1
    assert all(same[:-1])  # a validation follows the last update, in which the average goes on counting
    assert not torch.equal(trainer._judged.get_parameter("weight"), rule.get_parameter("weight"))


@pytest.mark.parametrize("clip", [None, 100.0])
def test_clip_ratio_bounds_the_gradient_by_those_before(clip: float | None) -> None:
    rule = make_rule()
    norms: list[tuple[float, float]] = []

    def follow(event: TrainEvent) -> None:
        grads = [weight.grad for weight in rule.parameters() if weight.grad is not None]
        norms.append((event.grad_norm, get_total_norm(grads).item()))

    MetaTrainer(rule, Quadratic(), replace(SMALL, updates=30, clip=clip, clip_ratio=1.2)).fit(on_update=follow)
    running = norms[0][0]
    clipped = 0
    for norm, taken in norms:
        limit = min(1.2 * running, clip or math.inf)
        assert taken == pytest.approx(min(norm, limit), rel=1e-4)
        running = 0.95 * running + 0.05 * min(norm, limit)
        clipped += norm > limit
    assert 0 < clipped < len(norms)


def test_warmup() -> None:
    rates = [event.lr for event in events_of(replace(SMALL, warmup=3, lr=0.1, hold=0.0, final_lr_fraction=0.5))]
    decay = 0.5 ** (1 / 11)
    expected = [0.1 * min(1, (update + 1) / 4) * decay**update for update in range(12)]
    assert rates == pytest.approx(expected)


def test_coordinate_fraction_changes_the_gradient_alone() -> None:
    every, part = (events_of(replace(WHOLE, updates=1, coordinate_fraction=fraction))[0] for fraction in (1.0, 0.5))
    assert part.loss == every.loss
    assert part.grad_norm != every.grad_norm
    assert part.grad_norm == pytest.approx(every.grad_norm, rel=1)


class EvaluatedProblem(SquareProblem):
    """Squares that also say how good they are, in their own way."""

    def __init__(self, evaluate: Callable[[Tensor], Tensor]) -> None:
        self.evaluate = evaluate

    def sample(self, batch_size: int, **options: Any) -> Square:
        instances = Square(batch_size)
        instances.evaluate = lambda params: self.evaluate(params["x"])  # type: ignore[attr-defined]
        return instances


def test_validation_takes_what_instances_evaluate() -> None:
    seen: list[Tensor] = []

    def evaluate(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.arange(len(x), dtype=torch.float32)

    result = MetaTrainer(make_rule(), EvaluatedProblem(evaluate), SMALL).fit()
    assert [row.validation_loss for row in result.history] == [3.5] * 4
    assert [x.shape for x in seen] == [(8, 1)] * 4
    assert not torch.equal(seen[0], torch.ones(8, 1))  # at the end of a run
    with pytest.raises(ValueError, match=r"evaluate must return one loss per instance, shape \(8,\), got \(\)"):
        MetaTrainer(make_rule(), EvaluatedProblem(torch.mean), SMALL).fit()


class Wide(Square):
    def __init__(self, batch: int, size: int) -> None:
        super().__init__(batch)
        self.size = size

    def init(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"x": torch.ones(self.batch, self.size)}

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        return params["x"].square().mean(1)


class WideProblem:
    def __init__(self, size: int) -> None:
        self.size = size

    def sample(self, batch_size: int, **options: Any) -> Wide:
        return Wide(batch_size, self.size)


@pytest.mark.parametrize(
    ("size", "batch", "functions"),
    [(1, 16, 1024), (256, 16, 1024), (1953, 2, 134), (20_000, 1, 13), (3_000_000, 1, 4)],
)
def test_batches_are_as_large_as_can_be_afforded(size: int, batch: int, functions: int) -> None:
    trainer = MetaTrainer(make_rule(), WideProblem(size), TrainConfig())
    assert trainer.config == replace(TrainConfig(), batch_size=batch, validation_functions=functions)
    given = MetaTrainer(make_rule(), WideProblem(size), TrainConfig(batch_size=3, validation_functions=7))
    assert (given.config.batch_size, given.config.validation_functions) == (3, 7)


def test_the_number_of_validation_functions_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l2l_fast.meta.validation.COORDINATES", 2000)
    config = replace(SMALL, validation_functions=None, updates=2)
    MetaTrainer(make_rule(), WideProblem(100), config, folder=tmp_path).fit()
    assert json.loads((tmp_path / "summary.json").read_text())["config"]["validation_functions"] == 20
    for functions in (None, 20):
        again = replace(config, validation_functions=functions)
        MetaTrainer(make_rule(), WideProblem(100), again, folder=tmp_path).fit(resume=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"average": 0.9, "clip_ratio": 1.5, "warmup": 4},
        {"objective": "log", "loss_power": 2.0, "truncation": 9},
        {"coordinate_fraction": 0.5, "batch_size": 12},
        {"shards": 3, "average": 0.5, "clip": None},
        {"shards": 2, "second_derivatives": True},
    ],
)
@pytest.mark.parametrize("cut", [1, 4, 8])
def test_resume_is_exact_with_every_setting(tmp_path: Path, settings: dict[str, Any], cut: int) -> None:
    config = replace(SMALL, **settings)
    MetaTrainer(make_rule(), DigitsProblem(), config, folder=tmp_path / "whole").fit()
    with pytest.raises(Stop):
        MetaTrainer(make_rule(), DigitsProblem(), config, folder=tmp_path / "cut").fit(on_update=stop_after(cut))
    MetaTrainer(make_rule(seed=1), DigitsProblem(), config, folder=tmp_path / "cut").fit(resume=True)
    assert_same_training(tmp_path / "whole", tmp_path / "cut")


def test_resume_after_the_average_was_the_best_rule(tmp_path: Path) -> None:
    config = replace(SMALL, average=0.9)
    result = MetaTrainer(make_rule(), Quadratic(), config, folder=tmp_path).fit()
    best = CoordinatewiseLSTM.load(tmp_path / "best.safetensors")
    assert result.best_update > 0
    assert all(map(torch.equal, best.parameters(), result.best_rule.parameters()))
    tensors = contents(tmp_path)["tensors"]
    assert not torch.equal(tensors["average.output.weight"], tensors["rule.output.weight"])


def lost_at_the_start(losses: Tensor) -> Tensor:
    return torch.cat([losses[:-1], losses[-1:] * math.nan])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda losses: losses.unsqueeze(1), r"one loss per instance, shape \(8,\), got \(8, 1\)"),
        (lambda losses: losses.mean(), r"one loss per instance, shape \(8,\), got \(\)"),
        (lambda losses: losses.detach(), "do not depend on the parameters"),
        (
            lambda losses: losses * math.inf,
            "not finite at the starting points.*8 of 8 instances, the first of them inf",
        ),
        (lost_at_the_start, "not finite at the starting points.*1 of 8 instances, the first of them nan; look at init"),
    ],
)
def test_a_problem_at_fault_is_said_so_at_once(
    tmp_path: Path, change: Callable[[Tensor], Tensor], message: str
) -> None:
    class Faulty(Square):
        def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
            return change(super().loss(params))

    class FaultyProblem(SquareProblem):
        def sample(self, batch_size: int, **options: Any) -> Square:
            return Faulty(batch_size)

    updates: list[TrainEvent] = []
    with pytest.raises(ValueError, match=message):
        MetaTrainer(make_rule(), FaultyProblem(), SMALL, folder=tmp_path).fit(on_update=updates.append)
    assert not updates
    assert not list(tmp_path.iterdir())


def test_what_init_returns_is_checked_before_training() -> None:
    class NoInstances(SquareProblem):
        def sample(self, batch_size: int, **options: Any) -> Any:
            class Odd(Square):
                def init(self, *, generator: torch.Generator | None = None) -> Any:
                    return torch.ones(self.batch, 1)

            return Odd(batch_size)

    with pytest.raises(TypeError, match="params must be a dict of tensors, got Tensor"):
        MetaTrainer(make_rule(), NoInstances(), replace(SMALL, validation_functions=None))


def test_the_logarithm_of_a_loss_that_is_not_positive() -> None:
    class Shifted(Square):
        def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
            return super().loss(params) - 2

    class ShiftedProblem(SquareProblem):
        def sample(self, batch_size: int, **options: Any) -> Square:
            return Shifted(batch_size)

    with pytest.raises(ValueError, match=r"objective='log' needs positive losses.* -1 at a starting point; use obj"):
        MetaTrainer(make_rule(), ShiftedProblem(), replace(SMALL, objective="log")).fit()
    assert MetaTrainer(make_rule(), ShiftedProblem(), SMALL).fit().updates == SMALL.updates


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"shards": 0}, ValueError, "shards must be at least 1, got 0"),
        ({"validation_functions": 0}, ValueError, "validation_functions must be at least 1, got 0"),
        ({"warmup": -1}, ValueError, "warmup must be at least 0, got -1"),
        ({"average": 1.0}, ValueError, "average must be below 1, got 1.0; without it"),
        ({"clip_ratio": 0}, ValueError, "clip_ratio must be finite and positive, got 0"),
        ({"coordinate_fraction": 0.0}, ValueError, "coordinate_fraction must be finite and positive, got 0.0"),
        ({"coordinate_fraction": 1.5}, ValueError, "coordinate_fraction must be at most 1, got 1.5"),
        ({"coordinate_fraction": 0.5, "second_derivatives": True}, ValueError, "second derivatives need every coor"),
        ({"objective": "square"}, ValueError, "unknown objective 'square'; known objectives: 'loss', 'log'"),
        ({"loss_power": -1.0}, ValueError, "loss_power must be finite and not negative, got -1.0"),
        ({"loss_power": 1.0, "loss_weights": (1.0,) * 101}, ValueError, "two ways to say the same; give one of them"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrainConfig(**settings)

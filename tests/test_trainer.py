"""``MetaTrainer``: known results, what its settings do, and bad input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainings import SMALL, LinearRule, Square, SquareProblem, make_rule

from l2l_fast.meta import MetaTrainer, TrainConfig, TrainEvent, unroll
from l2l_fast.problems import Quadratic
from l2l_fast.rule import CoordinatewiseLSTM

pytestmark = pytest.mark.usefixtures("one_thread")


def test_linear_rule_on_x_squared_after_two_segments() -> None:
    """Known values of the original implementation."""
    rule = LinearRule()
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.01)
    params, state = None, None
    for _ in range(2):
        run = unroll(rule, Square(1), 5, params=params, state=state)
        optimizer.zero_grad()
        run.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        params, state = run.params, run.state
    assert run.params["x"].item() == pytest.approx(0.855881, abs=1e-6)
    assert run.losses[-1].item() == pytest.approx(0.732533, abs=1e-6)


def test_trainer_is_that_loop() -> None:
    rule = LinearRule()
    config = TrainConfig(
        updates=2, horizon=10, truncation=5, batch_size=1, lr=0.01, final_lr_fraction=1.0, clip=None, validate_every=9
    )
    losses: list[float] = []
    MetaTrainer(rule, SquareProblem(), config).fit(on_update=lambda event: losses.append(event.loss))
    # The second segment starts at 1 as the first updates are 0, and goes x <- 0.98 x - 0.01.
    x, expected = 1.0, 1.0
    for _ in range(5):
        x = 0.98 * x - 0.01
        expected += x**2
    assert losses[0] == pytest.approx(6)
    assert losses[1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["linear", "lstm"])
@pytest.mark.parametrize("second", [False, True])
def test_x_squared_is_solved(kind: str, second: bool) -> None:
    rule: nn.Module = LinearRule() if kind == "linear" else make_rule()
    if isinstance(rule, CoordinatewiseLSTM):
        nn.init.zeros_(rule.output.weight)
        nn.init.zeros_(rule.output.bias)
    config = TrainConfig(
        updates=200, batch_size=1, lr=1e-2, validation_functions=1, validate_every=20, second_derivatives=second
    )
    result = MetaTrainer(rule, SquareProblem(), config).fit()
    assert result.history[0].validation_loss == 1  # a zeroed output layer moves nothing
    assert result.best_validation_loss < 1e-5


def test_training_helps_on_quadratics() -> None:
    config = TrainConfig(updates=100, validate_every=25, validation_functions=128)
    result = MetaTrainer(make_rule(), Quadratic(), config).fit()
    assert result.stopped == "updates"
    assert result.updates == 100
    assert [row.update for row in result.history] == [0, 25, 50, 75, 100]
    assert result.history[0].validation_loss > 20
    assert result.best_validation_loss < 3
    assert result.best_validation_loss == min(row.validation_loss for row in result.history)
    assert result.history[-1].best_validation_loss == result.best_validation_loss


def test_best_rule_is_the_one_that_was_validated() -> None:
    rule = make_rule()

    def spoil(event: TrainEvent) -> None:
        if event.update >= 20:
            nn.init.constant_(rule.output.bias, 1e3)

    config = replace(SMALL, updates=30, validate_every=1)
    trainer = MetaTrainer(rule, Quadratic(), config)
    result = trainer.fit(on_update=spoil)
    assert 0 < result.best_update <= 20
    assert result.history[-1].validation_loss > 10 * result.best_validation_loss
    for best in (result.best_rule, trainer.best_rule):
        assert isinstance(best, CoordinatewiseLSTM)
        assert best.card["updates"] == result.best_update
        assert best.card["validation_loss"] == result.best_validation_loss
        again = MetaTrainer(best, Quadratic(), replace(config, updates=0)).fit()
        assert again.best_validation_loss == result.best_validation_loss


def test_same_seed_same_training() -> None:
    results = [MetaTrainer(make_rule(), Quadratic(), SMALL).fit() for _ in range(2)]
    other = MetaTrainer(make_rule(), Quadratic(), replace(SMALL, seed=1)).fit()
    first, second = (result.best_rule.state_dict() for result in results)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert other.best_validation_loss != results[0].best_validation_loss


def test_loss_weights_are_those_of_the_run() -> None:
    weights = tuple(float(t == 9) for t in range(10))
    losses: list[float] = []
    trainer = MetaTrainer(make_rule(), Quadratic(), replace(SMALL, loss_weights=weights))
    trainer.fit(on_update=lambda event: losses.append(event.loss))
    # Segments of 4, 4 and 1 steps: only the last one of a run sees its end.
    assert [loss > 0 for loss in losses] == [False, False, True] * 4


@pytest.mark.parametrize(("hold", "held"), [(0.0, 1), (0.5, 6), (1.0, 12)])
def test_learning_rate_stays_and_then_falls_to_its_fraction(hold: float, held: int) -> None:
    rates: list[float] = []
    config = replace(SMALL, lr=0.1, hold=hold, final_lr_fraction=0.01)
    MetaTrainer(make_rule(), Quadratic(), config).fit(on_update=lambda event: rates.append(event.lr))
    assert len(rates) == 12
    assert rates[:held] == pytest.approx([0.1] * held)
    assert all(after < before for before, after in pairwise(rates[held - 1 :]))
    if hold < 1:
        assert rates[-1] == pytest.approx(0.001)


def test_clip_bounds_the_gradient() -> None:
    trainer = MetaTrainer(make_rule(), Quadratic(), replace(SMALL, updates=1, clip=1e-3))
    norms: list[float] = []
    trainer.fit(on_update=lambda event: norms.append(event.grad_norm))
    assert norms[0] > 1
    grads = [weight.grad for weight in trainer.rule.parameters()]
    assert torch.nn.utils.get_total_norm([g for g in grads if g is not None]).item() == pytest.approx(1e-3, rel=1e-3)


def test_patience_and_time_stop_training() -> None:
    config = replace(SMALL, updates=10_000, validate_every=2, lr=1e-30)
    result = MetaTrainer(make_rule(), Quadratic(), replace(config, patience=3)).fit()
    assert (result.stopped, result.updates, result.best_update) == ("patience", 6, 0)
    trainer = MetaTrainer(make_rule(), Quadratic(), replace(config, max_seconds=1e-9))
    assert trainer.fit().stopped == "max_seconds"
    assert trainer.fit().updates == 2  # a further call carries on


class Cliff(Square):
    """Not finite wherever the rule has moved to, and from the start on for every second run."""

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        return super().loss(params) * self.scale

    scale = 1.0


class CliffProblem(SquareProblem):
    def __init__(self, bad: Callable[[int], bool]) -> None:
        self.bad, self.sampled = bad, 0

    def sample(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Square:
        instances = Cliff(batch_size)
        if batch_size == SMALL.batch_size:  # training, not validation
            instances.scale = float("nan") if self.bad(self.sampled) else 1.0
            self.sampled += 1
        return instances


def test_updates_that_are_not_finite_are_skipped_and_counted() -> None:
    problem = CliffProblem(lambda index: index % 2 == 1)
    events: list[TrainEvent] = []
    rule = make_rule()
    MetaTrainer(rule, problem, SMALL).fit(on_update=events.append)
    # A good run of three segments, then a bad one that is given up at once.
    assert [event.skipped for event in events] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert all(weight.isfinite().all() for weight in rule.parameters())


class Ledge(Square):
    """Finite at the starting point and nowhere else."""

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        return super().loss(params) * torch.where(params["x"].squeeze(1) == 1, 1.0, float("inf"))


class LedgeProblem(SquareProblem):
    def __init__(self, batch: int) -> None:
        self.batch = batch  # of the instances that are so: those trained on, or those validated on

    def sample(self, batch_size: int, **options: Any) -> Square:
        return Ledge(batch_size) if batch_size == self.batch else Square(batch_size)


def test_nothing_but_skipped_updates_is_an_error() -> None:
    config = replace(SMALL, updates=1000)
    assert config.batch_size is not None
    with pytest.raises(FloatingPointError, match=r"100 meta-updates in a row.*lower lr"):
        MetaTrainer(make_rule(), LedgeProblem(config.batch_size), config).fit()
    with pytest.raises(FloatingPointError, match=r"100 meta-updates in a row.*already at the starting points"):
        MetaTrainer(make_rule(), CliffProblem(lambda index: True), config).fit()
    with pytest.raises(FloatingPointError, match="none of 7 meta-updates could be made"):
        MetaTrainer(make_rule(), LedgeProblem(config.batch_size), replace(SMALL, updates=7)).fit()


def test_validation_that_is_not_finite_counts_as_worst() -> None:
    assert SMALL.validation_functions is not None
    result = MetaTrainer(make_rule(), LedgeProblem(SMALL.validation_functions), SMALL).fit()
    assert result.best_validation_loss == float("inf")
    assert isinstance(result.best_rule, CoordinatewiseLSTM)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"updates": -1}, ValueError, "updates must be at least 0, got -1"),
        ({"updates": 1.5}, TypeError, "updates must be an int, got 1.5"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"lr": -1e-3}, ValueError, "lr must be finite and positive, got -0.001"),
        ({"lr": float("nan")}, ValueError, "lr must be finite and positive, got nan"),
        ({"lr": "fast"}, TypeError, "lr must be a number, got 'fast'"),
        ({"cuda_graph": "yes"}, TypeError, "cuda_graph must be True or False, got 'yes'"),
        ({"second_derivatives": 1}, TypeError, "second_derivatives must be True or False, got 1"),
        ({"clip": 0.0}, ValueError, "clip must be finite and positive, got 0.0"),
        ({"final_lr_fraction": 2.0}, ValueError, "final_lr_fraction must be at most 1, got 2.0"),
        ({"truncation": 101}, ValueError, "truncation must be at most the horizon of 100 steps, got 101"),
        ({"seed": 10**23}, ValueError, r"seed must be at most 2\*\*63 - 1, got 1000"),
        ({"validation_seed": 2**63}, ValueError, r"validation_seed must be at most 2\*\*63 - 1"),
        ({"backend": "zz"}, ValueError, "unknown backend 'zz'; known backends: 'cpu', 'triton', 'reference'"),
        ({"backend": 1}, TypeError, "backend must be the name of a backend or None, got 1"),
        ({"validate_by": "middle"}, ValueError, "validate_by must be one of 'end', 'run', got 'middle'"),
        ({"seed": 5, "validation_seed": 5}, ValueError, "seed and validation_seed are both 5"),
        ({"loss_weights": (1.0,) * 100}, ValueError, "each of the 101 points of 100 steps.*got 100"),
        ({"horizon": 20, "loss_weights": (float("inf"),) * 21}, ValueError, "loss_weights must be finite"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrainConfig(**settings)


def test_the_greatest_seeds() -> None:
    config = replace(SMALL, updates=1, seed=2**63 - 1, validation_seed=2**63 - 2)
    assert MetaTrainer(make_rule(), Quadratic(), config).fit().updates == 1


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="rule must be a module, got str"):
        MetaTrainer("quadratic", Quadratic())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="problem must be an object with a sample method, got 'quadratic'"):
        MetaTrainer(make_rule(), "quadratic")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="problem must be an object with a sample method, got <class"):
        MetaTrainer(make_rule(), Quadratic)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config must be a TrainConfig, got dict"):
        MetaTrainer(make_rule(), Quadratic(), {"lr": 0.1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no weight that requires grad"):
        MetaTrainer(make_rule().requires_grad_(False), Quadratic())
    with pytest.raises(ValueError, match="resume=True needs a folder"):
        MetaTrainer(make_rule(), Quadratic(), SMALL).fit(resume=True)

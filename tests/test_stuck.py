"""A training that does not get off the ground says so early, with the cause and what to try."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from trainings import Square, make_rule

from l2l_fast import CoordinatewiseLSTM, load_rule
from l2l_fast.meta import MetaTrainer, TrainConfig, search, stuck
from l2l_fast.meta.log import LogRow
from l2l_fast.meta.stuck import flat_share, why_stuck
from l2l_fast.problems import Quadratic, module_problem
from l2l_fast.problems.classification import digits

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CONFIG = TrainConfig(updates=30, horizon=20, truncation=20, batch_size=1, validate_every=10, validation_functions=2)


def history(*norms: float) -> list[LogRow]:
    return [LogRow(10 * k, 0.0, 0.01, 1.0, norm, 0, 2.3, 2.3) for k, norm in enumerate((None, *norms))]


def drifting(step: float) -> CoordinatewiseLSTM:
    """Moves every coordinate by ``step``, whatever the gradient."""
    rule = CoordinatewiseLSTM()
    with torch.no_grad():
        rule.output.weight.zero_()
        rule.output.bias.fill_(step / rule.spec.output_scale)
    return rule


def reason_for(
    rule: CoordinatewiseLSTM, start: float, end: float, *norms: float, problem: Any = None, config: TrainConfig = CONFIG
) -> str | None:
    """After as many validations as there are norms; each run has losses from ``start`` to ``end``."""
    losses = torch.linspace(start, end, 21).unsqueeze(1).repeat(1, 4)
    return why_stuck(history(*norms), losses, rule, problem or digits(), config, CPU)


def test_units_that_a_drift_saturates_are_seen() -> None:
    reason = reason_for(drifting(0.2), 2.3, 2.3, 1.0, 1.0)
    assert reason is not None
    assert "after 20 updates its runs still lead nowhere: the loss is 2.3 at their start and 2.3 at their end" in reason
    assert "% of the coordinates have lost their gradient" in reason
    assert "mirrored" in reason
    all_mirrored = reason_for(drifting(0.2), 2.3, 2.3, 1.0, 1.0, config=replace(CONFIG, mirrored=1.0))
    assert all_mirrored is not None
    assert "mirrored" not in all_mirrored


def test_a_vanished_meta_gradient_is_seen() -> None:
    reason = reason_for(make_rule(), 2.3, 2.31, 10.0, 0.1)
    assert reason is not None
    assert "meta-gradient has vanished, from a norm of 10 to 0.1" in reason


@pytest.mark.parametrize("end", [2.3, 2.29, 2.5])
def test_what_has_no_such_cause_may_be_the_problem(end: float) -> None:
    reason = reason_for(make_rule(), 2.3, end, 1.0, 1.0)
    assert reason is not None
    assert "look at the problem" in reason


def test_runs_that_diverge() -> None:
    reason = reason_for(make_rule(), 2.3, float("inf"), 1.0, 1.0)
    assert reason is not None
    assert "diverge" in reason


def test_one_that_learns_or_has_only_begun_is_left_alone() -> None:
    assert reason_for(drifting(0.2), 2.3, 2.3) is None
    assert reason_for(drifting(0.2), 2.3, 2.3, 1.0) is None
    assert reason_for(drifting(0.2), 2.3, 2.2, 10.0, 0.1) is None
    assert reason_for(drifting(0.2), -1.0, -1.2, 1.0, 1.0) is None


def test_a_solved_problem_is_not_saturated() -> None:
    """Its coordinates have lost their gradient too, where the loss has a floor that hides how far it fell."""
    rule = load_rule("quadratic")
    assert flat_share(rule, Quadratic(), replace(CONFIG, horizon=100), CPU) > 0.5
    reason = reason_for(rule, 20_100.0, 20_000.0, 1.0, 1.0, problem=Quadratic(), config=replace(CONFIG, horizon=100))
    assert reason is not None
    assert "lost their gradient" not in reason


class Constant(Square):
    """Depends on the parameters, and yet no rule can lower it."""

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        return 1 + 0 * params["x"].squeeze(1)


class ConstantProblem:
    def sample(self, batch_size: int, **options: Any) -> Constant:
        return Constant(batch_size)


def said(caplog: pytest.LogCaptureFixture, trainer: MetaTrainer) -> list[str]:
    with caplog.at_level(logging.WARNING, "l2l_fast"):
        trainer.fit()
    return [record.getMessage() for record in caplog.records]


def test_a_training_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    (once,) = said(caplog, MetaTrainer(make_rule(), ConstantProblem(), replace(CONFIG, updates=60)))
    assert once.startswith("this training is stuck: after 20 updates")
    assert "look at the problem" in once


def test_a_training_of_a_rule_that_saturates_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = replace(CONFIG, mirrored=0.0, lr=1e-5)
    (once,) = said(caplog, MetaTrainer(drifting(0.2), digits(), config))
    assert "of the coordinates have lost their gradient" in once


def test_labels_without_sense(caplog: pytest.LogCaptureFixture) -> None:
    """The loss falls to chance, and no rule can lower it any further."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(256, 8, generator=generator), torch.randint(4, (256,), generator=generator)
    problem = module_problem(lambda: torch.nn.Linear(8, 4), torch.nn.functional.cross_entropy, data, minibatch=256)
    rule = drifting(0.0)
    (once,) = said(caplog, MetaTrainer(rule, problem, replace(CONFIG, lr=1e-6)))
    assert "look at the problem" in once


@pytest.mark.parametrize("rule", ["fresh", "trained"])
def test_a_training_that_learns_says_nothing(caplog: pytest.LogCaptureFixture, rule: str) -> None:
    """Nor one that goes on from a good rule, which it can hardly make better."""
    start = load_rule("quadratic") if rule == "trained" else make_rule()
    problem = Quadratic(dim=2) if rule == "fresh" else Quadratic()
    assert not said(caplog, MetaTrainer(start, problem, replace(CONFIG, updates=200, batch_size=8)))


class Small(Square):
    def __init__(self, batch: int) -> None:
        if batch > 1:
            raise MemoryError(f"{batch} instances do not fit")
        super().__init__(batch)

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        if not params["x"].requires_grad and torch.is_grad_enabled():
            raise RuntimeError("this is none of its business")
        return 1 + 0 * params["x"].squeeze(1)


class SmallProblem:
    def sample(self, batch_size: int, **options: Any) -> Small:
        return Small(batch_size)


def test_looking_asks_for_no_more_instances_than_validation(caplog: pytest.LogCaptureFixture) -> None:
    (once,) = said(caplog, MetaTrainer(make_rule(), SmallProblem(), replace(CONFIG, validation_functions=1)))
    assert "lead nowhere" in once


def test_a_failing_look_ends_no_training(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> float:
        raise MemoryError("too large")

    monkeypatch.setattr(stuck, "flat_share", fail)
    trainer = MetaTrainer(make_rule(), ConstantProblem(), CONFIG)
    assert not said(caplog, trainer)
    assert trainer.fit().updates == CONFIG.updates


def test_a_search_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "l2l_fast"):
        search(ConstantProblem(), make_rule, CONFIG, 2)
    assert not caplog.records

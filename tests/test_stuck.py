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

from l2l_fast import CoordinatewiseLSTM
from l2l_fast.meta import MetaTrainer, TrainConfig
from l2l_fast.meta.log import LogRow
from l2l_fast.meta.stuck import why_stuck
from l2l_fast.problems import Quadratic
from l2l_fast.problems.classification import digits

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CONFIG = TrainConfig(updates=30, horizon=20, truncation=20, batch_size=1, validate_every=10, validation_functions=2)


def row(update: int, validation_loss: float, grad_norm: float | None, best: float) -> LogRow:
    return LogRow(update, 0.0, 0.01, 1.0, grad_norm, 0, validation_loss, best)


def history(*losses: float, norms: tuple[float, ...] = (1.0, 1.0)) -> list[LogRow]:
    every = zip(losses, (None, *norms), strict=True)
    return [row(10 * k, loss, norm, min(losses[: k + 1])) for k, (loss, norm) in enumerate(every)]


def drifting(step: float) -> CoordinatewiseLSTM:
    """Moves every coordinate by ``step``, whatever the gradient."""
    rule = CoordinatewiseLSTM()
    with torch.no_grad():
        rule.output.weight.zero_()
        rule.output.bias.fill_(step / rule.spec.output_scale)
    return rule


def test_units_that_a_drift_saturates_are_seen() -> None:
    reason = why_stuck(history(2.3, 2.3, 2.3), drifting(0.2), digits(), CONFIG, CPU)
    assert reason is not None
    assert "after 20 updates the validation loss is 2.3, and that of the untrained rule 2.3" in reason
    assert "% of its coordinates have lost their gradient" in reason
    assert "mirrored" in reason


def test_a_vanished_meta_gradient_is_seen() -> None:
    reason = why_stuck(history(2.3, 2.3, 2.31, norms=(10.0, 0.1)), make_rule(), digits(), CONFIG, CPU)
    assert reason is not None
    assert "the meta-gradient has vanished, from a norm of 10 to 0.1" in reason


def test_what_has_no_such_cause_may_be_the_problem() -> None:
    reason = why_stuck(history(2.3, 2.3, 2.29), make_rule(), digits(), CONFIG, CPU)
    assert reason is not None
    assert "look at the problem" in reason


@pytest.mark.parametrize("losses", [(2.3,), (2.3, 2.3), (2.3, 1.0, 2.3), (-1.0, -1.2, -1.1)])
def test_one_that_learns_or_has_only_begun_is_left_alone(losses: tuple[float, ...]) -> None:
    rows = history(*losses, norms=(1.0, 1.0)[: len(losses) - 1])
    assert why_stuck(rows, drifting(0.2), digits(), CONFIG, CPU) is None


class Constant(Square):
    """Depends on the parameters, and yet no rule can lower it."""

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        return 1 + 0 * params["x"].squeeze(1)


class ConstantProblem:
    def sample(self, batch_size: int, **options: Any) -> Constant:
        return Constant(batch_size)


def test_a_training_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "l2l_fast"):
        MetaTrainer(make_rule(), ConstantProblem(), replace(CONFIG, updates=60)).fit()
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("this training is stuck: after 20 updates")
    assert "look at the problem" in said


def test_a_training_that_learns_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "l2l_fast"):
        MetaTrainer(make_rule(), Quadratic(dim=2), replace(CONFIG, updates=200, batch_size=8)).fit()
    assert not caplog.records

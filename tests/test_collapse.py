"""A rule whose runs lead nowhere any more: training goes back to the best one there was."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from trainings import SMALL, DigitsProblem, Stop, assert_same_training, make_rule, stop_after

from l2l_fast import CoordinatewiseLSTM
from l2l_fast.meta import MetaTrainer, TrainConfig, TrainEvent, trainer
from l2l_fast.meta.validation import Validation
from l2l_fast.problems import Problem, Quadratic

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = replace(SMALL, updates=60, validate_every=10, truncation=3, hold=1.0, average=0.5)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Losses at the end of validation runs that start from 2: they are what the test puts here, in turn."""
    losses: list[float] = []

    def validate(rule: nn.Module, problem: Problem, config: TrainConfig, device: torch.device) -> Validation:
        loss = losses.pop(0)
        return Validation(loss, torch.tensor([[2.0, 2.0], [loss, loss]]))

    monkeypatch.setattr(trainer, "validate", validate)
    return losses


def weights(rule: nn.Module) -> Tensor:
    assert isinstance(rule, CoordinatewiseLSTM)
    return rule.flat_weights().detach().clone()


def test_training_goes_back_to_the_best_rule(scripted: list[float], caplog: pytest.LogCaptureFixture) -> None:
    scripted += [2.0, 1.5, 1.0, 2.1, 0.9, 0.8, 0.7]
    seen: dict[int, Tensor] = {}
    rates: dict[int, float] = {}
    training = MetaTrainer(make_rule(), Quadratic(), CONFIG)

    def watch(event: TrainEvent) -> None:
        seen[event.update] = weights(training.rule)
        rates[event.update] = event.lr

    with caplog.at_level(logging.WARNING, "l2l_fast"):
        result = training.fit(on_update=watch)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "after 30 updates the runs of the rule lead nowhere any more; back to the rule of update 20"
    assert result.best_update == 60
    # The best rule is the average of update 20, and training carries on from there, slowly at first.
    assert (seen[30] - seen[20]).norm() < (seen[29] - seen[20]).norm()
    assert (seen[31] - seen[30]).norm() < 0.2 * (seen[29] - seen[28]).norm()
    assert [rates[update] for update in (29, 30, 31, 32, 50, 51)] == pytest.approx(
        [0.01, 0.01, 0.01 / 21, 0.02 / 21, 0.2 / 21, 0.01]
    )


@pytest.mark.parametrize(
    "losses",
    [
        [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0],  # never led anywhere
        [1.0, 1.5, 1.5, 1.5, 1.2, 1.1, 1.05],  # worse than where it began, and yet going down
        [2.0, 1.0, 1.9, 1.0, 1.9, 1.0, 1.9],  # unsteady
    ],
)
def test_there_is_no_other_reason_to_go_back(
    scripted: list[float], losses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    scripted += losses
    with caplog.at_level(logging.WARNING, "l2l_fast"):
        MetaTrainer(make_rule(), Quadratic(), CONFIG).fit()
    assert not [record for record in caplog.records if "back to the rule" in record.getMessage()]


@pytest.mark.parametrize("cut", [29, 30, 31, 45])
def test_resumed_before_and_after_it_is_the_same(scripted: list[float], tmp_path: Path, cut: int) -> None:
    losses = [2.0, 1.5, 1.0, float("inf"), 0.9, 0.8, 0.7]
    scripted += losses
    MetaTrainer(make_rule(), DigitsProblem(), CONFIG, folder=tmp_path / "whole").fit()
    scripted += losses
    with pytest.raises(Stop):
        MetaTrainer(make_rule(), DigitsProblem(), CONFIG, folder=tmp_path / "cut").fit(on_update=stop_after(cut))
    MetaTrainer(make_rule(), DigitsProblem(), CONFIG, folder=tmp_path / "cut").fit(resume=True)
    assert not scripted
    assert_same_training(tmp_path / "cut", tmp_path / "whole")


def test_a_rule_that_saturates_in_the_middle_recovers() -> None:
    """On a real problem: a push that sends every run astray is undone at the next validation."""
    config = TrainConfig(
        updates=90, horizon=20, truncation=20, batch_size=4, validate_every=30, validation_functions=32, mirrored=0.0
    )
    training = MetaTrainer(make_rule(), Quadratic(dim=3), config)

    def push(event: TrainEvent) -> None:
        if event.update == 45:
            with torch.no_grad():
                training.rule.get_parameter("output.bias").fill_(50.0)

    result = training.fit(on_update=push)
    rows = [row.validation_loss for row in result.history]
    assert rows[1] < rows[0]
    assert rows[2] > rows[0]
    assert rows[3] < rows[1] * 1.5

"""Runs in a mirror: the same problem with the sign of half of the coordinates changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trainings import SMALL, Digits, DigitsProblem, assert_same_training, make_rule

from l2l_fast import CoordinatewiseLSTM, unroll
from l2l_fast.meta import MetaTrainer, TrainConfig, TrainEvent, shard
from l2l_fast.meta.mirror import mirrored
from l2l_fast.problems import Instances, Problem, Quadratic, Replayable
from l2l_fast.problems.classification import digits

pytestmark = pytest.mark.usefixtures("one_thread")

PROBLEMS: list[Problem] = [Quadratic(dim=40), digits(hidden=(7,)), DigitsProblem()]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def in_a_mirror(problem: Problem, seed: int | None) -> tuple[Instances, Instances]:
    instances = problem.sample(3, generator=seeded(0))
    return instances, mirrored(instances, seed)


@pytest.mark.parametrize("problem", PROBLEMS, ids=["quadratic", "digits", "regression"])
def test_a_rule_that_is_odd_takes_the_same_run(problem: Problem) -> None:
    """Without biases and without the magnitude of the gradient, the steps change sign with the gradients."""
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM(preprocess=None)
    with torch.no_grad():
        for cell in rule.cells:
            assert isinstance(cell, torch.nn.LSTMCell)
            cell.bias_ih.zero_()
            cell.bias_hh.zero_()
            for weights in (cell.weight_ih, cell.weight_hh):
                for gate in (0, 1, 3):
                    weights[20 * gate : 20 * gate + 20] = 0
        rule.output.reset_parameters()
        rule.output.bias.zero_()
        runs = [unroll(rule, i, 5, generator=seeded(1)) for i in in_a_mirror(problem, 5)]
    assert runs[0].losses[0].ne(runs[0].losses[-1]).all()
    torch.testing.assert_close(runs[1].losses, runs[0].losses, rtol=1e-4, atol=1e-5)
    for name, tensor in runs[0].params.items():
        torch.testing.assert_close(runs[1].params[name].abs(), tensor.abs(), rtol=1e-3, atol=1e-4)
        flipped = (runs[1].params[name] * tensor < 0).float().mean()
        if tensor.numel() > 100:
            assert 0.3 < flipped < 0.7


@pytest.mark.parametrize("problem", PROBLEMS, ids=["quadratic", "digits", "regression"])
def test_without_a_seed_nothing_is_flipped(problem: Problem) -> None:
    plain, same = in_a_mirror(problem, None)
    params = plain.init(generator=seeded(1))
    assert all(torch.equal(tensor, params[name]) for name, tensor in same.init(generator=seeded(1)).items())
    assert torch.equal(same.loss(params, generator=seeded(2)), plain.loss(params, generator=seeded(2)))


def test_what_is_drawn_makes_the_loss() -> None:
    """As a graph holds it: that of other instances, with the signs of these."""
    _, here = in_a_mirror(digits(hidden=(7,)), 1)
    _, captured = in_a_mirror(digits(hidden=(7,)), 2)
    assert isinstance(here, Replayable)
    assert isinstance(captured, Replayable)
    params = here.init(generator=seeded(3))
    by_draw = captured.loss_of(params, here.draw(generator=seeded(4)))
    torch.testing.assert_close(by_draw, here.loss(params, generator=seeded(4)), rtol=0, atol=0)


def pulled(update: float, seed: int | None) -> float:
    """How far units fed by 784 coordinates each are moved, on average, by 20 steps of a rule that moves all of them by
    ``update``."""
    instances = mirrored(Pull(), seed)
    rule = CoordinatewiseLSTM()
    with torch.no_grad():
        rule.output.weight.zero_()
        rule.output.bias.fill_(update / rule.spec.output_scale)
        run = unroll(rule, instances, 20)
    assert run.losses[0].count_nonzero() == 0
    return float(run.losses[-1].abs().mean())


class Pull:
    """The sum of the inputs' weights of a unit is the loss."""

    def init(self, *, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        return {"w": torch.zeros(50, 784)}

    def loss(self, params: Mapping[str, torch.Tensor], *, generator: torch.Generator | None = None) -> torch.Tensor:
        return params["w"].sum(1)


def test_a_common_drift_moves_a_unit_by_much_and_in_a_mirror_by_little() -> None:
    """What saturates the units of a network before a fresh rule has learned anything, and what keeps it from that."""
    plain = pulled(0.002, None)
    assert plain == pytest.approx(784 * 20 * 0.002, rel=1e-3)  # a sigmoid is saturated by 5
    assert pulled(0.002, 3) < plain / 20


def started_in_a_mirror(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each run of a training, whether it was mirrored."""
    runs: list[bool] = []

    class Counted(DigitsProblem):
        def sample(self, batch_size: int, **options: object) -> Digits:
            if batch_size == config.batch_size:
                runs.append(False)
            return super().sample(batch_size, **options)  # type: ignore[arg-type]

    def noted(instances: Instances, seed: int | None) -> Instances:
        runs[-1] = True
        return mirrored(instances, seed)

    monkeypatch.setattr(shard, "mirrored", noted)
    MetaTrainer(make_rule(), Counted(), config).fit()
    return runs


CONFIG = TrainConfig(updates=200, horizon=2, truncation=2, batch_size=3, validate_every=500, validation_functions=2)


def test_all_of_the_first_runs_are_mirrored_and_then_ever_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = started_in_a_mirror(replace(CONFIG, mirrored=0.5), monkeypatch)
    assert len(runs) == CONFIG.updates
    assert all(runs[:3])
    assert 35 < sum(runs[:50]) < 45  # about 3/4
    assert 5 < sum(runs[50:100]) < 20  # about 1/4
    assert not any(runs[100:])


def test_no_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(started_in_a_mirror(replace(CONFIG, mirrored=0.0), monkeypatch))


def test_a_training_that_is_resumed_in_the_middle_of_a_mirrored_run_is_the_same(tmp_path: Path) -> None:
    config = replace(SMALL, mirrored=1.0, checkpoint_every=1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    MetaTrainer(make_rule(), DigitsProblem(), config, folder=whole).fit()

    class Stop(Exception):
        pass

    def stop(event: TrainEvent) -> None:
        if event.update == 4:  # the second segment of the second run
            raise Stop

    with pytest.raises(Stop):
        MetaTrainer(make_rule(), DigitsProblem(), config, folder=parts).fit(on_update=stop)
    MetaTrainer(make_rule(), DigitsProblem(), config, folder=parts).fit(resume=True)
    assert_same_training(parts, whole)


@pytest.mark.parametrize(
    ("value", "error"), [(1.5, ValueError), (-0.1, ValueError), ("all", TypeError), (True, TypeError)]
)
@pytest.mark.parametrize("name", ["mirrored", "hold"])
def test_bad_shares(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{name} must be a"):
        replace(CONFIG, **{name: value})  # type: ignore[arg-type]

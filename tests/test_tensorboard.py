"""Meta-training in TensorBoard: curves read back from the event files, also over interruptions and in several ranks."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_cli import error_of, run
from trainings import SMALL, Stop, make_rule

from l2l_fast.meta import MetaTrainer, TrainEvent, TrainResult, tensorboard
from l2l_fast.problems import Quadratic

pytestmark = pytest.mark.usefixtures("one_thread")

COMMAND = ["train", "quadratic", "--updates", "6", "--batch-size", "2", "--horizon", "4", "--truncation", "2",
           "--validation-functions", "4", "--validate-every", "2"]  # fmt: skip

Curves = dict[str, list[tuple[int, float]]]


def curves_in(folder: Path) -> Curves:
    """Steps and values, as TensorBoard shows them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def fit(folder: Path, stop: int | None = None, resume: bool = False) -> TrainResult:
    """Train with curves in ``folder/curves``, up to a crash after ``stop`` updates."""
    write = tensorboard(folder / "curves")

    def on_update(event: TrainEvent) -> None:
        write(event)
        if event.update == stop:
            raise Stop

    config = replace(SMALL, checkpoint_every=5)
    return MetaTrainer(make_rule(), Quadratic(), config, folder=folder).fit(resume=resume, on_update=on_update)


def test_curves(tmp_path: Path) -> None:
    result = fit(tmp_path)
    curves = curves_in(tmp_path / "curves")
    assert list(curves) == ["meta/loss", "meta/grad_norm", "meta/lr", "meta/skipped", "meta/validation_loss"]
    for name in ("meta/loss", "meta/grad_norm", "meta/lr", "meta/skipped"):
        assert [step for step, _ in curves[name]] == list(range(1, SMALL.updates + 1))
    steps, values = zip(*curves["meta/validation_loss"], strict=True)
    assert steps == (5, 10, 12)  # that after the last update too
    assert values == pytest.approx([row.validation_loss for row in result.history[1:]])


@pytest.mark.parametrize("stop", [5, 9])
def test_a_resumed_training_has_the_curves_of_an_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    """The updates after the checkpoint, which are made twice, are shown once."""
    fit(tmp_path / "whole")
    with pytest.raises(Stop):
        fit(tmp_path / "cut", stop=stop)
    before = curves_in(tmp_path / "cut" / "curves")
    assert [step for step, _ in before["meta/loss"]] == list(range(1, stop + 1))  # nothing is left in a buffer
    fit(tmp_path / "cut", resume=True)
    assert curves_in(tmp_path / "cut" / "curves") == curves_in(tmp_path / "whole" / "curves")


def test_finished_training_adds_nothing(tmp_path: Path) -> None:
    fit(tmp_path)
    files = list((tmp_path / "curves").iterdir())
    fit(tmp_path, resume=True)
    assert list((tmp_path / "curves").iterdir()) == files


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    event = TrainEvent(1, 9, float("nan"), float("inf"), 0.5, 1.0, 0, None, 1.0)
    tensorboard(tmp_path)(event)
    assert curves_in(tmp_path) == {"meta/lr": [(1, 0.5)], "meta/skipped": [(1, 0.0)]}


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    write = tensorboard(tmp_path)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    write(TrainEvent(1, 9, 2.0, 1.0, 0.5, 1.0, 0, None, 1.0))
    assert len(list(tmp_path.iterdir())) == (rank == 0)


def test_the_command_draws_curves_and_carries_them_on(tmp_path: Path) -> None:
    assert run(*COMMAND, "--tensorboard", "--out", tmp_path / "whole")[0] == 0
    cut = [*COMMAND, "--tensorboard", "--out", str(tmp_path / "cut")]
    assert run(*cut, "--max-seconds", "1e-9")[0] == 0
    assert run(*cut, "--resume")[0] == 0
    curves = curves_in(tmp_path / "whole" / "tensorboard")
    assert [step for step, _ in curves["meta/validation_loss"]] == [2, 4, 6]
    assert curves_in(tmp_path / "cut" / "tensorboard") == curves
    assert run(*COMMAND, "--out", tmp_path / "without")[0] == 0
    assert not (tmp_path / "without" / "tensorboard").exists()


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"TensorBoard is not installed: pip install 'l2l_fast\[tensorboard\]'"):
        tensorboard(tmp_path)
    message = error_of(*COMMAND, "--tensorboard", "--out", tmp_path / "out")
    assert "TensorBoard is not installed: pip install 'l2l_fast[tensorboard]', or train without it" in message
    assert not (tmp_path / "out").exists()
    assert run(*COMMAND, "--out", tmp_path / "out")[0] == 0

"""Teachers by name: the shipped ones, files of tune-teacher and baselines, for train and evaluate."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import error_of, run
from trainings import assert_same_training

from l2l_fast import CoordinatewiseLSTM
from l2l_fast.experiments.teacher import PowerMomentum
from l2l_fast.experiments.teachers import Baseline, choose_teacher, load_teacher, shipped_teacher
from l2l_fast.meta import MetaTrainer, TrainConfig
from l2l_fast.problems import Quadratic

pytestmark = pytest.mark.usefixtures("one_thread")

TUNED = PowerMomentum(0.06, 0.9, 2.0, 0.7, 0.5, 1.2, decay=0.3, decay_time=20.0, settled=0.8, settle_at=60.0)
COMMAND = [
    "train", "quadratic", "--updates", "6", "--horizon", "5", "--batch-size", "2", "--validation-functions", "4",
    "--validate-every", "2", "--checkpoint-every", "1",
]  # fmt: skip
CONFIG = TrainConfig(
    updates=6,
    horizon=5,
    truncation=5,
    batch_size=2,
    validation_functions=4,
    validate_every=2,
    checkpoint_every=1,
)


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    path = tmp_path / "tuned" / "teacher.json"
    path.parent.mkdir()
    path.write_text(json.dumps(asdict(TUNED)))
    return path


def fresh_rule() -> CoordinatewiseLSTM:
    torch.manual_seed(0)
    return CoordinatewiseLSTM(preprocess=None)


def test_a_teacher_has_many_names(tuned: Path) -> None:
    assert choose_teacher("shipped", "digits") == shipped_teacher("digits") != shipped_teacher("mnist")
    assert choose_teacher(str(tuned), "digits") == load_teacher(tuned) == TUNED
    teacher = choose_teacher("nag:3e-2", "digits")
    assert teacher == pickle.loads(pickle.dumps(teacher)) == Baseline("nag", 0.03)
    (group,) = teacher([torch.zeros(2)]).param_groups
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.03, 0.9, True)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("none.json", "there is no teacher 'none.json': name 'shipped', a file that l2l-fast tune-teacher wrote"),
        ("adagrad:0.1", "there is no teacher 'adagrad:0.1'.*one of sgd, nag, rmsprop, adam with a learning rate"),
        ("adam", "there is no teacher 'adam'.*such as adam:0.01"),
        (".", "'.' is no file: name 'shipped'"),
        ("adam:", "learning rate of the teacher 'adam:' must be finite and positive, got ''"),
        ("sgd:-1", "learning rate of the teacher 'sgd:-1' must be finite and positive, got '-1'"),
        ("sgd:inf", "learning rate of the teacher 'sgd:inf' must be finite and positive"),
    ],
)
def test_unknown_teachers(choice: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_teacher(choice, "digits")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not JSON", "is not a file of l2l-fast tune-teacher: Expecting value"),
        (b"\xff\x00", "is not a file of l2l-fast tune-teacher: "),
        (b"[1, 2]", "expected the settings lr, power, slow, .*, got list"),
        (b'{"final_loss": {}}', "expected the settings lr, power, slow, .*, got final_loss"),
        ({"lr": "0.1"}, "lr must be a number, got '0.1'"),
        ({"lr": 0}, "lr must be positive, got 0"),
        ({"slow": float("nan")}, "slow must be finite, got nan"),
        ({"settle_width": -1.0}, "settle_width must be positive, got -1.0"),
        ({"slow": -0.5}, "slow must not be negative, got -0.5"),
        ({"agreement": 0.0}, "agreement must be positive, got 0.0"),
        ({"power": 2.5}, "power must be at least 0 and at most 2, got 2.5"),
        ({"memory": 1.0}, "memory must be at least 0 and below 1, got 1.0"),
        ({"nesterov": 1.0}, "expected the settings .*, got .*nesterov"),
    ],
)
def test_files_that_are_no_teacher(tmp_path: Path, content: bytes | dict[str, Any], message: str) -> None:
    path = tmp_path / "teacher.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps({**asdict(TUNED), **content}).encode())
    with pytest.raises(ValueError, match=f"teacher.json.*{message}"):
        load_teacher(path)


def test_train_imitates_over_whole_runs(tuned: Path, tmp_path: Path) -> None:
    assert run(*COMMAND, "--teacher", tuned, "--out", tmp_path / "command")[0] == 0
    MetaTrainer(fresh_rule(), Quadratic(), CONFIG, teacher=TUNED, folder=tmp_path / "library").fit()
    assert_same_training(tmp_path / "command", tmp_path / "library")


def test_imitation_resumes_with_the_same_teacher_only(tuned: Path, tmp_path: Path) -> None:
    assert run(*COMMAND, "--teacher", tuned, "--out", tmp_path / "whole")[0] == 0
    cut = [*COMMAND, "--out", str(tmp_path / "cut")]
    assert run(*cut, "--teacher", tuned, "--max-seconds", "1e-9")[0] == 0
    message = error_of(*cut, "--truncation", "5", "--resume")
    assert "teacher is 'PowerMomentum(lr=0.06" in message
    assert "but 'absent' here" in message
    message = error_of(*cut, "--teacher", "adam:0.01", "--resume")
    assert "in the checkpoint but \"Baseline(optimizer='adam', lr=0.01)\" here" in message
    tuned.rename(tmp_path / "moved.json")
    assert run(*cut, "--teacher", tmp_path / "moved.json", "--resume")[0] == 0
    assert_same_training(tmp_path / "whole", tmp_path / "cut")


def test_imitation_of_a_baseline_at_a_learning_rate_that_was_searched(tmp_path: Path) -> None:
    command = [*COMMAND, "--teacher", "sgd:0.05", "--search", "1"]
    for jobs in ("1", "2"):
        code, printed, err = run(*command, "--jobs", jobs, "--out", tmp_path / jobs)
        assert code == 0, err
        assert "learning rates tried" in printed
    assert_same_training(tmp_path / "1", tmp_path / "2")
    card = CoordinatewiseLSTM.load(tmp_path / "1" / "best.safetensors").card
    assert card["teacher"] == "Baseline(optimizer='sgd', lr=0.05)"
    message = error_of(*COMMAND, "--teacher", "sgd:0.5", "--search", "1", "--out", tmp_path / "1", "--resume")
    assert "holds trials of another search" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["shipped"], "no teacher was tuned for 'quadratic', only for 'mnist', 'digits'; l2l-fast tune-teacher finds"),
        (["none.json"], "there is no teacher 'none.json'"),
        (["adam:0.1", "--truncation", "3"], "a teacher is imitated over whole runs; set truncation, which is 3, to"),
        (["adam:0.1", "--loss-power", "2"], "loss_power has no meaning with a teacher"),
        (["adam:0.1", "--second-derivatives"], "second_derivatives has no meaning with a teacher"),
    ],
)
def test_train_refuses_a_teacher_before_it_makes_a_folder(tmp_path: Path, options: list[str], message: str) -> None:
    assert message in error_of(*COMMAND, "--out", tmp_path / "out", "--teacher", *options)
    assert not (tmp_path / "out").exists()


def test_evaluate_a_teacher_from_a_file(tuned: Path, tmp_path: Path) -> None:
    rule_file = tmp_path / "rule.safetensors"
    fresh_rule().save(rule_file)
    options = ["--rule", str(rule_file), "--runs", "4", "--steps", "3", "--out", str(tmp_path / "out")]
    assert run("evaluate", "quadratic", *options, "--teacher", tuned)[0] == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["final_loss"]
    assert list(found)[:2] == ["lstm", "teacher"]
    tuned.write_text(json.dumps(asdict(replace(TUNED, lr=1e-9))))
    assert run("evaluate", "quadratic", *options, "--teacher", tuned)[0] == 0
    other = json.loads((tmp_path / "out" / "evaluation.json").read_text())["final_loss"]
    assert other["lstm"] == found["lstm"]
    assert other["teacher"] != found["teacher"]

"""The folder of a training: one at a time in it, whole files only, and what is left after a kill."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from trainings import SMALL, assert_same_training, contents, make_rule

from l2l_fast.meta import MetaTrainer, TrainEvent
from l2l_fast.meta.folder import TrainingFolder
from l2l_fast.meta.lock import LOCK, hold
from l2l_fast.meta.log import LogRow
from l2l_fast.problems import Quadratic
from l2l_fast.rule import CoordinatewiseLSTM

pytestmark = pytest.mark.usefixtures("one_thread")


def test_files(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    result = MetaTrainer(make_rule(), Quadratic(), SMALL, folder=folder).fit()
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.safetensors",
        "checkpoint.safetensors",
        "log.csv",
        "summary.json",
    ]
    best = CoordinatewiseLSTM.load(folder / "best.safetensors")
    expected = result.best_rule.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in best.state_dict().items())
    assert best.card["problem"] == "Quadratic(dim=10, variant='gaussian')"
    with (folder / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [field.name for field in fields(LogRow)]
    assert [float(row["validation_loss"]) for row in rows] == [row.validation_loss for row in result.history]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["best_validation_loss"] == result.best_validation_loss
    assert summary["config"]["updates"] == SMALL.updates
    assert summary["stopped"] == "updates"


def test_a_used_folder_is_left_alone(tmp_path: Path) -> None:
    MetaTrainer(make_rule(), Quadratic(), SMALL, folder=tmp_path).fit()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"holds checkpoint.*resume=True.*another folder"):
        MetaTrainer(make_rule(), Quadratic(), SMALL, folder=tmp_path).fit()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_can_not_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    rule = make_rule()
    before = [weight.clone() for weight in rule.parameters()]
    started = time.perf_counter()
    with pytest.raises(OSError, match="file"):
        MetaTrainer(rule, Quadratic(), replace(SMALL, updates=10**6), folder=tmp_path / "file" / "run").fit()
    assert time.perf_counter() - started < 10
    assert all(torch.equal(*pair) for pair in zip(rule.parameters(), before, strict=True))


@pytest.mark.parametrize("refused", ["folder", "file"])
def test_a_folder_that_can_not_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    target = "pathlib.Path.mkdir" if refused == "folder" else "tempfile.TemporaryFile"
    monkeypatch.setattr(target, refuse)
    with pytest.raises(OSError, match=r"can't write to the folder .*run: Permission denied; name another one"):
        MetaTrainer(make_rule(), Quadratic(), SMALL, folder=tmp_path / "run").fit()


def test_a_held_folder_is_refused_and_named(tmp_path: Path) -> None:
    with hold(tmp_path):
        with pytest.raises(BlockingIOError, match=rf"{tmp_path} is in use: process {os.getpid()} on .* trains there"):
            hold(tmp_path).__enter__()
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    assert not list(tmp_path.iterdir())
    with hold(tmp_path):
        pass


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    """Also at the moment when the file of the holder before is removed."""
    inside, held = 0, [0] * 4

    def work(number: int) -> None:
        nonlocal inside
        deadline = time.monotonic() + 30
        while held[number] < 50 and time.monotonic() < deadline:
            time.sleep(1e-4)
            with suppress(BlockingIOError), hold(tmp_path):
                inside += 1
                assert inside == 1
                time.sleep(1e-4)
                inside -= 1
                held[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held == [50] * 4
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.warns(UserWarning, match=r"can't be locked \(No locks available\): train there only once"),
        hold(tmp_path),
    ):
        pass


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_training_is_refused_at_once(tmp_path: Path, resume: bool) -> None:
    refused = []

    def start_another(event: TrainEvent) -> None:
        if event.update == 5:
            before = {path.name: path.read_bytes() for path in (tmp_path / "both").iterdir()}
            with pytest.raises(BlockingIOError, match="is in use"):
                MetaTrainer(make_rule(1), Quadratic(), SMALL, folder=tmp_path / "both").fit(resume=resume)
            refused.append({path.name: path.read_bytes() for path in (tmp_path / "both").iterdir()} == before)

    MetaTrainer(make_rule(), Quadratic(), SMALL, folder=tmp_path / "both").fit(on_update=start_another)
    MetaTrainer(make_rule(), Quadratic(), SMALL, folder=tmp_path / "one").fit()
    assert refused == [True]
    assert_same_training(tmp_path / "one", tmp_path / "both")


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    trainer = MetaTrainer(make_rule(), Quadratic(), replace(SMALL, updates=6), folder=tmp_path)
    trainer.fit()
    files = sorted(tmp_path.iterdir())
    for name in (".checkpoint.safetensors.abc123", ".best.safetensors.x", ".log.csv.part", ".summary.json.part", LOCK):
        (tmp_path / name).write_text("half of it")
    (tmp_path / ".mine").touch()
    MetaTrainer(make_rule(), Quadratic(), replace(SMALL, updates=6), folder=tmp_path).fit(resume=True)
    assert sorted(tmp_path.iterdir()) == sorted([*files, tmp_path / ".mine"])


def test_files_are_whole_or_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = TrainingFolder(tmp_path)
    folder.write_summary({"updates": 1})

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            folder.write_summary({"updates": 2})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"updates": 1}


# Forked before PyTorch has computed anything, so that a process takes milliseconds to start.
KILLS = """
import csv, json, os, random, signal, sys, time
from dataclasses import fields, replace
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from safetensors import safe_open
from trainings import SMALL, make_rule
from l2l_fast.meta import MetaTrainer
from l2l_fast.problems import Quadratic

folder, config = Path({folder!r}), replace(SMALL, updates={updates}, validate_every=3)
checkpoint = folder / "checkpoint.safetensors"
MetaTrainer(make_rule(), Quadratic(), config)  # imports what is imported late
times, kills = random.Random(0), 0
while True:
    child = os.fork()
    if not child:
        MetaTrainer(make_rule(), Quadratic(), config, folder=folder).fit(resume=checkpoint.exists())
        os._exit(0)
    time.sleep(times.uniform(0, {patience}) if kills < {kills} else 0)
    if kills < {kills}:
        os.kill(child, signal.SIGKILL)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            file.metadata()
    if (folder / "log.csv").exists():
        with (folder / "log.csv").open(newline="") as file:
            assert all(None not in row.values() and None not in row for row in csv.DictReader(file))
    if (folder / "summary.json").exists():
        json.loads((folder / "summary.json").read_text())
    if ended == 0:
        break
    assert ended == -signal.SIGKILL, ended
    kills += 1
print(kills)
"""


def test_killed_again_and_again_it_still_gets_there(tmp_path: Path) -> None:
    updates = 60
    config = replace(SMALL, updates=updates, validate_every=3)
    MetaTrainer(make_rule(), Quadratic(), SMALL).fit()  # imports what is imported late
    begin = time.perf_counter()
    MetaTrainer(make_rule(), Quadratic(), config, folder=tmp_path / "whole").fit()
    patience = (time.perf_counter() - begin) / 6  # on average a twelfth of the way between two kills
    script = KILLS.format(
        tests=os.path.dirname(__file__), folder=str(tmp_path / "cut"), updates=updates, patience=patience, kills=10
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    assert_same_training(tmp_path / "whole", tmp_path / "cut")
    assert contents(tmp_path / "cut")["progress"]["updates"] == updates


@pytest.mark.parametrize("same", [True, False])
def test_a_restarted_process_carries_on_with_its_own_job_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    """A job that was refused a used folder at first must not take it over at its next attempt."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    config = replace(SMALL, max_seconds=1e-9)
    MetaTrainer(make_rule(), Quadratic(), config, folder=tmp_path).fit()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one" if same else "two")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    trainer = MetaTrainer(make_rule(), Quadratic(), SMALL, folder=tmp_path)
    if same:
        assert trainer.fit().updates == SMALL.updates
    else:
        with pytest.raises(FileExistsError, match="of an earlier training"):
            trainer.fit()

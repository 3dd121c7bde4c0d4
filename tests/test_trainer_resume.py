"""``MetaTrainer`` carries on to the bit wherever it was cut, and refuses to carry on with something else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from trainings import (
    SMALL,
    DigitsProblem,
    LinearRule,
    SquareProblem,
    Stop,
    assert_same_training,
    contents,
    make_rule,
    stop_after,
)

from l2l_fast.meta import MetaTrainer, TrainConfig, TrainEvent
from l2l_fast.problems import Quadratic
from l2l_fast.problems.quadratic import QuadraticInstances
from l2l_fast.rule import CoordinatewiseLSTM, load_rule

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("cut", range(13))
@pytest.mark.parametrize("second", [False, True])
def test_resume_is_exact_wherever_training_was_cut(tmp_path: Path, cut: int, second: bool) -> None:
    config = replace(SMALL, second_derivatives=second)
    MetaTrainer(make_rule(), DigitsProblem(), config, folder=tmp_path / "whole").fit()
    if cut:
        with pytest.raises(Stop):
            MetaTrainer(make_rule(), DigitsProblem(), config, folder=tmp_path / "cut").fit(on_update=stop_after(cut))
    else:
        MetaTrainer(make_rule(), DigitsProblem(), replace(config, max_seconds=1e-9), folder=tmp_path / "cut").fit()
    resumed = MetaTrainer(make_rule(seed=1), DigitsProblem(), config, folder=tmp_path / "cut").fit(resume=True)
    assert resumed.updates == config.updates
    assert_same_training(tmp_path / "whole", tmp_path / "cut")


def test_resume_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    config = replace(SMALL, checkpoint_every=7)
    MetaTrainer(make_rule(), Quadratic(), config, folder=tmp_path / "whole").fit()
    with pytest.raises(Stop):
        MetaTrainer(make_rule(), Quadratic(), config, folder=tmp_path / "cut").fit(on_update=stop_after(11))
    assert len((tmp_path / "cut" / "log.csv").read_text().splitlines()) == 4  # header; after 0, 5 and 10 updates
    MetaTrainer(make_rule(), Quadratic(), config, folder=tmp_path / "cut").fit(resume=True)
    assert_same_training(tmp_path / "whole", tmp_path / "cut")
    assert [row["update"] for row in contents(tmp_path / "cut")["log"]] == ["0", "5", "10", "12"]


def test_resume_of_finished_training_changes_nothing(tmp_path: Path) -> None:
    first = MetaTrainer(make_rule(), Quadratic(), SMALL, folder=tmp_path).fit()
    before = contents(tmp_path)
    again = MetaTrainer(make_rule(), Quadratic(), SMALL, folder=tmp_path).fit(resume=True)
    assert (again.updates, again.history) == (first.updates, first.history)
    after = contents(tmp_path)
    assert all(torch.equal(tensor, after["tensors"][name]) for name, tensor in before["tensors"].items())
    assert after["log"] == before["log"]


def test_another_rule_and_problem_resume_too(tmp_path: Path) -> None:
    config = replace(SMALL, batch_size=1)
    MetaTrainer(LinearRule(), SquareProblem(), config, folder=tmp_path).fit()
    result = MetaTrainer(LinearRule(), SquareProblem(), config, folder=tmp_path).fit(resume=True)
    assert result.updates == SMALL.updates
    assert not (tmp_path / "best.safetensors").exists()  # only a CoordinatewiseLSTM has a file format


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from trainings import make_rule
from l2l_fast.meta import MetaTrainer
from l2l_fast.problems import Quadratic
from test_trainer_resume import LONG
trainer = MetaTrainer(make_rule(), Quadratic(), LONG, folder={folder!r})
trainer.fit(on_update=lambda event: print(event.update, flush=True))
"""


LONG = replace(SMALL, updates=400, validate_every=50, checkpoint_every=3)


def killed_by(number: signal.Signals, folder: Path) -> tuple[int, str]:
    """Exit code and error output of training that gets the signal after some updates."""
    script = SCRIPT.format(tests=os.path.dirname(__file__), folder=str(folder))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 60:
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a long training that no signal reached."""
    folder = tmp_path_factory.mktemp("whole")
    MetaTrainer(make_rule(), Quadratic(), LONG, folder=folder).fit()
    return folder


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_resume_after_a_signal(tmp_path: Path, uninterrupted: Path, number: signal.Signals) -> None:
    code, errors = killed_by(number, tmp_path / "cut")
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
    else:
        assert code == -number
    done = contents(tmp_path / "cut")["progress"]["updates"]
    assert 57 <= done < LONG.updates
    MetaTrainer(make_rule(), Quadratic(), LONG, folder=tmp_path / "cut").fit(resume=True)
    assert_same_training(uninterrupted, tmp_path / "cut")


def test_ctrl_c_leaves_a_checkpoint_of_the_last_update(tmp_path: Path) -> None:
    def interrupt(event: TrainEvent) -> None:
        if event.update == 7:
            signal.raise_signal(signal.SIGINT)

    config = replace(SMALL, checkpoint_every=1000)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer = MetaTrainer(make_rule(), Quadratic(), config, folder=tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(on_update=interrupt)
    assert contents(tmp_path / "cut")["progress"]["updates"] == 7
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    trainer.fit()  # the same object carries on as well
    MetaTrainer(make_rule(), Quadratic(), config, folder=tmp_path / "whole").fit()
    assert_same_training(tmp_path / "whole", tmp_path / "cut")


def test_a_second_ctrl_c_acts_at_once() -> None:
    def interrupt(event: TrainEvent) -> None:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise Stop

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stop):
        MetaTrainer(make_rule(), Quadratic(), SMALL).fit(on_update=interrupt)
    assert signal.getsignal(signal.SIGINT) == handler


def test_a_handler_that_lets_training_go_on() -> None:
    received: list[int] = []

    def interrupt(event: TrainEvent) -> None:
        if event.update in (3, 7):
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        result = MetaTrainer(make_rule(), Quadratic(), SMALL).fit(on_update=interrupt)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM] * 2
    assert result.updates == SMALL.updates


def test_resume_refuses_another_training(tmp_path: Path) -> None:
    MetaTrainer(make_rule(), Quadratic(), SMALL, folder=tmp_path).fit()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    cases: list[tuple[nn.Module, Any, TrainConfig, str]] = [
        (make_rule(), Quadratic(), replace(SMALL, lr=0.5), r"config.lr is 0.01 in the checkpoint but 0.5 here"),
        (make_rule(), Quadratic(dim=3), SMALL, r'problem is "Quadratic\(dim=10.*but "Quadratic\(dim=3'),
        (CoordinatewiseLSTM(), Quadratic(), SMALL, r"rule.preprocess is .*identity.* but .*log_and_sign"),
        (LinearRule(), Quadratic(), SMALL, "rule.type is 'CoordinatewiseLSTM' in the checkpoint but 'LinearRule' here"),
    ]
    for rule, problem, config, message in cases:
        weights = [weight.clone() for weight in rule.parameters()]
        with pytest.raises(ValueError, match=message):
            MetaTrainer(rule, problem, config, folder=tmp_path).fit(resume=True)
        assert all(torch.equal(*pair) for pair in zip(rule.parameters(), weights, strict=True))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    MetaTrainer(make_rule(), Quadratic(), replace(SMALL, max_seconds=100.0), folder=tmp_path).fit(resume=True)


def test_resume_refuses_a_training_that_started_from_another_rule(tmp_path: Path) -> None:
    """By what it is told: weights are no measure, for training changes them and a fresh rule may stand in for any."""
    rule = make_rule()
    result = MetaTrainer(rule, Quadratic(), SMALL, folder=tmp_path, starts_from="first").fit()
    assert isinstance(result.best_rule, CoordinatewiseLSTM)
    assert result.best_rule.card["starts_from"] == "first"
    for other, found in (("second", "'second'"), (None, "'absent'")):
        with pytest.raises(ValueError, match=f"starts_from is 'first' in the checkpoint but {found} here"):
            MetaTrainer(rule, Quadratic(), SMALL, folder=tmp_path, starts_from=other).fit(resume=True)
    MetaTrainer(make_rule(seed=1), Quadratic(), SMALL, folder=tmp_path, starts_from="first").fit(resume=True)


@pytest.mark.parametrize("again", ["same", "best", "other"])
def test_any_rule_of_its_kind_is_resumed_into(tmp_path: Path, again: str) -> None:
    rule = load_rule("quadratic")
    config = replace(SMALL, updates=6)
    MetaTrainer(rule, Quadratic(), config, folder=tmp_path / "whole").fit()
    rule = load_rule("quadratic")
    with pytest.raises(Stop):
        MetaTrainer(rule, Quadratic(), config, folder=tmp_path / "cut").fit(on_update=stop_after(3))
    if again == "best":
        rule = CoordinatewiseLSTM.load(tmp_path / "cut" / "best.safetensors")
    elif again == "other":
        rule = CoordinatewiseLSTM(rule.spec.hidden_size, rule.spec.preprocess, rule.spec.output_scale)
    MetaTrainer(rule, Quadratic(), config, folder=tmp_path / "cut").fit(resume=True)
    assert_same_training(tmp_path / "whole", tmp_path / "cut")


def test_resume_refuses_a_damaged_or_foreign_file(tmp_path: Path) -> None:
    trainer = MetaTrainer(make_rule(), Quadratic(), SMALL, folder=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*checkpoint\.safetensors"):
        trainer.fit(resume=True)
    trainer.fit()
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        MetaTrainer(make_rule(), Quadratic(), SMALL, folder=tmp_path).fit(resume=True)
    (tmp_path / "best.safetensors").replace(path)
    with pytest.raises(ValueError, match=r"has the format 'l2l_fast.rule.v1', expected 'l2l_fast.checkpoint.v2'"):
        MetaTrainer(make_rule(), Quadratic(), SMALL, folder=tmp_path).fit(resume=True)


class BreaksOnce:
    """Quadratics whose first ``allowed`` samples work and whose next one does not."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.sampled = 0

    def sample(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> QuadraticInstances:
        self.sampled += 1
        if self.sampled == self.allowed + 1:
            raise Stop
        return Quadratic(dim=3).sample(batch_size, generator=generator, device=device)


@pytest.mark.parametrize("same", [True, False])
def test_training_that_broke_before_its_first_checkpoint_begins_anew(tmp_path: Path, same: bool) -> None:
    problem = BreaksOnce(allowed=0)
    trainer = MetaTrainer(make_rule(), problem, SMALL, folder=tmp_path)
    with pytest.raises(Stop):
        trainer.fit()
    assert list(tmp_path.iterdir()) == []
    if not same:
        trainer = MetaTrainer(make_rule(), problem, SMALL, folder=tmp_path)
    trainer.fit()
    MetaTrainer(make_rule(), Quadratic(dim=3), SMALL, folder=tmp_path / "whole").fit()
    assert contents(tmp_path)["log"] == contents(tmp_path / "whole")["log"]


def test_training_that_broke_after_its_first_checkpoint_resumes(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        MetaTrainer(make_rule(), BreaksOnce(allowed=1), SMALL, folder=tmp_path).fit()
    with pytest.raises(FileExistsError, match="holds checkpoint"):
        MetaTrainer(make_rule(), BreaksOnce(allowed=1), SMALL, folder=tmp_path).fit()
    # What the problem counts does not make it another one: it is described as it was when training began.
    fixed = BreaksOnce(allowed=1)
    trainer = MetaTrainer(make_rule(), fixed, SMALL, folder=tmp_path)
    fixed.sampled = 2
    assert trainer.fit(resume=True).updates == SMALL.updates


def test_training_that_broke_in_its_last_validation_makes_up_for_it() -> None:
    runs, validations = 4, 3  # before that one
    trainer = MetaTrainer(make_rule(), BreaksOnce(allowed=runs + validations), SMALL)
    with pytest.raises(Stop):
        trainer.fit()
    found, expected = trainer.fit().history, MetaTrainer(make_rule(), Quadratic(dim=3), SMALL).fit().history
    assert [replace(row, seconds=0.0) for row in found] == [replace(row, seconds=0.0) for row in expected]


class Nameless(SquareProblem):
    """No ``repr`` of its own."""

    def __init__(self, scale: float, data: Tensor) -> None:
        self.scale = scale
        self.data = data
        self._cache = [scale]


def test_resume_refuses_another_problem_without_a_repr(tmp_path: Path) -> None:
    def trainer(scale: float) -> MetaTrainer:
        return MetaTrainer(LinearRule(), Nameless(scale, torch.ones(2)), SMALL, folder=tmp_path)

    trainer(1.0).fit()
    with pytest.raises(ValueError, match=r"problem is 'Nameless\(scale=1.0\)' in .* but 'Nameless\(scale=2.0\)' here"):
        trainer(2.0).fit(resume=True)
    trainer(1.0).fit(resume=True)


def test_a_checkpoint_of_before_there_were_mirrors_resumes_as_it_was(tmp_path: Path) -> None:
    """It does not name the newer settings, and a rule of another start is in it."""

    def former_rule() -> CoordinatewiseLSTM:
        rule = make_rule()
        rule.output.reset_parameters()
        return rule

    MetaTrainer(former_rule(), DigitsProblem(), SMALL, folder=tmp_path / "whole").fit()
    cut = tmp_path / "cut"
    with pytest.raises(Stop):
        MetaTrainer(former_rule(), DigitsProblem(), SMALL, folder=cut).fit(on_update=stop_after(5))
    path = cut / "checkpoint.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    about = json.loads(metadata["about"])
    del about["config"]["mirrored"], about["config"]["hold"], tensors["shard.0.run.done"]
    save_file(tensors, path, {**metadata, "about": json.dumps(about)})
    with pytest.raises(ValueError, match=r"config\.hold is 0\.0 in the checkpoint but 0\.6 here"):
        MetaTrainer(make_rule(), DigitsProblem(), replace(SMALL, hold=0.6), folder=cut).fit(resume=True)
    MetaTrainer(make_rule(), DigitsProblem(), SMALL, folder=cut).fit(resume=True)
    assert_same_training(cut, tmp_path / "whole")

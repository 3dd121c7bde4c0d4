"""``MetaTrainer``: known results, bit-exact resume, files, interruptions, and bad input."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from l2l_fast.meta import MetaTrainer, TrainConfig, TrainEvent, unroll
from l2l_fast.meta.log import LogRow, tensorboard
from l2l_fast.problems import Quadratic
from l2l_fast.problems.quadratic import QuadraticInstances
from l2l_fast.rule import CoordinatewiseLSTM

SMALL = TrainConfig(
    updates=12, horizon=9, truncation=4, batch_size=2, validate_every=5, validation_functions=8, checkpoint_every=1
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Square:
    """``f(x) = x^2`` from ``x_0 = 1``."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def init(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"x": torch.ones(self.batch, 1)}

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        return params["x"].square().squeeze(1)


class SquareProblem:
    def sample(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Square:
        return Square(batch_size)


class LinearRule(nn.Module):
    """``update = weight * grad + bias``, zero to begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(()))

    def init_state(self, n: int) -> Tensor:
        return torch.zeros(n, 0)

    def forward(self, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.weight * grad + self.bias, state


class Digits:
    """Regressions with two parameters, named so that their order is not the alphabet's, on minibatches."""

    def __init__(self, slope: Tensor) -> None:
        self.slope = slope

    def init(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        batch = len(self.slope)
        return {
            "weight": torch.randn(batch, 3, generator=generator),
            "bias": torch.randn(batch, 1, generator=generator),
        }

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        x = torch.randn(len(self.slope), 5, 3, generator=generator)
        output = (x @ params["weight"].unsqueeze(-1)).squeeze(-1) + params["bias"]
        return (output - self.slope * x.sum(-1)).square().mean(1)


class DigitsProblem:
    def sample(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Digits:
        return Digits(torch.randn(batch_size, 1, generator=generator))


def make_rule(seed: int = 0) -> CoordinatewiseLSTM:
    torch.manual_seed(seed)
    return CoordinatewiseLSTM(preprocess=None)


def contents(folder: Path) -> dict[str, Any]:
    """Everything in a folder's checkpoint and log but the seconds."""
    with safe_open(folder / "checkpoint.safetensors", framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    progress = json.loads(metadata["progress"])
    for row in [progress, *progress["history"]]:
        del row["seconds"]
    with (folder / "log.csv").open(newline="") as log:
        rows = list(csv.DictReader(log))
    for row in rows:
        del row["seconds"]
    best = CoordinatewiseLSTM.load(folder / "best.safetensors")
    tensors |= {f"file.{name}": tensor for name, tensor in best.state_dict().items()}
    return {"tensors": tensors, "progress": progress, "log": rows, "card": best.card, "about": metadata["about"]}


def assert_same_training(first: Path, second: Path) -> None:
    left, right = contents(first), contents(second)
    assert left["tensors"].keys() == right["tensors"].keys()
    for name, tensor in left.pop("tensors").items():
        assert torch.equal(tensor, right["tensors"][name]), name
    del right["tensors"]
    assert left == right


class Stop(Exception):
    """Ends training from within, as a crash would."""


def stop_after(update: int) -> Callable[[TrainEvent], None]:
    def on_update(event: TrainEvent) -> None:
        if event.update == update:
            raise Stop

    return on_update


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
        if event.update == 20:
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


def test_learning_rate_decays_to_its_fraction() -> None:
    rates: list[float] = []
    config = replace(SMALL, lr=0.1, final_lr_fraction=0.01)
    MetaTrainer(make_rule(), Quadratic(), config).fit(on_update=lambda event: rates.append(event.lr))
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.001)
    assert all(after < before for before, after in pairwise(rates))


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
from dataclasses import replace
from test_trainer import SMALL, MetaTrainer, Quadratic, make_rule
config = replace(SMALL, updates={updates}, validate_every=50, checkpoint_every=3)
trainer = MetaTrainer(make_rule(), Quadratic(), config, folder={folder!r})
trainer.fit(on_update=lambda event: print(event.update, flush=True))
"""

LONG = 400


def killed_by(number: signal.Signals, folder: Path) -> tuple[int, str]:
    """Exit code and error output of training that gets the signal after some updates."""
    script = SCRIPT.format(tests=os.path.dirname(__file__), updates=LONG, folder=str(folder))
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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_resume_after_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    config = replace(SMALL, updates=LONG, validate_every=50, checkpoint_every=3)
    MetaTrainer(make_rule(), Quadratic(), config, folder=tmp_path / "whole").fit()
    code, errors = killed_by(number, tmp_path / "cut")
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
    else:
        assert code == -number
    done = contents(tmp_path / "cut")["progress"]["updates"]
    assert 57 <= done < LONG
    MetaTrainer(make_rule(), Quadratic(), config, folder=tmp_path / "cut").fit(resume=True)
    assert_same_training(tmp_path / "whole", tmp_path / "cut")


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


def test_tensorboard_is_optional(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="install the package tensorboard"):
        tensorboard(tmp_path)

    written: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None:
            written.append(("flush", 0, 0))

    module = type(sys)("tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    MetaTrainer(make_rule(), Quadratic(), SMALL).fit(on_update=tensorboard(tmp_path))
    assert [step for name, _, step in written if name == "meta/loss"] == list(range(1, 13))
    assert [step for name, _, step in written if name == "meta/validation_loss"] == [5, 10]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"updates": -1}, ValueError, "updates must be at least 0, got -1"),
        ({"updates": 1.5}, TypeError, "updates must be an int, got 1.5"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"lr": -1e-3}, ValueError, "lr must be finite and positive, got -0.001"),
        ({"lr": float("nan")}, ValueError, "lr must be finite and positive, got nan"),
        ({"lr": "fast"}, TypeError, "lr must be a number, got 'fast'"),
        ({"clip": 0.0}, ValueError, "clip must be finite and positive, got 0.0"),
        ({"final_lr_fraction": 2.0}, ValueError, "final_lr_fraction must be at most 1, got 2.0"),
        ({"truncation": 101}, ValueError, "truncation must be at most the horizon of 100 steps, got 101"),
        ({"seed": 10**23}, ValueError, r"seed must be at most 2\*\*63 - 1, got 1000"),
        ({"validation_seed": 2**63}, ValueError, r"validation_seed must be at most 2\*\*63 - 1"),
        ({"backend": "zz"}, ValueError, "unknown backend 'zz'; known backends: 'cpu', 'triton', 'reference'"),
        ({"backend": 1}, TypeError, "backend must be the name of a backend or None, got 1"),
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

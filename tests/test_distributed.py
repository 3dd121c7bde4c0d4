"""Several processes that train together: the same result for any number of them, and nobody left waiting."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, start_ranks
from torch import Tensor
from trainings import SMALL, Digits, DigitsProblem, Stop, assert_same_training, contents, make_rule, stop_after
from typer.testing import CliRunner

from l2l_fast.cli.app import app
from l2l_fast.meta import MetaTrainer, TrainConfig, TrainEvent
from l2l_fast.meta.distributed import Team
from l2l_fast.meta.shard import _seed

CONFIG = replace(SMALL, shards=2, average=0.9, clip_ratio=2.0, warmup=2)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with start_ranks(2, tmp_path_factory.mktemp("store")) as ranks:
        yield ranks


def train(
    folder: Path | None,
    config: TrainConfig = CONFIG,
    stop: int | None = None,
    resume: bool = False,
    problem: DigitsProblem | None = None,
) -> tuple[Any, list[Tensor]]:
    """History and weights, on every rank; each of them has made another rule, of which the first one's counts."""
    rule = make_rule(seed=dist.get_rank() if dist.is_initialized() else 0)
    trainer = MetaTrainer(rule, problem or DigitsProblem(), config, folder=folder)
    result = trainer.fit(resume=resume, on_update=None if stop is None else stop_after(stop))
    return [replace(row, seconds=0.0) for row in result.history], [weight.detach() for weight in rule.parameters()]


@pytest.mark.parametrize("shards", [2, 4])
def test_the_number_of_ranks_does_not_matter(ranks: Ranks, tmp_path: Path, shards: int) -> None:
    config = replace(CONFIG, shards=shards)
    history, weights = train(tmp_path / "one", config)
    for other_history, other_weights in ranks(train, tmp_path / "two", config):
        assert other_history == history
        assert all(map(torch.equal, weights, other_weights))
    assert_same_training(tmp_path / "one", tmp_path / "two")


def test_shards_are_runs_of_their_own() -> None:
    """Two shards are not one of twice the size, nor the same one twice."""
    losses: dict[int, list[float]] = {}
    for shards in (1, 2):
        trainer = MetaTrainer(make_rule(), DigitsProblem(), replace(SMALL, shards=shards))
        seen = losses.setdefault(shards, [])
        trainer.fit(on_update=lambda event, seen=seen: seen.append(event.loss))  # type: ignore[misc]
    generator = torch.Generator().manual_seed(_seed(SMALL.seed, 1))
    problem = DigitsProblem()
    trainer = MetaTrainer(make_rule(), problem, SMALL)
    trainer._shards[0]._generator = generator
    alone: list[float] = []
    trainer.fit(on_update=lambda event: alone.append(event.loss))
    assert losses[2][0] == pytest.approx((losses[1][0] + alone[0]) / 2, rel=1e-6)
    assert losses[1][0] != alone[0]
    assert _seed(5, 0) == 5
    assert len({_seed(seed, number) for seed in range(10) for number in range(10)}) == 100


@pytest.mark.parametrize("cut", [2, 5, 9])
@pytest.mark.parametrize("first", ["one", "two"])
def test_resume_with_another_number_of_ranks(ranks: Ranks, tmp_path: Path, cut: int, first: str) -> None:
    train(tmp_path / "whole")
    if first == "one":
        with pytest.raises(Stop):
            train(tmp_path / "cut", CONFIG, cut)
        ranks(train, tmp_path / "cut", CONFIG, None, True)
    else:
        assert all(isinstance(error, Stop) for error in ranks(train, tmp_path / "cut", CONFIG, cut))
        train(tmp_path / "cut", CONFIG, None, True)
    assert_same_training(tmp_path / "whole", tmp_path / "cut")


class RareDigits(DigitsProblem):
    """One batch in six, as the generator has it, is not finite."""

    def sample(self, batch_size: int, *, generator: torch.Generator | None = None, **options: Any) -> Digits:
        slope = torch.randn(batch_size, 1, generator=generator)
        if batch_size == CONFIG.batch_size and slope[0] > 1:
            slope[0] = math.inf
        return Digits(slope)


def test_a_shard_that_is_not_finite_skips_the_update_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    history, weights = train(tmp_path / "one", CONFIG, problem=RareDigits())
    assert 0 < history[-1].skipped < CONFIG.updates
    for other_history, other_weights in ranks(train, tmp_path / "two", CONFIG, None, False, RareDigits()):
        assert other_history == history
        assert all(map(torch.equal, weights, other_weights))
    assert_same_training(tmp_path / "one", tmp_path / "two")


class FailsOn(DigitsProblem):
    """Can't be sampled from on one rank after some times."""

    def __init__(self, rank: int, times: int) -> None:
        self.rank = rank
        self.times = times

    def __repr__(self) -> str:
        return "FailsOn()"

    def sample(self, batch_size: int, **options: Any) -> Digits:
        self.times -= dist.get_rank() == self.rank
        if self.times < 0:
            raise ValueError("no more data")
        return super().sample(batch_size, **options)


@pytest.mark.parametrize(("rank", "times"), [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)])
def test_a_rank_that_fails_takes_the_others_along(ranks: Ranks, rank: int, times: int) -> None:
    """In its validation, which only the first one has, or in an update."""
    errors = ranks(train, None, CONFIG, None, False, FailsOn(rank, times))
    assert [type(error) for error in errors] == [ValueError if rank == number else RuntimeError for number in range(2)]
    assert str(errors[1 - rank]) == f"rank {1 - rank} stops because rank {rank} failed, which says why"


def test_a_folder_that_can_not_be_written(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    first, second = ranks(train, tmp_path / "file" / "folder")
    assert isinstance(first, OSError)
    assert isinstance(second, RuntimeError)


def test_a_used_folder_and_a_missing_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks(train, tmp_path, CONFIG, None, True)
    assert (type(first), type(second)) == (FileNotFoundError, RuntimeError)
    train(tmp_path)
    first, second = ranks(train, tmp_path)
    assert (type(first), type(second)) == (FileExistsError, RuntimeError)
    errors = ranks(train, tmp_path, replace(CONFIG, lr=0.5), None, True)
    assert all("config.lr is 0.01 in the checkpoint but 0.5 here" in str(error) for error in errors)


def train_on_rank_1_differently() -> None:
    train(None, replace(CONFIG, lr=0.01 * (1 + dist.get_rank())))


def test_ranks_that_would_train_something_else(ranks: Ranks) -> None:
    first, second = ranks(train_on_rank_1_differently)
    assert str(first) == "all processes must train the same, but config.lr is 0.02 on rank 1 but 0.01 on rank 0"
    assert isinstance(second, RuntimeError)


def test_shards_that_can_not_be_shared(ranks: Ranks) -> None:
    for error in ranks(train, None, replace(CONFIG, shards=3)):
        assert isinstance(error, ValueError)
        assert "2 processes can't share shards=3 evenly; set shards to a multiple of 2, or start" in str(error)


def interrupt_one(folder: Path, rank: int) -> None:
    def on_update(event: TrainEvent) -> None:
        if event.update == 7 and dist.get_rank() == rank:
            signal.raise_signal(signal.SIGINT)

    config = replace(CONFIG, checkpoint_every=1000)
    MetaTrainer(make_rule(), DigitsProblem(), config, folder=folder).fit(on_update=on_update)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all(ranks: Ranks, tmp_path: Path, rank: int) -> None:
    train(tmp_path / "whole", replace(CONFIG, checkpoint_every=1000))
    assert all(isinstance(error, KeyboardInterrupt) for error in ranks(interrupt_one, tmp_path / "cut", rank))
    assert contents(tmp_path / "cut")["progress"]["updates"] == 7
    ranks(train, tmp_path / "cut", replace(CONFIG, checkpoint_every=1000), None, True)
    assert_same_training(tmp_path / "whole", tmp_path / "cut")


def updates_in_a_moment() -> tuple[int, str]:
    def on_update(event: TrainEvent) -> None:
        time.sleep(0.3 * dist.get_rank())

    result = MetaTrainer(make_rule(), DigitsProblem(), replace(CONFIG, max_seconds=0.2)).fit(on_update=on_update)
    return result.updates, result.stopped


def test_ranks_stop_together_when_time_runs_out(ranks: Ranks) -> None:
    first, second = ranks(updates_in_a_moment)
    assert first == second
    assert first[1] == "max_seconds"
    assert first[0] <= 3


def exchange() -> tuple[Any, ...]:
    team = Team(torch.device("cpu"))
    gathered = team.gather(lambda: torch.full((2, 3), float(team.rank)), 2, 3)
    tensor = torch.full((2, 2), float(team.rank)).t()
    team.broadcast([tensor])
    leader = team.from_leader(lambda: 7.5)
    return (
        team.share(6),
        gathered,
        tensor,
        leader,
        team.greatest(lambda: team.rank),
        team.collect(team.rank),
        team.leads,
    )


def test_team(ranks: Ranks) -> None:
    first, second = ranks(exchange)
    assert (first[0], second[0]) == (range(3), range(3, 6))
    for answer in (first, second):
        assert answer[1].tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
        assert answer[2].tolist() == [[0.0] * 2] * 2
        assert answer[3:5] == (7.5, 1.0)
    assert (first[5], second[5]) == ([0, 1], [])
    assert (first[6], second[6]) == (True, False)
    alone = Team(torch.device("cpu"))
    assert (alone.size, alone.share(6), alone.collect("x"), alone.leads) == (1, range(6), ["x"], True)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

ELASTIC = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from l2l_fast.meta.distributed import process_group
from test_distributed import CONFIG, DigitsProblem, MetaTrainer, make_rule

rank, restarts = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]

def on_update(event):
    if (rank, restarts, event.update) in (("1", "0", 4), ("0", "1", 8)):
        os.kill(os.getpid(), signal.SIGKILL)

with process_group(torch.device("cpu")):
    result = MetaTrainer(make_rule(), DigitsProblem(), CONFIG, folder=Path({folder!r})).fit(on_update=on_update)
    print(f"rank {{rank}}: {{result.updates}} updates with {{restarts}} restarts\\n", end="", flush=True)
"""


def test_torchrun_carries_on_after_ranks_were_killed(tmp_path: Path) -> None:
    """First the one that follows, then the one that leads and holds the folder."""
    script = tmp_path / "script.py"
    script.write_text(ELASTIC.format(tests=os.path.dirname(__file__), folder=str(tmp_path / "cut")))
    command = [*TORCHRUN, "--max-restarts", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {rank}: 12 updates with 2 restarts" for rank in range(2)]
    train(tmp_path / "whole")
    assert_same_training(tmp_path / "whole", tmp_path / "cut")


def test_torchrun_ended_by_sigterm_leaves_a_checkpoint(tmp_path: Path) -> None:
    options = ["train", "quadratic", "--updates", "400", "--shards", "2", "--batch-size", "2"]
    options += ["--horizon", "6", "--truncation", "3", "--validation-functions", "8", "--validate-every", "20"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    training = subprocess.Popen(
        [*TORCHRUN, "-m", "l2l_fast", *options, "--out", str(cut)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert training.stdout is not None
    assert training.stdout.readline().startswith("meta-training: 40/400")
    training.send_signal(signal.SIGTERM)
    printed, _ = training.communicate(timeout=60)
    lines = printed.splitlines()
    assert len(set(lines)) == len(lines)  # one of the two has printed
    assert not (cut / "summary.json").exists()
    assert 40 <= contents(cut)["progress"]["updates"] < 400
    for folder, more in ((cut, ["--resume"]), (whole, [])):
        done = CliRunner().invoke(app, [*options, "--out", str(folder), *more])
        assert done.exit_code == 0, done.output
    assert_same_training(whole, cut)

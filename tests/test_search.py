"""The learning-rate search: which rates it tries, what it remembers, processes of its own, and bad input."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import optuna
import pytest
import torch

from l2l_fast.meta import MetaTrainer, TrainConfig
from l2l_fast.meta.search import STUDY, Trial, search
from l2l_fast.problems import Quadratic
from l2l_fast.problems.quadratic import QuadraticInstances
from l2l_fast.rule import CoordinatewiseLSTM

CONFIG = TrainConfig(updates=10, horizon=10, truncation=5, batch_size=4, validate_every=5, validation_functions=16)

pytestmark = pytest.mark.usefixtures("one_thread")


def make_rule() -> CoordinatewiseLSTM:
    torch.manual_seed(0)
    return CoordinatewiseLSTM(preprocess=None)


def test_best_of_all_trials() -> None:
    seen: list[Trial] = []
    result = search(Quadratic(), make_rule, CONFIG, 4, on_trial=seen.append)
    assert tuple(seen) == result.trials
    assert len({trial.lr for trial in result.trials}) == 4
    assert all(1e-3 <= trial.lr <= 1e-1 for trial in result.trials)
    assert result.best_validation_loss == min(trial.validation_loss for trial in result.trials)
    assert Trial(result.best_lr, result.best_validation_loss) in result.trials
    # A trial is a training with that learning rate and nothing else.
    config = TrainConfig(**{**CONFIG.to_dict(), "lr": result.best_lr})
    assert MetaTrainer(make_rule(), Quadratic(), config).fit().best_validation_loss == result.best_validation_loss


def test_the_seed_decides() -> None:
    first, second, other = (search(Quadratic(), make_rule, CONFIG, 2, seed=seed) for seed in (0, 0, 9))
    assert first == second
    assert first.trials != other.trials


def test_rates_are_log_uniform() -> None:
    config = TrainConfig(**{**CONFIG.to_dict(), "updates": 0, "validation_functions": 1, "horizon": 5})
    rates = [math.log10(trial.lr) for trial in search(Quadratic(), make_rule, config, 60, low=1e-4, high=1.0).trials]
    quarters = [sum(-4 + k <= rate < -3 + k for rate in rates) for k in range(4)]
    assert min(quarters) >= 6
    assert sum(quarters) == 60


def test_storage_carries_on(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    whole = search(Quadratic(), make_rule, CONFIG, 3)
    search(Quadratic(), make_rule, CONFIG, 2, storage=storage)
    more: list[Trial] = []
    result = search(Quadratic(), make_rule, CONFIG, 3, storage=storage, on_trial=more.append)
    assert len(more) == 1
    assert result == whole
    with pytest.raises(ValueError, match=r"holds trials of another search.*use another storage"):
        search(Quadratic(dim=3), make_rule, CONFIG, 3, storage=storage)


def test_trials_of_before_there_were_mirrors_are_carried_on(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    config = replace(CONFIG, mirrored=0.0, hold=0.0, updates=0, batch_size=None)
    search(Quadratic(), make_rule, config, 2, storage=storage)
    study = optuna.load_study(study_name=STUDY, storage=storage)
    about = json.loads(study.user_attrs["about"])
    del about["config"]["mirrored"], about["config"]["hold"]
    study.set_user_attr("about", json.dumps(about))
    more: list[Trial] = []
    search(Quadratic(), make_rule, config, 3, storage=storage, on_trial=more.append)
    assert len(more) == 1


def test_a_trial_depends_on_seed_and_number_alone() -> None:
    first, more = (search(Quadratic(), make_rule, replace(CONFIG, updates=0), trials).trials for trials in (2, 5))
    assert more[:2] == first
    next_seed = search(Quadratic(), make_rule, replace(CONFIG, updates=0), 5, seed=1).trials
    assert not {trial.lr for trial in more} & {trial.lr for trial in next_seed}


class Ledge(Quadratic):
    """Not finite once the rule has taken a step, in training."""

    def sample(self, batch_size: int, **options: object) -> QuadraticInstances:
        instances = super().sample(batch_size)
        if batch_size == CONFIG.batch_size:
            loss = instances.loss
            taken: list[int] = []

            def broken(params: object, **options: object) -> torch.Tensor:
                taken.append(1)
                return loss(params) * (1 if len(taken) == 1 else math.inf)  # type: ignore[arg-type]

            instances.loss = broken  # type: ignore[method-assign]
        return instances


def test_training_that_breaks_down_counts_as_worst() -> None:
    result = search(Ledge(), make_rule, replace(CONFIG, updates=1000), 2)
    assert len(result.trials) == 2
    assert result.best_validation_loss == math.inf


class NeverFinite(Quadratic):
    def sample(self, batch_size: int, **options: object) -> QuadraticInstances:
        instances = super().sample(batch_size)
        return QuadraticInstances(instances.w, torch.full_like(instances.y, math.nan))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_problem_at_fault_ends_the_search(jobs: int) -> None:
    with pytest.raises(ValueError, match="not finite at the starting points, before the rule has taken a step: 16 of"):
        search(NeverFinite(), make_rule, CONFIG, 1, jobs=jobs)


class Killed(Quadratic):
    """Kills its process unless it is the test's own, or the file ``spared`` exists, which it leaves behind."""

    spared: Path | None = None

    def sample(self, batch_size: int, **options: object) -> QuadraticInstances:
        if multiprocessing.parent_process() is not None and not (self.spared and self.spared.exists()):
            if self.spared:
                self.spared.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(batch_size, **options)  # type: ignore[arg-type]


def killed(spared: Path | None) -> Killed:
    problem = Killed()
    object.__setattr__(problem, "spared", spared)
    return problem


def test_processes_give_the_same_even_if_one_is_killed(tmp_path: Path) -> None:
    whole = search(Quadratic(), make_rule, CONFIG, 3)
    seen: list[Trial] = []
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    search(Killed(), make_rule, CONFIG, 1, storage=storage)
    result = search(
        Killed(),
        make_rule,
        CONFIG,
        3,
        jobs=2,
        storage=storage,
        make_problem=partial(killed, tmp_path / "spared"),
        on_trial=seen.append,
    )
    assert (tmp_path / "spared").exists()
    assert result == whole
    assert sorted(seen, key=lambda trial: trial.lr) == sorted(whole.trials[1:], key=lambda trial: trial.lr)
    assert search(Killed(), make_rule, CONFIG, 3, storage=storage) == whole


def test_a_trial_that_is_killed_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l2l_fast.meta.trials.ATTEMPTS", 2)
    with pytest.raises(RuntimeError, match="process of trial 0 was killed by signal 9, 2 times, before it had a resul"):
        search(Killed(), make_rule, CONFIG, 1, jobs=2)


class Slow(Quadratic):
    """Notes the process that samples from it, and takes its time."""

    folder = Path()

    def sample(self, batch_size: int, **options: object) -> QuadraticInstances:
        if multiprocessing.parent_process() is not None:
            (self.folder / str(os.getpid())).touch()
            time.sleep(100)
        return super().sample(batch_size, **options)  # type: ignore[arg-type]


def slow(folder: Path) -> Slow:
    problem = Slow()
    object.__setattr__(problem, "folder", folder)
    return problem


SCRIPT = """
import sys
from functools import partial
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_search import CONFIG, Slow, make_rule, search, slow
if __name__ == "__main__":
    search(Slow(), make_rule, CONFIG, 2, jobs=2, make_problem=partial(slow, Path({folder!r})), storage={storage!r})
"""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def runs(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks processes up in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_search(tmp_path: Path, number: signal.Signals) -> None:
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    started = tmp_path / "started"
    started.mkdir()
    (tmp_path / "script.py").write_text(
        SCRIPT.format(tests=os.path.dirname(__file__), folder=str(started), storage=storage)
    )
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: len(list(started.iterdir())) == 2)
    children = [int(path.name) for path in started.iterdir()]
    assert all(map(runs, children))
    if number == signal.SIGINT:  # as a terminal sends it, to all
        os.killpg(parent.pid, number)
    else:
        parent.send_signal(number)
    _, errors = parent.communicate(timeout=60)
    if number == signal.SIGINT:
        assert errors.rstrip().endswith("KeyboardInterrupt")
        assert errors.count("Traceback") == 1
    wait_for(lambda: not any(map(runs, children)))
    result = search(Slow(), make_rule, CONFIG, 2, storage=storage)
    assert result == search(Quadratic(), make_rule, CONFIG, 2)


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        search(Quadratic(), make_rule, CONFIG, 0)
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        search(Quadratic(), make_rule, CONFIG, 1, jobs=0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        search(Quadratic(), make_rule, CONFIG, 1, seed=-1)
    with pytest.raises(ValueError, match=r"the problem can't be sent to another process: .*jobs=1"):
        search(Quadratic(), make_rule, CONFIG, 1, jobs=2, make_problem=lambda: Quadratic())
    with pytest.raises(ValueError, match=r"the teacher can't be sent to another process: .*jobs=1"):
        search(Quadratic(), make_rule, CONFIG, 1, jobs=2, teacher=lambda params: torch.optim.SGD(params))
    with pytest.raises(ValueError, match=r"0 < low < high, got 0\.1 and 0.01"):
        search(Quadratic(), make_rule, CONFIG, 1, low=0.1, high=0.01)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"needs optuna; install l2l_fast\[cli\]"):
        search(Quadratic(), make_rule, CONFIG, 1)

"""The learning-rate search: which rates it tries, what it remembers, and bad input."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from l2l_fast.meta import MetaTrainer, TrainConfig
from l2l_fast.meta.search import Trial, search
from l2l_fast.problems import Quadratic
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


def test_training_that_breaks_down_counts_as_worst() -> None:
    class Hopeless(Quadratic):
        def sample(self, batch_size: int, **options: object) -> object:  # type: ignore[override]
            instances = super().sample(batch_size)
            instances.y.fill_(math.nan)
            return type(instances)(instances.w, instances.y)

    config = TrainConfig(**{**CONFIG.to_dict(), "updates": 1000})
    result = search(Hopeless(), make_rule, config, 2)  # type: ignore[arg-type]
    assert result.best_validation_loss == math.inf


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        search(Quadratic(), make_rule, CONFIG, 0)
    with pytest.raises(ValueError, match=r"0 < low < high, got 0\.1 and 0.01"):
        search(Quadratic(), make_rule, CONFIG, 1, low=0.1, high=0.01)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"needs optuna; install l2l_fast\[cli\]"):
        search(Quadratic(), make_rule, CONFIG, 1)

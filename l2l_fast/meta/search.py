"""Search for the learning rate of meta-training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from l2l_fast.meta.checkpoint import describe
from l2l_fast.meta.config import TrainConfig
from l2l_fast.meta.trainer import MetaTrainer
from l2l_fast.problems import Problem

STUDY = "l2l_fast.lr"


@dataclass(frozen=True)
class Trial:
    """One learning rate and the best validation loss it led to; infinite if training broke down."""

    lr: float
    validation_loss: float


@dataclass(frozen=True)
class SearchResult:
    """What :func:`search` returns: the best trial's numbers, and all trials in the order they were made."""

    best_lr: float
    best_validation_loss: float
    trials: tuple[Trial, ...]


def search(
    problem: Problem,
    make_rule: Callable[[], nn.Module],
    config: TrainConfig,
    trials: int,
    *,
    low: float = 1e-3,
    high: float = 1e-1,
    seed: int = 0,
    storage: str | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> SearchResult:
    """Random search, log-uniform, by the best validation loss of trainings with ``config``.

    Args:
        make_rule: makes the untrained rule of a trial; the same one each time for a fair comparison.
        config: settings of each training; its ``lr`` is replaced.
        trials: trainings in all, those already in ``storage`` included.
        low, high: range of learning rates.
        seed: fixes which learning rates are tried.
        storage: optuna storage, such as ``"sqlite:///search.db"``, to keep trials in and to carry on from.
        on_trial: called after every trial.

    Raises:
        ImportError: if optuna is not installed.
        ValueError: if a number has no meaning, or ``storage`` holds the trials of another search.

    Source: Andrychowicz et al. 2016, section 3 (learning rate by random search).
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    if not 0 < low < high < math.inf:
        raise ValueError(f"low and high must be finite with 0 < low < high, got {low} and {high}")
    try:
        import optuna
    except ImportError as error:
        raise ImportError("the learning-rate search needs optuna; install l2l_fast[cli]") from error
    study = optuna.create_study(storage=storage, study_name=STUDY, load_if_exists=True)
    about = _about(make_rule(), problem, config, low, high, seed)
    if study.user_attrs.setdefault("about", about) != about:
        raise ValueError(f"{storage} holds trials of another search: {study.user_attrs['about']}; use another storage")
    study.set_user_attr("about", about)
    while len(done := study.get_trials(states=[optuna.trial.TrialState.COMPLETE])) < trials:
        # Seeded by trial: a search that was interrupted tries the same learning rates as one that was not.
        study.sampler = optuna.samplers.RandomSampler((seed + len(done)) % 2**32)
        asked = study.ask()
        lr = asked.suggest_float("lr", low, high, log=True)
        trial = Trial(lr, _validation_loss(make_rule(), problem, config, lr))
        study.tell(asked, trial.validation_loss)
        if on_trial is not None:
            on_trial(trial)
    results = tuple(Trial(trial.params["lr"], trial.values[0]) for trial in done)
    best = min(results, key=lambda trial: trial.validation_loss)
    return SearchResult(best.lr, best.validation_loss, results)


def _validation_loss(rule: nn.Module, problem: Problem, config: TrainConfig, lr: float) -> float:
    try:
        return MetaTrainer(rule, problem, replace(config, lr=lr)).fit().best_validation_loss
    except FloatingPointError:  # this learning rate leads nowhere
        return math.inf


def _about(rule: nn.Module, problem: Problem, config: TrainConfig, low: float, high: float, seed: int) -> str:
    about: dict[str, Any] = describe(rule, problem, config)
    del about["config"]["lr"]
    return json.dumps({**about, "low": low, "high": high, "seed": seed})

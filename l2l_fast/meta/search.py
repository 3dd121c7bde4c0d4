"""Search for the learning rate of meta-training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy
from torch import nn

from l2l_fast.meta.checkpoint import FORMER, describe
from l2l_fast.meta.config import TrainConfig
from l2l_fast.meta.imitation import Teacher
from l2l_fast.meta.trials import best_validation_loss, in_processes
from l2l_fast.problems import Problem

STUDY = "l2l_fast.lr"

_NUMBER = "number"  # attribute of a trial in the storage


@dataclass(frozen=True)
class Trial:
    """One learning rate and the best validation loss it led to; infinite if training broke down."""

    lr: float
    validation_loss: float


@dataclass(frozen=True)
class SearchResult:
    """What :func:`search` returns: the best trial's numbers, and all trials in the order of their numbers."""

    best_lr: float
    best_validation_loss: float
    trials: tuple[Trial, ...]


def search(
    problem: Problem,
    make_rule: Callable[[], nn.Module],
    config: TrainConfig,
    trials: int,
    *,
    teacher: Teacher | None = None,
    starts_from: str | None = None,
    low: float = 1e-3,
    high: float = 1e-1,
    seed: int = 0,
    storage: str | None = None,
    jobs: int = 1,
    make_problem: Callable[[], Problem] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> SearchResult:
    """Random search, log-uniform, by the best validation loss of trainings with ``config``.

    The learning rate of a trial follows from ``seed`` and the trial's number, and its result from that: it does not
    matter in how many processes the trials are made, nor whether they are made at once. Only this process writes to
    ``storage``, a trial at a time and when it is complete; one that was under way when it or the search was killed is
    made again.

    Args:
        make_rule: makes the untrained rule of a trial; the same one each time for a fair comparison.
        config: settings of each training; its ``lr`` is replaced.
        trials: trainings in all, those already in ``storage`` included.
        teacher: of every trial, see :class:`MetaTrainer`.
        starts_from: what the rule of a trial was trained as before; ``storage`` keeps it, and no trials of another.
        low, high: range of learning rates.
        seed: fixes which learning rates are tried.
        storage: optuna storage, such as ``"sqlite:///search.db"``, to keep trials in and to carry on from.
        jobs: trainings at a time; more than one run in processes of their own, with one thread each. A script that
            asks for them needs ``if __name__ == "__main__":`` around what it does.
        make_problem: makes ``problem`` in such a process; ``None`` sends the problem itself, pickled.
        on_trial: called after every trial.

    Raises:
        ImportError: if optuna is not installed.
        ValueError: if a number has no meaning, ``storage`` holds the trials of another search, or rule, problem or
            teacher can't be pickled for another process.
        RuntimeError: if the process of a trial ends without a result, by itself or killed three times.

    Source: Andrychowicz et al. 2016, section 3 (learning rate by random search).
    """
    for name, value in (("trials", trials), ("jobs", jobs)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 < low < high < math.inf:
        raise ValueError(f"low and high must be finite with 0 < low < high, got {low} and {high}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    try:
        import optuna
    except ImportError as error:
        raise ImportError("the learning-rate search needs optuna; install l2l_fast[cli]") from error
    study = optuna.create_study(storage=storage, study_name=STUDY, load_if_exists=True)
    about = _about(describe(make_rule(), problem, config, teacher, starts_from), low, high, seed)
    found = json.loads(study.user_attrs.get("about", about))
    if {**found, "config": FORMER | found["config"]} != json.loads(about):
        raise ValueError(f"{storage} holds trials of another search: {study.user_attrs['about']}; use another storage")
    study.set_user_attr("about", about)
    done = {
        trial.user_attrs[_NUMBER]: Trial(trial.params["lr"], trial.values[0])
        for trial in study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    }
    rates = {number: _learning_rate(seed, number, low, high) for number in range(trials) if number not in done}
    configs = {number: replace(config, lr=lr) for number, lr in rates.items()}
    if jobs == 1:
        losses = _one_by_one(make_rule, problem, configs, teacher)
    else:
        losses = in_processes(make_rule, make_problem or partial(_itself, problem), configs, jobs, teacher)
    with closing(losses):
        for number, loss in losses:
            done[number] = Trial(rates[number], loss)
            study.add_trial(
                optuna.trial.create_trial(
                    value=loss,
                    params={"lr": rates[number]},
                    distributions={"lr": optuna.distributions.FloatDistribution(low, high, log=True)},
                    user_attrs={_NUMBER: number},
                )
            )
            if on_trial is not None:
                on_trial(done[number])
    results = tuple(done[number] for number in sorted(done))
    best = min(results, key=lambda trial: trial.validation_loss)
    return SearchResult(best.lr, best.validation_loss, results)


def _one_by_one(
    make_rule: Callable[[], nn.Module],
    problem: Problem,
    configs: Mapping[int, TrainConfig],
    teacher: Teacher | None,
) -> Generator[tuple[int, float], None, None]:
    for number, config in configs.items():
        yield number, best_validation_loss(make_rule(), problem, config, teacher)


def _learning_rate(seed: int, number: int, low: float, high: float) -> float:
    share = float(numpy.random.default_rng([seed, number]).uniform())
    return low * math.pow(high / low, share)


def _itself(problem: Problem) -> Problem:
    return problem


def _about(training: dict[str, Any], low: float, high: float, seed: int) -> str:
    config = {name: value for name, value in training["config"].items() if name != "lr"}
    return json.dumps({**training, "config": config, "low": low, "high": high, "seed": seed})

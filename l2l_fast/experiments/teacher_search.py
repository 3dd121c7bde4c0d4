"""Settings of the hand-made teacher for one problem or several, found by a random search that learns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import optuna
import torch
from torch import Tensor

from l2l_fast.baselines import descend, final_losses
from l2l_fast.experiments.output import write_json
from l2l_fast.experiments.progress import progress
from l2l_fast.experiments.teacher import PowerMomentum
from l2l_fast.meta.checkpoint import describe_problem
from l2l_fast.meta.lock import hold
from l2l_fast.problems import Evaluates, Instances, Problem

TEACHER = "teacher.json"
TRIALS_FILE = "teacher.db"
TRIALS = 500
RUNS = 12  # that a trial is judged by, the same ones for every trial

# Next to those of validation, tuning and evaluation.
SEARCH_SEED = 2**31 + 3

STEPS = 100

_STARTUP_TRIALS = 30
_MEAN_WEIGHT, _LONGER_WEIGHT = 3.0, 0.3
_VERSION = 2  # of score and settings: trials of another one are of no use

# Adam with decays of 0.9 for both means, to begin with.
_FIRST_TRIAL = {
    "lr": 0.05,
    "power": 1.0,
    "slow": 4.0,
    "1 - momentum": 0.1,
    "1 - memory": 0.1,
    "agreement": 1.0,
    "decay": 0.5,
    "decay_time": 30.0,
    "settled": 0.5,
    "settle_at": 85.0,
    "settle_width": 8.0,
}


def search_teacher(
    problems: Sequence[Problem], folder: Path, *, trials: int = TRIALS, runs: int = RUNS, seed: int = 0
) -> PowerMomentum:
    """The best of ``trials`` settings, written to ``folder/teacher.json``.

    Judged by the mean over ``problems`` of ``log f(100) + 3 log mean f(0..100) + 0.3 log f(200)``, with losses averaged
    over runs; infinite unless all of them are finite and positive. Trials are kept in ``folder/teacher.db``, by
    problems, runs and seed, and are not made again.

    Raises:
        BlockingIOError: if another search is at work in the folder.
        ValueError: if there is no problem to judge by, or one is there twice, or no trial is worth anything.
    """
    if not problems:
        raise ValueError("a teacher is tuned for one problem or several, got none")
    names = [describe_problem(problem) for problem in problems]
    if len(set(names)) < len(names):
        raise ValueError(f"a problem to judge by is there twice: {', '.join(names)}; each counts once")
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a warning is the traceback of a Ctrl-C
    generator = torch.Generator().manual_seed(SEARCH_SEED)
    sets = [problem.sample(runs, generator=generator) for problem in problems]

    def judge(teacher: PowerMomentum) -> float:
        return sum(_score(instances, teacher, generator) for instances in sets) / len(sets)

    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=_STARTUP_TRIALS)
    with hold(folder), progress("tuning a teacher", trials) as advance:
        study = optuna.create_study(
            sampler=sampler,
            storage=f"sqlite:///{folder / TRIALS_FILE}",
            study_name=f"{' + '.join(names)} runs={runs} seed={seed} version={_VERSION}",
            load_if_exists=True,
        )
        done = len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE]))
        advance(done)
        if not done:
            study.enqueue_trial(_FIRST_TRIAL)
        study.optimize(
            lambda trial: judge(_suggest(trial)),
            n_trials=max(0, trials - done),
            callbacks=[lambda study, trial: advance(note=f"best {study.best_value:.3f}")],
        )
    if not math.isfinite(study.best_value):
        raise ValueError("no trial had losses that are finite and positive; look at the problem, or make more trials")
    found = _suggest(optuna.trial.FixedTrial(study.best_params))
    write_json(folder / TEACHER, asdict(found))
    return found


def _score(instances: Instances, teacher: PowerMomentum, generator: torch.Generator) -> float:
    halfway: list[Tensor] = []

    def look(step: int, params: Mapping[str, Tensor]) -> None:
        if step == STEPS and isinstance(instances, Evaluates):
            halfway.append(instances.evaluate(params))

    run = descend(instances, teacher, 2 * STEPS, generator=generator, on_step=look)
    last = final_losses(instances, run.losses, run.params).mean().item()
    final = (halfway[0] if halfway else run.losses[STEPS]).mean().item()
    mean = run.losses[: STEPS + 1].mean().item()
    if not all(math.isfinite(loss) and loss > 0 for loss in (final, mean, last)):
        return math.inf
    return math.log(final) + _MEAN_WEIGHT * math.log(mean) + _LONGER_WEIGHT * math.log(last)


def _suggest(trial: optuna.Trial | optuna.trial.FixedTrial) -> PowerMomentum:
    return PowerMomentum(
        lr=trial.suggest_float("lr", 0.01, 1.0, log=True),
        power=trial.suggest_float("power", 0.3, 1.2),
        slow=trial.suggest_float("slow", 0.0, 10.0),
        momentum=1 - trial.suggest_float("1 - momentum", 0.01, 0.5, log=True),
        memory=1 - trial.suggest_float("1 - memory", 0.02, 1.0, log=True),
        agreement=trial.suggest_float("agreement", 0.5, 3.0),
        decay=trial.suggest_float("decay", 0.0, 1.5),
        decay_time=trial.suggest_float("decay_time", 2.0, 100.0, log=True),
        settled=trial.suggest_float("settled", 0.05, 1.0),
        settle_at=trial.suggest_float("settle_at", 40.0, 110.0),
        settle_width=trial.suggest_float("settle_width", 1.0, 30.0, log=True),
    )

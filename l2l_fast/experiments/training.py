"""Meta-training and the search for its learning rate, with progress bars."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import optuna

from l2l_fast.experiments.progress import console, progress
from l2l_fast.meta import MetaTrainer, SearchResult, Teacher, TrainConfig, TrainEvent, TrainResult, search
from l2l_fast.meta.folder import BEST, CHECKPOINT, LOG, SUMMARY
from l2l_fast.meta.lock import hold
from l2l_fast.meta.search import Trial
from l2l_fast.problems import Problem
from l2l_fast.rule import CoordinatewiseLSTM

SEARCH = "search.db"

_SMOOTHING = 0.9  # of the live loss, which is that of a few functions and jumps


class _LiveLoss:
    """Smoothed meta-loss and the latest validation, in words."""

    def __init__(self) -> None:
        self._loss = math.nan
        self._validation = math.nan

    def __call__(self, event: TrainEvent) -> str:
        if math.isfinite(event.loss):
            known = math.isfinite(self._loss)
            self._loss = _SMOOTHING * self._loss + (1 - _SMOOTHING) * event.loss if known else event.loss
        if event.validation_loss is not None:
            self._validation = event.validation_loss
        text = f"loss {self._loss:.3g}"
        if math.isfinite(self._validation):
            text += f", validation {self._validation:.3g}, best {event.best_validation_loss:.3g}"
        return text + (f", {event.skipped} skipped" if event.skipped else "")


def fit(
    trainer: MetaTrainer,
    *,
    description: str = "meta-training",
    resume: bool = False,
    on_update: Callable[[TrainEvent], None] | None = None,
) -> TrainResult:
    """:meth:`MetaTrainer.fit` with a progress bar; without a terminal, with a line for every tenth of the way.

    Raises:
        As :meth:`MetaTrainer.fit` does.
    """
    live = _LiveLoss()
    updates = trainer.config.updates
    done = 0
    with progress(description, updates) as advance:

        def show(event: TrainEvent) -> None:
            nonlocal done
            note = live(event)
            advance(event.update - done, note=note)
            if not console.is_terminal and event.update * 10 // updates > done * 10 // updates:
                console.print(f"{description}: {event.update}/{updates}, {note}", highlight=False, soft_wrap=True)
            done = event.update
            if on_update is not None:
                on_update(event)

        return trainer.fit(resume=resume, on_update=show)


def check_unused(folder: Path) -> None:
    """Refuse a folder in which something has been or is being trained.

    Raises:
        BlockingIOError: if another training is at work there.
        FileExistsError: if there are files of an earlier one, with their names.
    """
    with hold(folder):
        found = [name for name in (CHECKPOINT, BEST, LOG, SUMMARY, SEARCH) if (folder / name).exists()]
    if found:
        raise FileExistsError(
            f"{folder} holds {', '.join(found)} of an earlier training; --resume carries on with it, "
            "--out names another folder"
        )


def search_lr(
    problem: Problem,
    make_rule: Callable[[], CoordinatewiseLSTM],
    config: TrainConfig,
    folder: Path,
    trials: int,
    jobs: int = 1,
    make_problem: Callable[[], Problem] | None = None,
    teacher: Teacher | None = None,
    starts_from: str | None = None,
) -> SearchResult:
    """:func:`l2l_fast.meta.search` with a progress bar; trials in ``folder/search.db`` are not made again.

    Raises:
        BlockingIOError: if another training is at work in the folder.
        ValueError: if the trials there belong to another search.
        As :func:`l2l_fast.meta.search` does.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with hold(folder), progress("searching a learning rate", trials) as advance:

        def on_trial(trial: Trial) -> None:
            advance(note=f"lr {trial.lr:.2g}: {trial.validation_loss:.3g}")

        return search(
            problem,
            make_rule,
            config,
            trials,
            teacher=teacher,
            starts_from=starts_from,
            seed=config.seed,
            storage=f"sqlite:///{folder / SEARCH}",
            jobs=jobs,
            make_problem=make_problem,
            on_trial=on_trial,
        )

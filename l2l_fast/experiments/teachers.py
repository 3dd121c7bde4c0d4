"""Teachers that a command can be given by name: the shipped ones, those that were tuned, and baselines."""

from __future__ import annotations

import json
import math
import os
from dataclasses import MISSING, dataclass, fields
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from l2l_fast.baselines import BASELINES
from l2l_fast.experiments.teacher import PowerMomentum
from l2l_fast.meta import Teacher

SHIPPED = "shipped"

_SHIPPED_SETTINGS = files("l2l_fast.experiments") / "teachers.json"


@dataclass(frozen=True)
class Baseline:
    """One of :data:`BASELINES` as a teacher.

    Args:
        optimizer: its name there.
        lr: its learning rate.
    """

    optimizer: str
    lr: float

    def __call__(self, params: list[Tensor], /) -> torch.optim.Optimizer:
        """An optimizer of ``params``."""
        return BASELINES[self.optimizer](params, self.lr)


def choose_teacher(choice: str, problem: str) -> Teacher:
    """The teacher that ``choice`` names: ``"shipped"``, the path of a ``teacher.json``, or such as ``"adam:0.01"``.

    Args:
        problem: name of the problem whose shipped teacher is meant.

    Raises:
        ValueError: if there is no such teacher, or the file holds none.
        OSError: if the file can't be read.
    """
    if choice == SHIPPED:
        return shipped_teacher(problem)
    name, separator, rate = choice.partition(":")
    if separator and name in BASELINES:
        return Baseline(name, _learning_rate(choice, rate))
    if not Path(choice).is_file():
        what = f"{choice!r} is no file" if Path(choice).exists() else f"there is no teacher {choice!r}"
        raise ValueError(
            f"{what}: name {SHIPPED!r}, a file that l2l-fast tune-teacher wrote, or one of "
            f"{', '.join(BASELINES)} with a learning rate, such as adam:0.01"
        )
    return load_teacher(choice)


def shipped_teacher(problem: str) -> PowerMomentum:
    """The tuned teacher for the problem called ``problem`` that is kept in the package.

    Raises:
        ValueError: if there is none.
    """
    known = json.loads(_SHIPPED_SETTINGS.read_text())
    if problem not in known:
        raise ValueError(
            f"no teacher was tuned for {problem!r}, only for {', '.join(map(repr, known))}; l2l-fast tune-teacher "
            "finds one, and its file can be named in place of the shipped one"
        )
    return PowerMomentum(**known[problem])


def load_teacher(path: str | os.PathLike[str]) -> PowerMomentum:
    """The teacher in a file that ``l2l-fast tune-teacher`` wrote.

    Raises:
        OSError: if the file can't be read.
        ValueError: if it is of another kind, or settings are missing, unknown or without a meaning.
    """
    try:
        settings = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a file of l2l-fast tune-teacher: {error}") from error
    known = {setting.name: setting.default is MISSING for setting in fields(PowerMomentum)}
    needed = {name for name, needed in known.items() if needed}
    if not isinstance(settings, dict) or not needed <= settings.keys() <= known.keys():
        found = ", ".join(settings) if isinstance(settings, dict) else type(settings).__name__
        raise ValueError(
            f"{path} is not a file of l2l-fast tune-teacher: expected the settings {', '.join(known)}, got {found}"
        )
    try:
        return PowerMomentum(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _learning_rate(choice: str, text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"the learning rate of the teacher {choice!r} must be finite and positive, got {text!r}")
    return rate

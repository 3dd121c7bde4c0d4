"""What several subcommands of ``l2l-fast`` share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape

from l2l_fast.baselines import BASELINES
from l2l_fast.datasets import FOLDER_VARIABLE
from l2l_fast.experiments.progress import console, errors
from l2l_fast.experiments.teachers import SHIPPED
from l2l_fast.problems import PROBLEMS, Problem, load_problem, parse_settings

ProblemName = Annotated[
    str | None, typer.Argument(metavar="PROBLEM", help=f"One of: {', '.join(PROBLEMS)}; or path.py:factory.")
]
ProblemFile = Annotated[
    str | None, typer.Option("--problem", metavar="FILE:FACTORY", help="A problem of yours, in place of PROBLEM.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Setting of the problem, such as hidden=40; may be repeated."),
]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder of the data sets.", show_default="$L2L_FAST_DATA, or the user's cache")
]
TEACHER_FORMS = f"{SHIPPED}, a file of tune-teacher, or {', '.join(BASELINES)} with a learning rate: adam:0.01"
Threads = Annotated[int | None, typer.Option(min=1, help="Threads to compute on; torch's choice by default.")]


@contextmanager
def carries_on() -> Iterator[None]:
    """Ctrl-C ends a command that carries on where it was."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print("\ninterrupted; the same command carries on")
        raise typer.Exit(130) from None


def set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def use_data_dir(data_dir: Path | None) -> None:
    if data_dir is not None:
        os.environ[FOLDER_VARIABLE] = os.fspath(data_dir)


def chosen_problem(name: str | None, file: str | None) -> str:
    """What the argument PROBLEM or the option ``--problem`` names.

    Raises:
        ValueError: if neither or both are given.
    """
    if (name is None) == (file is None):
        raise ValueError(f"name one problem: PROBLEM ({', '.join(PROBLEMS)}) or --problem path.py:factory")
    return name if file is None else file  # type: ignore[return-value]  # one of them is given


def make_problem(name: str, settings: Sequence[str] | None = None) -> Problem:
    """The built-in problem called ``name``, or that of the user's ``path.py:factory``.

    Args:
        settings: ``"name=value"`` each.

    Raises:
        ValueError: if there is none, or it can't be made with these settings.
    """
    values = parse_settings(settings or ())
    if ":" not in name and name not in PROBLEMS:
        known = ", ".join(map(repr, PROBLEMS))
        raise ValueError(f"unknown problem {name!r}; known problems: {known}, or path.py:factory for one of yours")
    try:
        return load_problem(name, values) if ":" in name else PROBLEMS[name](**values)
    except TypeError as error:
        raise ValueError(f"problem {name!r}: {error}") from error


def folder_name(problem: str) -> str:
    """``problem`` as the name of a folder: of ``path/to/file.py:factory`` the part ``file-factory``."""
    location, _, factory = problem.rpartition(":")
    return f"{Path(location).stem}-{factory}" if location else problem


def print_written(*paths: Path) -> None:
    for path in paths:
        console.print(f"wrote {escape(str(path))}", highlight=False, soft_wrap=True)

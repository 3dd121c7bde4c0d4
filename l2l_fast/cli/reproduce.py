"""``l2l-fast reproduce`` and ``l2l-fast tune-teacher``: the way to the shipped rules."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from l2l_fast.cli.common import (
    DataDir,
    ProblemName,
    Threads,
    carries_on,
    folder_name,
    make_problem,
    print_written,
    set_threads,
    use_data_dir,
)
from l2l_fast.experiments import recipes, tables, teacher_search
from l2l_fast.experiments.output import prepare_folder
from l2l_fast.experiments.progress import console
from l2l_fast.rule import load_rule


def reproduce(
    rule: Annotated[str, typer.Argument(metavar="RULE", help="A shipped rule: quadratic, mnist or digits.")],
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Seed of weights, functions and minibatches.", show_default="that of the shipped rule"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the training.", show_default="runs/reproduce-RULE-SEED")
    ] = None,
    data_dir: DataDir = None,
    threads: Threads = None,
) -> None:
    """Train a shipped rule again, by its recipe. Interrupted, the same command carries on."""
    set_threads(threads)
    use_data_dir(data_dir)
    recipe = recipes.recipe_for(rule)
    if seed is None:
        seed = int(load_rule(recipe.name).card["config"]["seed"])
    folder = prepare_folder(Path("runs") / f"reproduce-{rule}-{seed}" if out is None else out)
    with carries_on():
        recipes.reproduce(recipe, seed, folder)
    print_written(folder / recipes.RULE)


def tune_teacher(
    problem: ProblemName = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar='"NAME=VALUE ..."',
            help="Judge by the problem with these settings too, such as hidden=20,20; may be repeated.",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Settings to try.")] = teacher_search.TRIALS,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the search.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for teacher.json.", show_default="runs/teacher-PROBLEM[+ALSO...]")
    ] = None,
    data_dir: DataDir = None,
    threads: Threads = None,
) -> None:
    """Find the settings of a hand-made optimizer, a teacher that rules can imitate.

    Interrupted, the same command carries on.
    """
    set_threads(threads)
    use_data_dir(data_dir)
    if problem is None:
        raise ValueError("name the problem to tune the teacher for")
    problems = [make_problem(problem), *(make_problem(problem, settings.split()) for settings in also or ())]
    name = "+".join([f"teacher-{folder_name(problem)}", *(re.sub(r"[^\w=,.-]+", "_", text) for text in also or ())])
    folder = prepare_folder(Path("runs") / name if out is None else out)
    with carries_on():
        found = teacher_search.search_teacher(problems, folder, trials=trials, seed=seed)
    console.print(tables.info_table({name: f"{value:.4g}" for name, value in asdict(found).items()}))
    print_written(folder / teacher_search.TEACHER)

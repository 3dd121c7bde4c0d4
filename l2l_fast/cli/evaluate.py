"""``l2l-fast evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from l2l_fast.cli.common import (
    TEACHER_FORMS,
    DataDir,
    ProblemFile,
    ProblemName,
    Settings,
    Threads,
    chosen_problem,
    make_problem,
    print_written,
    set_threads,
    use_data_dir,
)
from l2l_fast.experiments import figures, tables
from l2l_fast.experiments.evaluate import Evaluation, evaluate_rules
from l2l_fast.experiments.machine import machine
from l2l_fast.experiments.output import prepare_folder, write_json
from l2l_fast.experiments.progress import console
from l2l_fast.experiments.teachers import choose_teacher
from l2l_fast.experiments.tuning import STEPS
from l2l_fast.meta import Teacher
from l2l_fast.rule import CoordinatewiseLSTM, as_rule, available_rules

Runs = Annotated[
    int | None,
    typer.Option("--runs", "--functions", min=2, help="Fresh functions to average over.", show_default="by their size"),
]
Retune = Annotated[bool, typer.Option("--retune", help="Tune baselines anew, even where learning rates are known.")]


def evaluate(
    rule: Annotated[
        list[str],
        typer.Option(help="A shipped rule by name, or the path of a .safetensors file; may be repeated."),
    ],
    problem: ProblemName = None,
    problem_file: ProblemFile = None,
    settings: Settings = None,
    runs: Runs = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of every run.")] = STEPS,
    teacher: Annotated[
        str | None, typer.Option(metavar="TEACHER", help=f"Also an optimizer to imitate: {TEACHER_FORMS}.")
    ] = None,
    retune: Retune = False,
    out: Annotated[Path | None, typer.Option(help="Folder for evaluation.json and curves.png.")] = None,
    data_dir: DataDir = None,
    threads: Threads = None,
) -> None:
    """Compare rules with tuned SGD, NAG, RMSprop and Adam on fresh functions."""
    set_threads(threads)
    use_data_dir(data_dir)
    name = chosen_problem(problem, problem_file)
    known_problem = make_problem(name, settings)
    rules = _contenders(rule)
    if teacher is not None:
        rules["teacher"] = choose_teacher(teacher, name)
    folder = None if out is None else prepare_folder(out)
    title = " ".join([name, *(settings or ())])
    result = evaluate_rules(known_problem, rules, name=title, steps=steps, functions=runs, cache=folder, retune=retune)
    print_evaluation(result)
    if folder is not None:
        numbers, picture = folder / "evaluation.json", folder / "curves.png"
        write_json(numbers, {**result.to_dict(), "machine": machine()})
        figures.write_curves(result, picture)
        print_written(numbers, picture)


def _contenders(names: list[str]) -> dict[str, CoordinatewiseLSTM | Teacher]:
    """Rules by what tables and pictures call them."""
    if len(names) == 1:
        return {"shipped" if names[0] in available_rules() else "lstm": as_rule(names[0])}
    return {name: as_rule(name) for name in names}


def print_evaluation(evaluation: Evaluation) -> None:
    console.print(tables.evaluation_table(evaluation))
    if "minibatch" in evaluation.measures:
        console.print(tables.measures_table(evaluation))

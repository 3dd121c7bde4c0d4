"""``l2l-fast train``."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape

from l2l_fast.cli.common import (
    DataDir,
    ProblemFile,
    ProblemName,
    Settings,
    Threads,
    chosen_problem,
    folder_name,
    make_problem,
    print_written,
    set_threads,
    use_data_dir,
)
from l2l_fast.experiments import tables, training
from l2l_fast.experiments.output import prepare_folder
from l2l_fast.experiments.progress import console, errors
from l2l_fast.meta import MetaTrainer, TrainConfig
from l2l_fast.meta import diagnose as diagnose_rule
from l2l_fast.meta.trainer import BEST, CHECKPOINT
from l2l_fast.rule import CoordinatewiseLSTM
from l2l_fast.spec import LogAndSign, RuleSpec


class _Preprocess(str, Enum):
    """What becomes of a gradient before it enters the rule."""

    LOG = "log"
    NONE = "none"


def train(
    problem: ProblemName = None,
    problem_file: ProblemFile = None,
    settings: Settings = None,
    updates: Annotated[int, typer.Option(min=1, help="Meta-updates.")] = TrainConfig.updates,
    lr: Annotated[float, typer.Option(help="Learning rate of the meta-optimizer at the start.")] = TrainConfig.lr,
    batch_size: Annotated[int, typer.Option(help="Functions trained on at once.")] = TrainConfig.batch_size,
    truncation: Annotated[int, typer.Option(help="Steps of a segment.")] = TrainConfig.truncation,
    horizon: Annotated[int, typer.Option(help="Steps of a run.")] = TrainConfig.horizon,
    second_derivatives: Annotated[
        bool, typer.Option("--second-derivatives", help="Differentiate through the gradients as well.")
    ] = False,
    preprocess: Annotated[
        _Preprocess, typer.Option(help="What becomes of a gradient: log and sign, or nothing.")
    ] = _Preprocess.NONE,
    p: Annotated[float, typer.Option("--p", help="Parameter p of the log preprocessing.")] = LogAndSign.p,
    output_scale: Annotated[float, typer.Option(help="Factor on the output of the network.")] = RuleSpec.output_scale,
    hidden_size: Annotated[int, typer.Option(help="Units per layer.")] = RuleSpec.hidden_size,
    seed: Annotated[int, typer.Option(help="Seed of the rule and of the functions trained on.")] = TrainConfig.seed,
    out: Annotated[
        Path | None, typer.Option(help="Folder for rule, checkpoint and log.", show_default="runs/PROBLEM")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Carry on from the checkpoint in the folder.")] = False,
    search: Annotated[
        int | None, typer.Option(min=1, help="First try so many random learning rates, then train with the best.")
    ] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Stop after so many seconds.")] = None,
    diagnose: Annotated[
        bool, typer.Option("--diagnose", help="Say afterwards what the rule does, and what may keep it from learning.")
    ] = False,
    data_dir: DataDir = None,
    threads: Threads = None,
) -> None:
    """Meta-train a rule on a problem. Ctrl-C leaves a checkpoint from which --resume carries on."""
    set_threads(threads)
    use_data_dir(data_dir)
    name = chosen_problem(problem, problem_file)
    known_problem = make_problem(name, settings)
    config = TrainConfig(
        updates=updates,
        lr=lr,
        batch_size=batch_size,
        truncation=truncation,
        horizon=horizon,
        second_derivatives=second_derivatives,
        seed=seed,
        max_seconds=max_seconds,
    )

    def make_rule() -> CoordinatewiseLSTM:
        torch.manual_seed(seed)
        chosen = LogAndSign(p) if preprocess is _Preprocess.LOG else None
        return CoordinatewiseLSTM(hidden_size, chosen, output_scale)

    rule = make_rule()
    folder = prepare_folder(Path("runs") / folder_name(name) if out is None else out)
    if not resume:
        training.check_unused(folder)
    try:
        if search is not None:
            found = training.search_lr(make_rule, known_problem, config, folder, search)
            console.print(tables.search_table(found))
            config = replace(config, lr=found.best_lr)
            resume = resume and (folder / CHECKPOINT).exists()
        result = training.fit(MetaTrainer(rule, known_problem, config, folder=folder), resume=resume)
    except KeyboardInterrupt:
        errors.print(f"\ninterrupted; {escape(_what_is_left(folder))}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    console.print(
        f"{result.updates} updates in {result.seconds:.1f} s; best validation loss {result.best_validation_loss:.4g} "
        f"after {result.best_update} updates",
        highlight=False,
        soft_wrap=True,
    )
    if result.best_update == 0:
        reason = (
            f"training stopped before its first validation, which is due after {config.validate_every} updates"
            if len(result.history) == 1
            else "no validation was better than that before training"
        )
        errors.print(
            f"[bold yellow]warning:[/] {escape(str(folder / BEST))} holds the untrained rule: {reason}",
            highlight=False,
            soft_wrap=True,
        )
    if diagnose:
        best = result.best_rule
        assert isinstance(best, CoordinatewiseLSTM)
        diagnosis = diagnose_rule(
            best,
            known_problem,
            steps=horizon,
            truncation=truncation,
            seed=config.validation_seed,
            second_derivatives=second_derivatives,
        )
        console.print(tables.diagnosis_table(diagnosis))
    print_written(folder / BEST)


def _what_is_left(folder: Path) -> str:
    """What the folder of a training that was interrupted holds, and how to carry on."""
    if (folder / CHECKPOINT).exists():
        return f"{folder} holds a checkpoint: the same command with --resume carries on from it"
    if (folder / training.SEARCH).exists():
        return f"{folder} holds the trials of the search: the same command with --resume carries on with them"
    return "nothing was kept"

"""``l2l-fast train``."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from l2l_fast.backends import NAMES
from l2l_fast.cli.common import (
    TEACHER_FORMS,
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
from l2l_fast.cli.train_settings import (
    DeviceName,
    PreprocessName,
    check_usable,
    chosen_truncation,
    initial_rule,
    parse_loss_weights,
    usable_device,
)
from l2l_fast.experiments import tables, training
from l2l_fast.experiments.output import prepare_folder
from l2l_fast.experiments.progress import console, errors
from l2l_fast.experiments.teachers import choose_teacher
from l2l_fast.meta import MetaTrainer, TrainConfig, TrainResult
from l2l_fast.meta import diagnose as diagnose_rule
from l2l_fast.meta import tensorboard as write_tensorboard
from l2l_fast.meta.distributed import Team, launched, process_group, restarted
from l2l_fast.meta.folder import BEST, CHECKPOINT
from l2l_fast.prepared import fingerprint
from l2l_fast.rule import CoordinatewiseLSTM
from l2l_fast.spec import LogAndSign, RuleSpec


class _Objective(str, Enum):
    """What is summed over the steps of a run."""

    LOSS = "loss"
    LOG = "log"


class _ValidateBy(str, Enum):
    """What a rule is worth."""

    END = "end"
    RUN = "run"


TENSORBOARD = "tensorboard"  # folder in that of the training

_RULE, _RUN, _META, _VALIDATION = "Rule", "Run", "Meta-optimizer", "Validation and files"


def train(
    problem: ProblemName = None,
    problem_file: ProblemFile = None,
    settings: Settings = None,
    init_from: Annotated[
        str | None,
        typer.Option(metavar="RULE", help="Start from a shipped rule or a rule file.", rich_help_panel=_RULE),
    ] = None,
    preprocess: Annotated[
        PreprocessName | None,
        typer.Option(
            help="What becomes of a gradient: log and sign, or nothing.",
            show_default="log; none for quadratic",
            rich_help_panel=_RULE,
        ),
    ] = None,
    p: Annotated[
        float | None,
        typer.Option(
            "--p", help="Parameter p of the log preprocessing.", show_default=f"{LogAndSign.p:g}", rich_help_panel=_RULE
        ),
    ] = None,
    output_scale: Annotated[
        float | None,
        typer.Option(
            help="Factor on the output of the network.",
            show_default=f"{RuleSpec.output_scale:g}",
            rich_help_panel=_RULE,
        ),
    ] = None,
    hidden_size: Annotated[
        int | None,
        typer.Option(help="Units per layer.", show_default=str(RuleSpec.hidden_size), rich_help_panel=_RULE),
    ] = None,
    horizon: Annotated[int, typer.Option(help="Steps of a run.", rich_help_panel=_RUN)] = TrainConfig.horizon,
    truncation: Annotated[
        int | None,
        typer.Option(
            help="Steps of a segment, each of which gives an update; 20 in the paper.",
            show_default=f"{TrainConfig.truncation}; whole runs with --teacher",
            rich_help_panel=_RUN,
        ),
    ] = None,
    untruncated: Annotated[
        bool,
        typer.Option(
            "--untruncated",
            help="Segments as long as a run; with --second-derivatives, for a second training.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Functions trained on at once.",
            show_default="16, or what has 4096 coordinates",
            rich_help_panel=_RUN,
        ),
    ] = None,
    shards: Annotated[
        int,
        typer.Option(
            help="Batches of them that an update averages; the processes of torchrun share them.", rich_help_panel=_RUN
        ),
    ] = TrainConfig.shards,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="TEACHER",
            help=f"Learn to take the steps of an optimizer, as a warm start: {TEACHER_FORMS}.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    objective: Annotated[
        _Objective, typer.Option(help="Train on losses or on their logarithms.", rich_help_panel=_RUN)
    ] = _Objective.LOSS,
    loss_power: Annotated[
        float, typer.Option(help="Weigh step t of T by (t/T) to this power.", rich_help_panel=_RUN)
    ] = TrainConfig.loss_power,
    loss_weights: Annotated[
        str | None,
        typer.Option(
            metavar="W[:COUNT],...",
            help="Weights of the points of a run, its start and end included: 0:100,1 is the last of 101 alone.",
            show_default="1 for each",
            rich_help_panel=_RUN,
        ),
    ] = None,
    second_derivatives: Annotated[
        bool,
        typer.Option("--second-derivatives", help="Differentiate through the gradients as well.", rich_help_panel=_RUN),
    ] = False,
    slope_floor: Annotated[
        float,
        typer.Option(
            help="Bound on the slope of the preprocessing in second derivatives; 0.1 for networks.",
            rich_help_panel=_RUN,
        ),
    ] = TrainConfig.slope_floor,
    coordinate_fraction: Annotated[
        float,
        typer.Option(help="Share of the coordinates that enter a meta-gradient, chosen anew.", rich_help_panel=_RUN),
    ] = TrainConfig.coordinate_fraction,
    mirrored: Annotated[
        float,
        typer.Option(
            help="Share of the updates, at the beginning, with runs in which half of the coordinates point the other "
            "way: keeps a fresh rule from saturating networks.",
            rich_help_panel=_RUN,
        ),
    ] = TrainConfig.mirrored,
    updates: Annotated[int, typer.Option(min=1, help="Meta-updates.", rich_help_panel=_META)] = TrainConfig.updates,
    lr: Annotated[float, typer.Option(help="Learning rate.", rich_help_panel=_META)] = TrainConfig.lr,
    hold: Annotated[
        float, typer.Option(help="Share of the updates before it falls.", rich_help_panel=_META)
    ] = TrainConfig.hold,
    final_lr_fraction: Annotated[
        float, typer.Option(help="What is left of the learning rate at the end.", rich_help_panel=_META)
    ] = TrainConfig.final_lr_fraction,
    warmup: Annotated[
        int, typer.Option(help="Updates over which the learning rate rises to that.", rich_help_panel=_META)
    ] = TrainConfig.warmup,
    clip: Annotated[
        float | None,
        typer.Option(help="Greatest norm of a meta-gradient; 0 for any.", show_default="0", rich_help_panel=_META),
    ] = TrainConfig.clip,
    clip_ratio: Annotated[
        float,
        typer.Option(help="Greatest norm relative to the mean of those before; 0 for any.", rich_help_panel=_META),
    ] = TrainConfig.clip_ratio or 0,
    average: Annotated[
        float,
        typer.Option(
            help="Validate and keep an average of the weights, with this decay; 0 for the weights themselves.",
            rich_help_panel=_META,
        ),
    ] = TrainConfig.average or 0,
    search: Annotated[
        int | None,
        typer.Option(
            min=1, help="First try so many random learning rates, then train with the best.", rich_help_panel=_META
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Learning rates to try at a time.", rich_help_panel=_META)] = 1,
    validate_every: Annotated[
        int, typer.Option(help="Updates between validations.", rich_help_panel=_VALIDATION)
    ] = TrainConfig.validate_every,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many validations without a new best.", show_default="never", rich_help_panel=_VALIDATION
        ),
    ] = None,
    validation_functions: Annotated[
        int | None,
        typer.Option(
            help="Functions to validate on.",
            show_default="1024, or what has 262144 coordinates",
            rich_help_panel=_VALIDATION,
        ),
    ] = None,
    validation_seed: Annotated[
        int, typer.Option(help="Seed of the functions to validate on.", rich_help_panel=_VALIDATION)
    ] = TrainConfig.validation_seed,
    validate_by: Annotated[
        _ValidateBy,
        typer.Option(help="Judge a rule by the end of a run, or by all of it.", rich_help_panel=_VALIDATION),
    ] = _ValidateBy.END,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            help="Updates between checkpoints.", show_default="at each validation", rich_help_panel=_VALIDATION
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for rule, checkpoint and log.", show_default="runs/PROBLEM", rich_help_panel=_VALIDATION
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Carry on from the checkpoint in the folder, with the same options.",
            rich_help_panel=_VALIDATION,
        ),
    ] = False,
    max_seconds: Annotated[
        float | None, typer.Option(help="Stop after so many seconds.", rich_help_panel=_VALIDATION)
    ] = None,
    tensorboard: Annotated[
        bool,
        typer.Option(
            "--tensorboard",
            help=f"Write curves for TensorBoard to {TENSORBOARD} in that folder.",
            rich_help_panel=_VALIDATION,
        ),
    ] = False,
    diagnose: Annotated[
        bool,
        typer.Option(
            "--diagnose",
            help="Say afterwards what the rule does, and what may keep it from learning.",
            rich_help_panel=_VALIDATION,
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the rule and of the functions trained on.")] = TrainConfig.seed,
    device: Annotated[DeviceName, typer.Option(help="Where to train.")] = DeviceName.CPU,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar=f"[{'|'.join(NAMES)}]", help="What computes the rule.", show_default="the fastest that works"
        ),
    ] = None,
    cuda_graph: Annotated[
        bool,
        typer.Option("--cuda-graph", help="Replay the steps of a run as a CUDA graph: for small networks on a GPU."),
    ] = False,
    data_dir: DataDir = None,
    threads: Threads = None,
) -> None:
    """Meta-train a rule on a problem. Ctrl-C leaves a checkpoint from which --resume carries on.

    torchrun --nproc-per-node 2 -m l2l_fast train PROBLEM --shards 2 trains in two processes.
    """
    set_threads(threads)
    use_data_dir(data_dir)
    if untruncated and truncation is not None:
        raise ValueError("--untruncated and --truncation are two ways to say the same; give one of them")
    config = TrainConfig(
        updates=updates,
        horizon=horizon,
        truncation=chosen_truncation(truncation, horizon, whole_runs=untruncated or teacher is not None),
        batch_size=batch_size,
        shards=shards,
        mirrored=mirrored,
        lr=lr,
        hold=hold,
        final_lr_fraction=final_lr_fraction,
        warmup=warmup,
        clip=clip or None,
        clip_ratio=clip_ratio or None,
        average=average or None,
        objective=objective.value,
        second_derivatives=second_derivatives,
        slope_floor=slope_floor,
        coordinate_fraction=coordinate_fraction,
        loss_weights=None if loss_weights is None else parse_loss_weights(loss_weights, horizon),
        loss_power=loss_power,
        validate_every=validate_every,
        patience=patience,
        validation_functions=validation_functions,
        validation_seed=validation_seed,
        validate_by=validate_by.value,
        checkpoint_every=checkpoint_every,
        seed=seed,
        max_seconds=max_seconds,
        backend=backend,
        cuda_graph=cuda_graph,
    )
    if search is not None and launched():
        raise ValueError(
            "--search makes trials in processes of its own (--jobs), not in those of torchrun; search first, then "
            "train with the --lr that was found"
        )
    place = usable_device(device)
    name = chosen_problem(problem, problem_file)
    known_problem = make_problem(name, settings)
    known_teacher = None if teacher is None else choose_teacher(teacher, name)

    if preprocess is None and init_from is None:
        preprocess = PreprocessName.NONE if name == "quadratic" else PreprocessName.LOG

    def make_rule() -> CoordinatewiseLSTM:
        return initial_rule(init_from, preprocess, p, output_scale, hidden_size, seed).to(place)

    first_rule = make_rule()
    starts_from = None if init_from is None else fingerprint(first_rule)
    check_usable(first_rule, known_problem, config, known_teacher)  # before there is a folder
    path = Path("runs") / folder_name(name) if out is None else out
    write_curves = write_tensorboard(path / TENSORBOARD) if tensorboard else None
    folder = prepare_folder(path)
    with process_group(place) as place:
        team = Team(place)
        console.quiet = not team.leads
        if not (resume or restarted()):
            team.from_leader(lambda: training.check_unused(folder))
        try:
            if search is not None:
                remake = partial(make_problem, name, settings)
                found = training.search_lr(
                    known_problem, make_rule, config, folder, search, jobs, remake, known_teacher, starts_from
                )
                console.print(tables.search_table(found))
                config = replace(config, lr=found.best_lr)
                resume = resume and (folder / CHECKPOINT).exists()
            trainer = MetaTrainer(
                make_rule(), known_problem, config, teacher=known_teacher, folder=folder, starts_from=starts_from
            )
            result = training.fit(trainer, resume=resume, on_update=write_curves)
        except KeyboardInterrupt:
            if team.leads:
                errors.print(f"\ninterrupted; {escape(_what_is_left(folder))}", highlight=False, soft_wrap=True)
            raise typer.Exit(130) from None
    if not team.leads:
        return
    _report(result, config, folder)
    if diagnose:
        best = result.best_rule
        assert isinstance(best, CoordinatewiseLSTM)
        diagnosis = diagnose_rule(
            best,
            known_problem,
            steps=config.horizon,
            truncation=config.truncation,
            seed=config.validation_seed,
            second_derivatives=config.second_derivatives,
            slope_floor=config.slope_floor,
            objective=config.objective,
            loss_weights=config.weights_between(0, config.horizon),
        )
        console.print(tables.diagnosis_table(diagnosis))
    print_written(folder / BEST)


def _report(result: TrainResult, config: TrainConfig, folder: Path) -> None:
    console.print(
        f"{result.updates} updates in {result.seconds:.1f} s; best validation loss {result.best_validation_loss:.4g} "
        f"after {result.best_update} updates",
        highlight=False,
        soft_wrap=True,
    )
    if result.best_update:
        return
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


def _what_is_left(folder: Path) -> str:
    """What the folder of a training that was interrupted holds, and how to carry on."""
    if (folder / CHECKPOINT).exists():
        return f"{folder} holds a checkpoint: the same command with --resume carries on from it"
    if (folder / training.SEARCH).exists():
        return f"{folder} holds the trials of the search: the same command with --resume carries on with them"
    return "nothing was kept"

"""The subcommands of ``l2l-fast``."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from typer.core import TyperGroup

from l2l_fast.backends import backends
from l2l_fast.experiments import cost_model, figures, numerics, speed, tables, training
from l2l_fast.experiments import demo as demonstration
from l2l_fast.experiments import kernels as kernel_analysis
from l2l_fast.experiments.evaluate import FUNCTIONS, STEPS, Evaluation, evaluate_rules
from l2l_fast.experiments.machine import instruction_sets, machine
from l2l_fast.experiments.output import prepare_folder, write_json
from l2l_fast.experiments.progress import console, errors
from l2l_fast.meta import MetaTrainer, TrainConfig
from l2l_fast.meta import diagnose as diagnose_rule
from l2l_fast.meta.trainer import BEST, CHECKPOINT
from l2l_fast.problems import PROBLEMS, Problem
from l2l_fast.rule import CoordinatewiseLSTM, as_rule, available_rules
from l2l_fast.spec import LogAndSign, RuleSpec

logger = logging.getLogger("l2l_fast")


class _Commands(TyperGroup):
    """Ends expected errors as one line and exit code 2, Ctrl-C with exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            errors.print("\ninterrupted")
            raise typer.Exit(130) from None
        except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
            logger.debug("the command failed", exc_info=True)
            message = " ".join(str(error).split()) or type(error).__name__
            errors.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Commands,
    help="Learned optimizers: meta-train, evaluate and measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ProblemName = Annotated[str, typer.Argument(metavar="PROBLEM", help=f"One of: {', '.join(PROBLEMS)}.")]
Rule = Annotated[str, typer.Option(help="A shipped rule by name, or the path of a .safetensors file.")]
Functions = Annotated[int, typer.Option(min=2, help="Fresh functions to average over.")]
Steps = Annotated[int, typer.Option(min=1, help="Steps of every run.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads to compute on; torch's choice by default.")]


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _problem(name: str) -> Problem:
    if name not in PROBLEMS:
        raise ValueError(f"unknown problem {name!r}; known problems: {', '.join(map(repr, PROBLEMS))}")
    return PROBLEMS[name]()


def _print_written(*paths: Path) -> None:
    for path in paths:
        console.print(f"wrote {escape(str(path))}", highlight=False, soft_wrap=True)


@app.command()
def info() -> None:
    """Versions, processor, backends and shipped rules."""
    facts = machine()
    sets = instruction_sets()
    console.print(
        tables.info_table(
            {
                **{name: facts[name] or "not installed" for name in ("l2l_fast", "python", "torch", "numpy", "triton")},
                "platform": facts["platform"],
                "cpu": f"{facts['cpu']}, {facts['cores']} cores",
                "instruction set": f"{facts['instruction_set']} (of {', '.join(sets)})" if sets else "none",
                "threads": str(facts["threads"]),
                "cuda device": facts["cuda_device"] or "none",
                **{f"backend {name}": reason or "works" for name, reason in backends().items()},
                "shipped rules": ", ".join(available_rules()) or "none",
            }
        )
    )


class _Preprocess(str, Enum):
    """What becomes of a gradient before it enters the rule."""

    LOG = "log"
    NONE = "none"


@app.command()
def train(
    problem: ProblemName,
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
    threads: Threads = None,
) -> None:
    """Meta-train a rule on a problem. Ctrl-C leaves a checkpoint from which --resume carries on."""
    _set_threads(threads)
    known_problem = _problem(problem)
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
    folder = prepare_folder(Path("runs") / problem if out is None else out)
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
    _print_written(folder / BEST)


def _what_is_left(folder: Path) -> str:
    """What the folder of a training that was interrupted holds, and how to carry on."""
    if (folder / CHECKPOINT).exists():
        return f"{folder} holds a checkpoint: the same command with --resume carries on from it"
    if (folder / training.SEARCH).exists():
        return f"{folder} holds the trials of the search: the same command with --resume carries on with them"
    return "nothing was kept"


def _evaluate(problem: str, rule: str, functions: int, steps: int, cache: Path | None) -> Evaluation:
    name = "shipped" if rule in available_rules() else "lstm"
    known_problem = _problem(problem)
    return evaluate_rules(
        known_problem, {name: as_rule(rule)}, name=problem, functions=functions, steps=steps, cache=cache
    )


@app.command()
def evaluate(
    problem: ProblemName,
    rule: Rule,
    functions: Functions = FUNCTIONS,
    steps: Steps = STEPS,
    out: Annotated[Path | None, typer.Option(help="Folder for evaluation.json and curves.png.")] = None,
    threads: Threads = None,
) -> None:
    """Compare a rule with tuned SGD, NAG, RMSprop and Adam on fresh functions."""
    _set_threads(threads)
    folder = None if out is None else prepare_folder(out)
    result = _evaluate(problem, rule, functions, steps, folder)
    console.print(tables.evaluation_table(result))
    if folder is not None:
        numbers, picture = folder / "evaluation.json", folder / "curves.png"
        write_json(numbers, {**result.to_dict(), "machine": machine()})
        figures.write_curves(result, picture)
        _print_written(numbers, picture)


class _Figure(str, Enum):
    """Figures of the paper that can be drawn."""

    FOUR = "4"


@app.command()
def figure(
    number: Annotated[_Figure, typer.Argument(metavar="N", help="Figure of the paper; known: 4 (left panel).")],
    rule: Rule = "quadratic",
    functions: Functions = FUNCTIONS,
    out: Annotated[Path, typer.Option(help="Folder for picture, curves and numbers.")] = Path("runs/figures"),
    threads: Threads = None,
) -> None:
    """Draw a figure of the paper, with its curves as CSV and its numbers as JSON."""
    _set_threads(threads)
    folder = prepare_folder(out)
    result = _evaluate("quadratic", rule, functions, STEPS, folder)
    console.print(tables.evaluation_table(result))
    _print_written(*figures.figure_4(result, folder))


def _no_fused_backend() -> str:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in numerics.fused_backends().items())
    return f"no fused backend works here, so there is nothing to compare ({reasons})"


@app.command(name="numerics")
def numerics_(
    coordinates: Annotated[int, typer.Option(min=1, help="Coordinates.")] = numerics.COORDINATES,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the unroll.")] = numerics.STEPS,
    threads: Threads = None,
) -> None:
    """Errors of every fused backend against float64, beside those of float32 PyTorch."""
    _set_threads(threads)
    comparisons = numerics.compare_all(coordinates=coordinates, steps=steps)
    if not comparisons:
        raise RuntimeError(_no_fused_backend())
    for comparison in comparisons:
        console.print(tables.numerics_table(comparison))


@app.command()
def bench(
    coordinates: Annotated[int, typer.Option(min=1, help="Coordinates of the forward.")] = speed.FORWARD_COORDINATES,
    threads: Threads = None,
) -> None:
    """Time per coordinate of every fused backend of the CPU, beside that of PyTorch."""
    _set_threads(threads)
    console.print(tables.timing_table(speed.measure(RuleSpec(), coordinates)))
    for name, reason in speed.cpu_backends().items():
        if reason is not None:
            console.print(f"backend {name} was not timed: {escape(reason)}", highlight=False, soft_wrap=True)


class _Architecture(str, Enum):
    """NVIDIA architectures by compute capability."""

    AMPERE = "80"
    HOPPER = "90"
    BLACKWELL = "120"
    ALL = "all"


@app.command()
def kernels(
    arch: Annotated[_Architecture, typer.Option(help="Compute capability to compile for.")] = _Architecture.HOPPER,
    json: Annotated[Path | None, typer.Option(dir_okay=False, help="File for all numbers.")] = None,
) -> None:
    """Compile the Triton kernels (no GPU needed), and show what they occupy and the time predicted for them."""
    if json is not None:
        prepare_folder(json.parent)
    capabilities = list(cost_model.ARCHITECTURES) if arch is _Architecture.ALL else [int(arch.value)]
    analyses = kernel_analysis.analyse_all(capabilities)
    for capability in capabilities:
        compiled = [analysis for analysis in analyses if analysis.capability == capability]
        console.print(tables.kernel_resources_table(compiled))
        console.print(tables.kernel_costs_table(compiled))
    if json is not None:
        model = cost_model.model()
        write_json(json, {"kernels": [asdict(one) for one in analyses], "model": model, "machine": machine()})
        _print_written(json)


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the rule, the picture and the results; those in it are replaced.")
    ] = Path("runs/demo"),
    threads: Threads = None,
) -> None:
    """Meta-train a rule before your eyes, then race it against tuned optimizers."""
    _set_threads(threads)
    demonstration.demo(out)

"""The subcommands of ``l2l-fast``."""

from __future__ import annotations

import logging
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from l2l_fast.backends import backends
from l2l_fast.cli.common import Threads, print_written, set_threads
from l2l_fast.cli.evaluate import evaluate
from l2l_fast.cli.figure import figure
from l2l_fast.cli.reproduce import reproduce, tune_teacher
from l2l_fast.cli.train import train
from l2l_fast.experiments import cost_model, numerics, precision, speed, state_losses, tables
from l2l_fast.experiments import demo as demonstration
from l2l_fast.experiments import kernels as kernel_analysis
from l2l_fast.experiments.machine import instruction_sets, machine
from l2l_fast.experiments.output import prepare_folder, write_json
from l2l_fast.experiments.progress import console, errors
from l2l_fast.rule import available_rules
from l2l_fast.spec import RuleSpec

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
        except (TypeError, ValueError, OSError, RuntimeError, FloatingPointError, ImportError) as error:
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

for command in (train, evaluate, figure, reproduce, tune_teacher):
    app.command()(command)


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
    set_threads(threads)
    comparisons = numerics.compare_all(coordinates=coordinates, steps=steps)
    if not comparisons:
        raise RuntimeError(_no_fused_backend())
    for comparison in comparisons:
        console.print(tables.numerics_table(comparison))


@app.command(name="precision")
def precision_(
    coordinates: Annotated[int, typer.Option(min=precision.TILE, help="Coordinates.")] = precision.COORDINATES,
    steps: Annotated[int, typer.Option(min=1, help="Steps.")] = precision.STEPS,
    json: Annotated[Path | None, typer.Option(dir_okay=False, help="File for all numbers.")] = None,
    threads: Threads = None,
) -> None:
    """What a state stored in fewer bits does: how far parameters drift, and what loss shipped rules reach."""
    if json is not None:
        prepare_folder(json.parent)
    set_threads(threads)
    drifts = precision.measure(coordinates=coordinates, steps=steps)
    for rule in dict.fromkeys(drift.rule for drift in drifts):
        console.print(tables.precision_table([drift for drift in drifts if drift.rule == rule]))
    losses = state_losses.measure()
    console.print(tables.state_losses_table(losses))
    if json is not None:
        measured = {"drifts": [asdict(drift) for drift in drifts], "losses": [asdict(loss) for loss in losses]}
        write_json(json, {**measured, "coordinates": coordinates, "steps": steps, "machine": machine()})
        print_written(json)


@app.command()
def bench(
    coordinates: Annotated[int, typer.Option(min=1, help="Coordinates of the forward.")] = speed.FORWARD_COORDINATES,
    threads: Threads = None,
) -> None:
    """Time per coordinate of every fused backend of the CPU, beside that of PyTorch."""
    set_threads(threads)
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
        print_written(json)


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the rule, the picture and the results; those in it are replaced.")
    ] = Path("runs/demo"),
    threads: Threads = None,
) -> None:
    """Meta-train a rule before your eyes, then race it against tuned optimizers."""
    set_threads(threads)
    demonstration.demo(out)

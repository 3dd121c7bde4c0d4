"""What all figures have in common, and learning curves."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from l2l_fast.experiments.evaluate import Evaluation
from l2l_fast.experiments.machine import machine
from l2l_fast.experiments.output import write_bytes, write_csv, write_json

LABELS = {
    "lstm": "LSTM",
    "shipped": "LSTM, shipped",
    "sgd": "SGD",
    "nag": "NAG",
    "rmsprop": "RMSprop",
    "adam": "Adam",
}

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = {
    "lstm": "#000000",
    "shipped": "#D55E00",
    "sgd": "#999999",
    "nag": "#0072B2",
    "rmsprop": "#009E73",
    "adam": "#CC79A7",
}
_OTHER_COLOURS = ("#56B4E9", "#E69F00", "#882255")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes) -> None:
    """A faint grid, and no frame on the right and on top."""
    axes.grid(which="major", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers on it, several in a decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_curves(axes: Axes, evaluation: Evaluation, *, first: int = 0) -> None:
    """Mean learning curves on a log axis: learned rules solid, baselines dashed, one standard error shaded.

    The legend gives the final losses.

    Args:
        first: step that the axis starts at.
    """
    spare = iter(_OTHER_COLOURS * len(evaluation.learned))
    steps = range(first, evaluation.steps + 1)
    # Drawn from worst to best, so that the legend is in the order in which the curves end.
    for name, run in sorted(evaluation.runs.items(), key=lambda item: -item[1].final_loss):
        learned = name in evaluation.learned
        mean, error = (values[first:].numpy() for values in (run.mean, run.standard_error))
        colour = COLOURS.get(name) or next(spare)
        axes.plot(
            steps,
            mean,
            color=colour,
            linestyle="-" if learned else "--",
            linewidth=2.2 if learned else 1.5,
            zorder=3 if learned else 2,
            label=f"{LABELS.get(name, name)}  ({run.final_loss:.3g})",
        )
        # A lower bound of 0 can't be drawn on a log axis.
        axes.fill_between(steps, (mean - error).clip(mean * 1e-3), mean + error, color=colour, alpha=0.18, linewidth=0)
    log_scale(axes)
    axes.set_xlim(first, evaluation.steps)
    axes.set_xlabel("step")
    axes.set_ylabel("mean loss")
    style(axes)
    if first:  # curves under way fill their panel: room for the legend above them
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.4)
    legend = f"(mean loss at step {evaluation.steps})"
    axes.legend(loc="upper right" if first else "best", title=legend, frameon=False, fontsize=9, title_fontsize=9)


def curves_figure(evaluation: Evaluation) -> Figure:
    """One panel of :func:`draw_curves`."""
    figure = new_figure(6.4, 4.6)
    axes = figure.subplots()
    draw_curves(axes, evaluation)
    axes.set_title(f"{evaluation.problem}: mean over {evaluation.functions} fresh functions", fontsize=11)
    return figure


def write_picture(figure: Figure, path: Path) -> None:
    """Draw ``figure`` into the PNG file ``path``, atomically.

    Raises:
        OSError: if it can't be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    write_bytes(path, buffer.getvalue())


def write_curves(evaluation: Evaluation, path: Path) -> None:
    """:func:`write_picture` of :func:`curves_figure`."""
    write_picture(curves_figure(evaluation), path)


def write_figure(
    folder: Path,
    name: str,
    figure: Figure,
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    numbers: Mapping[str, Any],
) -> list[Path]:
    """A figure as picture, table and numbers: ``figure-<name>.png``, ``.csv`` and ``.json``.

    Returns:
        The files written; files of those names are replaced.

    Raises:
        OSError: if they can't be written.
    """
    picture, table, summary = (folder / f"figure-{name}{suffix}" for suffix in (".png", ".csv", ".json"))
    write_picture(figure, picture)
    write_csv(table, header, rows)
    write_json(summary, {**numbers, "machine": machine()})
    return [picture, table, summary]

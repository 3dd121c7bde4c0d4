"""The figures of Andrychowicz et al. 2016."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from l2l_fast.experiments.evaluate import Evaluation, Run
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
_COLOURS = {
    "lstm": "#000000",
    "shipped": "#D55E00",
    "sgd": "#999999",
    "nag": "#0072B2",
    "rmsprop": "#009E73",
    "adam": "#CC79A7",
}
_OTHER_COLOURS = ("#56B4E9", "#E69F00", "#882255")


def curves_figure(evaluation: Evaluation) -> Figure:
    """Mean learning curves on a log axis: learned rules solid, baselines dashed, one standard error shaded."""
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    spare = iter(_OTHER_COLOURS * len(evaluation.learned))
    # Drawn from worst to best, so that the legend is in the order in which the curves end.
    for name, run in sorted(evaluation.runs.items(), key=lambda item: -item[1].final_loss):
        learned = name in evaluation.learned
        mean, error = run.mean.numpy(), run.standard_error.numpy()
        colour = _COLOURS.get(name) or next(spare)
        steps = range(len(mean))
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
    axes.set_yscale("log")
    axes.set_xlim(0, evaluation.steps)
    axes.set_xlabel("step")
    axes.set_ylabel("mean loss")
    axes.set_title(f"{evaluation.problem}: mean over {evaluation.functions} fresh functions", fontsize=11)
    axes.grid(which="major", color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title=f"(mean loss at step {evaluation.steps})", frameon=False, fontsize=9, title_fontsize=9)
    return figure


def write_curves(evaluation: Evaluation, path: Path) -> None:
    """Draw :func:`curves_figure` into the PNG file ``path``, atomically.

    Raises:
        OSError: if it can't be written.
    """
    buffer = io.BytesIO()
    curves_figure(evaluation).savefig(buffer, format="png", dpi=160)
    write_bytes(path, buffer.getvalue())


def figure_4(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Left panel of figure 4, as picture, curves and numbers: ``figure-4.png``, ``.csv`` and ``.json``.

    Returns:
        The files written; files of those names are replaced.

    Raises:
        OSError: if they can't be written.

    Source: Andrychowicz et al. 2016, figure 4.
    """
    picture, curves, numbers = (folder / f"figure-4{suffix}" for suffix in (".png", ".csv", ".json"))
    write_curves(evaluation, picture)
    write_csv(curves, ["step", *_columns(evaluation.runs)], _rows(evaluation.runs))
    write_json(numbers, {**evaluation.to_dict(), "machine": machine()})
    return [picture, curves, numbers]


def _columns(runs: dict[str, Run]) -> list[str]:
    return [column for name in runs for column in (f"{name}_mean", f"{name}_standard_error")]


def _rows(runs: dict[str, Run]) -> list[list[float]]:
    columns = [column.tolist() for run in runs.values() for column in (run.mean, run.standard_error)]
    return [[step, *values] for step, values in enumerate(zip(*columns, strict=True))]

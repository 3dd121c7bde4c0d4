"""Figures 4, 5 and 6 of Andrychowicz et al. 2016: a rule trained on one small network, there and on other networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from l2l_fast.experiments.evaluate import Evaluation, evaluate, evaluate_rules
from l2l_fast.experiments.figures import COLOURS, LABELS, draw_curves, log_scale, new_figure, style, write_figure
from l2l_fast.experiments.tuning import STEPS
from l2l_fast.problems import ImageClassifier, Problem, Quadratic
from l2l_fast.rule import CoordinatewiseLSTM

LAYERS = (1, 2)
WIDTHS = (5, 10, 20, 40, 80)

Architecture = tuple[int, int]  # hidden layers and the units of each


@dataclass(frozen=True)
class Comparison:
    """How rules are compared with baselines, the same way for all parts of a figure.

    Attributes:
        rules: learned rules by name.
        runs: functions to compare on; ``None`` takes what suits their size.
        cache, retune: as for :func:`l2l_fast.experiments.tuning.tune_baselines`.
        steps: of a run.
    """

    rules: Mapping[str, CoordinatewiseLSTM]
    runs: int | None = None
    cache: Path | None = None
    retune: bool = False
    steps: int = STEPS

    def on(self, problem: Problem, name: str) -> Evaluation:
        """On ``problem``, with ``name`` as title and baselines tuned for it."""
        return evaluate_rules(
            problem,
            self.rules,
            name=name,
            steps=self.steps,
            functions=self.runs,
            cache=self.cache,
            retune=self.retune,
        )


@dataclass(frozen=True)
class Panel:
    """Learning curves of one evaluation.

    Attributes:
        evaluation: whose problem is the title.
        first: step that the panel starts at.
    """

    evaluation: Evaluation
    first: int = 0


def quadratic_panels(comparison: Comparison) -> dict[str, Panel]:
    """Left panel of figure 4."""
    return {"quadratic": Panel(comparison.on(Quadratic(), "Quadratics"))}


def network_panels(comparison: Comparison, network: ImageClassifier) -> dict[str, Panel]:
    """Middle and right panel of figure 4: the network that the rule was trained on, and the same runs carried on."""
    name = network.dataset.upper()
    first = comparison.on(network, name)
    tuned = {baseline: run.tuned for baseline, run in first.baselines.items() if run.tuned is not None}
    carried_on = evaluate(
        network,
        comparison.rules,
        tuned,
        name=f"{name}, carried on",
        steps=2 * comparison.steps,
        functions=first.functions,
    )
    return {"network": Panel(first), "carried_on": Panel(carried_on, comparison.steps)}


def tuned_for_longer(comparison: Comparison, network: ImageClassifier, carried_on: Evaluation) -> Evaluation:
    """``carried_on`` with baselines tuned for its steps, which is more than the rule was trained for."""
    name = f"{network.dataset.upper()}, baselines tuned for {carried_on.steps} steps"
    baselines = replace(comparison, rules={}, steps=carried_on.steps).on(network, name).baselines
    return replace(carried_on, problem=name, baselines=baselines)


def transfer_panels(comparison: Comparison, network: ImageClassifier) -> dict[str, Panel]:
    """Figure 5: other networks than that which the rule was trained on, with baselines tuned for each."""
    (width,) = network.hidden
    variants = {
        "wider": (f"{2 * width} hidden units", replace(network, hidden=(2 * width,))),
        "deeper": ("2 hidden layers", replace(network, hidden=(width, width))),
        "relu": ("ReLU", replace(network, activation="relu")),
    }
    return {
        key: Panel(comparison.on(variant, f"{network.dataset.upper()}, {title}"))
        for key, (title, variant) in variants.items()
    }


def architecture_evaluations(
    comparison: Comparison, network: ImageClassifier, layers: Sequence[int] = LAYERS, widths: Sequence[int] = WIDTHS
) -> dict[Architecture, Evaluation]:
    """Figure 6: networks of every number of layers and units, with baselines tuned for each."""
    return {
        (depth, width): comparison.on(
            replace(network, hidden=(width,) * depth),
            f"{network.dataset.upper()}, {_layers(depth)} of {width} units",
        )
        for depth in layers
        for width in widths
    }


def write_curves_figure(
    folder: Path, number: str, panels: Mapping[str, Panel], others: Mapping[str, Evaluation] | None = None
) -> list[Path]:
    """Figure 4 or 5: panels side by side, their curves and numbers.

    Args:
        others: evaluations for the numbers only, by name.

    Returns:
        The files written.

    Raises:
        OSError: if they can't be written.

    Source: Andrychowicz et al. 2016, figures 4 and 5.
    """
    rows = [
        [key, name, step, mean, error]
        for key, panel in panels.items()
        for name, run in panel.evaluation.runs.items()
        for step, (mean, error) in enumerate(zip(run.mean.tolist(), run.standard_error.tolist(), strict=True))
    ]
    evaluations = {key: panel.evaluation for key, panel in panels.items()} | dict(others or {})
    return write_figure(
        folder,
        number,
        curves_figure(list(panels.values())),
        ["panel", "optimizer", "step", "mean", "standard_error"],
        rows,
        {"panels": {key: evaluation.to_dict() for key, evaluation in evaluations.items()}},
    )


def curves_figure(panels: Sequence[Panel]) -> Figure:
    """Panels side by side, each with a y axis of its own."""
    figure = new_figure(4.9 * len(panels) + 0.6, 4.4)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw_curves(axes, panel.evaluation, first=panel.first)
        axes.set_title(f"{panel.evaluation.problem}  (mean of {panel.evaluation.functions})", fontsize=11)
    return figure


def write_architectures_figure(
    folder: Path, evaluations: Mapping[Architecture, Evaluation], trained_on: Architecture
) -> list[Path]:
    """Figure 6: final losses by architecture.

    Args:
        trained_on: what the rule was trained on.

    Returns:
        The files written.

    Raises:
        OSError: if they can't be written.

    Source: Andrychowicz et al. 2016, figure 6.
    """
    rows: list[list[Any]] = []
    for (layers, width), evaluation in evaluations.items():
        for name, run in evaluation.runs.items():
            lr = "" if run.tuned is None else run.tuned.lr
            rows.append([layers, width, name, run.final_loss, run.final_standard_error, lr])
    return write_figure(
        folder,
        "6",
        architectures_figure(evaluations, trained_on),
        ["layers", "width", "optimizer", "final_loss", "standard_error", "lr"],
        rows,
        {
            "architectures": [
                {"layers": layers, "width": width, **evaluation.to_dict()}
                for (layers, width), evaluation in evaluations.items()
            ]
        },
    )


def architectures_figure(evaluations: Mapping[Architecture, Evaluation], trained_on: Architecture) -> Figure:
    """Final loss over the units of a layer, with standard errors; a panel for each number of layers.

    Dashed: the architecture that the rule was trained on, and the loss that it reaches there.
    """
    depths = sorted({layers for layers, _ in evaluations})
    figure = new_figure(4.9 * len(depths) + 0.6, 4.4)
    panels = figure.subplots(1, len(depths), sharey=True, squeeze=False)[0]
    for axes, depth in zip(panels, depths, strict=True):
        widths = sorted(width for layers, width in evaluations if layers == depth)
        for name in evaluations[depth, widths[0]].runs:
            learned = name in evaluations[depth, widths[0]].learned
            runs = [evaluations[depth, width].runs[name] for width in widths]
            axes.errorbar(
                widths,
                [run.final_loss for run in runs],
                [run.final_standard_error for run in runs],
                color=COLOURS[name],
                linestyle="-" if learned else "--",
                linewidth=2.2 if learned else 1.5,
                zorder=3 if learned else 2,
                marker="o",
                markersize=4,
                capsize=2.5,
                label=LABELS[name],
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(widths, list(map(str, widths)))
        axes.set_xlabel("hidden units per layer")
        axes.set_title(_layers(depth), fontsize=11)
        log_scale(axes)
        style(axes)
        axes.tick_params(labelleft=True)
    _mark_training(panels, depths, evaluations, trained_on)
    some = next(iter(evaluations.values()))
    panels[0].set_ylabel(f"mean loss at step {some.steps}")
    panels[-1].legend(frameon=False, fontsize=9)
    return figure


def _mark_training(
    panels: Sequence[Any],
    depths: Sequence[int],
    evaluations: Mapping[Architecture, Evaluation],
    trained_on: Architecture,
) -> None:
    if trained_on not in evaluations:
        return
    axes = panels[depths.index(trained_on[0])]
    (run,) = evaluations[trained_on].learned.values()
    axes.axvline(trained_on[1], color="#888888", linewidth=1, linestyle=":", zorder=1)
    for each in panels:
        each.axhline(run.final_loss, color="#888888", linewidth=1, linestyle=":", zorder=1)


def _layers(count: int) -> str:
    return "1 hidden layer" if count == 1 else f"{count} hidden layers"

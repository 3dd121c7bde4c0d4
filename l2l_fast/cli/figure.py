"""``l2l-fast figure``."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from l2l_fast.cli.common import DataDir, Threads, print_written, set_threads, use_data_dir
from l2l_fast.cli.evaluate import Retune, Runs, print_evaluation
from l2l_fast.datasets import load
from l2l_fast.experiments import figure_networks as networks
from l2l_fast.experiments import figure_steps, tables
from l2l_fast.experiments.figure_networks import Comparison
from l2l_fast.experiments.output import prepare_folder
from l2l_fast.experiments.progress import console
from l2l_fast.experiments.tuning import tune_baselines
from l2l_fast.problems import ImageClassifier
from l2l_fast.rule import as_rule


class _Figure(str, Enum):
    """Figures of the paper that can be drawn."""

    FOUR = "4"
    FIVE = "5"
    SIX = "6"
    STEPS = "steps"


_HELP = (
    "4: quadratics, MNIST, and MNIST carried on; 5: other networks than the rule was trained on; 6: final loss by "
    "architecture; steps: the update as a function of the gradient (appendix B)."
)


def figure(
    number: Annotated[_Figure, typer.Argument(metavar="N", help=_HELP)],
    rule: Annotated[
        str, typer.Option(help="Rule for networks: shipped, by name, or the path of a .safetensors file.")
    ] = "mnist",
    quadratic_rule: Annotated[str, typer.Option(help="Rule for the quadratics of figure 4.")] = "quadratic",
    runs: Runs = None,
    retune: Retune = False,
    out: Annotated[Path, typer.Option(help="Folder for picture, curves and numbers.")] = Path("runs/figures"),
    data_dir: DataDir = None,
    threads: Threads = None,
) -> None:
    """Draw a figure of the paper, with its curves as CSV and its numbers as JSON."""
    set_threads(threads)
    use_data_dir(data_dir)
    folder = prepare_folder(out)
    comparison = Comparison({"lstm": as_rule(rule)}, runs, folder, retune)
    network = ImageClassifier("mnist")
    if number is _Figure.FOUR:
        _figure_4(replace(comparison, rules={"lstm": as_rule(quadratic_rule)}), comparison, network, folder)
    elif number is _Figure.FIVE:
        panels = networks.transfer_panels(comparison, network)
        for panel in panels.values():
            print_evaluation(panel.evaluation)
        print_written(*networks.write_curves_figure(folder, "5", panels))
    elif number is _Figure.SIX:
        evaluations = networks.architecture_evaluations(comparison, network)
        console.print(tables.architectures_table(evaluations))
        trained_on = (len(network.hidden), network.hidden[0])
        print_written(*networks.write_architectures_figure(folder, evaluations, trained_on))
    else:
        tuned = tune_baselines(network, cache=folder, retune=retune)
        compared = {name: tuned[name] for name in figure_steps.COMPARED}
        found = figure_steps.responses(as_rule(rule), compared, network)
        print_written(*figure_steps.write_steps_figure(folder, found, compared))


def _figure_4(quadratics: Comparison, comparison: Comparison, network: ImageClassifier, folder: Path) -> None:
    """Without the images, or with damaged ones, only the left panel is drawn, before the error says so."""
    unusable: OSError | ValueError | None = None
    try:
        load(network.dataset)
    except (OSError, ValueError) as error:
        unusable = error
    panels = networks.quadratic_panels(quadratics)
    others = {}
    if unusable is None:
        panels |= networks.network_panels(comparison, network)
        others["carried_on_tuned"] = networks.tuned_for_longer(comparison, network, panels["carried_on"].evaluation)
    for evaluation in (*(panel.evaluation for panel in panels.values()), *others.values()):
        print_evaluation(evaluation)
    print_written(*networks.write_curves_figure(folder, "4", panels, others))
    if unusable is not None:
        raise OSError(f"only the left panel was drawn: {unusable}") from unusable

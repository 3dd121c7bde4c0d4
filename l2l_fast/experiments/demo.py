"""The whole path in a few minutes: meta-train a rule on quadratics, then race it against tuned optimizers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from l2l_fast.baselines import BASELINES
from l2l_fast.experiments import figures, numerics, speed, tables
from l2l_fast.experiments.evaluate import FUNCTIONS, TUNING_FUNCTIONS, Evaluation, evaluate_rules
from l2l_fast.experiments.machine import machine, threads
from l2l_fast.experiments.output import prepare_folder, write_json
from l2l_fast.experiments.progress import console
from l2l_fast.experiments.training import fit
from l2l_fast.meta import MetaTrainer, TrainConfig, TrainResult
from l2l_fast.problems import PROBLEMS
from l2l_fast.rule import CoordinatewiseLSTM, available_rules, load_rule

PROBLEM = "quadratic"
UPDATES = 6000
MAX_SECONDS = 90.0  # of training, where a machine is too slow for all updates


@dataclass(frozen=True)
class Size:
    """How much the demonstration does; smaller sizes are for its tests."""

    updates: int = UPDATES
    functions: int = FUNCTIONS
    tuning_functions: int = TUNING_FUNCTIONS
    timed_coordinates: int = speed.FORWARD_COORDINATES
    compared_coordinates: int = numerics.COORDINATES


def demo(folder: Path, size: Size | None = None) -> Path:
    """Meta-train, evaluate, measure; print tables as they come and write everything to ``folder``.

    ``rule.safetensors``, ``curves.png`` and ``results.json`` of an earlier demonstration are replaced,
    each as a whole.

    Returns:
        The path of ``results.json``.

    Raises:
        OSError: if the folder can't be written; this is found out before any work is done.
    """
    size = size or Size()
    folder = prepare_folder(folder)
    rule_file, picture, results = folder / "rule.safetensors", folder / "curves.png", folder / "results.json"
    with threads(1):  # functions as small as these gain nothing from more
        trained = _train(size.updates)
        rule = trained.best_rule
        assert isinstance(rule, CoordinatewiseLSTM)
        rule.save(rule_file)
        rules = {"lstm": rule}
        if PROBLEM in available_rules():
            rules["shipped"] = load_rule(PROBLEM)
        evaluation = evaluate_rules(
            PROBLEMS[PROBLEM](),
            rules,
            name=PROBLEM,
            functions=size.functions,
            tuning_functions=size.tuning_functions,
            cache=folder,
        )
    console.print(
        f"Meta-trained for {trained.updates} updates in {trained.seconds:.0f} s; the rule is the one of update "
        f"{trained.best_update}, chosen on functions that no table below contains.\n",
        highlight=False,
    )
    console.print(tables.evaluation_table(evaluation))
    figures.write_curves(evaluation, picture)

    timings = speed.measure(rule.spec, size.timed_coordinates)
    console.print(tables.timing_table(timings))
    comparisons = [numerics.summary(c) for c in numerics.compare_all([rule.spec.preprocess], size.compared_coordinates)]
    for comparison in comparisons:
        console.print(tables.numerics_table(comparison))
    for name, reason in numerics.fused_backends().items():
        if reason is not None:
            console.print(f"backend {name} was not measured: {escape(reason)}", highlight=False, soft_wrap=True)
    write_json(results, _results(evaluation, trained, timings, comparisons))
    for path in (results, picture, rule_file):
        console.print(f"wrote {escape(str(path))}", highlight=False, soft_wrap=True)
    return results


def _train(updates: int) -> TrainResult:
    console.print(
        f"Meta-training an LSTM optimizer on random functions, {updates} updates or {MAX_SECONDS:.0f} s.",
        highlight=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rule = CoordinatewiseLSTM(preprocess=None)
    trainer = MetaTrainer(rule, PROBLEMS[PROBLEM](), TrainConfig(updates=updates, max_seconds=MAX_SECONDS))
    return fit(trainer)


def _results(
    evaluation: Evaluation,
    trained: TrainResult,
    timings: list[speed.Timing],
    comparisons: list[numerics.Comparison],
) -> dict[str, Any]:
    names = ("lstm", "shipped", *BASELINES)
    values = evaluation.to_dict()
    return {
        **values,
        "final_loss": {name: values["final_loss"].get(name) for name in names},
        "standard_error": {name: values["standard_error"].get(name) for name in names},
        "training": {
            "updates": trained.updates,
            "seconds": trained.seconds,
            "best_update": trained.best_update,
            "best_validation_loss": trained.best_validation_loss,
            "stopped": trained.stopped,
        },
        "speed": [asdict(timing) for timing in timings],
        "numerics": [
            {
                "backend": comparison.backend,
                "preprocess": tables.describe(comparison.preprocess),
                "coordinates": comparison.coordinates,
                "steps": comparison.steps,
                "rows": [{**asdict(row), "ratio": row.ratio} for row in comparison.rows],
            }
            for comparison in comparisons
        ],
        "machine": machine(),
    }

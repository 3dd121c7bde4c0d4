"""Learning rates of the baselines: tuned once, kept in files, and for the problems of the figures in the package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from l2l_fast.baselines import BASELINES, COARSE_TO_FINE_POINTS, GRID_POINTS, Tuned, tune
from l2l_fast.experiments.effort import effort_for
from l2l_fast.experiments.output import write_json
from l2l_fast.experiments.progress import progress
from l2l_fast.meta.checkpoint import describe_problem
from l2l_fast.problems import Problem

# Out of the way of the small seeds that people train with, and next to the one of validation, so that no two
# samples coincide.
TUNING_SEED = 2**31 + 1

STEPS = 100

_CACHE = "baselines.json"
# A copy of the FOLDER/baselines.json that `l2l-fast figure N --retune --out FOLDER` leaves for N = 4, 5 and 6.
_SHIPPED = files("l2l_fast.experiments") / "tuned.json"

Table = dict[str, dict[str, Tuned]]


def tune_baselines(
    problem: Problem,
    *,
    steps: int = STEPS,
    functions: int | None = None,
    seed: int = TUNING_SEED,
    cache: Path | None = None,
    retune: bool = False,
) -> dict[str, Tuned]:
    """Every baseline with its best learning rate on ``problem``, from a file where it is known.

    Args:
        functions: how many to tune on; ``None`` takes what suits their size.
        cache: folder where results are kept, in ``baselines.json``, by problem, steps, functions and seed. A file that
            can't be read as such is replaced.
        retune: tune even what the cache or the package knows.
    """
    effort = effort_for(problem)
    functions = effort.tuning if functions is None else functions
    file = None if cache is None else cache / _CACHE
    key = f"{describe_problem(problem)} steps={steps} functions={functions} screening={effort.screening} seed={seed}"
    known = {} if file is None else _read(file)
    if not retune:
        found = known.get(key) or _parse(_SHIPPED.read_text()).get(key)
        if found is not None:
            return found
    tuned = {}
    points = GRID_POINTS if effort.screening is None else COARSE_TO_FINE_POINTS
    with progress("tuning the baselines", len(BASELINES) * points) as advance:
        for name in BASELINES:
            tuned[name] = tune(
                problem,
                name,
                steps=steps,
                functions=functions,
                screening=effort.screening,
                generator=torch.Generator().manual_seed(seed),
                on_run=advance,
            )
    if file is not None:
        known[key] = tuned
        write_json(file, _to_dict(known))
    return tuned


def _read(file: Path) -> Table:
    if not file.is_file():
        return {}
    try:
        return _parse(file.read_text())
    except (ValueError, TypeError, AttributeError):
        return {}  # it holds nothing that can't be computed again


def _parse(text: str) -> Table:
    return {
        key: {name: Tuned(**entry) for name, entry in entries.items()}
        for key, entries in json.loads(text).items()
        if entries.keys() == BASELINES.keys()
    }


def _to_dict(table: Mapping[str, Mapping[str, Tuned]]) -> dict[str, Any]:
    return {key: {name: asdict(entry) for name, entry in entries.items()} for key, entries in table.items()}

"""A learned rule against tuned baselines, on functions that neither has seen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2l_fast.backends import resolve
from l2l_fast.baselines import BASELINES, GRID_POINTS, Tuned, settle, tune
from l2l_fast.experiments.output import write_json
from l2l_fast.experiments.progress import progress
from l2l_fast.meta.unroll import unroll
from l2l_fast.problems import Problem
from l2l_fast.rule import CoordinatewiseLSTM

# Out of the way of the small seeds that people train with, and next to the one of validation, so that no two
# samples coincide.
TUNING_SEED = 2**31 + 1
EVALUATION_SEED = 2**31 + 2
_BOOTSTRAP_SEED = 2**31 + 3

FUNCTIONS = 2048
TUNING_FUNCTIONS = 1024
STEPS = 100

_RESAMPLES = 2000


@dataclass(frozen=True)
class Run:
    """One optimizer on every evaluation function.

    Attributes:
        losses: ``[steps + 1, functions]``.
        tuned: the baseline's learning rate; ``None`` for a learned rule.
    """

    losses: Tensor
    tuned: Tuned | None = None

    @property
    def mean(self) -> Tensor:
        """Mean over functions ``[steps + 1]``, float64."""
        return self.losses.double().mean(dim=1)

    @property
    def standard_error(self) -> Tensor:
        """Standard error of the mean over functions ``[steps + 1]``, float64."""
        return self.losses.double().std(dim=1) / math.sqrt(self.losses.shape[1])

    @property
    def final_loss(self) -> float:
        """Mean loss after the last step."""
        return float(self.mean[-1])

    @property
    def final_standard_error(self) -> float:
        """Standard error of :attr:`final_loss`."""
        return float(self.standard_error[-1])


@dataclass(frozen=True)
class Ratio:
    """Mean final loss of one run over that of another, on the same functions.

    Attributes:
        value: the ratio of means.
        low: lower end of the 95 % interval from a bootstrap over functions, both runs resampled together.
        high: upper end.
        won: share of functions on which the first run ends lower.
    """

    value: float
    low: float
    high: float
    won: float


def compare(run: Run, other: Run) -> Ratio:
    """The ratio of ``run`` to ``other``."""
    finals = torch.stack([run.losses[-1], other.losses[-1]]).double()
    functions = finals.shape[1]
    generator = torch.Generator().manual_seed(_BOOTSTRAP_SEED)
    resampled = torch.empty(_RESAMPLES, 2, dtype=torch.float64)
    for sample in resampled:
        chosen = torch.randint(functions, (functions,), generator=generator)
        torch.mean(finals[:, chosen], dim=1, out=sample)
    ratios = resampled[:, 0] / resampled[:, 1]
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    means = finals.mean(dim=1)
    return Ratio(float(means[0] / means[1]), low, high, float((finals[0] < finals[1]).double().mean()))


@dataclass(frozen=True)
class Evaluation:
    """Learned rules and tuned baselines on the same functions.

    Attributes:
        problem: its name.
        steps: steps of every run.
        functions: how many.
        seed: what they were drawn from.
        learned: runs of learned rules by name.
        baselines: runs of tuned baselines by name.
    """

    problem: str
    steps: int
    functions: int
    seed: int
    learned: dict[str, Run]
    baselines: dict[str, Run]

    @property
    def runs(self) -> dict[str, Run]:
        """All runs, the learned ones first."""
        return {**self.learned, **self.baselines}

    @property
    def best_baseline(self) -> str:
        """The baseline with the lowest mean final loss on these very functions, a choice in its favour."""
        return min(self.baselines, key=lambda name: self.baselines[name].final_loss)

    def ratio(self, name: str) -> Ratio:
        """``name`` relative to the best baseline."""
        return compare(self.runs[name], self.baselines[self.best_baseline])

    def to_dict(self) -> dict[str, Any]:
        """Numbers at the last step, as JSON-compatible values."""
        return {
            "problem": self.problem,
            "steps": self.steps,
            "functions": self.functions,
            "seed": self.seed,
            "final_loss": {name: run.final_loss for name, run in self.runs.items()},
            "standard_error": {name: run.final_standard_error for name, run in self.runs.items()},
            "best_baseline": self.best_baseline,
            "ratio_to_best_baseline": {name: asdict(self.ratio(name)) for name in self.runs},
            "baselines": {name: _to_dict(run.tuned) for name, run in self.baselines.items() if run.tuned is not None},
        }


def _to_dict(tuned: Tuned) -> dict[str, Any]:
    return {"lr": tuned.lr, "tuned_loss": tuned.loss, "stepped_down": tuned.stepped_down}


def tune_baselines(
    problem: Problem,
    *,
    steps: int = STEPS,
    functions: int = TUNING_FUNCTIONS,
    seed: int = TUNING_SEED,
    cache: Path | None = None,
) -> dict[str, Tuned]:
    """Every baseline with its best learning rate on ``problem``.

    Args:
        cache: a JSON file that results are read from and added to. They are keyed by problem, steps,
            functions, seed and torch's version; a file that can't be read as such is replaced.
    """
    key = f"{problem!r} steps={steps} functions={functions} seed={seed} torch={torch.__version__}"
    known = _read_cache(cache)
    if key in known:
        return known[key]
    tuned = {}
    with progress("tuning the baselines", len(BASELINES) * GRID_POINTS) as advance:
        for name in BASELINES:
            generator = torch.Generator().manual_seed(seed)
            tuned[name] = tune(problem, name, steps=steps, functions=functions, generator=generator, on_run=advance)
    if cache is not None:
        known[key] = tuned
        write_json(
            cache, {key: {name: asdict(entry) for name, entry in entries.items()} for key, entries in known.items()}
        )
    return tuned


def _read_cache(cache: Path | None) -> dict[str, dict[str, Tuned]]:
    if cache is None or not cache.is_file():
        return {}
    try:
        content = json.loads(cache.read_text())
        return {
            key: {name: Tuned(**entry) for name, entry in entries.items()}
            for key, entries in content.items()
            if entries.keys() == BASELINES.keys()
        }
    except (ValueError, TypeError, AttributeError):
        return {}  # it holds nothing that can't be computed again


def evaluate(
    problem: Problem,
    rules: Mapping[str, CoordinatewiseLSTM],
    baselines: Mapping[str, Tuned],
    *,
    name: str,
    steps: int = STEPS,
    functions: int = FUNCTIONS,
    seed: int = EVALUATION_SEED,
    backend: str | None = None,
) -> Evaluation:
    """Run learned rules and tuned baselines on the same fresh functions, from the same starts.

    A baseline whose tuned learning rate diverges on these functions is given a lower one.

    Args:
        name: what to call the problem.

    Raises:
        ValueError: if ``steps`` is below 1 or ``functions`` below 2.
        RuntimeError: if the named backend can't run a rule, or a baseline diverges at any learning rate.
    """
    if steps < 1 or functions < 2:
        raise ValueError(f"need at least 1 step and 2 functions, got {steps} steps and {functions} functions")
    generator = torch.Generator().manual_seed(seed)
    instances = problem.sample(functions, generator=generator, device=generator.device)
    learned, tuned_runs = {}, {}
    with progress("evaluating", len(rules) + len(baselines)) as advance:
        for rule_name, rule in rules.items():
            with torch.no_grad():
                run = unroll(rule, instances, steps, generator=generator.clone_state(), backend=backend)
            learned[rule_name] = Run(run.losses)
            advance()
        for baseline_name, tuned in baselines.items():
            settled, losses = settle(tuned, instances, steps, generator=generator)
            tuned_runs[baseline_name] = Run(losses, settled)
            advance()
    return Evaluation(name, steps, functions, seed, learned, tuned_runs)


def evaluate_rules(
    problem: Problem,
    rules: Mapping[str, CoordinatewiseLSTM],
    *,
    name: str,
    steps: int = STEPS,
    functions: int = FUNCTIONS,
    tuning_functions: int = TUNING_FUNCTIONS,
    cache: Path | None = None,
) -> Evaluation:
    """:func:`tune_baselines`, then :func:`evaluate`.

    Args:
        cache: folder in which results of tuning are kept, as ``baselines.json``.

    Raises:
        As :func:`evaluate` does; that ``$L2L_FAST_BACKEND`` can't run a rule is found out before the tuning.
    """
    for rule in rules.values():
        weight = rule.output.weight
        resolve(None, weight.device, weight.dtype, rule.spec)
    file = None if cache is None else cache / "baselines.json"
    baselines = tune_baselines(problem, steps=steps, functions=tuning_functions, cache=file)
    return evaluate(problem, rules, baselines, name=name, steps=steps, functions=functions)

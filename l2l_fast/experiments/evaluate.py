"""A learned rule against tuned baselines, on functions that neither has seen."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2l_fast.backends import resolve
from l2l_fast.baselines import Descent, Tuned, descend, final_losses, settle
from l2l_fast.experiments.effort import FUNCTIONS as FUNCTIONS
from l2l_fast.experiments.effort import TUNING_FUNCTIONS as TUNING_FUNCTIONS
from l2l_fast.experiments.effort import effort_for
from l2l_fast.experiments.progress import progress
from l2l_fast.experiments.tuning import STEPS, tune_baselines
from l2l_fast.meta import Teacher, Unroll, unroll
from l2l_fast.problems import Evaluates, Instances, Problem
from l2l_fast.rule import CoordinatewiseLSTM

EVALUATION_SEED = 2**31 + 2  # next to the one of tuning
_BOOTSTRAP_SEED = 2**31 + 3

_RESAMPLES = 2000
_DRAWN_AT_ONCE = 2**22  # values that resampling holds in memory
_LAST_POINTS = 5  # whose minibatch losses are averaged


@dataclass(frozen=True)
class Run:
    """One optimizer on every evaluation function.

    Attributes:
        losses: ``[steps + 1, functions]``, of minibatches where there is data.
        fixed: ``[functions]``, loss of the last point on fixed data, those trained on unless the problem holds some
            out; ``None`` without ``evaluate``.
        test: ``[functions]``, loss of the last point on test data; ``None`` without such.
        tuned: the baseline's learning rate; ``None`` for a learned rule.
    """

    losses: Tensor
    fixed: Tensor | None = None
    test: Tensor | None = None
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
    def measures(self) -> dict[str, Tensor]:
        """What can be said of each function in one number, ``[functions]`` each.

        ``final`` is what optimizers are compared by: the loss of the last point, on fixed data where there are such,
        for the noise of minibatches hides small differences. ``minibatch`` is the mean loss of the last five points,
        ``test`` the last point's on test data, ``mean`` the mean over the whole run.
        """
        measures = {"final": self.losses[-1] if self.fixed is None else self.fixed}
        if self.fixed is not None:
            measures["minibatch"] = self.losses[-_LAST_POINTS:].mean(dim=0)
        if self.test is not None:
            measures["test"] = self.test
        return {**measures, "mean": self.losses.mean(dim=0)}

    @property
    def final_loss(self) -> float:
        """Mean of the measure ``final``."""
        return mean_of(self.measures["final"])

    @property
    def final_standard_error(self) -> float:
        """Standard error of :attr:`final_loss`."""
        return standard_error_of(self.measures["final"])


def mean_of(values: Tensor) -> float:
    """Mean over functions."""
    return float(values.double().mean())


def standard_error_of(values: Tensor) -> float:
    """Standard error of the mean over functions."""
    return float(values.double().std() / math.sqrt(len(values)))


@dataclass(frozen=True)
class Ratio:
    """Mean of one run over that of another, on the same functions.

    Attributes:
        value: the ratio of means.
        low: lower end of the 95 % interval from a bootstrap over functions, both runs resampled together.
        high: upper end.
        won: share of functions on which the first run is lower.
    """

    value: float
    low: float
    high: float
    won: float


def compare(values: Tensor, others: Tensor) -> Ratio:
    """The ratio of a measure ``[functions]`` of one run to that of another."""
    pair = torch.stack([values, others]).double()
    functions = pair.shape[1]
    generator = torch.Generator().manual_seed(_BOOTSTRAP_SEED)
    rows = max(1, _DRAWN_AT_ONCE // functions)
    resampled = []
    for first in range(0, _RESAMPLES, rows):
        shape = (min(rows, _RESAMPLES - first), functions)
        resampled.append(pair[:, torch.randint(functions, shape, generator=generator)].mean(dim=-1))
    means = torch.cat(resampled, dim=1)
    ratios = means[0] / means[1]
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    value = mean_of(values) / mean_of(others)
    return Ratio(value, low, high, float((pair[0] < pair[1]).double().mean()))


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
    def measures(self) -> tuple[str, ...]:
        """Names of the measures of the runs."""
        return tuple(next(iter(self.runs.values())).measures)

    @property
    def best_baseline(self) -> str:
        """The baseline that ends lowest."""
        return self.best_baseline_by("final")

    def best_baseline_by(self, measure: str) -> str:
        """The baseline with the lowest mean of a measure on these very functions, a choice in its favour."""
        return min(self.baselines, key=lambda name: mean_of(self.baselines[name].measures[measure]))

    def ratio(self, name: str, measure: str = "final") -> Ratio:
        """``name`` relative to the best baseline, both by ``measure``."""
        best = self.baselines[self.best_baseline_by(measure)]
        return compare(self.runs[name].measures[measure], best.measures[measure])

    def to_dict(self) -> dict[str, Any]:
        """Means, standard errors and ratios by every measure, as JSON-compatible values; those of ``final`` on top."""
        summaries = {measure: self._summary(measure) for measure in self.measures}
        final = summaries.pop("final")
        return {
            "problem": self.problem,
            "steps": self.steps,
            "functions": self.functions,
            "seed": self.seed,
            "final_loss": final.pop("mean"),
            **final,
            "other_measures": summaries,
            "baselines": {
                name: {"lr": run.tuned.lr, "tuned_loss": run.tuned.loss, "stepped_down": run.tuned.stepped_down}
                for name, run in self.baselines.items()
                if run.tuned is not None
            },
        }

    def _summary(self, measure: str) -> dict[str, Any]:
        values = {name: run.measures[measure] for name, run in self.runs.items()}
        return {
            "mean": {name: mean_of(value) for name, value in values.items()},
            "standard_error": {name: standard_error_of(value) for name, value in values.items()},
            "best_baseline": self.best_baseline_by(measure),
            "ratio_to_best_baseline": {name: asdict(self.ratio(name, measure)) for name in values},
        }


def evaluate(
    problem: Problem,
    rules: Mapping[str, CoordinatewiseLSTM | Teacher],
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
        rules: learned rules; what makes another optimizer counts as one.
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
    with progress(f"evaluating on {name}", (len(rules) + len(baselines)) * (steps + 1)) as advance:
        watched = _Watched(instances, advance)
        for rule_name, rule in rules.items():
            run: Unroll | Descent
            if isinstance(rule, CoordinatewiseLSTM):
                with torch.no_grad():
                    run = unroll(rule, watched, steps, generator=generator.clone_state(), backend=backend)
            else:
                run = descend(watched, rule, steps, generator=generator)
            learned[rule_name] = _judged(instances, run.losses, run.params)
        for baseline_name, tuned in baselines.items():
            settled, descent = settle(tuned, instances, steps, generator=generator)
            tuned_runs[baseline_name] = _judged(instances, descent.losses, descent.params, settled)
            advance(steps + 1)
    return Evaluation(name, steps, functions, seed, learned, tuned_runs)


class _Watched:
    """Instances that report every loss they are asked for."""

    def __init__(self, instances: Instances, on_loss: Callable[[], None]) -> None:
        self._instances = instances
        self._on_loss = on_loss

    def init(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return self._instances.init(generator=generator)

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        self._on_loss()
        return self._instances.loss(params, generator=generator)


def _judged(instances: Instances, losses: Tensor, params: Mapping[str, Tensor], tuned: Tuned | None = None) -> Run:
    """A run with what its last point is worth."""
    if not isinstance(instances, Evaluates):
        return Run(losses, tuned=tuned)
    return Run(losses, final_losses(instances, losses, params), _test_losses(instances, params), tuned)


def _test_losses(instances: Evaluates, params: Mapping[str, Tensor]) -> Tensor | None:
    """Loss on test data, where ``evaluate`` has a ``split`` and the instances have such data."""
    if "split" not in inspect.signature(instances.evaluate).parameters:
        return None
    try:
        losses: Tensor = instances.evaluate(params, split="test")  # type: ignore[call-arg]  # looked up above
    except ValueError:  # as these parameters were evaluated just now, it is the split
        return None
    return losses


def evaluate_rules(
    problem: Problem,
    rules: Mapping[str, CoordinatewiseLSTM | Teacher],
    *,
    name: str,
    steps: int = STEPS,
    functions: int | None = None,
    tuning_functions: int | None = None,
    cache: Path | None = None,
    retune: bool = False,
) -> Evaluation:
    """:func:`tune_baselines`, then :func:`evaluate`.

    Args:
        functions, tuning_functions: ``None`` takes what suits the size of the functions.
        cache, retune: as for :func:`tune_baselines`.

    Raises:
        As :func:`evaluate` does; that ``$L2L_FAST_BACKEND`` can't run a rule is found out before the tuning.
    """
    for rule in rules.values():
        if isinstance(rule, CoordinatewiseLSTM):
            weight = rule.output.weight
            resolve(None, weight.device, weight.dtype, rule.spec)
    baselines = tune_baselines(problem, steps=steps, functions=tuning_functions, cache=cache, retune=retune)
    functions = effort_for(problem).functions if functions is None else functions
    return evaluate(problem, rules, baselines, name=name, steps=steps, functions=functions)

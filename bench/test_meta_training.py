"""One segment of meta-training as it happens: 20 steps on the paper's MNIST network, forward and backward."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import meta_training
import pytest
import torch
from measure import report
from meta_training import COORDINATES, SEGMENTS
from torch import Tensor

from l2l_fast import CoordinatewiseLSTM

STEPS = 20
ROUNDS = 5
# What is promised of first-order meta-gradients.
LEAST_SPEEDUP = 2.5
LEAST_SAVING = 20


def _segment(name: str, rule: CoordinatewiseLSTM, order: str) -> Callable[[], list[Tensor]]:
    instances = meta_training.network()

    def run() -> list[Tensor]:
        loss = SEGMENTS[name](rule, instances, STEPS, order)
        return list(torch.autograd.grad(loss, list(rule.parameters())))

    return run


def _times_eager(run: Callable[[], object], eager: Callable[[], object]) -> float:
    """Ratio of the best times; the two take turns, so that a busy machine hurts both."""
    best = {run: float("inf"), eager: float("inf")}
    for _ in range(ROUNDS):
        for candidate in best:
            start = time.perf_counter()
            candidate()
            best[candidate] = min(best[candidate], time.perf_counter() - start)
    return best[eager] / best[run]


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("name", SEGMENTS)
def test_segment(benchmark: Any, rule: CoordinatewiseLSTM, name: str, order: str) -> None:
    benchmark.group = f"segment of meta-training, {order} order n={COORDINATES} T={STEPS}"
    run, eager = _segment(name, rule, order), _segment("eager", rule, order)
    for actual, expected in zip(run(), eager(), strict=True):
        # Pixels that are nearly always black have gradients about zero, whose logarithm shows every rounding.
        assert (actual - expected).norm() <= 1e-2 * expected.norm()
    report(benchmark, COORDINATES, run, steps=STEPS, macs=0, rounds=ROUNDS)
    if name == "fused":
        ratio = _times_eager(run, eager)
        benchmark.extra_info["times_eager"] = ratio
        assert order == "second" or ratio >= LEAST_SPEEDUP


@functools.cache
def _peak(name: str, order: str, steps: int) -> int:
    command = [sys.executable, str(Path(__file__).with_name("meta_training.py")), name, order, str(steps)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set's peak is read from /proc")
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize(("name", "steps"), [("eager", 20), ("fused", 20), ("fused", 100), ("fused", 1000)])
def test_peak_memory(benchmark: Any, name: str, order: str, steps: int) -> None:
    """Untruncated runs are for the fused kernels alone: autograd would keep 2 GiB and 20 GiB."""
    benchmark.group = f"memory of meta-training, {order} order n={COORDINATES} T={steps}"
    peak = benchmark.pedantic(_peak, (name, order, steps), rounds=1, iterations=1)
    benchmark.extra_info.update(n=COORDINATES, steps=steps, threads=1, peak_memory_mib=peak / 2**20)
    if (name, steps) == ("fused", STEPS):
        ratio = _peak("eager", order, steps) / peak
        benchmark.extra_info["times_eager"] = ratio
        assert order == "second" or ratio >= LEAST_SAVING

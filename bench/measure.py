"""What a time means: recorded beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from l2l_fast.backends import cpu

# One multiply-add each: two layers of 80 gates, then the output.
MACS_FORWARD = 80 * 22 + 80 * 40 + 20
# The derivatives by the inputs and by the weights of both layers; the features have none in an unroll.
MACS_BACKWARD = 80 * 20 + 80 * 40 + 80 * 22 + 80 * 40

_peaks: dict[str, float] = {}


def fma_peak() -> float:
    """The highest peak measured so far in this process, per thread, for the instruction set in use."""
    name = cpu.instruction_set()
    _peaks[name] = max(_peaks.get(name, 0.0), *(cpu.fma_peak() for _ in range(3)))
    return _peaks[name]


def report(
    benchmark: Any, n: int, run: Callable[[], object], *, steps: int = 1, macs: int = MACS_FORWARD, rounds: int = 0
) -> None:
    """Time ``run`` and record what its time means.

    Args:
        n: coordinates per call.
        steps: steps per call.
        macs: multiply-adds per coordinate and step that the mathematics asks for.
        rounds: how often to run; 0 leaves it to pytest-benchmark.
    """
    run()
    if rounds:
        benchmark.pedantic(run, rounds=rounds, iterations=1)
    else:
        benchmark(run)
    info = benchmark.extra_info
    info.update(n=n, steps=steps, threads=torch.get_num_threads())
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.min
        info["ns_per_coordinate_step"] = 1e9 * seconds / (n * steps)
        info["share_of_fma_peak"] = 2 * macs * n * steps / seconds / (fma_peak() * torch.get_num_threads())

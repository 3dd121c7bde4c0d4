"""What the benchmarks share: the eager baseline, peak memory, and what a time means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from l2l_fast import CoordinatewiseLSTM, reference
from l2l_fast.backends import cpu

# One multiply-add each: two layers of 80 gates, then the output.
MACS_FORWARD = 80 * 22 + 80 * 40 + 20
# The derivatives by the inputs and by the weights of both layers; the features have none in an unroll.
MACS_BACKWARD = 80 * 20 + 80 * 40 + 80 * 22 + 80 * 40

_peaks: dict[str, float] = {}

Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, tuple[Tensor, ...]]]


def eager_step(rule: CoordinatewiseLSTM) -> Step:
    """One step as PyTorch users write it: two ``nn.LSTMCell`` and a ``nn.Linear``, states as separate tensors."""
    first, second = rule.cells

    def step(grad: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        h1, c1 = first(reference.features(rule.spec, grad), state[:2])
        h2, c2 = second(h1, state[2:])
        return rule.spec.output_scale * rule.output(h2).squeeze(-1), (h1, c1, h2, c2)

    return step


def fma_peak() -> float:
    """The highest peak measured so far in this process, per thread, for the instruction set in use."""
    name = cpu.instruction_set()
    _peaks[name] = max(_peaks.get(name, 0.0), *(cpu.fma_peak() for _ in range(3)))
    return _peaks[name]


def zero_state(rule: CoordinatewiseLSTM, n: int) -> tuple[Tensor, ...]:
    """A fresh state as :func:`eager_step` takes it."""
    return tuple(torch.zeros(n, rule.spec.hidden_size) for _ in range(4))


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

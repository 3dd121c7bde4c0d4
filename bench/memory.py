"""Peak memory of one meta-step in a process of its own: ``python bench/memory.py fused|eager N T``.

Prints the bytes by which the resident set rose at most above what it was before. Linux only.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch

import l2l_fast
from l2l_fast.experiments.speed import eager_step, zero_state


class Bowl:
    """``n`` coordinates of ``(x - 1)^2 / 2``: an optimizee that needs next to no memory itself."""

    def __init__(self, n: int) -> None:
        self.n = n

    def init(self, *, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        return {"x": torch.zeros(1, self.n)}

    def loss(self, params: Mapping[str, torch.Tensor], *, generator: torch.Generator | None = None) -> torch.Tensor:
        return (params["x"] - 1).square().sum(1) / 2


def resident(field: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM``."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def meta_step(name: str, rule: l2l_fast.CoordinatewiseLSTM, n: int, steps: int) -> None:
    """An unroll and its meta-gradient, first order."""
    if name == "fused":
        torch.autograd.backward(l2l_fast.unroll(rule, Bowl(n), steps).loss)
        return
    step, state, x, loss = eager_step(rule), zero_state(rule, n), torch.zeros(n), torch.zeros(())
    for _ in range(steps):
        update, state = step((x - 1).detach(), state)
        x = x + update
        loss = loss + (x - 1).square().sum() / 2
    torch.autograd.backward(loss)


def main(name: str, n: int, steps: int) -> None:
    """Warm up on few coordinates, then measure."""
    torch.set_num_threads(1)
    rule = l2l_fast.CoordinatewiseLSTM()
    meta_step(name, rule, 16, steps)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at the present size
    before = resident("VmRSS")
    meta_step(name, rule, n, steps)
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

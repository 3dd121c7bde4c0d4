"""Peak memory of a meta-step, each case in a fresh process: an allocator keeps what it has freed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

STEPS = 20


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set's peak is read from /proc")
@pytest.mark.parametrize("n", [10_000, 100_000])
@pytest.mark.parametrize("name", ["fused", "eager"])
def test_peak(benchmark: Any, name: str, n: int) -> None:
    benchmark.group = f"memory of a meta-step n={n} T={STEPS}"
    command = [sys.executable, str(Path(__file__).with_name("memory.py")), name, str(n), str(STEPS)]

    def run() -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    output = benchmark.pedantic(run, rounds=1, iterations=1)
    benchmark.extra_info.update(n=n, steps=STEPS, threads=1, peak_memory_mib=int(output) / 2**20)

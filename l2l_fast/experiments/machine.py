"""What a number was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from l2l_fast.backends import backends, cpu


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def instruction_set() -> str | None:
    """The instruction set that the C++ backend runs on; ``None`` where that backend does not work."""
    return None if backends()["cpu"] else cpu.instruction_set()


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that the C++ backend has for this processor, fastest last."""
    return () if backends()["cpu"] else cpu.instruction_sets()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute on ``count`` threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine() -> dict[str, Any]:
    """Versions, processor and threads, as JSON-compatible values."""
    return {
        "l2l_fast": _version("l2l_fast"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "triton": _version("triton"),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "instruction_set": instruction_set(),
        "threads": torch.get_num_threads(),
    }

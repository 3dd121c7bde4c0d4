"""Fixtures and options of the benchmarks."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from measure import fma_peak

import l2l_fast
from l2l_fast.backends import cpu


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("l2l_fast")
    group.addoption("--bench-threads", type=int, default=1, help="threads of every benchmark (default: 1)")
    group.addoption("--bench-max", type=int, default=1_000_000, help="most coordinates of a case (default: 1000000)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    limit = config.getoption("--bench-max")
    large = [item for item in items if _coordinates(item) > limit]
    config.hook.pytest_deselected(items=large)
    items[:] = [item for item in items if _coordinates(item) <= limit]


def _coordinates(item: pytest.Item) -> int:
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return 0
    n = item.callspec.params.get("n", 0)
    assert isinstance(n, int)
    return n


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Numbers travel with the machine and the versions that made them."""
    machine_info["torch"] = torch.__version__
    machine_info["l2l_fast"] = l2l_fast.__version__
    machine_info["python"] = platform.python_version()
    machine_info["instruction_set"] = cpu.instruction_set()
    machine_info["threads"] = config.getoption("--bench-threads")
    machine_info["fma_peak_gflops"] = fma_peak() / 1e9


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of threads of this run, set for PyTorch and so for us."""
    before = torch.get_num_threads()
    count: int = request.config.getoption("--bench-threads")
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def rule() -> l2l_fast.CoordinatewiseLSTM:
    """A rule with the weights of a fresh module."""
    torch.manual_seed(0)
    return l2l_fast.CoordinatewiseLSTM()


@pytest.fixture
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the C++ kernels on the instruction set that the case names."""
    before = cpu.instruction_set()
    cpu.use_instruction_set(request.param)
    yield request.param
    cpu.use_instruction_set(before)

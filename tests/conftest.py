"""Fixtures shared by the tests: seeded randomness, every backend, poisoned memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from l2l_fast.backends import Backend, backends, cpu, get


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random numbers."""
    return torch.Generator().manual_seed(20160614)


def _backend_ids() -> list[str]:
    """Every backend; the one in C++ once per instruction set that this processor runs."""
    ids = []
    for name, reason in backends().items():
        if name == "cpu" and reason is None:
            ids += [f"cpu-{instruction_set}" for instruction_set in cpu.instruction_sets()]
        else:
            ids.append(name)
    return ids


BACKEND_IDS = _backend_ids()


@pytest.fixture(params=BACKEND_IDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend in turn; one that does not work here is a failure, not a skip."""
    name, _, instruction_set = request.param.partition("-")
    reason = backends()[name]
    assert reason is None, f"backend {name!r} must work where the tests run: {reason}"
    if not instruction_set:
        yield get(name)
        return
    before = cpu.instruction_set()
    cpu.use_instruction_set(instruction_set)
    yield get(name)
    cpu.use_instruction_set(before)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of NaN, so that an element which a kernel forgot to write shows."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_and_fill(*args: Any, **options: Any) -> Tensor:
            tensor = allocate(*args, **options)
            if tensor.is_floating_point():
                tensor.detach().fill_(float("nan"))
            return tensor

        return allocate_and_fill

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread, which small tensors want."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""``optimizer.step()`` takes no memory in the steady state: neither tensors nor Python objects that stay."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_loop import make_grads, make_params, make_rule, set_grads
from torch import nn

from l2l_fast import LearnedOptimizer

# The profiler warns that it is young.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]

SHAPES = [(), (7,), (0,), (3, 5), (100,), (16, 16)] * 20


def allocated(function: Callable[[], object]) -> int:
    """Bytes that tensors were given meanwhile, whether or not they were freed again."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    changes = [event.cpu_memory_usage for event in profiler.events() if event.name == "[memory]"]
    inside = [event.self_cpu_memory_usage for event in profiler.events() if event.name != "[memory]"]
    return sum(max(change, 0) for change in changes + inside)


def prepared(
    generator: torch.Generator, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[list[nn.Parameter], LearnedOptimizer]:
    """An optimizer that has made its state."""
    params = make_params(SHAPES, generator, dtype)
    optimizer = LearnedOptimizer(params, make_rule(generator), backend="cpu", **options)
    set_grads(params, make_grads(params, generator))
    for _ in range(2):
        optimizer.step()
    return params, optimizer


def test_the_measure_sees_what_is_freed_at_once() -> None:
    assert allocated(lambda: torch.ones(1000).sum()) >= 4000
    assert allocated(lambda: torch.empty(1000)) >= 4000


def test_the_first_step_makes_the_state(generator: torch.Generator) -> None:
    params = make_params(SHAPES, generator)
    optimizer = LearnedOptimizer(params, make_rule(generator), backend="cpu")
    set_grads(params, make_grads(params, generator))
    assert allocated(optimizer.step) >= 320 * sum(param.numel() for param in params)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_is_made(generator: torch.Generator, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    _, optimizer = prepared(generator, dtype, state_dtype=state_dtype, weight_decay=0.1, skip_nonfinite=True)
    optimizer.param_groups[0]["lr"] = 0.5
    assert allocated(optimizer.step) == 0


def test_new_gradients_cost_nothing(generator: torch.Generator) -> None:
    """As after ``zero_grad(set_to_none=True)``: gradients lie elsewhere at every step."""
    params, optimizer = prepared(generator)
    set_grads(params, make_grads(params, generator))
    assert allocated(optimizer.step) == 0


def test_python_memory_does_not_grow(generator: torch.Generator) -> None:
    _, optimizer = prepared(generator)
    tracemalloc.start()
    try:
        for _ in range(100):  # caches fill
            optimizer.step()
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(500):
            optimizer.step()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Python keeps freed objects for later, of whom some were made before and some are seen to be made; the smallest
    # object that stays behind every step would take 28 bytes.
    assert after - before < 500 * 20, "something stays behind every step"

"""What ``optimizer.step()`` asks of the device: one launch, no waiting, no memory."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cuda_models import Model, assert_same, ragged_shapes
from plain_loop import make_rule

from l2l_fast import CoordinatewiseLSTM
from l2l_fast.backends import get

# The profiler and the guard against waiting warn that they are young.
pytestmark = [pytest.mark.hardware, pytest.mark.filterwarnings("ignore::UserWarning")]

SMALL = [(5,), (70,), (3, 4)]
WORK = {"kernel", "gpu_memcpy", "gpu_memset"}

Profile = Callable[[Callable[[], object]], dict[str, list[str]]]


@pytest.fixture
def rule(generator: torch.Generator, device: torch.device) -> CoordinatewiseLSTM:
    return make_rule(generator).to(device)


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    """Runs a function and says what the device did: names of kernels, copies and fills, by category."""

    def run(function: Callable[[], object]) -> dict[str, list[str]]:
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            function()
            torch.cuda.synchronize()
        path = tmp_path / "trace.json"
        profiler.export_chrome_trace(str(path))
        found = defaultdict(list)
        for event in json.loads(path.read_text())["traceEvents"]:
            if event.get("cat") in WORK:
                found[event["cat"]].append(event["name"])
        return dict(found)

    assert run(lambda: torch.ones(3, device="cuda").add_(1))["kernel"], "the profiler sees no kernels on this machine"
    return run


@contextmanager
def no_waiting() -> Iterator[None]:
    """Let whatever makes the host wait for the device raise."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_guard_catches_waiting(device: torch.device) -> None:
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=device).item()


def test_one_launch_for_any_number_of_tensors(profile: Profile, rule: CoordinatewiseLSTM, device: torch.device) -> None:
    model = Model(rule, device, ragged_shapes())
    model.steps(2)
    work = profile(model.step)
    assert work.keys() == {"kernel"}
    (kernel,) = work["kernel"]
    assert "step_in_place_kernel" in kernel


def test_gradients_that_move_cost_one_asynchronous_copy(
    profile: Profile, rule: CoordinatewiseLSTM, device: torch.device
) -> None:
    model = Model(rule, device, ragged_shapes())
    model.steps(2)
    model.move_gradients(5)
    work = profile(model.step)
    assert len(work["kernel"]) == 1
    assert len(work["gpu_memcpy"]) == 1
    assert "HtoD" in work["gpu_memcpy"][0]
    assert "Pinned" in work["gpu_memcpy"][0]
    assert "gpu_memset" not in work


def test_one_launch_for_each_group(profile: Profile, rule: CoordinatewiseLSTM, device: torch.device) -> None:
    model = Model(rule, device, SMALL, [(9,), (200,)])
    model.steps(2)
    work = profile(model.step)
    assert work.keys() == {"kernel"}
    assert len(work["kernel"]) == 2


def test_new_options_cost_nothing(profile: Profile, rule: CoordinatewiseLSTM, device: torch.device) -> None:
    model = Model(rule, device, SMALL)
    model.steps(2)
    model.optimizer.param_groups[0]["lr"] = 0.125
    model.optimizer.param_groups[0]["weight_decay"] = 0.5
    work = profile(model.step)
    assert work.keys() == {"kernel"}
    assert len(work["kernel"]) == 1


def test_one_launch_for_an_unroll_backward(profile: Profile, rule: CoordinatewiseLSTM, device: torch.device) -> None:
    weights, grads = rule.flat_weights().detach(), torch.randn(21, 1000, device=device)
    backward = get("triton").unroll_backward

    def run() -> object:
        return backward(rule.spec, weights, grads, torch.ones(21), None)

    run()
    kernels = profile(run)["kernel"]
    assert sum("backward_kernel" in name for name in kernels) == 1


def test_no_step_waits_for_the_device(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    model = Model(rule, device, ragged_shapes(), SMALL)
    model.steps(2)
    with no_waiting():
        model.step()
    model.move_gradients(5)
    with no_waiting():
        model.step()
    model.optimizer.param_groups[0]["lr"] = 0.125
    with no_waiting():
        model.step()


def test_no_backward_of_an_unroll_waits(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    weights, grads = rule.flat_weights().detach(), torch.randn(4, 100, device=device)
    loss_weights = torch.ones(4)
    get("triton").unroll_backward(rule.spec, weights, grads, loss_weights, None)
    with no_waiting():
        get("triton").unroll_backward(rule.spec, weights, grads, loss_weights, None)


@pytest.mark.parametrize("moves", [False, True], ids=["gradients stay", "gradients move"])
def test_the_host_runs_ahead(rule: CoordinatewiseLSTM, device: torch.device, moves: bool) -> None:
    """The device is still busy with what came before when ``step()`` returns, whatever it used to get there."""
    model = Model(rule, device, ragged_shapes())
    model.steps(2)
    if moves:
        model.move_gradients(5)
    busy = torch.cuda.Event()  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        # About a second, in clock cycles.
        torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]
        busy.record()
        model.step()
        assert not busy.query()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)


def test_steady_state_allocates_nothing(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    model = Model(rule, device, ragged_shapes(), SMALL)
    model.steps(2)
    model.step()
    before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
    for _ in range(5):
        model.step()
    assert torch.cuda.memory_stats(device)["allocation.all.allocated"] == before


def test_gradients_that_move_allocate_nothing_on_the_device(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    model = Model(rule, device, ragged_shapes(), SMALL)
    model.steps(3)
    for seed in range(5):
        model.move_gradients(seed)
        before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
        model.step()
        assert torch.cuda.memory_stats(device)["allocation.all.allocated"] == before


def test_a_busy_stream_sees_every_set_of_addresses(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    """Addresses wait in pinned memory for a device that lags behind; none may be overwritten meanwhile."""
    lagging, prompt = (Model(rule, device, ragged_shapes()) for _ in range(2))
    draws = [prompt.gradients(seed) for seed in range(20)]
    for model in (lagging, prompt):
        model.steps(1)
    torch.cuda.synchronize(device)
    with torch.cuda.device(device):
        torch.cuda._sleep(1_000_000_000)  # type: ignore[no-untyped-call]
    for model in (lagging, prompt):
        for draw in draws:
            for param, grad in zip(model.params, draw, strict=True):
                param.grad = grad
            model.step()
            if model is prompt:
                torch.cuda.synchronize(device)
    assert_same(lagging, prompt)

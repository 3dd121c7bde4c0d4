"""The state in 8 bits: its numbers, its steps on every backend, and what of it a checkpoint holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import SIZES, SPECS, make_state, make_weights
from numerics import in_int8
from plain_loop import make_grads, make_params, make_rule, set_grads
from torch import Tensor

from l2l_fast import CoordinatewiseLSTM, LearnedOptimizer, int8
from l2l_fast.backends import Backend

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

SPEC = SPECS["log10"]
NAN, INFINITY = float("nan"), float("inf")


def wide_state(n: int, generator: torch.Generator) -> Tensor:
    """Magnitudes over eight decades."""
    return make_state(n, SPEC, generator) * 10 ** (-8 * torch.rand(n, 2, 2, 20, generator=generator))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def rule(generator: torch.Generator) -> CoordinatewiseLSTM:
    return make_rule(generator)


# The numbers


@pytest.mark.parametrize("hidden_size", [20, 3])
@pytest.mark.parametrize("n", [0, *SIZES])
def test_numbers_are_those_of_the_definition(n: int, hidden_size: int, generator: torch.Generator) -> None:
    state = torch.randn(n, 2, 2, hidden_size, generator=generator)
    state *= 10 ** (-8 * torch.rand(state.shape, generator=generator))
    packed = int8.pack(state)
    assert packed.dtype == torch.int8
    assert packed.is_contiguous()
    assert_same(int8.unpack(packed, n, 4 * hidden_size), in_int8(state)[0])


EDGES = {
    "zeros": [0.0, -0.0],
    "powers of 2": [1.0, 0.5, 2.0**-7, 2.0**-8],
    "ties": [1.0, 1.5 / 64, 2.5 / 64, 3.5 / 64, -1.5 / 64, -2.5 / 64],
    "next to a power of 2": [1 - 2.0**-24, 0.996, 0.995],
    "denormal": [1e-40, -1e-45, 2.0**-126],
    "tiny": [2.0**-119, 2.0**-120, 2.0**-126],
    "huge": [3.4e38, -1e38, 1e30],
    "not finite": [NAN, INFINITY, -INFINITY, 0.25],
    "nothing finite": [NAN] * 16,
}


@pytest.mark.parametrize("values", EDGES.values(), ids=EDGES)
def test_edges(values: list[float]) -> None:
    state = torch.zeros(16, 2, 2, 20)
    state[: len(values)] = torch.tensor(values).view(-1, 1, 1, 1)
    numbers, scales = int8.encode(state)
    assert int(scales.max()) <= 247  # so that its power of 2 and the inverse of that are normal
    read = int8.decode(numbers, scales, 16)
    assert_same(read, in_int8(state)[0])
    assert torch.equal(read.isnan(), ~state.isfinite())


def test_error_is_half_a_step(generator: torch.Generator) -> None:
    """But for the largest, which has no next step to be rounded to."""
    state = wide_state(64, generator)
    read, step = in_int8(state)
    error = (read.double() - state.double()).abs() / step
    assert error.max() < 1
    assert (error[state.abs() < 127 * step] <= 0.5).all()
    assert (state.view(4, 16, -1).abs().amax(1) >= 64 * step.view(4, 16, -1)[:, 0]).all()


def test_stored_again_in_the_same_company_numbers_stay(generator: torch.Generator) -> None:
    state = wide_state(33, generator)
    state[5, 0, 1] = NAN
    once = int8.unpack(int8.pack(state), 33, 80)
    assert_same(int8.unpack(int8.pack(once), 33, 80), once)


# The backends


@pytest.mark.parametrize("n", [0, *SIZES])
def test_packing(backend: Backend, n: int, generator: torch.Generator) -> None:
    state = wide_state(n, generator)
    if n > 1:
        state[1, 1, 0, 2] = NAN
    packed = backend.pack_state(state, torch.int8)
    read = backend.unpack_state(packed, n, SPEC)
    assert packed.dtype == torch.int8
    assert read.dtype == torch.bfloat16
    assert_same(read, in_int8(state)[0])
    assert packed.numel() <= 85 * 64 * -(-n // 64)
    packed.fill_(7)
    assert_same(read, in_int8(state)[0])


@pytest.mark.parametrize("n", [0, 1, 33])
def test_initial_state_is_zero(backend: Backend, n: int) -> None:
    packed = backend.init_state(n, SPEC, torch.int8, torch.device("cpu"))
    assert_same(backend.unpack_state(packed, n, SPEC), torch.zeros(n, 2, 2, 20, dtype=torch.bfloat16))


def gradients(n: int, generator: torch.Generator, *, finite: bool) -> Tensor:
    grad = torch.randn(n, generator=generator) * 10 ** (-8 * torch.rand(n, generator=generator))
    grad[::7] = 0.0
    grad[3::31] = 1e30
    if not finite:
        grad[2::9] = NAN
        grad[5::9] = -INFINITY
    return grad


class Step:
    """One step over tensors of a few sizes, in int8, and in float32 from what int8 has for the state."""

    SIZES = (1, 15, 0, 16, 17, 200)

    def __init__(self, backend: Backend, generator: torch.Generator, *, finite: bool, **options: Any) -> None:
        weights = make_weights(SPEC, generator, "trained")
        prepared = backend.prepare(SPEC, weights)
        self.grads = [gradients(n, generator, finite=finite) for n in self.SIZES]
        self.params = [torch.randn(n, generator=generator) for n in self.SIZES]
        self.before = [in_int8(wide_state(n, generator))[0] for n in self.SIZES]

        self.narrow = [param.clone() for param in self.params]
        states = [backend.pack_state(state, torch.int8) for state in self.before]
        backend.step_(SPEC, prepared, self.narrow, self.grads, states, **options)
        self.states = [backend.unpack_state(s, n, SPEC) for s, n in zip(states, self.SIZES, strict=True)]

        self.wide = [param.clone() for param in self.params]
        states = [backend.pack_state(state, torch.float32) for state in self.before]
        backend.step_(SPEC, prepared, self.wide, self.grads, states, **options)
        self.wide_states = [backend.unpack_state(s, n, SPEC) for s, n in zip(states, self.SIZES, strict=True)]


@pytest.mark.parametrize("options", [{}, {"lr": 0.3, "weight_decay": 0.1, "maximize": True}], ids=["plain", "options"])
@pytest.mark.parametrize("skip_nonfinite", [False, True])
@pytest.mark.parametrize("finite", [True, False])
def test_step_stores_the_float32_result(
    backend: Backend, generator: torch.Generator, finite: bool, skip_nonfinite: bool, options: dict[str, Any]
) -> None:
    """One not finite neither spreads nor counts for the scale; one that is skipped keeps what it had, and counts."""
    step = Step(backend, generator, finite=finite, skip_nonfinite=skip_nonfinite, **options)
    # A product of matrices may be taken in another way, so that a number may fall on the other side of a half.
    steps_off = 1 if backend.name == "triton" else 0
    for narrow, wide in zip(step.narrow, step.wide, strict=True):
        torch.testing.assert_close(narrow, wide, rtol=1e-6 * steps_off, atol=1e-6 * steps_off, equal_nan=True)
    for state, wide_state in zip(step.states, step.wide_states, strict=True):
        expected, size = in_int8(wide_state)
        assert torch.equal(state.isnan(), expected.isnan())
        apart = (state.double() - expected.double()).abs() / size
        assert not len(state) or apart.nan_to_num().max() <= steps_off
    if skip_nonfinite:
        for param, narrow, grad, before, state in zip(
            step.params, step.narrow, step.grads, step.before, step.states, strict=True
        ):
            skipped = ~grad.isfinite()
            assert torch.equal(narrow[skipped], param[skipped])
            assert torch.isfinite(state[skipped]).all()
            if not skipped.any():
                continue
            # To within what its neighbours' new scale resolves.
            assert ((state - before)[skipped].abs() <= in_int8(state)[1][skipped]).all()
    elif not finite:
        assert all(state[~grad.isfinite()].isnan().all() for state, grad in zip(step.states, step.grads, strict=True))


def test_results_do_not_depend_on_the_number_of_threads(backend: Backend, rule: CoordinatewiseLSTM) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        params = make_params([(1000,)], generator)
        optimizer = LearnedOptimizer(params, rule, backend=backend.name, state_dtype=torch.int8)
        set_grads(params, make_grads(params, generator))
        for _ in range(2):
            optimizer.step()
        results.append((params[0].detach(), optimizer.state_dict()["state"][0]["lstm"]))
    for one, two in zip(*results, strict=True):
        assert_same(one, two)


# Checkpoints


def stepped(rule: CoordinatewiseLSTM, generator: torch.Generator, **options: Any) -> tuple[LearnedOptimizer, Any]:
    params = make_params([(33,), (3, 5)], generator)
    optimizer = LearnedOptimizer(params, rule, **options)
    for _ in range(3):
        set_grads(params, make_grads(params, generator))
        optimizer.step()
    return optimizer, params


def test_what_pads_a_tile_leaves_no_trace(backend: Backend, rule: CoordinatewiseLSTM) -> None:
    """A checkpoint does not hold it, so that it must not count for a scale: whether it was stepped or is fresh."""
    generator = torch.Generator().manual_seed(0)
    optimizer, params = stepped(rule, generator, backend=backend.name, state_dtype=torch.int8)
    twin_params = [torch.nn.Parameter(param.detach().clone()) for param in params]
    twin = LearnedOptimizer(twin_params, rule, backend=backend.name, state_dtype=torch.int8)
    twin.load_state_dict(optimizer.state_dict())
    grads = make_grads(params, generator)
    for _ in range(3):
        for group, each in ((params, optimizer), (twin_params, twin)):
            set_grads(group, grads)
            each.step()
    for one, two in zip(params, twin_params, strict=True):
        assert torch.equal(one, two)
    for key, entry in optimizer.state_dict()["state"].items():
        assert torch.equal(entry["lstm"], twin.state_dict()["state"][key]["lstm"])


def test_checkpoint_is_of_bfloat16_and_widens(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    optimizer, params = stepped(rule, generator, state_dtype=torch.int8)
    saved = optimizer.state_dict()
    assert {entry["lstm"].dtype for entry in saved["state"].values()} == {torch.bfloat16}
    assert saved["state"][1]["lstm"].shape == (3, 5, 2, 2, 20)
    for wider in (torch.bfloat16, torch.float32):
        other = LearnedOptimizer(params, rule, state_dtype=wider)
        other.load_state_dict(saved)
        for key, entry in other.state_dict()["state"].items():
            assert entry["lstm"].dtype == wider
            assert torch.equal(entry["lstm"], saved["state"][key]["lstm"].to(wider))


def test_in_other_company_numbers_are_rounded_to_its_step(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """As when a parameter is sharded otherwise than when it was saved."""
    optimizer, _ = stepped(rule, generator, state_dtype=torch.int8)
    saved = optimizer.state_dict()
    shifted = saved["state"][0]["lstm"][7:]
    part = LearnedOptimizer(make_params([(26,)], generator), rule, state_dtype=torch.int8)
    state_dict = part.state_dict()
    state_dict["state"] = {0: {"lstm": shifted}}
    part.load_state_dict(state_dict)
    assert_same(part.state_dict()["state"][0]["lstm"], in_int8(shifted)[0])


def test_conversion(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    optimizer, params = stepped(rule, generator)
    exact = [entry["lstm"] for entry in optimizer.state_dict()["state"].values()]
    optimizer.convert_state(torch.int8)
    assert optimizer.state_dtype == torch.int8
    narrow = [entry["lstm"] for entry in optimizer.state_dict()["state"].values()]
    for state, right in zip(narrow, exact, strict=True):
        assert_same(state.view(-1, 80), in_int8(right.reshape(-1, 80))[0])
    set_grads(params, make_grads(params, generator))
    optimizer.step()
    narrow = [entry["lstm"] for entry in optimizer.state_dict()["state"].values()]
    optimizer.convert_state(torch.float32)
    for entry, right in zip(optimizer.state_dict()["state"].values(), narrow, strict=True):
        assert_same(entry["lstm"], right.float())


def test_infinity_has_no_room(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    optimizer, _ = stepped(rule, generator)
    state_dict = optimizer.state_dict()
    state_dict["state"][0]["lstm"][3, 0, 1, 2] = INFINITY
    optimizer.load_state_dict(state_dict)
    with pytest.raises(ValueError, match=r"reaches inf, too large for torch.int8; keep torch.float32"):
        optimizer.convert_state(torch.int8)
    state_dict["state"][0]["lstm"][3, 0, 1, 2] = 3.4e38
    optimizer.load_state_dict(state_dict)
    optimizer.convert_state(torch.int8)
    assert optimizer.state_dict()["state"][0]["lstm"][3, 0, 1, 2] > 3.3e38


def test_memory(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """85 bytes a coordinate: of one that is not padded, that is."""
    params = make_params([(64,)], generator)
    optimizer = LearnedOptimizer(params, rule, state_dtype=torch.int8)
    set_grads(params, make_grads(params, generator))
    optimizer.step()
    assert optimizer.state[params[0]]["lstm"].nbytes == 85 * 64

"""Optimizer and unroll on a device: storage, size, non-finite gradients, checkpoints, compilation, mixed devices."""

from __future__ import annotations

import logging

import pytest
import torch
from cuda_models import Model, assert_same
from numerics import assert_as_good_as_eager, in_int8, ulps_apart
from plain_loop import make_rule
from torch import Tensor

import l2l_fast
from l2l_fast import CoordinatewiseLSTM, reference
from l2l_fast.backends import get, resolve
from l2l_fast.optim import LearnedOptimizer
from l2l_fast.problems import Quadratic

SHAPES = [(5,), (70,), (3, 4), (), (0,), (130,)]
STORAGE = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def rule(generator: torch.Generator, device: torch.device) -> CoordinatewiseLSTM:
    return make_rule(generator).to(device)


def same_bits(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.hardware
def test_the_automatic_choice_is_triton(
    rule: CoordinatewiseLSTM, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="l2l_fast")
    for dtype in STORAGE:
        assert resolve(None, device, dtype, rule.spec).name == "triton"
    assert not caplog.records
    assert l2l_fast.backends()["triton"] is None


# Numbers


def by_hand(rule: CoordinatewiseLSTM, model: Model, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Updates by the reference, and what the next state is, of each parameter."""
    weights = rule.flat_weights().detach()
    results = [
        reference.step(rule.spec, weights, param.grad.float().flatten(), state.float())
        for param, state in zip(model.params, states, strict=True)
        if param.grad is not None
    ]
    return torch.cat([update for update, _ in results]), [state for _, state in results]


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_int8_storage(rule: CoordinatewiseLSTM, device: torch.device, dtype: torch.dtype) -> None:
    """Each of three steps is that of the reference from what is stored, and stored to within a step of int8."""
    model = Model(rule, device, SHAPES, dtype=dtype, state_dtype=torch.int8)
    states = [torch.zeros(param.numel(), 2, 2, 20, device=device) for param in model.params]
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for seed in range(3):
        before = model.flat().float()
        model.move_gradients(seed)
        update, right = by_hand(rule, model, states)
        model.step()
        torch.testing.assert_close(model.flat().float(), before + update.cpu(), rtol=0, atol=tolerance)
        stored = model.flat_states()
        assert stored.dtype == torch.bfloat16
        states = list(torch.split(stored.to(device), [param.numel() for param in model.params]))
        for state, exact in zip(states, right, strict=True):
            if len(exact):
                _, steps = in_int8(exact.cpu())
                assert ((state.cpu().double() - exact.cpu().double()).abs() <= steps).all()


def test_int8_nonfinite_gradients(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    """They make NaN of their coordinate, and have no part in what its neighbours share."""
    n = 200
    bad = torch.arange(n) % 5 == 0
    few, all_of_them = (Model(rule, device, [(n,)], state_dtype=torch.int8) for _ in range(2))
    for model in (few, all_of_them):
        model.steps(1)
        model.move_gradients(1)
    for model, value in ((few, float("nan")), (all_of_them, float("inf"))):
        grad = model.params[0].grad
        assert grad is not None
        grad[bad.to(device)] = value
        model.step()
        assert model.flat()[bad].isnan().all()
        assert model.flat_states()[bad].isnan().all()
        assert model.flat()[~bad].isfinite().all()
        assert model.flat_states()[~bad].isfinite().all()
    same_bits(few.flat(), all_of_them.flat())
    same_bits(few.flat_states(), all_of_them.flat_states())


@pytest.mark.parametrize("state_dtype", STORAGE, ids=str)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_storage(rule: CoordinatewiseLSTM, device: torch.device, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    """One step rounds what float32 storage keeps; three steps go the way of the reference."""
    narrow = Model(rule, device, SHAPES, dtype=dtype, state_dtype=state_dtype)
    wide = Model(rule, device, SHAPES)
    with torch.no_grad():
        for param, same in zip(wide.params, narrow.params, strict=True):
            param.copy_(same)
    narrow.move_gradients(0)
    for param, same in zip(wide.params, narrow.params, strict=True):
        assert same.grad is not None
        param.grad = same.grad.float()
    narrow.step()
    wide.step()
    same_bits(narrow.flat(), wide.flat().to(dtype))
    state = narrow.flat_states()
    assert state.dtype == state_dtype
    if state_dtype == torch.float32:
        same_bits(state, wide.flat_states())
    else:
        assert ulps_apart(state, wide.flat_states().to(state_dtype)).max() <= 1

    loop = Model(rule, device, SHAPES, dtype=dtype, state_dtype=state_dtype, backend="reference")
    loop.steps(3)
    narrow.steps(2, first=1)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
    bound = max(tolerance[dtype], tolerance[state_dtype])
    torch.testing.assert_close(narrow.flat(), loop.flat(), rtol=0, atol=bound)
    torch.testing.assert_close(narrow.flat_states(), loop.flat_states(), rtol=0, atol=tolerance[state_dtype] * 4)


@pytest.mark.parametrize("skip", [False, True], ids=["propagated", "skipped"])
@pytest.mark.parametrize("state_dtype", STORAGE, ids=str)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_nonfinite_gradients(
    rule: CoordinatewiseLSTM, device: torch.device, dtype: torch.dtype, state_dtype: torch.dtype, skip: bool
) -> None:
    bad_ones, clean = (
        Model(rule, device, [(200,)], dtype=dtype, state_dtype=state_dtype, skip_nonfinite=skip) for _ in range(2)
    )
    bad = torch.arange(200) % 5 == 0
    specials = torch.tensor([float("inf"), float("-inf"), float("nan")])[torch.arange(200) // 5 % 3].to(device, dtype)
    for model in (bad_ones, clean):
        model.steps(1)
        model.move_gradients(1)
    before = bad_ones.flat(), bad_ones.flat_states()
    grad = bad_ones.params[0].grad
    assert grad is not None
    grad[bad.to(device)] = specials[bad.to(device)]
    for model in (bad_ones, clean):
        model.step()
    for now, then, other in zip(
        (bad_ones.flat(), bad_ones.flat_states()), before, (clean.flat(), clean.flat_states()), strict=True
    ):
        same_bits(now[~bad], other[~bad])
        if skip:
            same_bits(now[bad], then[bad])
        else:
            assert now[bad].isnan().all()


def test_grad_scaler_skips_a_step_with_infinities(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    model = Model(rule, device, [(70,)], dtype=torch.float32)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    (param,) = model.params
    before = model.flat()

    def train(factor: float) -> None:
        model.optimizer.zero_grad()
        torch.autograd.backward(scaler.scale((factor * param.square()).sum()))
        scaler.step(model.optimizer)
        scaler.update()

    train(float("inf"))
    same_bits(model.flat(), before)
    assert scaler.get_scale() == 2.0**9
    train(1.0)
    moved = model.flat()
    assert moved.isfinite().all()
    assert (moved != before).all()


def test_reference_serves_the_device(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    """What is not served by the kernels falls back to it: other sizes, other dtypes."""
    fused = Model(rule, device, SHAPES)
    plain = Model(rule, device, SHAPES, backend="reference")
    fused.steps(3)
    plain.steps(3)
    torch.testing.assert_close(fused.flat(), plain.flat(), rtol=0, atol=1e-5)
    torch.testing.assert_close(fused.flat_states(), plain.flat_states(), rtol=0, atol=1e-5)
    other = make_rule(torch.Generator().manual_seed(0), hidden_size=6).to(device)
    assert resolve(None, device, torch.float32, other.spec).name == "reference"
    Model(other, device, SHAPES, backend="reference").steps(2)


def test_unroll_equals_the_cpu(generator: torch.Generator, device: torch.device) -> None:
    """The meta-gradient through problem, steps and backward is as good as float32 PyTorch's."""
    rule = make_rule(generator)
    instances = Quadratic(10).sample(32, generator=torch.Generator().manual_seed(1))

    def meta_gradient(rule: CoordinatewiseLSTM, backend: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        here = type(instances)(instances.w.to(device, dtype), instances.y.to(device, dtype), 0.1)
        start = here.init(generator=torch.Generator().manual_seed(2))
        rule = rule.to(device, dtype)
        run = l2l_fast.unroll(rule, here, steps=5, params=start, backend=backend)
        gradients = torch.autograd.grad(run.loss, list(rule.parameters()))
        return torch.cat([gradient.reshape(-1) for gradient in gradients]).cpu()

    cpu = torch.device("cpu")
    exact = meta_gradient(rule, "reference", cpu, torch.float64)
    eager = meta_gradient(rule, "reference", cpu, torch.float32)
    assert_as_good_as_eager(
        "meta-gradient", meta_gradient(rule, "triton", device, torch.float32), eager, exact, factor=4
    )


def test_same_bits_every_time(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    """Also with other work in between, which moves memory around and warms other caches."""
    n = 100_000 if device.type == "cuda" else 200
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(5, n, generator=generator).to(device)
    state = torch.randn(n, 2, 2, 20, generator=generator).to(device)
    weights, backend = rule.flat_weights().detach(), get("triton")

    def everything() -> list[Tensor]:
        param, packed = grads[0].clone(), backend.pack_state(state, torch.float32)
        prepared = backend.prepare(rule.spec, weights)
        backend.step_(rule.spec, prepared, [param], [grads[1]], [packed])
        unrolled = backend.unroll_backward(rule.spec, weights, grads, torch.ones(5), state)
        assert unrolled[1] is not None
        return [
            param,
            packed,
            *backend.step(rule.spec, weights, grads[0], state),
            *backend.step_backward(rule.spec, weights, grads[0], state, grads[1], state),
            unrolled[0],
            unrolled[1],
        ]

    first = everything()
    for round_ in range(5 if device.type == "cuda" else 1):
        noise = torch.randn((round_ + 1) * n, device=device).sort()
        for one, two in zip(first, everything(), strict=True):
            same_bits(two, one)
        del noise


@pytest.mark.hardware
def test_more_state_than_32_bit_indices_reach(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    n = 27_000_000
    assert n * 80 > 2**31
    generator = torch.Generator(device).manual_seed(0)
    large = torch.nn.Parameter(torch.zeros(n, device=device))
    places = torch.cat([torch.arange(1000), torch.arange(2**24, 2**24 + 1000), torch.arange(n - 1000, n)]).to(device)
    few = torch.nn.Parameter(torch.zeros(len(places), device=device))
    optimizers = [
        LearnedOptimizer([param], rule, backend="triton", state_dtype=torch.float16) for param in (large, few)
    ]
    grads = []
    for _ in range(3):  # the later steps see the state
        large.grad = torch.randn(n, generator=generator, device=device)
        few.grad = large.grad[places]
        grads.append(few.grad)
        for optimizer in optimizers:
            optimizer.step()
    same_bits(large.detach()[places], few.detach())

    state, total = torch.zeros(len(places), 2, 2, 20, dtype=torch.float16, device=device), torch.zeros_like(few)
    weights = rule.flat_weights().detach()
    for grad in grads:
        update, new_state = reference.step(rule.spec, weights, grad, state)
        total += update
        state = new_state.half()
    torch.testing.assert_close(few.detach(), total, rtol=0, atol=4e-3)


@pytest.mark.hardware
def test_more_gradients_than_32_bit_indices_reach(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    """Coordinates whose gradients are all zero have no part in the meta-gradient, so the last ones make all of it."""
    n, steps = 22_000_000, 100
    assert (steps + 1) * n > 2**31
    weights, backend = rule.flat_weights().detach(), get("triton")
    some = torch.randn(steps + 1, 1000, generator=torch.Generator().manual_seed(0)).to(device)
    grads = torch.zeros(steps + 1, n, device=device)
    grads[:, -1000:] = some
    d_weights, _ = backend.unroll_backward(rule.spec, weights, grads, torch.ones(steps + 1), None)
    expected, _ = backend.unroll_backward(rule.spec, weights, some, torch.ones(steps + 1), None)
    torch.testing.assert_close(d_weights, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


# Checkpoints


def resumed(model: Model, rule: CoordinatewiseLSTM, device: torch.device, backend: str) -> Model:
    """Another model that goes on from where ``model`` is."""
    other = Model(rule, device, SHAPES, backend=backend)
    with torch.no_grad():
        for param, same in zip(other.params, model.params, strict=True):
            param.copy_(same)
    other.optimizer.load_state_dict(model.optimizer.state_dict())
    return other


def test_a_run_moves_from_the_cpu_to_the_device_and_back(generator: torch.Generator, device: torch.device) -> None:
    there, cpu = make_rule(generator).to(device), torch.device("cpu")
    here = CoordinatewiseLSTM()
    here.load_state_dict(there.state_dict())
    stays = Model(here, cpu, SHAPES, backend="cpu")
    moves = Model(here, cpu, SHAPES, backend="cpu")
    stays.steps(6)
    moves.steps(2)
    moves = resumed(moves, there, device, "triton")
    moves.steps(2, first=2)
    moves = resumed(moves, here, cpu, "cpu")
    moves.steps(2, first=4)
    torch.testing.assert_close(moves.flat(), stays.flat(), rtol=0, atol=1e-5)
    torch.testing.assert_close(moves.flat_states(), stays.flat_states(), rtol=0, atol=1e-5)


def test_resuming_on_the_device_is_exact(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    whole, parts = (Model(rule, device, SHAPES) for _ in range(2))
    whole.steps(4)
    parts.steps(2)
    parts = resumed(parts, rule, device, "triton")
    parts.steps(2, first=2)
    assert_same(parts, whole)


# Compilation


def test_compiled_training_step(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    """A training step compiled with the optimizer inside does what the plain one does, bit for bit."""
    torch.compiler.reset()
    plain, compiled = (Model(rule, device, [(5,), (70,), (3, 4)]) for _ in range(2))

    def training_step(model: Model) -> None:
        model.optimizer.zero_grad()
        loss = torch.stack([param.square().sum() for param in model.params]).sum()
        torch.autograd.backward(loss)
        model.step()

    fast = torch.compile(training_step, backend="inductor" if device.type == "cuda" else "aot_eager")
    for _ in range(3):
        training_step(plain)
        fast(compiled)
    assert_same(compiled, plain)


# Mixed devices


@pytest.mark.hardware
def test_one_optimizer_for_two_devices(generator: torch.Generator, device: torch.device) -> None:
    rule = make_rule(generator)
    here, there = Model(rule, torch.device("cpu"), SHAPES, backend="cpu"), Model(rule, device, SHAPES)
    both = Model(rule, torch.device("cpu"), SHAPES, backend="cpu"), Model(rule, device, SHAPES)
    shared = LearnedOptimizer([param for model in both for param in model.params], rule)
    for seed in range(3):
        for model in (here, there):
            model.move_gradients(seed)
            model.step()
        for model in both:
            model.move_gradients(seed)
        shared.step()
    same_bits(both[0].flat(), here.flat())
    same_bits(both[1].flat(), there.flat())


@pytest.mark.hardware
def test_a_model_that_moved_away_from_its_state(rule: CoordinatewiseLSTM, device: torch.device) -> None:
    param = torch.nn.Parameter(torch.ones(5))
    optimizer = LearnedOptimizer([param], rule)
    param.grad = torch.ones(5)
    optimizer.step()
    param.data = param.data.to(device)
    param.grad = torch.ones(5, device=device)
    with pytest.raises(RuntimeError, match=r"is on cuda.* but its state is on cpu.*state_dict"):
        optimizer.step()


@pytest.mark.hardware
def test_tensors_of_the_cpu_are_refused_by_name(rule: CoordinatewiseLSTM) -> None:
    with pytest.raises(RuntimeError, match=r"backend='triton' can't be used: .*not on cpu"):
        LearnedOptimizer([torch.nn.Parameter(torch.ones(5))], rule, backend="triton")


@pytest.mark.hardware
@pytest.mark.parametrize("elsewhere", ["weights", "grad", "state"])
def test_mixed_devices_in_a_step_are_refused(rule: CoordinatewiseLSTM, device: torch.device, elsewhere: str) -> None:
    if elsewhere == "weights":
        rule = rule.cpu()
    grad = torch.ones(5, device="cpu" if elsewhere == "grad" else device)
    state = rule.init_state(5, device="cpu" if elsewhere == "state" else device)
    with pytest.raises((ValueError, RuntimeError), match=r"(?s)cpu.*cuda|cuda.*cpu"):
        rule(grad, state)


@pytest.mark.hardware
def test_mixed_devices_in_an_unroll_are_refused(rule: CoordinatewiseLSTM) -> None:
    instances = Quadratic(10).sample(2, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match=r"is on cpu but the rule is on cuda"):
        l2l_fast.unroll(rule, instances, steps=2)

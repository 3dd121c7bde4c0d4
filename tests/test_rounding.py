"""Random rounding: right on average, the same again from the same seed, and what small updates need in 16 bits."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_loop import make_grads, make_params, make_rule, set_grads
from torch import Tensor, nn

from l2l_fast import LearnedOptimizer
from l2l_fast.backends import Backend
from l2l_fast.experiments import rounding as experiment
from l2l_fast.rounding import round_

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.bfloat16, torch.float16]


def rounded(source: Tensor, dtype: torch.dtype, seed: int = 0) -> Tensor:
    target = torch.full(source.shape, float("nan"), dtype=dtype)
    round_(target, source, torch.Generator().manual_seed(seed))
    return target


NUMBERS: dict[torch.dtype, list[float]] = {
    torch.bfloat16: [1.001, -1.0077, 3.14159, -1e-30, 2.9e38, 1e-40, -(1.0 + 2**-20)],
    torch.float16: [1.0001, -1.00097, 3.14159, 60000.7, -(2.0**-14) * 1.0003, 6.1e-5, -3.3e-6, 7.3e-8, 1e-9],
}


@pytest.mark.parametrize(("dtype", "number"), [(dtype, x) for dtype in DTYPES for x in NUMBERS[dtype]], ids=str)
def test_rounds_to_a_neighbour_and_is_unbiased(dtype: torch.dtype, number: float) -> None:
    draws = 40_000
    source = torch.full((draws,), number)
    result = rounded(source, dtype).double()
    number = source[0].double().item()
    values = sorted(set(result.tolist()))
    nearest = source[:1].to(dtype).double().item()
    assert nearest in values or len(values) == 1
    low, high = values[0], values[-1]
    assert len(values) <= 2
    assert low <= number <= high or len(values) == 1
    step = high - low
    if len(values) == 2:
        bits = torch.tensor(values, dtype=torch.float64).to(dtype).view(torch.int16).int()
        assert (bits[1] - bits[0]).abs() == 1  # nothing lies between
    else:  # so near a number of the dtype that the other neighbour may not turn up
        ulp = max(abs(number) * torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
        assert abs(number - low) < 1e-3 * ulp
        step = ulp
    probability = (number - low) / step
    sigma = step * max(probability * (1 - probability), 1 / draws) ** 0.5 / draws**0.5
    assert abs(result.mean().item() - number) < 5 * sigma


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_the_dtype_are_kept(dtype: torch.dtype) -> None:
    """All of them: both zeros, subnormals, infinities, and NaN as NaN."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    result = rounded(every.float(), dtype)
    number = ~every.isnan()
    assert torch.equal(result[number].view(torch.int16), every[number].view(torch.int16))
    assert result[~number].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_of_range_is_as_to_nearest(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    every_nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    source = torch.cat([torch.tensor([largest, largest * (1 + 2**-14), -largest * (1 + 2**-14), 3.4e38]), every_nan])
    for seed in range(20):
        torch.testing.assert_close(rounded(source, dtype, seed), source.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_updates_below_half_a_unit_do_not_vanish(dtype: torch.dtype) -> None:
    """300 updates of 1/20 of a unit in the last place: lost by rounding to nearest, kept on average at random."""
    update = torch.finfo(dtype).eps / 20
    ends = {}
    for name in ("nearest", "random"):
        param = nn.Parameter(torch.ones(512, dtype=dtype))
        rule = experiment.constant_rule(update)
        optimizer = LearnedOptimizer([param], rule, stochastic_rounding=name == "random")
        param.grad = torch.zeros_like(param)
        for _ in range(300):
            optimizer.step()
        ends[name] = param.detach().double()
    exact = 1 + 300 * update
    assert torch.equal(ends["nearest"], torch.ones(512, dtype=torch.float64))
    spread = (300 / 20 * torch.finfo(dtype).eps ** 2 / 512) ** 0.5  # variance of a step: below update * eps
    assert abs(ends["random"].mean().item() - exact) < 5 * spread
    assert len(set(ends["random"].tolist())) > 5  # coordinates are rounded independently


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_parameters_are_stepped_as_ever(generator: torch.Generator, dtype: torch.dtype) -> None:
    rule = make_rule(generator)
    params = make_params([(7,), (3, 5)], generator, dtype)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    pair = LearnedOptimizer(params, rule), LearnedOptimizer(twins, rule, stochastic_rounding=True)
    grads = make_grads(params, generator)
    for optimizer, tensors in zip(pair, (params, twins), strict=True):
        set_grads(tensors, grads)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


SHAPES = [(), (7,), (0,), (3, 5), (40,)]


def run(optimizer: LearnedOptimizer, generator: torch.Generator, steps: int = 2) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        set_grads(params, make_grads(params, generator))
        optimizer.step()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_in_float32_and_rounds_once(backend: Backend, generator: torch.Generator, dtype: torch.dtype) -> None:
    """With every other option on; the state is that of the step in float32."""
    rule = make_rule(generator)
    options: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.1, "maximize": True, "skip_nonfinite": True, "warmup": 3}
    narrow = make_params(SHAPES, generator, dtype)
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    rough = LearnedOptimizer(narrow, rule, stochastic_rounding=True, backend=backend.name, **options)
    exact = LearnedOptimizer(wide, rule, backend=backend.name, **options)
    grads = make_grads(narrow, generator)
    grads[4][3] = float("inf")
    set_grads(narrow, grads)
    set_grads(wide, [grad.float() for grad in grads])
    rough.step()
    exact.step()
    for a, b in zip(narrow, wide, strict=True):
        assert ((a.float() - b).abs() <= torch.finfo(dtype).eps * b.abs().clamp(min=1e-4)).all()
    for key, entry in exact.state_dict()["state"].items():
        assert torch.equal(rough.state_dict()["state"][key]["lstm"], entry["lstm"])


def test_gradient_is_not_rounded_before_the_step(generator: torch.Generator) -> None:
    """A float32 gradient of a bfloat16 parameter counts with all its digits."""
    rule = make_rule(generator)
    states = []
    for dtype in (torch.bfloat16, torch.float32):
        param = nn.Parameter(torch.ones(20, dtype=dtype))
        optimizer = LearnedOptimizer([param], rule, stochastic_rounding=True)
        param.grad_dtype = torch.float32
        param.grad = torch.linspace(1.001, 1.003, 20)
        optimizer.step()
        states.append(optimizer.state_dict()["state"][0]["lstm"])
    assert torch.equal(*states)


def through_file(pair: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def by_state_dict(pair: tuple[list[nn.Parameter], LearnedOptimizer]) -> tuple[list[nn.Parameter], LearnedOptimizer]:
    params, optimizer = pair
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    assert optimizer.rule is not None
    resumed = LearnedOptimizer(copies, optimizer.rule, backend=optimizer.backend)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    return copies, resumed


WAYS: dict[str, Callable[[Any], Any]] = {
    "state dict": by_state_dict,
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "file": through_file,
}


@pytest.mark.parametrize("way", WAYS)
def test_exact_resume(backend: Backend, generator: torch.Generator, way: str) -> None:
    """With every option that keeps something from step to step or reads it."""
    params = make_params(SHAPES, generator, torch.bfloat16)
    optimizer = LearnedOptimizer(
        params, make_rule(generator), warmup=5, max_update_norm=0.5, stochastic_rounding=True, rounding_seed=3,
        backend=backend.name,
    )  # fmt: skip
    run(optimizer, generator)
    twins, twin = WAYS[way]((params, optimizer))
    other = torch.Generator()
    other.set_state(generator.get_state())
    run(optimizer, generator)
    run(twin, other)
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))
    assert twin.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_random_numbers_differ_by_seed_group_and_step() -> None:
    seen: list[Tensor] = []
    for seed in (0, 0, 1):
        params = [nn.Parameter(torch.ones(200, dtype=torch.bfloat16)) for _ in range(3)]
        groups = [{"params": params[:2]}, {"params": params[2:]}]
        optimizer = LearnedOptimizer(
            groups, experiment.constant_rule(2**-8), stochastic_rounding=True, rounding_seed=seed
        )
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        optimizer.step()
        first = [p.detach().clone() for p in params]
        with torch.no_grad():
            for param in params:
                param.fill_(1.0)
        optimizer.step()
        optimizer.step()
        seen += [*first, params[0].detach()]
    same, other = seen[:4], seen[8:]
    assert all(torch.equal(a, b) for a, b in zip(same, seen[4:8], strict=True))
    different = [*same, *other]
    assert not any(torch.equal(a, b) for k, a in enumerate(different) for b in different[:k])


def test_noncontiguous_parameter(backend: Backend, generator: torch.Generator) -> None:
    rule = make_rule(generator)
    start = torch.rand(6, 4, generator=generator).bfloat16()
    grad = torch.randn(4, 6, generator=generator).bfloat16()
    ends = []
    for param in (start.t().requires_grad_(), start.t().contiguous().requires_grad_()):
        optimizer = LearnedOptimizer([param], rule, stochastic_rounding=True, backend=backend.name)
        for _ in range(2):
            param.grad = grad.clone()
            optimizer.step()
        ends.append(param.detach())
    assert torch.equal(*ends)
    assert not ends[0].is_contiguous()


def test_grad_scaler_skips_steps(generator: torch.Generator) -> None:
    """A step that the scaler skips is none: parameter, warm-up and random numbers are as without it.

    bfloat16, as the scaler refuses to unscale gradients of float16.
    """
    rule = make_rule(generator)
    start = torch.rand(20, generator=generator).bfloat16()
    target = torch.randn(20, generator=generator).bfloat16()
    ends, counts = [], []
    for factors in ((1.0, float("inf"), 1.0, float("nan"), 1.0), (1.0, 1.0, 1.0)):
        param = nn.Parameter(start.clone())
        optimizer = LearnedOptimizer([param], rule, stochastic_rounding=True, warmup=4, max_update_norm=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, backoff_factor=0.5)
        for factor in factors:
            optimizer.zero_grad()
            torch.autograd.backward(scaler.scale((param - target).square().sum() * factor))
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([param], 100.0)
            scaler.step(optimizer)
            scaler.update()
        ends.append(param.detach())
        counts.append(optimizer.param_groups[0]["step"])
    assert counts == [3, 3]
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], start)


def test_measured_loss_of_small_updates() -> None:
    """The command behind the table in docs/options.md, at a smaller size."""
    for unit in (0.49, 0.1):
        arrived = experiment.vanishing(unit, coordinates=512, steps=200).arrived
        assert arrived["float32"] == pytest.approx(1, abs=1e-3)
        assert arrived["bfloat16, to nearest"] == 0
        assert arrived["bfloat16, at random"] == pytest.approx(1, abs=0.02)
    losses = experiment.quadratics(functions=32, steps=20)
    assert losses.keys() == experiment.WAYS.keys()
    assert all(0 < loss < 10 for loss in losses.values())

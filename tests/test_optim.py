"""LearnedOptimizer steps as the plain loop over the reference does."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_loop import (
    PlainLoop,
    assert_params_close,
    assert_states_close,
    make_grads,
    make_params,
    make_rule,
    set_grads,
    states_of,
)
from torch import Tensor, nn

from l2l_fast import CoordinatewiseLSTM, Identity, LogAndSign
from l2l_fast.backends import Backend, get
from l2l_fast.optim import LearnedOptimizer
from l2l_fast.storage import public_dtype

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(), (1,), (7,), (0,), (3, 5), (16,), (2, 3, 4), (33,), (4, 0, 2)]


@pytest.fixture
def rule(generator: torch.Generator) -> CoordinatewiseLSTM:
    return make_rule(generator)


@pytest.mark.parametrize("preprocess", [LogAndSign(), LogAndSign(5.0), Identity()], ids=str)
def test_many_shapes(backend: Backend, generator: torch.Generator, preprocess: LogAndSign | Identity) -> None:
    rule = make_rule(generator, preprocess=preprocess)
    params = make_params(SHAPES, generator)
    optimizer = LearnedOptimizer(params, rule, backend=backend.name)
    loop = PlainLoop(params, rule)
    for _ in range(4):
        grads = make_grads(params, generator)
        set_grads(params, grads)
        optimizer.step()
        loop.step(grads)
    assert_params_close(params, loop)
    assert_states_close(states_of(optimizer), loop)
    for param, grad in zip(params, grads, strict=True):
        assert param.grad is not None
        torch.testing.assert_close(param.grad, grad, rtol=0, atol=0)


def test_update_is_large_enough_to_test_with(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(100,)], generator)
    before = params[0].detach().clone()
    set_grads(params, make_grads(params, generator))
    LearnedOptimizer(params, rule).step()
    assert (params[0] - before).abs().median() > 0.01


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(
    backend: Backend,
    rule: CoordinatewiseLSTM,
    generator: torch.Generator,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
) -> None:
    params = make_params([(17,), (3, 5)], generator, dtype)
    optimizer = LearnedOptimizer(params, rule, backend=backend.name, state_dtype=state_dtype)
    loop = PlainLoop(params, rule, state_dtype)
    for _ in range(3):
        grads = make_grads(params, generator)
        set_grads(params, grads)
        optimizer.step()
        loop.step(grads)
    assert_params_close(params, loop, state_dtype)
    assert {p.dtype for p in params} == {dtype}
    assert {state.dtype for state in states_of(optimizer)} == {public_dtype(state_dtype)}


def test_mixed_dtypes_in_one_group(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """Also float64, which the automatic choice leaves to the reference."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float64)
    params = [make_params([(9,)], generator, dtype)[0] for dtype in dtypes]
    optimizer = LearnedOptimizer(params, rule)
    loop = PlainLoop(params, rule)
    for _ in range(3):
        grads = make_grads(params, generator)
        set_grads(params, grads)
        optimizer.step()
        loop.step(grads)
    assert_params_close(params, loop)
    assert [p.dtype for p in params] == list(dtypes)


def test_rule_of_float64_computes_in_float64(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    rule = rule.double()
    params = make_params([(50,)], generator, torch.float64)
    optimizer = LearnedOptimizer(params, rule)
    loop = PlainLoop(params, rule)
    grads = make_grads(params, generator)
    set_grads(params, grads)
    optimizer.step()
    loop.step(grads)
    torch.testing.assert_close(params[0].detach(), loop.params[0], rtol=0, atol=1e-14)


def test_groups_with_their_own_options(backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    first, second = make_params([(20,), (5,)], generator), make_params([(3, 3)], generator)
    groups: list[dict[str, Any]] = [
        {"params": first},
        {"params": second, "lr": 0.3, "weight_decay": 0.5, "maximize": True},
    ]
    optimizer = LearnedOptimizer(groups, rule, lr=0.7, weight_decay=0.1, backend=backend.name)
    loops = PlainLoop(first, rule), PlainLoop(second, rule)
    for _ in range(3):
        grads = make_grads(first, generator), make_grads(second, generator)
        set_grads(first + second, grads[0] + grads[1])
        optimizer.step()
        loops[0].step(grads[0], lr=0.7, weight_decay=0.1)
        loops[1].step(grads[1], lr=0.3, weight_decay=0.5, maximize=True)
    assert_params_close(first, loops[0])
    assert_params_close(second, loops[1])


def test_weight_decay_is_decoupled(backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """The state and the update do not depend on it; at gradient and update 0 only the decay is left."""
    with torch.no_grad():
        rule.output.weight.zero_()
        rule.output.bias.zero_()
    params = make_params([(40,)], generator)
    before = params[0].detach().clone()
    set_grads(params, make_grads(params, generator))
    LearnedOptimizer(params, rule, lr=0.5, weight_decay=0.25, backend=backend.name).step()
    torch.testing.assert_close(params[0].detach(), (1 - 0.5 * 0.25) * before, rtol=1e-6, atol=0)


def test_maximize_is_minimizing_the_negative(
    backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator
) -> None:
    params = make_params([(40,)], generator)
    negated = [nn.Parameter(p.detach().clone()) for p in params]
    ascent = LearnedOptimizer(params, rule, maximize=True, backend=backend.name)
    descent = LearnedOptimizer(negated, rule, backend=backend.name)
    for _ in range(3):
        grads = make_grads(params, generator)
        set_grads(params, grads)
        set_grads(negated, [-grad for grad in grads])
        ascent.step()
        descent.step()
    assert torch.equal(params[0], negated[0])


@pytest.mark.parametrize(
    "shape_and_view",
    [
        ((6, 4), lambda t: t.t()),
        ((2, 3, 4, 5), lambda t: t.contiguous(memory_format=torch.channels_last)),
        ((12, 3), lambda t: t[::2]),
    ],
    ids=["transposed", "channels_last", "strided"],
)
def test_noncontiguous_parameters(
    backend: Backend,
    rule: CoordinatewiseLSTM,
    generator: torch.Generator,
    shape_and_view: tuple[tuple[int, ...], Callable[[Tensor], Tensor]],
) -> None:
    shape, view = shape_and_view
    param = view(torch.rand(shape, generator=generator)).requires_grad_()
    strides = param.stride()
    assert not param.is_contiguous()
    optimizer = LearnedOptimizer([param], rule, backend=backend.name)
    loop = PlainLoop([param], rule)
    for _ in range(3):
        grads = make_grads([param], generator)
        param.grad = grads[0].clone()
        optimizer.step()
        loop.step(grads)
    assert_params_close([param], loop)
    assert_states_close(states_of(optimizer), loop)
    assert param.stride() == strides


def test_noncontiguous_gradient_of_contiguous_parameter(
    backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator
) -> None:
    params = make_params([(4, 6), (3,)], generator)
    grads = [torch.randn(6, 4, generator=generator).t(), torch.randn(1, generator=generator).expand(3)]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    loop = PlainLoop(params, rule)
    LearnedOptimizer(params, rule, backend=backend.name).step()
    loop.step(grads)
    assert_params_close(params, loop)


def test_gradient_of_another_dtype(backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(20,)], generator, torch.float16)
    grad = torch.randn(20, generator=generator)
    params[0].grad_dtype = torch.float32
    params[0].grad = grad
    loop = PlainLoop(params, rule)
    LearnedOptimizer(params, rule, backend=backend.name).step()
    loop.step([grad.half()])
    assert_params_close(params, loop)


def test_missing_gradients(backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """A parameter without gradient rests, its state as well, and state is made at the first gradient."""
    params = make_params([(5,), (6,), (7,)], generator)
    optimizer = LearnedOptimizer(params, rule, backend=backend.name)
    loop = PlainLoop(params, rule)
    for present in [(1, 0, 0), (0, 0, 0), (0, 1, 0), (1, 1, 0), (0, 1, 0)]:
        grads = [grad if there else None for grad, there in zip(make_grads(params, generator), present, strict=True)]
        set_grads(params, grads)
        optimizer.step()
        loop.step(grads)
    assert_params_close(params, loop)
    assert set(optimizer.state_dict()["state"]) == {0, 1}
    assert torch.equal(params[2], loop.params[2])


def test_no_gradient_at_all_changes_nothing(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(5,)], generator)
    before = params[0].detach().clone()
    optimizer = LearnedOptimizer(params, rule, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(params[0], before)
    assert not optimizer.state


def test_add_param_group_midway(backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    first, second = make_params([(5,)], generator), make_params([(20,), (2, 2)], generator)
    optimizer = LearnedOptimizer(first, rule, lr=0.5, backend=backend.name)
    loops = PlainLoop(first, rule), PlainLoop(second, rule)
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": second, "lr": 0.25})
        grads = make_grads(first, generator), make_grads(second, generator)
        set_grads(first + second, grads[0] + grads[1])
        optimizer.step()
        loops[0].step(grads[0], lr=0.5)
        if step >= 2:
            loops[1].step(grads[1], lr=0.25)
    assert_params_close(first, loops[0])
    assert_params_close(second, loops[1])


def test_one_call_per_group_and_dtype(
    rule: CoordinatewiseLSTM, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def step_(*args: Any, **options: Any) -> None:
        calls.append(len(args[2]))

    monkeypatch.setattr(get("reference"), "step_", step_, raising=True)
    groups = [make_params([(3,)] * 50, generator), make_params([(3,)] * 20, generator)]
    groups[1][::2] = make_params([(3,)] * 10, generator, torch.bfloat16)
    for group in groups:
        set_grads(group, make_grads(group, generator))
    LearnedOptimizer([{"params": group} for group in groups], rule, backend="reference").step()
    assert sorted(calls) == [10, 10, 50]


def test_a_step_leaves_no_garbage(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(3,)] * 10, generator)
    set_grads(params, make_grads(params, generator))
    optimizer = LearnedOptimizer(params, rule)
    optimizer.step()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(50):
        optimizer.step()
    gc.collect()
    assert len(gc.get_objects()) < before + 25


# ---- the rule ----


def test_rule_is_read_but_not_owned(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(5,)], generator)
    before = [weight.detach().clone() for weight in rule.parameters()]
    optimizer = LearnedOptimizer(params, rule)
    set_grads(params, make_grads(params, generator))
    optimizer.step()
    assert [p for group in optimizer.param_groups for p in group["params"]] == params
    assert all(torch.equal(a, b) for a, b in zip(rule.parameters(), before, strict=True))
    assert all(weight.grad is None for weight in rule.parameters())
    assert params[0].grad_fn is None


@pytest.mark.parametrize("change", ["in place", "assigned", "dtype"])
def test_new_weights_count_from_the_next_step(
    backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator, change: str
) -> None:
    params = make_params([(20,)], generator)
    optimizer = LearnedOptimizer(params, rule, backend=backend.name)
    loop = PlainLoop(params, rule)
    for step in range(4):
        if step == 2:
            other = make_rule(generator)
            if change == "in place":
                rule.load_state_dict(other.state_dict())
            elif change == "assigned":
                rule.load_tensors(other.state_dict(), source="the test")
            else:
                rule.bfloat16().float()
            loop.weights = rule.flat_weights().detach()
        grads = make_grads(params, generator)
        set_grads(params, grads)
        optimizer.step()
        loop.step(grads)
    assert_params_close(params, loop)


def test_rule_from_a_file(rule: CoordinatewiseLSTM, generator: torch.Generator, tmp_path: Any) -> None:
    rule.save(tmp_path / "rule.safetensors")
    params = make_params([(5,)], generator)
    loop = PlainLoop(params, rule)
    grads = make_grads(params, generator)
    set_grads(params, grads)
    LearnedOptimizer(params, tmp_path / "rule.safetensors").step()
    loop.step(grads)
    assert_params_close(params, loop)


def test_other_hidden_size_runs_on_the_reference(generator: torch.Generator) -> None:
    rule = make_rule(generator, hidden_size=6)
    params = make_params([(5, 4)], generator)
    optimizer, loop = LearnedOptimizer(params, rule), PlainLoop(params, rule)
    grads = make_grads(params, generator)
    set_grads(params, grads)
    optimizer.step()
    loop.step(grads)
    assert_params_close(params, loop)
    assert optimizer.state_dict()["state"][0]["lstm"].shape == (5, 4, 2, 2, 6)


# ---- gradients that are not finite ----

NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("value", NOT_FINITE)
def test_nonfinite_gradient_shows(
    backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator, value: float
) -> None:
    params = make_params([(20,)], generator)
    grads = make_grads(params, generator)
    grads[0][3] = value
    set_grads(params, grads)
    optimizer = LearnedOptimizer(params, rule, backend=backend.name)
    loop = PlainLoop(params, rule)
    optimizer.step()
    loop.step(grads)
    bad = torch.arange(20) == 3
    state = states_of(optimizer)[0]
    assert params[0][bad].isnan().all()
    assert state[bad].isnan().all()
    assert state[~bad].isfinite().all()
    torch.testing.assert_close(params[0].detach()[~bad], loop.params[0][~bad], rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_skip_nonfinite_keeps_parameter_and_state(
    backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator, value: float
) -> None:
    params = make_params([(20,)], generator)
    optimizer = LearnedOptimizer(params, rule, weight_decay=0.1, skip_nonfinite=True, backend=backend.name)
    set_grads(params, make_grads(params, generator))
    optimizer.step()
    param, state = params[0].detach().clone(), states_of(optimizer)[0]
    grads = make_grads(params, generator)
    grads[0][3] = value
    set_grads(params, grads)
    optimizer.step()
    bad = torch.arange(20) == 3
    assert torch.equal(params[0][bad], param[bad])
    assert torch.equal(states_of(optimizer)[0][bad], state[bad])
    assert (params[0][~bad] != param[~bad]).all()

"""LearnedOptimizer has the habits of ``torch.optim``."""

from __future__ import annotations

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
from torch.optim import lr_scheduler

from l2l_fast import CoordinatewiseLSTM
from l2l_fast.backends import Backend
from l2l_fast.optim import LearnedOptimizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def rule(generator: torch.Generator) -> CoordinatewiseLSTM:
    return make_rule(generator)


def test_closure(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(5,)], generator)
    optimizer, loop = LearnedOptimizer(params, rule), PlainLoop(params, rule)
    before = params[0].detach().clone()

    def closure() -> float:
        optimizer.zero_grad()
        loss = (params[0] ** 2).sum()
        torch.autograd.backward(loss)
        return loss.item()

    assert optimizer.step(closure) == pytest.approx((before**2).sum().item())
    loop.step([2 * before])
    assert_params_close(params, loop)
    set_grads(params, [None])
    assert optimizer.step() is None


def test_failing_closure_changes_nothing(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(5,)], generator)
    before = params[0].detach().clone()
    set_grads(params, make_grads(params, generator))
    optimizer = LearnedOptimizer(params, rule)

    def closure() -> float:
        raise ArithmeticError("no loss")

    with pytest.raises(ArithmeticError, match="no loss"):
        optimizer.step(closure)
    assert torch.equal(params[0], before)
    assert not optimizer.state


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(rule: CoordinatewiseLSTM, generator: torch.Generator, set_to_none: bool) -> None:
    params = make_params([(5,)], generator)
    set_grads(params, make_grads(params, generator))
    LearnedOptimizer(params, rule).zero_grad(set_to_none=set_to_none)
    grad = params[0].grad
    assert grad is None if set_to_none else grad is not None and not grad.any()


SCHEDULERS: dict[str, Callable[[LearnedOptimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.1),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: step / 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=2.0, total_steps=8, cycle_momentum=False),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
}


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(
    backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator, name: str, lr: float | Tensor
) -> None:
    params = make_params([(20,)], generator)
    lr = lr.clone() if isinstance(lr, Tensor) else lr
    optimizer = LearnedOptimizer(params, rule, lr=lr, backend=backend.name)
    loop = PlainLoop(params, rule)
    scheduler = SCHEDULERS[name](optimizer)
    used = []
    for _ in range(5):
        grads = make_grads(params, generator)
        set_grads(params, grads)
        used.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        loop.step(grads, lr=used[-1])
        scheduler.step()
    assert len(set(used)) > 1
    assert_params_close(params, loop)


def test_reduce_on_plateau(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    optimizer = LearnedOptimizer(make_params([(5,)], generator), rule)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for loss in (1.0, 1.0, 1.0):
        scheduler.step(loss)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_lr_zero_still_moves_the_state(backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """As a warm-up from 0 needs it."""
    params = make_params([(20,)], generator)
    before = params[0].detach().clone()
    optimizer = LearnedOptimizer(params, rule, lr=0.0, backend=backend.name)
    set_grads(params, make_grads(params, generator))
    optimizer.step()
    assert torch.equal(params[0], before)
    assert states_of(optimizer)[0].any()


def test_step_hooks(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(5,)], generator)
    optimizer = LearnedOptimizer(params, rule)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step()
    assert seen == ["before", "after"]


def test_repr_names_the_options_and_the_rule(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    text = repr(LearnedOptimizer(make_params([(5,)], generator), rule, lr=0.125, weight_decay=0.5))
    assert text.startswith("LearnedOptimizer (")
    for part in ("lr: 0.125", "weight_decay: 0.5", "maximize: False", "skip_nonfinite: False", "hidden_size=20"):
        assert part in text


def test_named_parameters(rule: CoordinatewiseLSTM) -> None:
    model = nn.Linear(2, 3)
    optimizer = LearnedOptimizer(model.named_parameters(), rule)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_frozen_parameters_are_left_alone(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    before = [p.detach().clone() for p in model[0].parameters()]
    optimizer = LearnedOptimizer(model.parameters(), rule, weight_decay=0.1)
    model(torch.randn(5, 3, generator=generator)).sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model[0].parameters(), before, strict=True))


def test_clip_grad_norm(backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(20,), (5,)], generator)
    grads = make_grads(params, generator)
    set_grads(params, grads)
    optimizer, loop = LearnedOptimizer(params, rule, backend=backend.name), PlainLoop(params, rule)
    norm = nn.utils.clip_grad_norm_(params, 0.5)
    optimizer.step()
    loop.step([grad * (0.5 / (norm + 1e-6)) for grad in grads])
    assert norm > 0.5
    assert_params_close(params, loop)


def test_grad_scaler(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """Unscales what the optimizer sees, and skips the step when a gradient overflows."""
    params = make_params([(20,)], generator)
    target = torch.randn(20, generator=generator)
    optimizer, loop = LearnedOptimizer(params, rule), PlainLoop(params, rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        before = params[0].detach().clone()
        torch.autograd.backward(scaler.scale((params[0] - target).square().sum() * factor))
        scaler.step(optimizer)
        scaler.update()
        if factor == 1.0:
            loop.step([2 * (before - target)])
        else:
            assert torch.equal(params[0], before)
    assert_params_close(params, loop)


def test_gradient_with_a_graph(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(5,)], generator)
    optimizer, loop = LearnedOptimizer(params, rule), PlainLoop(params, rule)
    (grad,) = torch.autograd.grad((params[0] ** 3).sum(), params, create_graph=True)
    params[0].grad = grad
    optimizer.step()
    loop.step([grad.detach()])
    assert_params_close(params, loop)


def test_tensor_saved_for_backward_is_guarded(
    backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator
) -> None:
    """As after any in-place change, a backward through the old value is refused."""
    params = make_params([(5,)], generator)
    loss = (params[0] ** 2).sum()
    set_grads(params, make_grads(params, generator))
    LearnedOptimizer(params, rule, backend=backend.name).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


def test_model_converted_after_construction(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """dtype and strides may change between steps, and with them the backend; the state goes along."""
    model = nn.Conv2d(3, 4, 2)
    params = list(model.parameters())
    with torch.no_grad():
        for param in params:
            param.copy_(torch.rand(param.shape, generator=generator))
    optimizer = LearnedOptimizer(params, rule)
    loop = PlainLoop(params, rule)
    conversions: list[dict[str, Any]] = [
        {},
        {"memory_format": torch.channels_last},
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float32},
    ]
    for conversion in conversions:
        model.to(**conversion)
        loop.params = [p.detach().clone(memory_format=torch.contiguous_format) for p in params]
        grads = make_grads(params, generator)
        set_grads(params, grads)
        optimizer.step()
        loop.step(grads)
        assert_params_close(params, loop)
    assert_states_close(states_of(optimizer), loop)


def test_state_may_be_dropped(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """``optimizer.state`` answers to the usual ways of starting afresh."""
    params = make_params([(5,), (6,)], generator)
    optimizer = LearnedOptimizer(params, rule)
    for everything in (True, False):
        set_grads(params, make_grads(params, generator))
        optimizer.step()
        if everything:
            optimizer.state.clear()
        else:
            del optimizer.state[params[0]]
            optimizer.state[params[1]] = {}
        loop = PlainLoop(params, rule)
        grads = make_grads(params, generator)
        set_grads(params, grads)
        optimizer.step()
        loop.step(grads)
        assert_params_close(params, loop)


def test_trains_a_module(backend: Backend, generator: torch.Generator) -> None:
    """With a rule made by hand, whose update is minus an odd function of the gradient's sign."""
    rule = CoordinatewiseLSTM()
    blocks = {name: torch.zeros_like(weight) for name, weight in rule.state_dict().items()}
    forget, candidate = slice(20, 40), slice(40, 60)
    for layer in (0, 1):
        blocks[f"cells.{layer}.bias_ih"][forget] = -20.0  # no memory
    blocks["cells.0.weight_ih"][candidate, 1] = 2.0
    blocks["cells.1.weight_ih"][candidate] = 1.0
    blocks["output.weight"].fill_(-0.01)
    rule.load_state_dict(blocks)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.5)
    x = torch.randn(64, 4, generator=generator)
    y = x.sum(1, keepdim=True).sin()
    optimizer = LearnedOptimizer(model.parameters(), rule, backend=backend.name)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]

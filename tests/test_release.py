"""The update inside the backward leaves what the ordinary step leaves, and no gradients."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_loop import make_rule
from torch import Tensor, nn
from torch.optim import lr_scheduler

from l2l_fast import CoordinatewiseLSTM, LearnedOptimizer, optimizer_in_backward
from l2l_fast.backends import Backend
from l2l_fast.release import OptimizerInBackward

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Two layers that share a weight, a scale that is used twice, and a layer without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5, bias=False)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Linear(5, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.frozen(self.scale * self.second(torch.tanh(self.scale * self.first(x))))
        return y


@pytest.fixture
def rule(generator: torch.Generator) -> CoordinatewiseLSTM:
    return make_rule(generator)


@pytest.fixture
def model(generator: torch.Generator) -> Net:
    net = Net()
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.5)
    return net


def backward(model: nn.Module, seed: int) -> Tensor:
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed))
    loss: Tensor = model(x).square().mean()
    torch.autograd.backward(loss)
    return loss.detach()


def train_plainly(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()


def train(model: nn.Module, seeds: range) -> None:
    for seed in seeds:
        backward(model, seed)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, actual), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(actual, expected), name


def states(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """States by the name of their parameter."""
    saved = optimizer.state_dict()
    names = {
        key: name
        for group in saved["param_groups"]
        for key, name in zip(group["params"], group["param_names"], strict=True)
    }
    return {names[key]: entry["lstm"] for key, entry in saved["state"].items()}


@pytest.mark.parametrize("more", [{}, {"warmup": 3, "max_update_norm": 0.05}], ids=["plain", "limited"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_as_the_ordinary_step(
    backend: Backend, rule: CoordinatewiseLSTM, model: Net, dtype: torch.dtype, more: dict[str, Any]
) -> None:
    model.to(dtype)
    frozen = [param.clone() for param in model.frozen.parameters()]
    plain = copy.deepcopy(model)
    options: dict[str, Any] = {
        "lr": 0.5,
        "weight_decay": 0.1,
        "backend": backend.name,
        "state_dtype": torch.float16,
        **more,
    }
    ordinary = LearnedOptimizer(
        [(name, param) for name, param in plain.named_parameters() if param.requires_grad], rule, **options
    )
    released = optimizer_in_backward(model, rule, **options)
    before = model.first.weight.detach().clone()
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    for step in range(4):
        for net in (plain, model):
            torch.autograd.backward(net(x + step).square().mean())
        ordinary.step()
        ordinary.zero_grad()
    assert (model.first.weight - before).abs().max() > 0.01
    assert_same(model, plain)
    assert all(torch.equal(a, b) for a, b in zip(model.frozen.parameters(), frozen, strict=True))
    expected = states(ordinary)
    assert states(released).keys() == expected.keys() == {"first.weight", "first.bias", "scale"}
    for name, state in states(released).items():
        assert torch.equal(state, expected[name]), name


def test_a_zero_gradient_at_rate_0_is_a_step_like_any(rule: CoordinatewiseLSTM) -> None:
    """As in a warm-up from 0, of a model one half of which starts at 0: what each tensor sees alone tells nothing."""

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Parameter(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))
            self.up = nn.Parameter(torch.zeros(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.down.t() @ self.up.t()

    model, plain = LowRank(), LowRank()
    ordinary = LearnedOptimizer(plain.parameters(), rule)
    released = optimizer_in_backward(model, rule)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    for step in range(4):
        for optimizer, net in ((ordinary, plain), (released, model)):
            for group in optimizer.param_groups:
                group["lr"] = step / 4
            torch.autograd.backward((net(x) - 1).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert_same(model, plain)
    assert model.up.abs().max() > 0
    assert {group["step"] for optimizer in (ordinary, released) for group in optimizer.param_groups} == {4}


def test_gradients_are_freed_as_they_are_used(rule: CoordinatewiseLSTM) -> None:
    """When the gradient of one layer arrives, those of the layers behind it are gone: one at a time is alive."""
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(5)))
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def note(param: Tensor) -> None:
        nonlocal most
        assert param.grad is not None
        alive.append(weakref.ref(param.grad))
        most = max(most, sum(grad() is not None for grad in alive))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
    handle = optimizer_in_backward(model, rule)
    torch.autograd.backward(model(torch.ones(2, 6)).sum())
    assert len(handle.param_groups) == len(alive) == 5
    assert most == 1
    assert all(param.grad is None for param in model.parameters())


def test_an_ordinary_loop_may_stay_as_it_is(rule: CoordinatewiseLSTM, model: Net) -> None:
    plain = copy.deepcopy(model)
    ordinary = LearnedOptimizer([p for p in plain.parameters() if p.requires_grad], rule)
    train_plainly(plain, ordinary, range(3))
    train_plainly(model, optimizer_in_backward(model, rule), range(3))
    assert_same(model, plain)


def test_closure(rule: CoordinatewiseLSTM, model: Net) -> None:
    twin = copy.deepcopy(model)
    released, other = (optimizer_in_backward(net, rule) for net in (model, twin))
    assert released.step() is None
    with torch.no_grad():
        loss = released.step(lambda: backward(model, 0))  # type: ignore[arg-type, return-value]
    assert loss == backward(twin, 0)
    assert_same(model, twin)
    assert states(released).keys() == states(other).keys()


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
def test_schedulers(rule: CoordinatewiseLSTM, model: Net, lr: float | Tensor) -> None:
    """One that multiplies the rate it finds would show a tensor shared by the groups."""
    plain = copy.deepcopy(model)
    ordinary = LearnedOptimizer([p for p in plain.parameters() if p.requires_grad], rule, lr=0.5)
    released = optimizer_in_backward(model, rule, lr=lr)
    schedulers = [lr_scheduler.StepLR(optimizer, 1, gamma=0.5) for optimizer in (ordinary, released)]
    for seed in range(3):
        train_plainly(plain, ordinary, range(seed, seed + 1))
        train_plainly(model, released, range(seed, seed + 1))
        for scheduler in schedulers:
            scheduler.step()
    assert ordinary.param_groups[0]["lr"] == 0.0625
    assert all(group["lr"] == 0.0625 for group in released.param_groups)
    assert_same(model, plain)


def test_options_of_one_parameter(rule: CoordinatewiseLSTM, model: Net) -> None:
    released = optimizer_in_backward(model, rule)
    before = copy.deepcopy(model)
    for group in released.param_groups:
        if group["param_names"] == ["scale"]:
            group["lr"] = 0.0
    train(model, range(2))
    assert torch.equal(model.scale, before.scale)
    assert not torch.equal(model.first.bias, before.first.bias)


# ---- checkpoints ----


def through_file(state_dict: dict[str, Any]) -> Any:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_resume_is_exact(backend: Backend, rule: CoordinatewiseLSTM, model: Net) -> None:
    released = optimizer_in_backward(model, rule, lr=0.5, backend=backend.name)
    train(model, range(3))
    saved = through_file(released.state_dict())
    twin = copy.deepcopy(model)
    resumed = optimizer_in_backward(twin, rule, backend=backend.name)
    resumed.load_state_dict(saved)
    for net in (model, twin):
        train(net, range(3, 6))
    assert_same(twin, model)
    fresh = copy.deepcopy(model)
    afresh = optimizer_in_backward(fresh, rule, lr=0.5, backend=backend.name)
    train(fresh, range(3))
    train(model, range(3))
    assert not torch.equal(fresh.first.weight, model.first.weight)  # the state matters
    assert states(afresh).keys() == states(released).keys()


def test_state_moves_to_an_ordinary_optimizer_and_back(rule: CoordinatewiseLSTM, model: Net) -> None:
    released = optimizer_in_backward(model, rule)
    train(model, range(3))
    plain = copy.deepcopy(model)
    groups = [{"params": [named]} for named in plain.named_parameters() if named[1].requires_grad]
    ordinary = LearnedOptimizer(groups, rule)
    ordinary.load_state_dict(released.state_dict())
    train_plainly(plain, ordinary, range(3, 5))
    train(model, range(3, 5))
    assert_same(model, plain)
    back = copy.deepcopy(plain)
    again = optimizer_in_backward(back, rule)
    again.load_state_dict(ordinary.state_dict())
    for net in (model, back):
        train(net, range(5, 7))
    assert_same(model, back)


def test_schedulers_act_after_loading(rule: CoordinatewiseLSTM, model: Net) -> None:
    released = optimizer_in_backward(model, rule)
    scheduler = lr_scheduler.StepLR(released, 1, gamma=0.0)
    train_plainly(model, released, range(1))
    released.load_state_dict(released.state_dict())
    scheduler.step()
    before = copy.deepcopy(model)
    train(model, range(1, 2))
    assert_same(model, before)


def test_hooks_see_the_public_state(rule: CoordinatewiseLSTM, model: Net) -> None:
    released = optimizer_in_backward(model, rule)
    train(model, range(1))
    seen: list[Any] = []
    released.register_state_dict_post_hook(lambda _, state: seen.append(state["state"][0]["lstm"].shape))
    released.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["state"][0]["lstm"].shape))
    released.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    saved = released.state_dict()
    saved["param_groups"][0]["lr"] = 0.25
    released.load_state_dict(saved)
    shape = (*next(model.parameters()).shape, 2, 2, 20)
    assert seen[:2] == [shape, shape]
    assert seen[2] == 0.25


def _without_state(saved: dict[str, Any]) -> None:
    del saved["state"]


def _one_group_less(saved: dict[str, Any]) -> None:
    saved["param_groups"].pop()


def _state_of_another_shape(saved: dict[str, Any]) -> None:
    last = max(saved["state"])
    saved["state"][last]["lstm"] = saved["state"][last]["lstm"][..., :1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_state, "'state' and 'param_groups'"),
        (_one_group_less, "parameter groups of"),
        (_state_of_another_shape, "must have shape"),
    ],
)
def test_a_broken_state_dict_changes_nothing(
    rule: CoordinatewiseLSTM, model: Net, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    released = optimizer_in_backward(model, rule)
    train(model, range(2))
    twin = copy.deepcopy(model)
    other = optimizer_in_backward(twin, rule)
    other.load_state_dict(released.state_dict())
    saved = released.state_dict()
    saved["param_groups"][0]["lr"] = 0.0
    damage(saved)
    with pytest.raises(ValueError, match=message):
        released.load_state_dict(saved)
    for net in (model, twin):
        train(net, range(2, 4))
    assert_same(model, twin)


def test_copies_are_refused(rule: CoordinatewiseLSTM, model: Net) -> None:
    released = optimizer_in_backward(model, rule)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="can't be copied or pickled"):
            copied(released)


# ---- adding, removing, refusing ----


def test_add_param_group(rule: CoordinatewiseLSTM, model: Net) -> None:
    plain = copy.deepcopy(model)
    ordinary = LearnedOptimizer([p for p in plain.parameters() if p.requires_grad], rule)
    released = optimizer_in_backward(model, rule)
    for net, optimizer in ((plain, ordinary), (model, released)):
        train_plainly(net, optimizer, range(2))
        named = list(net.frozen.requires_grad_(True).named_parameters())
        with_names = optimizer is released
        optimizer.add_param_group({"params": named if with_names else [p for _, p in named], "lr": 0.25})
        train_plainly(net, optimizer, range(2, 4))
    assert_same(model, plain)
    with pytest.raises(ValueError, match="more than one parameter group"):
        released.add_param_group({"params": list(model.frozen.named_parameters())})
    with pytest.raises(ValueError, match="lr must be finite"):
        released.add_param_group({"params": [("new", nn.Parameter(torch.ones(2)))], "lr": -1.0})
    assert len(released.param_groups) == 7


def test_remove_gives_the_gradients_back(rule: CoordinatewiseLSTM, model: Net) -> None:
    released = optimizer_in_backward(model, rule)
    train(model, range(2))
    saved = released.state_dict()
    released.remove()
    before = copy.deepcopy(model)
    train(model, range(2, 3))
    assert_same(model, before)
    assert model.scale.grad is not None
    model.zero_grad()
    second = optimizer_in_backward(model, rule)
    second.load_state_dict(saved)
    train(model, range(3, 4))
    assert not torch.equal(model.scale, before.scale)


def test_two_on_one_model_are_an_error(rule: CoordinatewiseLSTM, model: Net) -> None:
    first, second = (optimizer_in_backward(model, rule) for _ in range(2))
    with pytest.raises(RuntimeError, match="was taken before its update"):
        backward(model, 0)
    model.zero_grad()
    first.remove()
    backward(model, 0)
    assert states(second)["scale"].any()


def test_a_failed_construction_leaves_no_hooks(rule: CoordinatewiseLSTM) -> None:
    param, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3).to(torch.complex64))
    groups: list[dict[str, Any]] = [{"params": [param]}, {"params": [other]}]
    with pytest.raises(TypeError, match="complex64"):
        OptimizerInBackward(groups, rule, {})
    torch.autograd.backward(param.sum())
    assert torch.equal(param, torch.ones(3))
    assert param.grad is not None


def test_the_handle_has_to_be_kept(rule: CoordinatewiseLSTM) -> None:
    """It holds the state; without it nothing is updated, which must not pass in silence."""
    model = nn.Linear(3, 3)
    dead = weakref.ref(optimizer_in_backward(model, rule))
    gc.collect()
    assert dead() is None
    with pytest.raises(RuntimeError, match="keep it as long as the model"):
        torch.autograd.backward(model(torch.ones(1, 3)).sum())


def test_nothing_outlives_model_and_handle(rule: CoordinatewiseLSTM) -> None:
    model = nn.Linear(3, 3)
    handle = optimizer_in_backward(model, rule)
    torch.autograd.backward(model(torch.ones(1, 3)).sum())
    dead: list[weakref.ref[Any]] = [weakref.ref(handle), weakref.ref(model.weight)]
    del model, handle
    gc.collect()
    assert [reference() for reference in dead] == [None, None]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: [nn.Parameter(torch.ones(2))], TypeError, "takes the module"),
        (lambda: nn.ReLU(), ValueError, "no parameter that requires a gradient"),
        (lambda: nn.Linear(2, 2).requires_grad_(False), ValueError, "no parameter that requires a gradient"),
        (lambda: nn.ParameterList([torch.ones(2, dtype=torch.complex64)]), TypeError, "complex64"),
    ],
    ids=["list", "empty", "frozen", "complex"],
)
def test_bad_model(rule: CoordinatewiseLSTM, make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optimizer_in_backward(make(), rule)


def test_bad_option(rule: CoordinatewiseLSTM, model: Net) -> None:
    with pytest.raises(ValueError, match="lr must be finite"):
        optimizer_in_backward(model, rule, lr=-1.0)
    backward(model, 0)
    assert model.scale.grad is not None


def test_rules_of_groups(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """A group may have a rule of its own, which a checkpoint then asks for."""
    other = make_rule(generator)
    params, twins = ([nn.Parameter(torch.ones(4)) for _ in range(2)] for _ in range(2))

    def groups(pair: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": pair[:1]}, {"params": pair[1:], "rule": other}]

    handle, ordinary = OptimizerInBackward(groups(params), rule, {}), LearnedOptimizer(groups(twins), rule)
    for step in range(3):
        if step == 2:
            handle.load_state_dict(handle.state_dict())
        for pair in (params, twins):
            torch.autograd.backward(torch.stack([param.square().sum() for param in pair]).sum())
        ordinary.step()
        ordinary.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))
    assert not torch.equal(params[0], params[1])
    assert repr(handle).count("sha256") == 2


def test_distributed_data_parallel_is_refused(rule: CoordinatewiseLSTM, tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.parallel.DistributedDataParallel(nn.Linear(2, 2)))
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            optimizer_in_backward(model, rule)
    finally:
        torch.distributed.destroy_process_group()


def test_random_rounding_differs_between_parameters(rule: CoordinatewiseLSTM, model: Net) -> None:
    """It is that of an ordinary optimizer with a group for every parameter, after loading too."""
    options: dict[str, Any] = {"stochastic_rounding": True, "rounding_seed": 3, "lr": 1e-3}
    model = model.to(torch.bfloat16)
    twin, inputs = copy.deepcopy(model), torch.ones(7, 5, dtype=torch.bfloat16)

    def losses(net: nn.Module) -> None:
        torch.autograd.backward(net(inputs).square().mean())

    handle = optimizer_in_backward(model, rule, **options)
    groups = [{"params": [param]} for param in twin.parameters() if param.requires_grad]
    plain = LearnedOptimizer(groups, rule, **options)
    for step in range(6):
        if step == 3:
            handle.load_state_dict(handle.state_dict())
        losses(model)
        plain.zero_grad()
        losses(twin)
        plain.step()
        assert_same(model, twin)
    assert handle._singles[1]._first_group == 1


def test_a_limit_for_all_updates_together_is_refused(rule: CoordinatewiseLSTM, model: Net) -> None:
    with pytest.raises(ValueError, match="limits all updates together, which here come one after the other"):
        optimizer_in_backward(model, rule, max_update_norm=1.0, update_norm="global")
    optimizer_in_backward(model, rule, max_update_norm=1.0).remove()


def test_a_group_with_a_frozen_parameter_adds_nothing(rule: CoordinatewiseLSTM, model: Net) -> None:
    handle = optimizer_in_backward(model, rule)
    before = len(handle.param_groups)
    other = nn.Linear(2, 2)
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(ValueError, match=r"of shape \(2,\) requires no gradient"):
        handle.add_param_group({"params": [other.weight, frozen]})
    assert len(handle.param_groups) == len(handle.state_dict()["param_groups"]) == before
    torch.autograd.backward(other(torch.ones(1, 2)).sum())
    assert other.weight.grad is not None


def test_a_limit_for_all_updates_is_refused_later_too(rule: CoordinatewiseLSTM, model: Net) -> None:
    handle = optimizer_in_backward(model, rule, max_update_norm=1.0)
    saved = handle.state_dict()
    saved["param_groups"][1]["update_norm"] = "global"
    with pytest.raises(ValueError, match="limits all updates together"):
        handle.load_state_dict(saved)
    for group in handle.param_groups:
        group["update_norm"] = "global"
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="limits all updates together"):
        backward(model, 0)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_state_is_converted_for_all(rule: CoordinatewiseLSTM, model: Net) -> None:
    handle = optimizer_in_backward(model, rule)
    train(model, range(2))
    handle.convert_state(torch.float16)
    assert handle.state_dtype == torch.float16
    assert {entry["lstm"].dtype for entry in handle.state_dict()["state"].values()} == {torch.float16}
    assert len(handle.state) == len(handle.state_dict()["state"])
    train(model, range(2))
    handle.load_state_dict(handle.state_dict())


def test_step_updates_what_has_a_gradient_by_hand(rule: CoordinatewiseLSTM, model: Net) -> None:
    handle = optimizer_in_backward(model, rule)
    before = model.scale.detach().clone()
    model.scale.grad = torch.ones(())
    handle.step()
    assert model.scale.grad is None
    assert model.scale != before
    handle.remove()
    model.scale.grad = torch.ones(())
    handle.step()
    assert model.scale.grad is not None

"""State of LearnedOptimizer: saved, loaded, moved between backends, pickled, copied. Resuming is exact."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from plain_loop import PlainLoop, assert_params_close, make_grads, make_params, make_rule, set_grads
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim import Optimizer

from l2l_fast import CoordinatewiseLSTM
from l2l_fast.backends import NAMES, Backend
from l2l_fast.optim import LearnedOptimizer

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(), (7,), (0,), (3, 5), (40,)]
STORAGE = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


@pytest.fixture
def rule(generator: torch.Generator) -> CoordinatewiseLSTM:
    return make_rule(generator)


def run(optimizer: LearnedOptimizer, generator: torch.Generator, steps: int = 3) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        set_grads(params, make_grads(params, generator))
        optimizer.step()


def copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def assert_same(first: LearnedOptimizer, second: LearnedOptimizer) -> None:
    """Same parameters, options and state, bit for bit."""
    for a, b in zip(first.param_groups, second.param_groups, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a["params"], b["params"], strict=True))
    a, b = first.state_dict(), second.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for key, entry in a["state"].items():
        assert entry.keys() == b["state"][key].keys()
        assert entry["lstm"].dtype == b["state"][key]["lstm"].dtype
        assert torch.equal(entry["lstm"], b["state"][key]["lstm"])


def through_file(state_dict: dict[str, Any]) -> Any:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_public_layout(backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params(SHAPES, generator)
    optimizer = LearnedOptimizer(params, rule, backend=backend.name)
    run(optimizer, generator)
    state = optimizer.state_dict()["state"]
    assert list(state) == list(range(len(SHAPES)))
    for key, shape in enumerate(SHAPES):
        assert state[key].keys() == {"lstm"}
        assert state[key]["lstm"].shape == (*shape, 2, 2, 20)
        assert state[key]["lstm"].is_contiguous()


def test_state_dict_is_a_copy(backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """Neither later steps change it nor does changing it change the optimizer."""
    params = make_params(SHAPES, generator)
    optimizer = LearnedOptimizer(params, rule, backend=backend.name)
    run(optimizer, generator)
    first, second = optimizer.state_dict(), optimizer.state_dict()
    for entry in first["state"].values():
        entry["lstm"].fill_(7.0)
    run(optimizer, generator, steps=1)
    third = optimizer.state_dict()
    for key in (0, 1, 3, 4):
        assert not torch.equal(second["state"][key]["lstm"], third["state"][key]["lstm"])
        assert third["state"][key]["lstm"].abs().max() < 7


@pytest.mark.parametrize("transport", [copy.deepcopy, through_file, lambda d: d], ids=["copy", "file", "direct"])
@pytest.mark.parametrize("state_dtype", STORAGE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exact_resume(
    backend: Backend,
    rule: CoordinatewiseLSTM,
    generator: torch.Generator,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    transport: Callable[[Any], Any],
) -> None:
    """Saved, loaded elsewhere and continued is uninterrupted; the state never takes the parameters' dtype."""
    options: dict[str, Any] = {"backend": backend.name, "state_dtype": state_dtype}
    params = make_params(SHAPES, generator, dtype)
    optimizer = LearnedOptimizer(params, rule, lr=0.5, weight_decay=0.1, **options)
    run(optimizer, generator)
    saved = transport(optimizer.state_dict())
    resumed = LearnedOptimizer(copies(params), rule, **options)
    resumed.load_state_dict(saved)
    assert_same(optimizer, resumed)
    assert resumed.param_groups[0]["lr"] == 0.5
    twin = torch.Generator()
    twin.set_state(generator.get_state())
    run(optimizer, generator)
    run(resumed, twin)
    assert_same(optimizer, resumed)


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("state_dtype", STORAGE, ids=str)
def test_moves_between_backends(
    rule: CoordinatewiseLSTM, generator: torch.Generator, source: str, target: str, state_dtype: torch.dtype
) -> None:
    params = make_params(SHAPES, generator)
    optimizer = LearnedOptimizer(params, rule, backend=source, state_dtype=state_dtype)
    run(optimizer, generator)
    moved = LearnedOptimizer(copies(params), rule, backend=target, state_dtype=state_dtype)
    moved.load_state_dict(optimizer.state_dict())
    assert_same(optimizer, moved)
    loop = PlainLoop(params, rule, state_dtype)
    loop.states = [optimizer.state_dict()["state"][k]["lstm"].view(p.numel(), 2, 2, 20) for k, p in enumerate(params)]
    grads = make_grads(params, generator)
    set_grads(moved.param_groups[0]["params"], grads)
    moved.step()
    loop.step(grads)
    assert_params_close(moved.param_groups[0]["params"], loop, state_dtype)


@pytest.mark.parametrize("saved_dtype", [torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_state_widens_without_loss(
    rule: CoordinatewiseLSTM, generator: torch.Generator, saved_dtype: torch.dtype
) -> None:
    params = make_params(SHAPES, generator)
    optimizer = LearnedOptimizer(params, rule, state_dtype=saved_dtype)
    run(optimizer, generator)
    wide = LearnedOptimizer(copies(params), rule)
    wide.load_state_dict(optimizer.state_dict())
    for key, entry in optimizer.state_dict()["state"].items():
        loaded = wide.state_dict()["state"][key]["lstm"]
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, entry["lstm"].float())


def test_partial_state(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """Parameters that have had no gradient have no state, saved or loaded; loading drops what is not saved."""
    params = make_params([(5,), (6,)], generator)
    optimizer = LearnedOptimizer(params, rule)
    set_grads(params, [make_grads(params, generator)[0], None])
    optimizer.step()
    saved = optimizer.state_dict()
    assert set(saved["state"]) == {0}
    run(optimizer, generator)
    optimizer.load_state_dict(saved)
    assert set(optimizer.state_dict()["state"]) == {0}
    assert torch.equal(optimizer.state_dict()["state"][0]["lstm"], saved["state"][0]["lstm"])
    saved["state"][1] = {}
    optimizer.load_state_dict(saved)
    run(optimizer, generator)
    assert set(optimizer.state_dict()["state"]) == {0, 1}


def test_loading_twice(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """The last one counts, and nothing of the first stands between it and the user's hooks."""
    optimizer = LearnedOptimizer(make_params([(5,)], generator), rule)
    run(optimizer, generator)
    first = optimizer.state_dict()
    run(optimizer, generator)
    second = optimizer.state_dict()
    optimizer.load_state_dict(second)
    seen: list[Tensor] = []
    optimizer.register_load_state_dict_pre_hook(lambda _, loaded: seen.append(loaded["state"][0]["lstm"]))
    optimizer.load_state_dict(first)
    assert seen[0] is first["state"][0]["lstm"]
    assert torch.equal(optimizer.state_dict()["state"][0]["lstm"], first["state"][0]["lstm"])


def test_load_leaves_the_dict_as_it_is(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(5,)], generator)
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, generator)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    run(optimizer, generator)
    assert saved["param_groups"] == kept["param_groups"]
    assert torch.equal(saved["state"][0]["lstm"], kept["state"][0]["lstm"])


def test_other_entries_of_the_state_survive(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """What a user keeps beside the rule's state is saved, loaded and copied with it."""
    params = make_params([(5,)], generator)
    optimizer = LearnedOptimizer(params, rule)
    optimizer.state[params[0]]["note"] = 3
    run(optimizer, generator)
    assert optimizer.state_dict()["state"][0]["note"] == 3
    other = LearnedOptimizer(copies(params), rule)
    other.load_state_dict(optimizer.state_dict())
    assert copy.deepcopy(other).state_dict()["state"][0].keys() == {"note", "lstm"}


def test_safetensors_take_the_state(
    backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator, tmp_path: Path
) -> None:
    optimizer = LearnedOptimizer(make_params([(7,), (3, 5)], generator), rule, backend=backend.name)
    run(optimizer, generator)
    tensors = {str(key): entry["lstm"] for key, entry in optimizer.state_dict()["state"].items()}
    safetensors.torch.save_file(tensors, tmp_path / "state.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "state.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_hooks_see_the_public_layout(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(3, 5)], generator)
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, generator)
    seen: list[tuple[int, ...]] = []

    def look(_: Optimizer, state_dict: dict[str, Any]) -> None:
        seen.append(tuple(state_dict["state"][0]["lstm"].shape))

    def double(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {0: {"lstm": 2 * state_dict["state"][0]["lstm"]}}
        return {**state_dict, "state": state}

    def look_after(opt: Optimizer) -> None:
        seen.append(tuple(opt.state_dict()["state"][0]["lstm"].shape))

    optimizer.register_state_dict_post_hook(look)
    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(look)
    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.register_load_state_dict_post_hook(look_after)
    optimizer.load_state_dict(saved)
    assert seen == [(3, 5, 2, 2, 20)] * len(seen)
    assert len(seen) == 4  # saved; loaded; the state dict of look_after, by look and by itself
    assert torch.equal(optimizer.state_dict()["state"][0]["lstm"], 2 * saved["state"][0]["lstm"])


def test_groups_come_with_the_state(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(5,), (6,)], generator)
    groups: list[dict[str, Any]] = [
        {"params": params[:1], "lr": 0.5},
        {"params": params[1:], "maximize": True, "skip_nonfinite": True},
    ]
    optimizer = LearnedOptimizer(groups, rule, weight_decay=0.1)
    run(optimizer, generator)
    twins = copies(params)
    other = LearnedOptimizer([{"params": twins[:1]}, {"params": twins[1:]}], rule)
    other.load_state_dict(optimizer.state_dict())
    assert_same(optimizer, other)


def test_state_dict_names_the_rule_of_the_moment(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    optimizer = LearnedOptimizer(make_params([(5,)], generator), rule)
    before = optimizer.state_dict()["param_groups"][0]["rule"]
    rule.load_state_dict(make_rule(generator).state_dict())
    after = optimizer.state_dict()["param_groups"][0]["rule"]
    assert before != after
    assert after == LearnedOptimizer(make_params([(5,)], generator), rule).state_dict()["param_groups"][0]["rule"]


def test_rule_through_a_file_or_another_dtype_is_the_same_rule(
    rule: CoordinatewiseLSTM, generator: torch.Generator, tmp_path: Path
) -> None:
    params = make_params([(5,)], generator)
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, generator)
    rule.save(tmp_path / "rule.safetensors")
    for same in (tmp_path / "rule.safetensors", copy.deepcopy(rule).double()):
        other = LearnedOptimizer(copies(params), same)
        other.load_state_dict(optimizer.state_dict())
        assert torch.equal(other.state_dict()["state"][0]["lstm"], optimizer.state_dict()["state"][0]["lstm"])


# ---- copies ----


def by_torch_save(pair: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "save": by_torch_save,
}


@pytest.mark.parametrize("state_dtype", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("name", COPIES)
def test_copies_continue_alike(
    backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator, name: str, state_dtype: torch.dtype
) -> None:
    params = make_params(SHAPES, generator)
    optimizer = LearnedOptimizer(params, rule, lr=0.5, backend=backend.name, state_dtype=state_dtype)
    run(optimizer, generator)
    twin_params, twin = COPIES[name]((params, optimizer))
    assert all(a is b for a, b in zip(twin.param_groups[0]["params"], twin_params, strict=True))
    assert_same(optimizer, twin)
    other = torch.Generator()
    other.set_state(generator.get_state())
    run(optimizer, generator)
    run(twin, other)
    assert_same(optimizer, twin)
    run(twin, other, steps=1)
    assert not torch.equal(params[1], twin_params[1])


@pytest.mark.parametrize("name", COPIES)
def test_copy_of_a_fresh_optimizer_works(rule: CoordinatewiseLSTM, generator: torch.Generator, name: str) -> None:
    optimizer = LearnedOptimizer(make_params([(5,)], generator), rule)
    twin = COPIES[name](optimizer)
    assert repr(twin) == repr(optimizer)
    run(twin, generator)
    twin.add_param_group({"params": make_params([(6,)], generator)})
    run(twin, generator)
    assert set(twin.state_dict()["state"]) == {0, 1}
    assert not optimizer.state


def test_copy_has_a_rule_of_its_own(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(20,)], generator)
    optimizer = LearnedOptimizer(params, rule)
    twin = copy.deepcopy(optimizer)
    assert twin.rule is not None
    with torch.no_grad():
        rule.output.bias.add_(1.0)
    loop = PlainLoop(twin.param_groups[0]["params"], twin.rule)
    grads = make_grads(params, generator)
    set_grads(twin.param_groups[0]["params"], grads)
    twin.step()
    loop.step(grads)
    assert_params_close(twin.param_groups[0]["params"], loop)
    assert not torch.equal(twin.rule.output.bias, rule.output.bias)


# ---- torch.distributed.checkpoint, here in one process ----


def model_and_optimizer(rule: CoordinatewiseLSTM, generator: torch.Generator) -> tuple[nn.Module, LearnedOptimizer]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    groups: list[dict[str, Any]] = [
        {"params": model[1].parameters(), "lr": 0.5},
        {"params": model[0].parameters()},
    ]
    return model, LearnedOptimizer(groups, rule)


OPTIONS = {
    "plain": dcp.StateDictOptions(),
    "full": dcp.StateDictOptions(full_state_dict=True, cpu_offload=True),
    "flat": dcp.StateDictOptions(flatten_optimizer_state_dict=True),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_distributed_checkpoint(rule: CoordinatewiseLSTM, generator: torch.Generator, name: str) -> None:
    model, optimizer = model_and_optimizer(rule, generator)
    run(optimizer, generator)
    saved: dict[str, Any] = {**dcp.get_optimizer_state_dict(model, optimizer, options=OPTIONS[name])}
    tensors = (
        [value for value in saved.values() if isinstance(value, Tensor)]
        if name == "flat"
        else [entry["lstm"] for entry in saved["state"].values()]
    )
    assert {tuple(tensor.shape) for tensor in tensors} == {(*p.shape, 2, 2, 20) for p in model.parameters()}
    other_model, other = model_and_optimizer(rule, generator)
    other_model.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(other_model, other, copy.deepcopy(saved), options=OPTIONS[name])
    assert_same(optimizer, other)
    twin = torch.Generator()
    twin.set_state(generator.get_state())
    run(optimizer, generator)
    run(other, twin)
    assert_same(optimizer, other)


@pytest.mark.parametrize("name", OPTIONS)
def test_distributed_checkpoint_of_another_rule(
    rule: CoordinatewiseLSTM, generator: torch.Generator, name: str
) -> None:
    model, optimizer = model_and_optimizer(rule, generator)
    run(optimizer, generator)
    saved = dcp.get_optimizer_state_dict(model, optimizer, options=OPTIONS[name])
    other_model, other = model_and_optimizer(make_rule(generator), generator)
    with pytest.raises(ValueError, match="was written with the rule"):
        dcp.set_optimizer_state_dict(other_model, other, saved, options=OPTIONS[name])


def test_a_first_step_without_rate_and_gradients_makes_states_alone(generator: torch.Generator) -> None:
    """So torch.distributed.checkpoint has states made; training goes on as if it had not."""
    rule = make_rule(generator)
    params = [torch.ones(3, requires_grad=True) for _ in range(2)]
    asked, plain = (LearnedOptimizer([param], rule, lr=0.1, warmup=3) for param in params)
    params[0].grad = torch.zeros(3)
    asked.param_groups[0]["lr"] = 0.0
    asked.step()
    asked.param_groups[0]["lr"] = 0.1
    assert asked.state_dict()["state"][0]["lstm"].count_nonzero() == 0
    assert asked.param_groups[0]["step"] == 0
    for _ in range(3):
        for param, optimizer in zip(params, (asked, plain), strict=True):
            param.grad = torch.full((3,), 0.5)
            optimizer.step()
    assert torch.equal(*params)
    # Later, or with gradients, a rate of 0 is a step like any other.
    asked.param_groups[0]["lr"] = 0.0
    asked.step()
    assert asked.param_groups[0]["step"] == 4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"step": "x"}, TypeError, "step must be an integer, got 'x'"),
        ({"lr": None}, ValueError, "group 0 of the state dict lacks lr"),
        ({"warmup": -1}, ValueError, "warmup must not be negative"),
    ],
)
def test_broken_options_of_a_checkpoint_change_nothing(
    generator: torch.Generator, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    optimizer = LearnedOptimizer([torch.ones(3, requires_grad=True)], make_rule(generator), lr=0.1)
    saved = optimizer.state_dict()
    for name, value in change.items():
        saved["param_groups"][0][name] = value
        if value is None:
            del saved["param_groups"][0][name]
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[0]["step"] == 0

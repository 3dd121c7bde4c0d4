"""Rules per parameter group: named in groups or by patterns on the names of parameters."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loop import PlainLoop, assert_params_close, make_grads, make_params, make_rule, set_grads
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp

from l2l_fast import CoordinatewiseLSTM, Identity, LearnedOptimizer
from l2l_fast.backends import Backend, get

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def rules(generator: torch.Generator) -> list[CoordinatewiseLSTM]:
    return [make_rule(generator), make_rule(generator, preprocess=Identity())]


@pytest.fixture
def params(generator: torch.Generator) -> list[nn.Parameter]:
    return make_params([(5,), (3, 5)], generator)


def groups_of(params: list[nn.Parameter], rules: list[Any]) -> list[dict[str, Any]]:
    return [{"params": [param], "rule": rule} for param, rule in zip(params, rules, strict=True)]


def run(optimizer: LearnedOptimizer, generator: torch.Generator, steps: int = 2) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        set_grads(params, make_grads(params, generator))
        optimizer.step()


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3), nn.Linear(3, 2))


def test_each_group_runs_its_own_rule(
    backend: Backend, rules: list[CoordinatewiseLSTM], params: list[nn.Parameter], generator: torch.Generator
) -> None:
    optimizer = LearnedOptimizer(groups_of(params, rules), backend=backend.name)
    loops = [PlainLoop([param], rule) for param, rule in zip(params, rules, strict=True)]
    for _ in range(3):
        grads = make_grads(params, generator)
        set_grads(params, grads)
        optimizer.step()
        for loop, grad in zip(loops, grads, strict=True):
            loop.step([grad])
    for param, loop in zip(params, loops, strict=True):
        assert_params_close([param], loop)


def test_rules_of_different_size(
    rules: list[CoordinatewiseLSTM], params: list[nn.Parameter], generator: torch.Generator
) -> None:
    """Each on a backend that serves it; states have the hidden size of their group's rule."""
    rules = [rules[0], make_rule(generator, hidden_size=6)]
    optimizer = LearnedOptimizer(groups_of(params, rules))
    loops = [PlainLoop([param], rule) for param, rule in zip(params, rules, strict=True)]
    grads = make_grads(params, generator)
    set_grads(params, grads)
    optimizer.step()
    for param, loop, grad in zip(params, loops, grads, strict=True):
        loop.step([grad])
        assert_params_close([param], loop)
    state = optimizer.state_dict()["state"]
    assert [tuple(state[k]["lstm"].shape) for k in (0, 1)] == [(5, 2, 2, 20), (3, 5, 2, 2, 6)]
    twin = copy.deepcopy(optimizer)
    assert torch.equal(twin.state_dict()["state"][1]["lstm"], state[1]["lstm"])


def test_default_rule_serves_groups_that_name_none(rules: list[CoordinatewiseLSTM], params: list[nn.Parameter]) -> None:
    groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:], "rule": rules[1]}]
    optimizer = LearnedOptimizer(groups, rules[0])
    assert [group["rule"] for group in optimizer.param_groups] == rules
    assert optimizer.rule is rules[0]


def test_group_without_any_rule(rules: list[CoordinatewiseLSTM], params: list[nn.Parameter]) -> None:
    with pytest.raises(ValueError, match=r"names no rule, and the optimizer has none .* pass rule="):
        LearnedOptimizer(params)
    optimizer = LearnedOptimizer([{"params": params[:1], "rule": rules[0]}])
    assert optimizer.rule is None
    with pytest.raises(ValueError, match="names no rule"):
        optimizer.add_param_group({"params": params[1:]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [("nonesuch", ValueError, "unknown rule 'nonesuch'"), (3, TypeError, "a shipped name or a path, got int")],
)
def test_unknown_rule_of_a_group(
    rules: list[CoordinatewiseLSTM], params: list[nn.Parameter], rule: Any, error: type[Exception], message: str
) -> None:
    optimizer = LearnedOptimizer(params[:1], rules[0])
    group = {"params": params[1:], "rule": rule}
    with pytest.raises(error, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    group["rule"] = rules[1]
    optimizer.add_param_group(group)


def test_rules_are_prepared_once_per_device(
    rules: list[CoordinatewiseLSTM], generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of groups and dtypes, also where groups name a file."""
    reference = get("reference")
    prepare, calls = reference.prepare, []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return prepare(*args)

    monkeypatch.setattr(reference, "prepare", counted)
    rules[1].save(tmp_path / "rule.safetensors")
    named: list[Any] = [rules[0], rules[0], tmp_path / "rule.safetensors", str(tmp_path / "rule.safetensors")]
    params = make_params([(3,)] * 4, generator)
    params[1] = make_params([(3,)], generator, torch.bfloat16)[0]
    optimizer = LearnedOptimizer(groups_of(params, named), backend="reference")
    run(optimizer, generator, steps=3)
    assert len(calls) == 2
    assert optimizer.param_groups[2]["rule"] is optimizer.param_groups[3]["rule"]
    with torch.no_grad():
        rules[0].output.bias.add_(1.0)
    run(optimizer, generator, steps=2)
    assert len(calls) == 3


def test_one_call_per_group(
    rules: list[CoordinatewiseLSTM], generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(get("reference"), "step_", lambda *args, **_: calls.append(len(args[2])))
    params = make_params([(3,)] * 30, generator)
    groups = [{"params": params[:20], "rule": rules[0]}, {"params": params[20:], "rule": rules[1]}]
    run(LearnedOptimizer(groups, backend="reference"), generator, steps=1)
    assert calls == [20, 10]


# ---- patterns ----


def test_from_module(rules: list[CoordinatewiseLSTM], tmp_path: Path) -> None:
    model = network()
    rules[1].save(tmp_path / "fc.safetensors")
    patterns: dict[str, Any] = {
        "0.weight": rules[0],
        "*.bias": rules[0],
        "[34].*": tmp_path / "fc.safetensors",
        "*": rules[1],
    }
    optimizer = LearnedOptimizer.from_module(model, patterns, lr=0.5, warmup=3)
    names = [group["param_names"] for group in optimizer.param_groups]
    assert names == [["0.weight"], ["0.bias", "1.bias", "3.bias", "4.bias"], ["3.weight", "4.weight"], ["1.weight"]]
    by_name = dict(model.named_parameters())
    for group in optimizer.param_groups:
        assert all(param is by_name[name] for name, param in zip(group["param_names"], group["params"], strict=True))
        assert (group["lr"], group["warmup"]) == (0.5, 3)
    used = [group["rule"] for group in optimizer.param_groups]
    assert used[:2] + used[3:] == [rules[0], rules[0], rules[1]]
    assert torch.equal(used[2].flat_weights(), rules[1].flat_weights())


def test_from_module_of_compiled_modules(rules: list[CoordinatewiseLSTM]) -> None:
    """Patterns match with and without what torch.compile puts into names, of the whole or of a part."""
    model: Any = network()
    model[0] = torch.compile(model[0], backend="eager")
    patterns: dict[str, Any] = {"0.weight": rules[0], "_orig_mod.[34].*": rules[1], "1.*": rules[1], "*": rules[0]}
    compiled: Any = torch.compile(model, backend="eager")
    groups = LearnedOptimizer.from_module(compiled, patterns).param_groups
    assert [group["param_names"] for group in groups] == [
        ["_orig_mod.0._orig_mod.weight"],
        [f"_orig_mod.{name}" for name in ("3.weight", "3.bias", "4.weight", "4.bias")],
        ["_orig_mod.1.weight", "_orig_mod.1.bias"],
        ["_orig_mod.0._orig_mod.bias"],
    ]


def test_from_module_is_the_optimizer_of_its_groups(
    backend: Backend, rules: list[CoordinatewiseLSTM], generator: torch.Generator
) -> None:
    model = network()
    twin = copy.deepcopy(model)
    fc, conv = [*twin[3:].parameters()], [*twin[:3].parameters()]  # type: ignore[index]
    groups: list[dict[str, Any]] = [{"params": fc}, {"params": conv, "rule": rules[1]}]
    pair = (
        LearnedOptimizer.from_module(model, {"[34].*": rules[0], "*": rules[1]}, backend=backend.name),
        LearnedOptimizer(groups, rules[0], backend=backend.name),
    )
    for _ in range(2):
        grads = make_grads(list(model.parameters()), generator)
        for optimizer, net in zip(pair, (model, twin), strict=True):
            set_grads(list(net.parameters()), grads)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_shared_and_frozen_parameters(rules: list[CoordinatewiseLSTM], generator: torch.Generator) -> None:
    """A shared one is stepped once, under the first of its names; a frozen one rests."""
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4)})
    model["head"].weight = model["embed"].weight
    model["head"].bias.requires_grad_(False)
    optimizer = LearnedOptimizer.from_module(model, {"embed.*": rules[0], "*": rules[1]}, weight_decay=0.1)
    assert [group["param_names"] for group in optimizer.param_groups] == [["embed.weight"], ["head.bias"]]
    before = [p.detach().clone() for p in model.parameters()]
    torch.autograd.backward(model["head"](model["embed"](torch.tensor([0, 1]))).sum())
    optimizer.step()
    weight, bias = model.parameters()
    assert torch.equal(bias, before[1])
    assert not torch.equal(weight, before[0])
    assert set(optimizer.state_dict()["state"]) == {0}


PATTERNS: list[tuple[list[str], str]] = [
    ([], "rules names no pattern"),
    (["0.*", "1.*"], r"no pattern of '0\.\*', '1\.\*' matches the parameters '3\.weight', '3\.bias', '4\.weight'"),
    (["conv*", "*"], r"patterns 'conv\*' are left without a parameter: the parameters are '0\.weight', '0\.bias'"),
    (["*", "0.*"], r"patterns '0\.\*' are left .* earlier patterns take all parameters that '0\.\*' matches"),
    (["0.WEIGHT", "*"], r"'0\.WEIGHT' are left without"),
]


@pytest.mark.parametrize(("patterns", "message"), PATTERNS)
def test_bad_patterns(rules: list[CoordinatewiseLSTM], patterns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer.from_module(network(), dict.fromkeys(patterns, rules[0]))


def test_module_without_parameters(rules: list[CoordinatewiseLSTM]) -> None:
    with pytest.raises(ValueError, match="the ReLU has no parameters"):
        LearnedOptimizer.from_module(nn.ReLU(), {"*": rules[0]})


# ---- state ----


def test_state_dict_identifies_the_rule_of_each_group(
    rules: list[CoordinatewiseLSTM], params: list[nn.Parameter], generator: torch.Generator
) -> None:
    """And is refused by an optimizer that has them the other way round, with nothing changed."""
    optimizer = LearnedOptimizer(groups_of(params, rules))
    run(optimizer, generator)
    saved = optimizer.state_dict()
    assert len({group["rule"] for group in saved["param_groups"]}) == 2
    assert all(isinstance(group["rule"], str) for group in saved["param_groups"])
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    swapped = LearnedOptimizer(groups_of(copies, rules[::-1]))
    with pytest.raises(ValueError, match="group 0 of the state dict was written with the rule"):
        swapped.load_state_dict(saved)
    assert not swapped.state
    assert [group["rule"] for group in swapped.param_groups] == rules[::-1]
    assert [group["step"] for group in swapped.param_groups] == [0, 0]


def loaded(pair: tuple[list[nn.Parameter], LearnedOptimizer]) -> tuple[list[nn.Parameter], LearnedOptimizer]:
    params, optimizer = pair
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    other = LearnedOptimizer(groups_of(copies, [group["rule"] for group in optimizer.param_groups]))
    other.load_state_dict(optimizer.state_dict())
    return copies, other


WAYS: dict[str, Callable[[Any], Any]] = {
    "state dict": loaded,
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("way", WAYS)
def test_exact_resume(
    rules: list[CoordinatewiseLSTM], params: list[nn.Parameter], generator: torch.Generator, way: str
) -> None:
    optimizer = LearnedOptimizer(groups_of(params, rules), lr=0.5)
    run(optimizer, generator)
    twins, twin = WAYS[way]((params, optimizer))
    other = torch.Generator()
    other.set_state(generator.get_state())
    run(optimizer, generator)
    run(twin, other)
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))
    assert twin.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert all(isinstance(group["rule"], CoordinatewiseLSTM) for group in twin.param_groups)


@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoint(rules: list[CoordinatewiseLSTM], generator: torch.Generator, flat: bool) -> None:
    model = network()
    patterns = {"[34].*": rules[0], "*": rules[1]}
    optimizer = LearnedOptimizer.from_module(model, patterns, warmup=5)
    run(optimizer, generator)
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = dcp.get_optimizer_state_dict(model, optimizer, options=options)
    twin = copy.deepcopy(model)
    other = LearnedOptimizer.from_module(twin, patterns)
    dcp.set_optimizer_state_dict(twin, other, copy.deepcopy(saved), options=options)
    seeds = torch.Generator()
    seeds.set_state(generator.get_state())
    run(optimizer, generator)
    run(other, seeds)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


# ---- rules that change ----


def test_rule_of_a_group_may_be_replaced(
    rules: list[CoordinatewiseLSTM], params: list[nn.Parameter], generator: torch.Generator
) -> None:
    """The new one counts from the next step, the old one is forgotten."""
    old = copy.deepcopy(rules[0])
    optimizer = LearnedOptimizer([{"params": params, "rule": old}])
    loop = PlainLoop(params, old)
    for step in range(4):
        if step == 2:
            optimizer.param_groups[0]["rule"] = rules[1]
            loop.spec, loop.weights = rules[1].spec, rules[1].flat_weights().detach()
        grads = make_grads(params, generator)
        set_grads(params, grads)
        optimizer.step()
        loop.step(grads)
    assert_params_close(params, loop)
    forgotten = weakref.ref(old)
    del old
    gc.collect()
    assert forgotten() is None


def test_rule_of_another_size_needs_fresh_state(
    rules: list[CoordinatewiseLSTM], params: list[nn.Parameter], generator: torch.Generator
) -> None:
    optimizer = LearnedOptimizer(groups_of(params, rules))
    run(optimizer, generator)
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[1]["rule"] = make_rule(generator, hidden_size=6)
    with pytest.raises(RuntimeError, match=r"20 hidden units, but .* group has 6; .* del optimizer\.state"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    del optimizer.state[params[1]]
    optimizer.step()
    assert optimizer.state_dict()["state"][1]["lstm"].shape == (3, 5, 2, 2, 6)


def test_replaced_by_a_name(
    rules: list[CoordinatewiseLSTM], params: list[nn.Parameter], generator: torch.Generator
) -> None:
    optimizer = LearnedOptimizer(groups_of(params, rules))
    set_grads(params, make_grads(params, generator))
    before = params[0].detach().clone()
    optimizer.param_groups[1]["rule"] = "quadratic"
    with pytest.raises(TypeError, match=r"got 'quadratic'; set it to l2l_fast\.load_rule\(name\)"):
        optimizer.step()
    assert torch.equal(params[0], before)


def test_repr_names_the_rules(rules: list[CoordinatewiseLSTM], params: list[nn.Parameter]) -> None:
    text = repr(LearnedOptimizer(groups_of(params, rules)))
    assert "Parameter Group 1" in text
    assert "preprocess=log_and_sign(10.0)" in text
    assert "preprocess=identity" in text

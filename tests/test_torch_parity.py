"""What PyTorch tests of its own optimizers, asked of LearnedOptimizer.

The cases follow the optimizer database of PyTorch (``torch.testing._internal.common_optimizers``) and the tests that
run over it; what needs no database is in ``test_optim*.py``.
"""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from plain_loop import PlainLoop, assert_params_close, make_grads, make_params, make_rule, set_grads
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim import optimizer as torch_optimizer

from l2l_fast import CoordinatewiseLSTM, LearnedOptimizer

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Case:
    """One entry of the database: what it is called, and the options of the optimizer."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, params: Any, rule: CoordinatewiseLSTM) -> LearnedOptimizer:
        # A tensor is changed in place by schedulers, so every optimizer gets its own.
        return LearnedOptimizer(params, rule, **copy.deepcopy(self.options))


CASES = (
    Case("default"),
    Case("lr", {"lr": 0.5}),
    Case("tensor lr", {"lr": torch.tensor(0.5)}),
    Case("weight decay", {"weight_decay": 0.1}),
    Case("tensor weight decay", {"weight_decay": torch.tensor(0.1)}),
    Case("maximize", {"maximize": True}),
    Case("maximize, weight decay", {"maximize": True, "weight_decay": 0.001}),
    Case("skip nonfinite", {"skip_nonfinite": True}),
    Case("float16 state", {"state_dtype": torch.float16}),
    Case("bfloat16 state, lr, weight decay", {"state_dtype": torch.bfloat16, "lr": 0.5, "weight_decay": 0.1}),
    Case("reference", {"backend": "reference"}),
)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.param
    return chosen


@pytest.fixture
def rule(generator: torch.Generator) -> CoordinatewiseLSTM:
    return make_rule(generator)


@pytest.fixture
def descent() -> CoordinatewiseLSTM:
    """A rule made by hand that goes down: minus an odd function of the gradient's sign."""
    rule = CoordinatewiseLSTM()
    blocks = {name: torch.zeros_like(weight) for name, weight in rule.state_dict().items()}
    for layer in (0, 1):
        blocks[f"cells.{layer}.bias_ih"][20:40] = -20.0  # no memory
    blocks["cells.0.weight_ih"][40:60, 1] = 2.0
    blocks["cells.1.weight_ih"][40:60] = 1.0
    blocks["output.weight"].fill_(-0.01)
    rule.load_state_dict(blocks)
    return rule


def run(optimizer: LearnedOptimizer, seeds: range) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for seed in seeds:
        set_grads(params, make_grads(params, torch.Generator().manual_seed(seed)))
        optimizer.step()


def assert_alike(one: LearnedOptimizer, other: LearnedOptimizer) -> None:
    """Parameters, options and states, to the bit."""
    for left, right in zip(one.param_groups, other.param_groups, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left["params"], right["params"], strict=True))
    saved, saved_other = one.state_dict(), other.state_dict()
    assert saved["param_groups"] == saved_other["param_groups"]
    states, others = saved["state"], saved_other["state"]
    assert states.keys() == others.keys()
    assert all(torch.equal(states[key]["lstm"], others[key]["lstm"]) for key in states)


# ---- over the database ----


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "scheduled"])
def test_goes_in_the_right_direction(
    case: Case, descent: CoordinatewiseLSTM, generator: torch.Generator, contiguous: bool, scheduled: bool
) -> None:
    weight, bias = (torch.randn(shape, generator=generator) for shape in ((10, 5), (10,)))
    if not contiguous:
        weight, bias = (tensor.repeat_interleave(2, -1)[..., ::2] for tensor in (weight, bias))
    params = [weight.requires_grad_(), bias.requires_grad_()]
    assert params[0].is_contiguous() == contiguous
    x = torch.randn(5, generator=generator)
    optimizer = case.make(params, descent)
    schedulers: list[Any] = []
    if scheduled:
        schedulers = [
            lr_scheduler.StepLR(optimizer, gamma=0.9, step_size=10),
            lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=3),
        ]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (params[0].mv(x) + params[1]).square().sum()
        torch.autograd.backward(loss)
        return loss

    first = float(closure().detach())
    for _ in range(60):
        loss = optimizer.step(closure)  # type: ignore[arg-type]
        for scheduler in schedulers:
            scheduler.step(
                *[float(torch.as_tensor(loss).detach())] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            )
    last = float(closure().detach())
    # The plateau of a loss that rises as it should halves the rate again and again, so little is asked of an ascent.
    assert last > 1.01 * first if case.options.get("maximize") else last < 0.8 * first


def test_deepcopy_takes_all_public_attributes(case: Case, rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    original = case.make(make_params([(3, 2), (4,)], generator), rule)
    run(original, range(2))
    twin = copy.deepcopy(original)
    public = {name for name in dir(original) if not name.startswith("_")}
    assert {name for name in dir(twin) if not name.startswith("_")} == public
    for name in ("backend", "state_dtype"):
        assert getattr(twin, name) == getattr(original, name), name
    # PyTorch adds what pickles of old versions lack, and the rule is copied.
    assert {k: v for k, v in twin.defaults.items() if k in original.defaults and k != "rule"} == {
        k: v for k, v in original.defaults.items() if k != "rule"
    }
    assert_alike(twin, original)
    run(twin, range(2, 3))
    run(original, range(2, 3))
    assert_alike(twin, original)


def test_a_reloaded_run_repeats(case: Case, rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """The state dict says it all, also once the optimizer has gone on, and through a file without pickled code."""
    params = make_params([(3, 2), (4,), (0,)], generator)
    first = case.make(params, rule)
    run(first, range(3))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    twins = [param.detach().clone().requires_grad_() for param in params]
    run(first, range(3, 6))
    buffer.seek(0)
    second = LearnedOptimizer(
        twins, rule, backend=case.options.get("backend"), state_dtype=case.options.get("state_dtype", torch.float32)
    )
    second.load_state_dict(torch.load(buffer, weights_only=True))
    run(second, range(3, 6))
    assert_alike(first, second)


def test_gradients_are_only_read(case: Case, rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(3, 2), (4,)], generator)
    optimizer = case.make(params, rule)
    grads = make_grads(params, generator)
    set_grads(params, grads)
    versions = [param.grad._version for param in params if param.grad is not None]
    for _ in range(3):
        optimizer.step()
    assert [param.grad._version for param in params if param.grad is not None] == versions
    for param, grad in zip(params, grads, strict=True):
        assert param.grad is not None
        assert torch.equal(param.grad, grad)


def test_nothing_happens_without_gradients(case: Case, rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(3, 2), (4,)], generator)
    optimizer = case.make(params, rule)
    run(optimizer, range(2))
    saved, before = copy.deepcopy(optimizer), [param.detach().clone() for param in params]
    optimizer.zero_grad()
    for _ in range(3):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert_alike(optimizer, saved)


def test_repr_and_state(case: Case, rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(3,), (2,)], generator)
    optimizer = case.make(params, rule)
    assert not optimizer.state
    params[0].grad = torch.ones(3)
    optimizer.step()
    assert list(optimizer.state) == [params[0]]
    text = repr(optimizer)
    assert text.startswith("LearnedOptimizer (\nParameter Group 0\n")
    for name in ("lr", "weight_decay", "maximize"):
        assert f"    {name}: {optimizer.param_groups[0][name]}\n" in text


# ---- schedulers ----


def _swa(o: torch.optim.Optimizer) -> Any:
    return swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.25, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, gamma=0.5)], milestones=[2]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4, power=2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, factor=0.5, total_iters=2), lr_scheduler.ExponentialLR(o, gamma=0.8)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.9, step_size_up=2, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=8, cycle_momentum=False),
    "SWALR": _swa,
}


def test_every_scheduler_of_torch_is_listed() -> None:
    found = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert found - {"LRScheduler"} == set(SCHEDULERS)


def advance(scheduler: Any) -> None:
    scheduler.step(*[1.0] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(rule: CoordinatewiseLSTM, generator: torch.Generator, name: str, tensor: bool) -> None:
    """The rates are those that SGD gets, two groups keep their own, and a step uses the rate of the moment."""
    groups = [make_params([(6,)], generator), make_params([(3,)], generator)]
    sgd_params = [make_params([(1,)], generator) for _ in groups]

    def lr(value: float) -> Any:
        return torch.tensor(value) if tensor else value

    rates = (0.5, 0.25)
    optimizer = LearnedOptimizer([{"params": g, "lr": lr(v)} for g, v in zip(groups, rates, strict=True)], rule)
    sgd = torch.optim.SGD([{"params": g, "lr": lr(v)} for g, v in zip(sgd_params, rates, strict=True)])
    loops = [PlainLoop(group, rule) for group in groups]
    schedulers = [SCHEDULERS[name](o) for o in (optimizer, sgd)]
    seen = set()
    for _ in range(5):
        expected = [float(group["lr"]) for group in sgd.param_groups]
        assert [float(group["lr"]) for group in optimizer.param_groups] == expected
        seen.add(tuple(expected))
        for group, loop, rate in zip(groups, loops, expected, strict=True):
            grads = make_grads(group, generator)
            set_grads(group, grads)
            loop.step(grads, lr=rate)
        optimizer.step()
        sgd.step()
        for scheduler in schedulers:
            advance(scheduler)
    assert len(seen) > 1
    for group, loop in zip(groups, loops, strict=True):
        assert_params_close(group, loop)
    if tensor:
        assert all(isinstance(group["lr"], Tensor) for group in optimizer.param_groups)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_resumes(rule: CoordinatewiseLSTM, generator: torch.Generator, name: str) -> None:
    params = make_params([(6,)], generator)
    optimizer = LearnedOptimizer(params, rule, lr=0.5)
    scheduler = SCHEDULERS[name](optimizer)
    for step in range(3):
        run(optimizer, range(step, step + 1))
        advance(scheduler)
    twin = LearnedOptimizer([param.detach().clone().requires_grad_() for param in params], rule, lr=0.5)
    resumed = SCHEDULERS[name](twin)
    resumed.load_state_dict(scheduler.state_dict())
    twin.load_state_dict(optimizer.state_dict())
    for step in range(3, 6):
        for o, s in ((optimizer, scheduler), (twin, resumed)):
            run(o, range(step, step + 1))
            advance(s)
    assert_alike(twin, optimizer)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.9),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=8),
    ],
    ids=["CyclicLR", "OneCycleLR"],
)
def test_a_scheduler_of_momentum_is_refused_by_torch(
    rule: CoordinatewiseLSTM, generator: torch.Generator, make: Callable[[torch.optim.Optimizer], Any]
) -> None:
    """A learned rule has none."""
    with pytest.raises(ValueError, match="momentum"):
        make(LearnedOptimizer(make_params([(3,)], generator), rule))


def test_averaged_models(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """The mean and the exponential mean of the points that were visited."""
    model = nn.Linear(3, 2)
    optimizer = LearnedOptimizer(model.parameters(), rule)
    mean = swa_utils.AveragedModel(model)
    exponential = swa_utils.get_ema_multi_avg_fn(0.5)  # type: ignore[no-untyped-call]
    moving = swa_utils.AveragedModel(model, multi_avg_fn=exponential)
    visited = []
    for step in range(4):
        run(optimizer, range(step, step + 1))
        visited.append(model.weight.detach().clone())
        mean.update_parameters(model)
        moving.update_parameters(model)
    torch.testing.assert_close(mean.module.get_parameter("weight").detach(), torch.stack(visited).mean(0))
    expected = visited[0]
    for point in visited[1:]:
        expected = (expected + point) / 2
    torch.testing.assert_close(moving.module.get_parameter("weight").detach(), expected)
    assert not torch.equal(visited[0], visited[-1])


# ---- hooks ----


@pytest.fixture
def optimizer_(rule: CoordinatewiseLSTM, generator: torch.Generator) -> LearnedOptimizer:
    optimizer = LearnedOptimizer(make_params([(4,), (2, 2)], generator), rule)
    run(optimizer, range(1))
    return optimizer


@pytest.fixture
def order() -> Iterator[list[str]]:
    """What global hooks have noted; they are gone after the test."""
    seen: list[str] = []
    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        torch_optimizer.register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    yield seen
    for handle in handles:
        handle.remove()


def test_step_hooks_run_in_order(optimizer_: LearnedOptimizer, order: list[str]) -> None:
    weight = optimizer_.param_groups[0]["params"][0]
    before = weight.detach().clone()

    def pre(*_: Any) -> None:
        order.append("pre")
        assert torch.equal(weight, before)

    def post(*_: Any) -> None:
        order.append("post")
        assert not torch.equal(weight, before)

    handles = [optimizer_.register_step_pre_hook(pre), optimizer_.register_step_post_hook(post)]
    optimizer_.step()
    assert order == ["global pre", "pre", "post", "global post"]
    for handle in handles:
        handle.remove()
    order.clear()
    optimizer_.step()
    assert order == ["global pre", "global post"]


def test_step_pre_hook_may_replace_the_arguments(optimizer_: LearnedOptimizer) -> None:
    calls: list[str] = []

    def closure(name: str, loss: float) -> Callable[[], float]:
        def evaluate() -> float:
            calls.append(name)
            return loss

        return evaluate

    def replace(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (args[0], closure("replaced", 2.0)), kwargs

    optimizer_.register_step_pre_hook(replace)
    assert optimizer_.step(closure("own", 1.0)) == 2.0
    assert calls == ["replaced"]


def test_state_dict_hooks(optimizer_: LearnedOptimizer) -> None:
    """One before may change the optimizer; one after may change or replace what it gets."""

    def halve(o: torch.optim.Optimizer) -> None:
        o.param_groups[0]["lr"] = 0.5

    def add(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "extra": sorted(state_dict["state"])}

    handles = [optimizer_.register_state_dict_pre_hook(halve), optimizer_.register_state_dict_post_hook(add)]
    saved = optimizer_.state_dict()
    assert saved["extra"] == [0, 1]
    assert saved["param_groups"][0]["lr"] == 0.5
    for handle in handles:
        handle.remove()
    assert "extra" not in optimizer_.state_dict()


@pytest.mark.parametrize("prepend", [False, True])
def test_load_state_dict_hooks(optimizer_: LearnedOptimizer, prepend: bool) -> None:
    """One before may replace what is loaded; several run in the order of registration or before the earlier ones."""
    seen: list[str] = []

    def rates(name: str, lr: float) -> Callable[..., dict[str, Any]]:
        def hook(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            seen.append(name)
            return {**state_dict, "param_groups": [{**g, "lr": lr} for g in state_dict["param_groups"]]}

        return hook

    optimizer_.register_load_state_dict_pre_hook(rates("first", 0.25))
    optimizer_.register_load_state_dict_pre_hook(rates("second", 0.75), prepend=prepend)
    optimizer_.register_load_state_dict_post_hook(lambda _: seen.append("last"))
    optimizer_.register_load_state_dict_post_hook(lambda _: seen.append("or first"), prepend=prepend)
    optimizer_.load_state_dict(optimizer_.state_dict())
    assert optimizer_.param_groups[0]["lr"] == (0.25 if prepend else 0.75)
    assert seen == (["second", "first", "or first", "last"] if prepend else ["first", "second", "last", "or first"])


# ---- what may be optimized, and how it is named ----


def test_parameters_from_a_generator(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(3,), (2,)], generator)
    groups: list[dict[str, Any]] = [{"params": iter(params[:1])}, {"params": params[1]}]
    for optimizer in (LearnedOptimizer(iter(params), rule), LearnedOptimizer(iter(groups), rule)):
        assert [p for group in optimizer.param_groups for p in group["params"]] == params
        before = [param.detach().clone() for param in params]
        run(optimizer, range(1))
        assert not any(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: p, TypeError, "iterable of Tensors or dicts"),
        (lambda p: [], ValueError, "empty parameter list"),
        (lambda p: [{"params": {p}}], TypeError, "ordered collections"),
        (lambda p: [p * 2], ValueError, "non-leaf"),
        (lambda p: [{"params": [p]}, p], TypeError, "dict"),
        (lambda p: [3.0], TypeError, "can only optimize Tensors"),
        (lambda p: [("a", p), nn.Parameter(torch.ones(1))], ValueError, "names"),
        (lambda p: [{"params": [("a", p)]}, {"params": [nn.Parameter(torch.ones(1))]}], ValueError, "names"),
        (lambda p: [{"params": [p]}, {"params": [p]}], ValueError, "more than one parameter group"),
    ],
    ids=[
        "tensor",
        "empty",
        "set",
        "non-leaf",
        "mixed",
        "number",
        "half named",
        "half named groups",
        "twice",
    ],
)
def test_refused_as_by_torch(
    rule: CoordinatewiseLSTM, make: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    """The same kind of error as SGD raises."""
    for kind in (lambda p: LearnedOptimizer(p, rule), lambda p: torch.optim.SGD(p, lr=0.1)):
        param = nn.Parameter(torch.ones(3))
        with pytest.raises(error, match=message):
            kind(make(param))


def test_names_and_state_dicts(rule: CoordinatewiseLSTM) -> None:
    """Names go into the state dict; of names there and here those win that win in SGD, and order says who is who."""
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    named = LearnedOptimizer(model.named_parameters(), rule)
    run(named, range(1))
    saved, sgd_saved = named.state_dict(), torch.optim.SGD(model.named_parameters()).state_dict()
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]
    renamed: list[tuple[str, torch.Tensor]] = [("w", other.weight), ("b", other.bias)]
    kinds: list[Any] = [renamed, list(other.parameters())]
    for params in kinds:
        optimizer, sgd = LearnedOptimizer(params, rule), torch.optim.SGD(params)
        optimizer.load_state_dict(saved)
        sgd.load_state_dict(sgd_saved)
        assert optimizer.param_groups[0].get("param_names") == sgd.param_groups[0].get("param_names")
        assert torch.equal(optimizer.state_dict()["state"][0]["lstm"], saved["state"][0]["lstm"])
    unnamed = LearnedOptimizer(other.parameters(), rule).state_dict()
    keeps = LearnedOptimizer(renamed, rule)
    keeps.load_state_dict(unnamed)
    assert keeps.param_groups[0]["param_names"] == ["w", "b"]


def test_defaults_reach_later_groups(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    first, second = make_params([(3,)], generator), make_params([(2,)], generator)
    optimizer = LearnedOptimizer(first, rule)
    optimizer.defaults["lr"] = 0.125
    optimizer.add_param_group({"params": iter(second)})
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.125]


def test_only_tensors_without_elements(rule: CoordinatewiseLSTM) -> None:
    params = [nn.Parameter(torch.ones(0)), nn.Parameter(torch.ones(3, 0, 2))]
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, range(2))
    saved = optimizer.state_dict()
    assert [saved["state"][key]["lstm"].shape for key in (0, 1)] == [(0, 2, 2, 20), (3, 0, 2, 2, 2, 20)]
    optimizer.load_state_dict(saved)
    run(optimizer, range(1))


# ---- surroundings ----


def test_grad_mode_is_as_before(optimizer_: LearnedOptimizer) -> None:
    """Inside a closure gradients are on, after the step the mode is the caller's, also when the closure fails."""
    modes: list[bool] = []

    def closure() -> float:
        modes.append(torch.is_grad_enabled())
        return 0.0

    def failing() -> float:
        raise ArithmeticError

    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            optimizer_.step(closure)
            assert torch.is_grad_enabled() == enabled
            with pytest.raises(ArithmeticError):
                optimizer_.step(failing)
            assert torch.is_grad_enabled() == enabled
    assert modes == [True, True]


def test_default_dtype_has_no_influence(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(5,)], generator)
    twins = [param.detach().clone().requires_grad_() for param in params]
    one, other = LearnedOptimizer(params, rule), LearnedOptimizer(twins, rule)
    run(one, range(3))
    grads = [make_grads(twins, torch.Generator().manual_seed(seed)) for seed in range(3)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for draw in grads:
            set_grads(twins, draw)
            other.step()
        saved = other.state_dict()
        other.load_state_dict(saved)
    finally:
        torch.set_default_dtype(before)
    assert saved["state"][0]["lstm"].dtype == torch.float32
    assert_alike(one, other)


def test_gradients_add_up_over_backwards(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    models = [nn.Linear(4, 1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(8, 4, generator=generator)
    for model, parts in zip(models, (1, 4), strict=True):
        optimizer = LearnedOptimizer(model.parameters(), rule)
        for part in x.chunk(parts):
            torch.autograd.backward(model(part).square().sum() / 8)
        optimizer.step()
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=0, atol=1e-5)


def test_parametrized_modules(descent: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """Weight normalisation and tied weights: what is optimized is what the module has underneath."""
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    tied = nn.Sequential(layer, nn.Tanh(), layer)
    optimizer = LearnedOptimizer(tied.parameters(), descent)
    x = torch.randn(16, 4, generator=generator)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (tied(x) - 0.1).square().mean()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert len(optimizer.state) == 3
    assert losses[-1] < 0.7 * losses[0]


def test_profiler_names_the_step(optimizer_: LearnedOptimizer) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        optimizer_.step()
    assert "Optimizer.step#LearnedOptimizer.step" in {event.name for event in profiler.events()}

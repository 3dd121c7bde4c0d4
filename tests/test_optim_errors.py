"""What LearnedOptimizer refuses: the error says what came and what would be right, and nothing has changed."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loop import make_grads, make_params, make_rule, set_grads
from torch import Tensor, nn

from l2l_fast import CoordinatewiseLSTM
from l2l_fast.optim import LearnedOptimizer

pytestmark = pytest.mark.usefixtures("one_thread")

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def rule(generator: torch.Generator) -> CoordinatewiseLSTM:
    return make_rule(generator)


@pytest.fixture
def params(generator: torch.Generator) -> list[nn.Parameter]:
    return make_params([(5,), (3, 5)], generator)


@pytest.fixture
def optimizer(params: list[nn.Parameter], rule: CoordinatewiseLSTM, generator: torch.Generator) -> LearnedOptimizer:
    """An optimizer of two groups after one step, with gradients for the next."""
    groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}]
    optimizer = LearnedOptimizer(groups, rule)
    for _ in range(2):
        set_grads(params, make_grads(params, generator))
        optimizer.step()
    set_grads(params, make_grads(params, generator))
    return optimizer


class Unchanged:
    """Fails if parameters, groups or state of the optimizer change inside the block."""

    def __init__(self, optimizer: LearnedOptimizer) -> None:
        self.optimizer = optimizer

    def snapshot(self) -> tuple[list[Tensor], dict[str, Any]]:
        params = [p.detach().clone() for group in self.optimizer.param_groups for p in group["params"]]
        return params, copy.deepcopy(self.optimizer.state_dict())

    def __enter__(self) -> None:
        self.before = self.snapshot()

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is not None:
            return
        (params, state_dict), (params_before, before) = self.snapshot(), self.before
        assert all(torch.equal(a, b) for a, b in zip(params, params_before, strict=True))
        assert repr(state_dict["param_groups"]) == repr(before["param_groups"])  # NaN equals NaN here
        assert state_dict["state"].keys() == before["state"].keys()
        for key, entry in before["state"].items():
            assert torch.equal(state_dict["state"][key]["lstm"], entry["lstm"])


# ---- construction and add_param_group ----

OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, "lr must be finite and not negative, got -1.0"),
    ({"lr": NAN}, ValueError, "lr must be finite and not negative, got nan"),
    ({"lr": INF}, ValueError, "lr must be finite and not negative, got inf"),
    ({"lr": "fast"}, TypeError, "lr must be a number or a 0-dimensional CPU tensor, got str"),
    ({"lr": None}, TypeError, "lr must be a number .* got NoneType"),
    ({"lr": torch.ones(1)}, ValueError, r"lr as a tensor must be 0-dimensional and on the CPU.*shape \(1,\) on cpu"),
    ({"lr": torch.ones((), device="meta")}, ValueError, "lr as a tensor must be .* on meta"),
    ({"lr": torch.tensor(NAN)}, ValueError, "lr must be finite and not negative, got nan"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay must be finite and not negative, got -0.1"),
    ({"weight_decay": NAN}, ValueError, "weight_decay must be finite and not negative, got nan"),
]


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS)
def test_bad_option(
    params: list[nn.Parameter],
    rule: CoordinatewiseLSTM,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        LearnedOptimizer(params, rule, **options)
    with pytest.raises(error, match=message):
        LearnedOptimizer([{"params": params, **options}], rule)


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS)
def test_bad_option_of_an_added_group(
    optimizer: LearnedOptimizer, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with Unchanged(optimizer), pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], **options})


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS)
def test_bad_option_set_later(
    optimizer: LearnedOptimizer, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Found in the last group, before the first is stepped."""
    optimizer.param_groups[1].update(options)
    with Unchanged(optimizer), pytest.raises(error, match=message):
        optimizer.step()


PARAMS: list[tuple[Tensor, type[Exception], str]] = [
    (torch.zeros(2, dtype=torch.complex64), TypeError, "got torch.complex64 .* torch.view_as_real"),
    (torch.zeros(2, dtype=torch.int64), TypeError, "got torch.int64"),
    (torch.zeros(2, dtype=torch.float8_e4m3fn), TypeError, "got torch.float8_e4m3fn"),
    (torch.zeros(2, 2).to_sparse(), TypeError, "parameters must be dense, got layout torch.sparse_coo"),
    (torch.zeros(2, requires_grad=True) * 2, ValueError, "can't optimize a non-leaf Tensor"),
]


@pytest.mark.parametrize(("param", "error", "message"), PARAMS)
def test_bad_parameter(
    optimizer: LearnedOptimizer, rule: CoordinatewiseLSTM, param: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LearnedOptimizer([param], rule)
    with Unchanged(optimizer), pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3)), param]})


def test_no_parameters(rule: CoordinatewiseLSTM) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        LearnedOptimizer([], rule)


def test_parameter_in_two_groups(optimizer: LearnedOptimizer, params: list[nn.Parameter]) -> None:
    with Unchanged(optimizer), pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": params[:1]})


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_parameter_twice_in_a_group(optimizer: LearnedOptimizer) -> None:
    param = nn.Parameter(torch.zeros(2))
    with Unchanged(optimizer), pytest.raises(ValueError, match="occurs twice in one parameter group"):
        optimizer.add_param_group({"params": [param, param]})


@pytest.mark.parametrize("state_dtype", [torch.float64, torch.uint8, "float32"])
def test_bad_state_dtype(params: list[nn.Parameter], rule: CoordinatewiseLSTM, state_dtype: Any) -> None:
    with pytest.raises(
        TypeError, match=r"state_dtype must be one of torch.float32, torch.float16, torch.bfloat16, torch.int8"
    ):
        LearnedOptimizer(params, rule, state_dtype=state_dtype)


def test_unknown_backend(params: list[nn.Parameter], rule: CoordinatewiseLSTM) -> None:
    with pytest.raises(ValueError, match="unknown backend 'gpu'; known backends"):
        LearnedOptimizer(params, rule, backend="gpu")


def test_named_backend_works_or_raises(generator: torch.Generator, rule: CoordinatewiseLSTM) -> None:
    with pytest.raises(RuntimeError, match=r"backend='cpu' can't be used: .*float64.*'reference'"):
        LearnedOptimizer(make_params([(5,)], generator, torch.float64), rule, backend="cpu")
    with pytest.raises(RuntimeError, match=r"backend='cpu' can't be used: .*float64"):
        LearnedOptimizer(make_params([(5,)], generator), rule.double(), backend="cpu")
    with pytest.raises(RuntimeError, match=r"backend='cpu' can't be used: .*not 6"):
        LearnedOptimizer(make_params([(5,)], generator), make_rule(generator, hidden_size=6), backend="cpu")


def test_unknown_rule(params: list[nn.Parameter], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown rule 'nonesuch'"):
        LearnedOptimizer(params, "nonesuch")
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors"):
        LearnedOptimizer(params, tmp_path / "missing.safetensors")
    with pytest.raises(TypeError, match="got int"):
        LearnedOptimizer(params, 3)  # type: ignore[arg-type]


# ---- step ----


def test_sparse_gradient(optimizer: LearnedOptimizer, params: list[nn.Parameter]) -> None:
    params[1].grad = torch.eye(3, 5).to_sparse()
    with Unchanged(optimizer), pytest.raises(TypeError, match=r"layout torch\.sparse_coo .*p\.grad\.to_dense\(\)"):
        optimizer.step()
    params[1].grad = params[1].grad.to_dense()
    optimizer.step()


def test_sparse_gradient_of_an_embedding(rule: CoordinatewiseLSTM) -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = LearnedOptimizer(embedding.parameters(), rule)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match="without sparse=True"):
        optimizer.step()
    assert not optimizer.state


def test_failed_first_step_leaves_no_state(rule: CoordinatewiseLSTM, params: list[nn.Parameter]) -> None:
    optimizer = LearnedOptimizer(params, rule)
    params[0].grad = torch.ones(5)
    params[1].grad = torch.eye(3, 5).to_sparse()
    with Unchanged(optimizer), pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("shape", [(40, 40), (5, 3), (15,)], ids=str)
def test_data_replaced_by_another_shape(
    optimizer: LearnedOptimizer, params: list[nn.Parameter], generator: torch.Generator, shape: tuple[int, ...]
) -> None:
    """Also by one of as many elements, whose coordinates the state does not have in this order."""
    before = params[0].detach().clone()
    params[1].data = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=rf"shape {re.escape(str(shape))} .* gradient of shape \(3, 5\)"):
        optimizer.step()
    optimizer.zero_grad()
    set_grads(params, make_grads(params, generator))
    with pytest.raises(RuntimeError, match=r"a state for shape \(3, 5\); .* del optimizer\.state\[param\]"):
        optimizer.step()
    assert torch.equal(params[0], before)
    del optimizer.state[params[1]]
    optimizer.step()
    assert optimizer.state_dict()["state"][1]["lstm"].shape == (*shape, 2, 2, 20)


@pytest.mark.parametrize("shape", [(5, 3), (4, 4)], ids=str)
@pytest.mark.parametrize("use", ["state_dict", "deepcopy", "pickle"])
def test_data_replaced_before_its_state_is_taken(
    optimizer: LearnedOptimizer, params: list[nn.Parameter], shape: tuple[int, ...], use: str
) -> None:
    params[1].data = torch.zeros(shape)
    uses: dict[str, Callable[[], object]] = {
        "state_dict": optimizer.state_dict,
        "deepcopy": lambda: copy.deepcopy(optimizer),
        "pickle": lambda: pickle.dumps(optimizer),
    }
    with pytest.raises(RuntimeError, match=r"has a state for shape \(3, 5\); to start it afresh"):
        uses[use]()


def test_data_replaced_after_loading(
    optimizer: LearnedOptimizer, params: list[nn.Parameter], generator: torch.Generator
) -> None:
    optimizer.load_state_dict(optimizer.state_dict())
    params[1].data = torch.zeros(5, 3)
    optimizer.zero_grad()
    set_grads(params, make_grads(params, generator))
    with pytest.raises(RuntimeError, match=r"shape \(5, 3\) has a state for shape \(3, 5\)"):
        optimizer.step()


def test_stale_gradient_after_loading(
    optimizer: LearnedOptimizer, params: list[nn.Parameter], rule: CoordinatewiseLSTM, generator: torch.Generator
) -> None:
    """A state of the right size does not excuse a gradient of the wrong one."""
    larger = make_params([(5,), (40, 40)], generator)
    other = LearnedOptimizer([{"params": larger[:1]}, {"params": larger[1:]}], rule)
    set_grads(larger, make_grads(larger, generator))
    other.step()
    params[1].data = larger[1].detach().clone()
    optimizer.load_state_dict(other.state_dict())
    with Unchanged(optimizer), pytest.raises(RuntimeError, match=r"gradient of shape \(3, 5\) .* call zero_grad\(\)"):
        optimizer.step()


def test_parameter_moved_away_from_its_state(
    optimizer: LearnedOptimizer, params: list[nn.Parameter], generator: torch.Generator
) -> None:
    before = params[0].detach().clone()
    torch.utils.swap_tensors(  # type: ignore[no-untyped-call]
        params[1], nn.Parameter(torch.zeros(3, 5, device="meta"))
    )
    params[1].grad = torch.zeros(3, 5, device="meta")
    with pytest.raises(RuntimeError, match="is on meta but its state is on cpu; take state_dict"):
        optimizer.step()
    assert torch.equal(params[0], before)


# ---- load_state_dict ----


def edit(path: list[Any], value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(state_dict: dict[str, Any]) -> None:
        target: Any = state_dict
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value(target[path[-1]]) if callable(value) else value

    return apply


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "no state": (lambda d: d.pop("state"), ValueError, r"keys 'state' and 'param_groups', got \['param_groups'\]"),
    "a group short": (lambda d: d["param_groups"].pop(), ValueError, r"groups of \[1\] parameters.* of \[1, 1\]"),
    "a parameter more": (
        edit(["param_groups", 1, "params"], [1, 2]),
        ValueError,
        r"groups of \[1, 2\] parameters, this optimizer of \[1, 1\]",
    ),
    "no rule": (lambda d: d["param_groups"][0].pop("rule"), ValueError, "none: by another optimizer"),
    "another rule": (edit(["param_groups", 1, "rule"], "x"), ValueError, r"with the rule \[x\], this optimizer runs"),
    "not a tensor": (edit(["state", 1, "lstm"], [1.0]), TypeError, "state of parameter 1 must be a tensor, got list"),
    "another hidden size": (
        edit(["state", 1, "lstm"], lambda t: t[..., :19]),
        ValueError,
        r"parameter 1 must have shape \(3, 5, 2, 2, 20\) .* got \(3, 5, 2, 2, 19\)",
    ),
    "another shape of the same size": (
        edit(["state", 1, "lstm"], lambda t: t.view(15, 2, 2, 20)),
        ValueError,
        r"must have shape \(3, 5, 2, 2, 20\) for a parameter of shape \(3, 5\), got \(15, 2, 2, 20\)",
    ),
    "float64": (
        edit(["state", 1, "lstm"], lambda t: t.double()),
        TypeError,
        "is torch.float64, which state_dtype=torch.float32 can't hold",
    ),
    "of another optimizer": (
        edit(["state", 1], {"step": 1, "exp_avg": torch.zeros(3, 5)}),
        ValueError,
        "state of parameter 1 has 'step', 'exp_avg' but no 'lstm', .*; take the entry out to start",
    ),
    "integers": (edit(["state", 1, "lstm"], lambda t: t.int()), TypeError, "is torch.int32"),
    "a number for an entry": (edit(["state", 1], 3), TypeError, "entry of parameter 1 must be a dictionary, got int"),
    "a tensor for an entry": (edit(["state", 1], torch.zeros(3)), TypeError, "must be a dictionary, got Tensor"),
    "sparse": (
        edit(["state", 1, "lstm"], lambda t: t.to_sparse()),
        TypeError,
        "must be dense and in memory, got torch.sp",
    ),
    "on meta": (
        edit(["state", 1, "lstm"], lambda t: t.to("meta")),
        TypeError,
        "must be dense and in memory, .* on meta",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_state_dict(optimizer: LearnedOptimizer, name: str) -> None:
    break_it, error, message = BROKEN[name]
    state_dict = copy.deepcopy(optimizer.state_dict())
    for entry in state_dict["state"].values():
        entry["lstm"].mul_(2)
    for group in state_dict["param_groups"]:
        group["lr"] = 0.125
    break_it(state_dict)
    with Unchanged(optimizer), pytest.raises(error, match=message):
        optimizer.load_state_dict(state_dict)
    optimizer.step()


@pytest.mark.parametrize(
    "take_out", [lambda state: state.pop(1), lambda state: state.update({1: {}})], ids=["no", "empty"]
)
def test_parameter_without_an_entry_starts_afresh(
    optimizer: LearnedOptimizer, take_out: Callable[[dict[int, Any]], Any]
) -> None:
    """As in torch.optim; torch.distributed.checkpoint writes empty ones."""
    saved = optimizer.state_dict()
    take_out(saved["state"])
    optimizer.load_state_dict(saved)
    optimizer.step()
    states = optimizer.state_dict()["state"]
    assert states[1]["lstm"].shape == (3, 5, 2, 2, 20)
    assert not torch.equal(states[0]["lstm"], saved["state"][0]["lstm"])


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.int8),
        (torch.bfloat16, torch.int8),
    ],
)
def test_state_would_lose_digits(
    params: list[nn.Parameter],
    rule: CoordinatewiseLSTM,
    generator: torch.Generator,
    saved: torch.dtype,
    wanted: torch.dtype,
) -> None:
    source = LearnedOptimizer(params, rule, state_dtype=saved)
    set_grads(params, make_grads(params, generator))
    source.step()
    target = LearnedOptimizer(make_params([(5,), (3, 5)], generator), rule, state_dtype=wanted)
    with (
        Unchanged(target),
        pytest.raises(TypeError, match=f"is {saved}, which state_dtype={wanted} can't hold"),
    ):
        target.load_state_dict(source.state_dict())


def test_checkpoint_of_another_rule(
    optimizer: LearnedOptimizer, generator: torch.Generator, rule: CoordinatewiseLSTM
) -> None:
    nudged = copy.deepcopy(rule)
    with torch.no_grad():
        nudged.output.bias.add_(1e-3)
    for other in (nudged, make_rule(generator, hidden_size=6)):
        params = make_params([(5,), (3, 5)], generator)
        target = LearnedOptimizer([{"params": params[:1]}, {"params": params[1:]}], other)
        with Unchanged(target), pytest.raises(ValueError, match=r"was written with the rule .* this optimizer runs"):
            target.load_state_dict(optimizer.state_dict())


def test_checkpoint_of_another_optimizer(
    optimizer: LearnedOptimizer, params: list[nn.Parameter], generator: torch.Generator
) -> None:
    adam = torch.optim.Adam([{"params": params[:1]}, {"params": params[1:]}])
    adam.step()
    with Unchanged(optimizer), pytest.raises(ValueError, match="none: by another optimizer"):
        optimizer.load_state_dict(adam.state_dict())

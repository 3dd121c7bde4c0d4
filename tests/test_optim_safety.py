"""Options that keep a run from going astray: warm-up, a limit on the step, and the state's dtype changed on purpose."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plain_loop import PlainLoop, assert_params_close, make_grads, make_params, make_rule, set_grads
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

from l2l_fast import CoordinatewiseLSTM, LearnedOptimizer
from l2l_fast.backends import Backend

pytestmark = pytest.mark.usefixtures("one_thread")

NAN, INF = float("nan"), float("inf")
SHAPES = [(), (7,), (0,), (3, 5), (40,)]


@pytest.fixture
def rule(generator: torch.Generator) -> CoordinatewiseLSTM:
    return make_rule(generator)


def twins_of(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def moves(optimizer: LearnedOptimizer, grads: list[Tensor]) -> list[Tensor]:
    """What a step with ``grads`` adds to each parameter, in float64."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().double().clone() for p in params]
    set_grads(params, grads)
    optimizer.step()
    return [p.detach().double() - b for p, b in zip(params, before, strict=True)]


# ---- warm-up ----


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
def test_warmup(backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator, lr: float | Tensor) -> None:
    """On top of a scheduler; the learning rate of the group is left as it is."""
    params = make_params([(20,)], generator)
    lr = lr.clone() if isinstance(lr, Tensor) else lr  # the scheduler changes it in place
    optimizer = LearnedOptimizer(params, rule, lr=lr, weight_decay=0.1, warmup=4, backend=backend.name)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    loop = PlainLoop(params, rule)
    for step in range(6):
        grads = make_grads(params, generator)
        set_grads(params, grads)
        scheduled = 0.5 if step < 3 else 0.25
        assert float(optimizer.param_groups[0]["lr"]) == scheduled
        optimizer.step()
        scheduler.step()
        loop.step(grads, lr=scheduled * min(1.0, (step + 1) / 4), weight_decay=0.1)
    assert_params_close(params, loop)


def test_warmup_of_a_group_counts_its_own_steps(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """A group that is added later, or had no gradient yet, starts from its own first step."""
    params = make_params([(20,), (5,), (6,)], generator)
    optimizer = LearnedOptimizer([{"params": params[:1]}, {"params": params[1:2]}], rule, warmup=3)
    loops = [PlainLoop([param], rule) for param in params]
    for step in range(5):
        if step == 1:
            optimizer.add_param_group({"params": params[2:], "warmup": 2})
        present = [True, step != 2, step >= 1]
        grads = [grad if there else None for grad, there in zip(make_grads(params, generator), present, strict=True)]
        set_grads(params, grads)
        optimizer.step()
        taken = [step, step if step < 2 else step - 1, step - 1]
        for loop, grad, count, warmup in zip(loops, grads, taken, (3, 3, 2), strict=True):
            loop.step([grad], lr=min(1.0, (count + 1) / warmup))
    for param, loop in zip(params, loops, strict=True):
        assert_params_close([param], loop)
    assert [group["step"] for group in optimizer.param_groups] == [5, 4, 4]


# ---- a limit on the step ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_limit_that_is_not_reached_changes_nothing(
    rule: CoordinatewiseLSTM, generator: torch.Generator, dtype: torch.dtype
) -> None:
    """Bit for bit, for each tensor and for all together."""
    params = make_params(SHAPES, generator, dtype)
    others = twins_of(params), twins_of(params)
    optimizers = [
        LearnedOptimizer(params, rule),
        LearnedOptimizer(others[0], rule, max_update_norm=1e6),
        LearnedOptimizer(others[1], rule, max_update_norm=1e6, update_norm="global"),
    ]
    for _ in range(3):
        grads = make_grads(params, generator)
        for optimizer in optimizers:
            moves(optimizer, grads)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(params, other, strict=True))


def test_limit_for_each_tensor(backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """A longer move keeps its direction, a shorter one all of its bits; the state moves as ever."""
    params = make_params(SHAPES, generator)
    twins = twins_of(params)
    options: dict[str, Any] = {"weight_decay": 0.1, "maximize": True, "backend": backend.name}
    free, bound = LearnedOptimizer(params, rule, **options), LearnedOptimizer(twins, rule, **options)
    grads = make_grads(params, generator)
    start = twins_of(params)
    unbound = moves(free, grads)
    norms = [move.norm().item() for move in unbound]
    limit = sorted(norms)[3]  # one of the tensors moves farther, one exactly so far
    bound.param_groups[0]["max_update_norm"] = limit * 0.999
    bounded = moves(bound, grads)
    shortened = 0
    for move, short, norm, before in zip(unbound, bounded, norms, start, strict=True):
        if norm <= limit * 0.999:
            assert torch.equal(move, short)
        else:
            shortened += 1
            expected = move * (limit * 0.999 / norm)
            # One rounding of the parameter, and one of the difference.
            torch.testing.assert_close(short, expected, rtol=1e-6, atol=2e-7 * (1 + before.abs().max().item()))
    assert shortened == 2
    for key, entry in free.state_dict()["state"].items():
        assert torch.equal(bound.state_dict()["state"][key]["lstm"], entry["lstm"])


def test_limit_for_all_tensors(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """Over groups, dtypes and strides; a group without it neither counts nor is held back."""
    shapes: list[tuple[int, ...]] = [(7,), (6, 4), (9,), (5,)]
    params = make_params(shapes, generator)
    params[1] = nn.Parameter(params[1].detach().t().contiguous().t())
    params[2] = nn.Parameter(params[2].detach().double())
    twins = [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]
    assert not twins[1].is_contiguous()

    def groups(tensors: list[nn.Parameter], **limit: Any) -> list[dict[str, Any]]:
        return [{"params": tensors[:2], **limit}, {"params": tensors[2:3], **limit}, {"params": tensors[3:]}]

    free = LearnedOptimizer(groups(params), rule)
    bound = LearnedOptimizer(groups(twins, max_update_norm=0.1, update_norm="global"), rule)
    grads = make_grads(params, generator)
    unbound, bounded = moves(free, grads), moves(bound, grads)
    joint = torch.cat([move.reshape(-1) for move in unbound[:3]]).norm().item()
    assert joint > 0.2
    for move, short in zip(unbound[:3], bounded[:3], strict=True):
        torch.testing.assert_close(short, move * (0.1 / joint), rtol=1e-5, atol=1e-6)
    assert torch.equal(unbound[3], bounded[3])


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_limit_with_a_gradient_that_is_not_finite(
    backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator, scope: str
) -> None:
    """It shows where it is, and what shares its norm rests."""
    params = make_params([(20,), (5,)], generator)
    before = twins_of(params)
    optimizer = LearnedOptimizer(params, rule, max_update_norm=0.5, update_norm=scope, backend=backend.name)
    grads = make_grads(params, generator)
    grads[0][3] = INF
    moves(optimizer, grads)
    bad = torch.arange(20) == 3
    assert params[0][bad].isnan().all()
    assert torch.equal(params[0][~bad], before[0][~bad])
    assert torch.equal(params[1], before[1]) == (scope == "global")


def test_limit_with_skip_nonfinite(backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(20,)], generator)
    before = params[0].detach().clone()
    options: dict[str, Any] = {"skip_nonfinite": True, "weight_decay": 0.1, "backend": backend.name}
    optimizer = LearnedOptimizer(params, rule, max_update_norm=0.1, **options)
    grads = make_grads(params, generator)
    grads[0][3] = NAN
    (move,) = moves(optimizer, grads)
    assert move[3] == 0
    assert move.norm().item() == pytest.approx(0.1, rel=1e-4)
    assert not torch.equal(params[0], before)


def test_limit_with_a_closure(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(20,)], generator)
    before = params[0].detach().double()
    optimizer = LearnedOptimizer(params, rule, max_update_norm=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (params[0] ** 2).sum()
        torch.autograd.backward(loss)
        return loss.item()

    assert optimizer.step(closure) == pytest.approx((before**2).sum().item(), rel=1e-5)
    assert (params[0].detach().double() - before).norm().item() == pytest.approx(0.1, rel=1e-4)


def test_tensor_saved_for_backward_is_guarded(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    both: list[dict[str, Any]] = [{"max_update_norm": 1.0}, {"stochastic_rounding": True}]
    for options in both:
        params = make_params([(5,)], generator, torch.bfloat16)
        loss = (params[0] ** 2).sum()
        set_grads(params, make_grads(params, generator))
        LearnedOptimizer(params, rule, **options).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.backward(loss)


class NoAnswer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails where the host would ask a device for a number, and notes what is allocated and called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert name not in {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero"}, name
        self.called.append(name)
        return func(*args, **(kwargs or {}))


def test_no_option_asks_the_device(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = [*make_params([(5,), (3, 5)], generator), *make_params([(7,)], generator, torch.bfloat16)]
    for scope in ("tensor", "global"):
        optimizer = LearnedOptimizer(
            params, rule, warmup=3, max_update_norm=0.1, update_norm=scope, stochastic_rounding=True
        )
        set_grads(params, make_grads(params, generator))
        with NoAnswer() as mode:
            optimizer.step()
            optimizer.step()
        assert "aten::random_" in str(mode.called)
        assert "aten::linalg_vector_norm" in mode.called or scope == "tensor"


def test_without_options_a_step_calls_no_operation(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """Beyond the backend's own: nothing is allocated, copied or computed beside it."""
    params = [*make_params([(5,), (3, 5)], generator), *make_params([(7,)], generator, torch.bfloat16)]
    optimizer = LearnedOptimizer(params, rule, warmup=3, backend="cpu")
    set_grads(params, make_grads(params, generator))
    optimizer.step()
    with NoAnswer() as mode:
        optimizer.step()
    assert [name for name in mode.called if not name.startswith(("aten::detach", "profiler::"))] == []


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_limit_takes_as_many_calls_for_many_tensors(
    rule: CoordinatewiseLSTM, generator: torch.Generator, scope: str
) -> None:
    """Small tensors are as fast as the calls on all of them are few."""
    counts = []
    for tensors in (2, 20):
        params = make_params([(5,)] * tensors, generator)
        optimizer = LearnedOptimizer(params, rule, max_update_norm=0.1, update_norm=scope, backend="cpu")
        set_grads(params, make_grads(params, generator))
        optimizer.step()
        with NoAnswer() as mode:
            optimizer.step()
        counts.append([name for name in mode.called if not name.startswith(("aten::detach", "profiler::"))])
    assert counts[0] == counts[1]


def test_limited_steps_find_their_memory_again(
    rule: CoordinatewiseLSTM, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels' tables, and CUDA graphs, rely on addresses that stay."""
    params = make_params([(5,), (3, 5)], generator)
    optimizer = LearnedOptimizer(params, rule, max_update_norm=0.1, backend="reference")
    seen: list[list[int]] = []
    reference = optimizer._sync_rules()[0].runner(torch.device("cpu"), torch.float32).backend
    step_ = reference.step_

    def watched(spec: Any, prepared: Any, tensors: list[Tensor], *rest: Any, **options: Any) -> None:
        seen.append([tensor.data_ptr() for tensor in tensors])
        step_(spec, prepared, tensors, *rest, **options)

    monkeypatch.setattr(reference, "step_", watched)
    for _ in range(3):
        moves(optimizer, make_grads(params, generator))
    assert seen[0] == seen[1] == seen[2]
    assert not set(seen[0]) & {param.data_ptr() for param in params}


# ---- bad options ----

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"warmup": -1}, ValueError, "warmup must not be negative, got -1"),
    ({"warmup": 1.5}, TypeError, "warmup must be an integer, got 1.5"),
    ({"warmup": True}, TypeError, "warmup must be an integer, got True"),
    ({"max_update_norm": 0}, ValueError, "max_update_norm must be finite and positive, got 0; None sets no limit"),
    ({"max_update_norm": NAN}, ValueError, "max_update_norm must be finite and positive, got nan"),
    ({"max_update_norm": INF}, ValueError, "max_update_norm must be finite and positive, got inf"),
    ({"max_update_norm": "1"}, TypeError, "max_update_norm must be a number or None, got '1'"),
    ({"update_norm": "layer"}, ValueError, r"update_norm must be 'tensor' .* or 'global' .* got 'layer'"),
    ({"rounding_seed": -3}, ValueError, "rounding_seed must not be negative, got -3"),
    ({"rounding_seed": None}, TypeError, "rounding_seed must be an integer, got None"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_option(
    rule: CoordinatewiseLSTM,
    generator: torch.Generator,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    """At construction, in a group, and set later: then found before anything is stepped."""
    params = make_params([(5,), (6,)], generator)
    with pytest.raises(error, match=message):
        LearnedOptimizer(params, rule, **options)
    optimizer = LearnedOptimizer(params[:1], rule)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": params[1:], **options})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": params[1:]})
    optimizer.param_groups[1].update(options)
    before = params[0].detach().clone()
    set_grads(params, make_grads(params, generator))
    with pytest.raises(error, match=message):
        optimizer.step()
    assert torch.equal(params[0], before)
    assert not optimizer.state
    assert optimizer.param_groups[0]["step"] == 0


def test_checkpoint_from_before_the_options(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """Loads with them off."""
    params = make_params([(5,)], generator)
    optimizer = LearnedOptimizer(params, rule)
    moves(optimizer, make_grads(params, generator))
    saved = optimizer.state_dict()
    for option in ("warmup", "max_update_norm", "update_norm", "stochastic_rounding", "rounding_seed", "step"):
        del saved["param_groups"][0][option]
    twins = twins_of(params)
    other = LearnedOptimizer(twins, rule, warmup=7)
    other.load_state_dict(saved)
    grads = make_grads(params, generator)
    moves(optimizer, grads)
    moves(other, grads)
    assert torch.equal(params[0], twins[0])
    assert other.param_groups[0]["step"] == 1


# ---- the state's dtype ----


@pytest.mark.parametrize("state_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_convert_state(
    backend: Backend, rule: CoordinatewiseLSTM, generator: torch.Generator, state_dtype: torch.dtype
) -> None:
    """Rounded once, and back without loss; then the optimizer is one of that dtype."""
    params = make_params(SHAPES, generator)
    optimizer = LearnedOptimizer(params, rule, backend=backend.name)
    moves(optimizer, make_grads(params, generator))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.convert_state(state_dtype)
    assert optimizer.state_dtype == state_dtype
    for key, entry in optimizer.state_dict()["state"].items():
        assert torch.equal(entry["lstm"], before[key]["lstm"].to(state_dtype))
    twins = twins_of(params)
    twin = LearnedOptimizer(twins, rule, backend=backend.name, state_dtype=state_dtype)
    twin.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        grads = make_grads(params, generator)
        moves(optimizer, grads)
        moves(twin, grads)
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))
    narrow = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.convert_state(torch.float32)
    for key, entry in optimizer.state_dict()["state"].items():
        assert entry["lstm"].dtype == torch.float32
        assert torch.equal(entry["lstm"], narrow[key]["lstm"].float())


def test_convert_state_beyond_range(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    params = make_params([(5,), (6,)], generator)
    optimizer = LearnedOptimizer(params, rule)
    moves(optimizer, make_grads(params, generator))
    saved = optimizer.state_dict()
    saved["state"][1]["lstm"][2, 0, 1, 3] = 1e5
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"\(6,\) reaches 100000\.0, too large for torch.float16; keep torch.float32"):
        optimizer.convert_state(torch.float16)
    assert optimizer.state_dtype == torch.float32
    assert all(torch.equal(optimizer.state_dict()["state"][k]["lstm"], saved["state"][k]["lstm"]) for k in (0, 1))
    with pytest.raises(TypeError, match="state_dtype must be one of"):
        optimizer.convert_state(torch.float64)
    optimizer.convert_state(torch.bfloat16)
    assert optimizer.state_dtype == torch.bfloat16


def test_state_dtype_is_not_to_be_assigned(rule: CoordinatewiseLSTM, generator: torch.Generator) -> None:
    """It would leave states of two dtypes to one call of a kernel."""
    optimizer = LearnedOptimizer(make_params([(5,)], generator), rule)
    with pytest.raises(AttributeError):
        optimizer.state_dtype = torch.float16  # type: ignore[misc]

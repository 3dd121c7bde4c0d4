"""Limits and random rounding of parameters that several processes share: as of whole ones, and replicas stay equal."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plain_loop import make_rule
from ranks import Ranks
from sharded import (
    PLACEMENTS,
    assert_same,
    assert_same_shares,
    communicates,
    loss_of,
    make_model,
    make_optimizer,
    on_all,
    params_of,
    placed,
    seeded,
    set_grads,
    sharded_and_plain,
    share,
    states_of,
    take_steps,
    whole,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from l2l_fast import LearnedOptimizer, optimizer_in_backward
from l2l_fast.experiments.rounding import constant_rule
from l2l_fast.sharding import shard_of

pytestmark = pytest.mark.usefixtures("one_thread")

INF = float("inf")
SCOPES = ["tensor", "global"]


@functools.cache
def line() -> DeviceMesh:
    """All ranks; made once, for DTensor may mix up the process groups of a second one with those of the first."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


@functools.cache
def square() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2))


def shards(params: Sequence[Tensor]) -> list[Tensor]:
    """What this rank holds of each parameter, copied."""
    return [param.to_local().detach().clone() for param in params if isinstance(param, DTensor)]


def shards_of_all_ranks(params: Sequence[Tensor]) -> list[dict[tuple[int, ...], list[Tensor]]]:
    """For each parameter all its shards, each as all ranks hold it that have a replica."""
    own = [(shard_of(param), local) for param, local in zip(params, shards(params), strict=True)]  # type: ignore[arg-type]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    found: list[dict[tuple[int, ...], list[Tensor]]] = [{} for _ in params]
    for of_a_rank in gathered:
        for replicas, (shard, local) in zip(found, of_a_rank, strict=True):
            replicas.setdefault(shard, []).append(local)
    return found


def assert_replicas_agree(params: Sequence[Tensor]) -> None:
    for of_a_parameter in shards_of_all_ranks(params):
        for replicas in of_a_parameter.values():
            assert all(torch.equal(replicas[0], replica) for replica in replicas[1:])


# ---- max_update_norm ----


def moves(optimizer: LearnedOptimizer, step: int) -> list[Tensor]:
    """How far the step takes each parameter, in float64."""
    params = params_of(optimizer)
    before = [whole(param).double() for param in params]
    take_steps(optimizer, range(step, step + 1))
    return [whole(param).double() - start for param, start in zip(params, before, strict=True)]


def limit_as_one_process(scope: str) -> None:
    """On every number of ranks some shards are smaller than others, and some empty."""
    _, sharded, plain = sharded_and_plain(max_update_norm=0.02, update_norm=scope)
    for step in range(3):
        set_grads(params_of(sharded), step)
        with communicates(1):
            sharded.step()
        lengths = [move.norm() for move in moves(plain, step)]
        if scope == "global":
            lengths = [torch.stack(lengths).norm()]
        assert max(lengths) == pytest.approx(0.02, rel=1e-4)  # so that there is something to compare
        assert_same_shares(sharded, plain, 1e-6)
    assert_same([whole(state) for state in states_of(sharded)], states_of(plain))


@pytest.mark.parametrize("scope", SCOPES)
def test_limit_with_fsdp(ranks: Ranks, scope: str) -> None:
    on_all(ranks, limit_as_one_process, scope)


def step_within_the_limit(scope: str) -> None:
    _, limited, plain = sharded_and_plain()
    limited.param_groups[0].update(max_update_norm=1e3, update_norm=scope)
    take_steps(limited, range(2))
    take_steps(plain, range(2))
    assert_same_shares(limited, plain)


@pytest.mark.parametrize("scope", SCOPES)
def test_steps_within_the_limit_keep_their_bits(two: Ranks, scope: str) -> None:
    on_all(two, step_within_the_limit, scope)


def tensors_to_place() -> list[Tensor]:
    return [torch.randn(shape, generator=seeded(0)) for shape in [(3, 5, 2), (1, 7, 3), (2, 2, 33)]]


def limit_with_placements(scope: str) -> None:
    mesh = square()
    options: dict[str, Any] = {"max_update_norm": 0.02, "update_norm": scope}
    for placements in PLACEMENTS:
        sharded = make_optimizer(placed(tensors_to_place(), mesh, placements), **options)
        plain = make_optimizer([nn.Parameter(tensor) for tensor in tensors_to_place()], **options)
        set_grads(params_of(sharded), 0)
        with communicates(sum(isinstance(placement, Shard) for placement in placements)):
            sharded.step()
        set_grads(params_of(plain), 0)
        plain.step()
        assert_same_shares(sharded, plain, 1e-6)
        assert_replicas_agree(params_of(sharded))


@pytest.mark.parametrize("scope", SCOPES)
def test_limit_with_placements(four: Ranks, scope: str) -> None:
    """Over dimensions of the mesh that hold replicas nothing is added up, nor communicated."""
    on_all(four, limit_with_placements, scope)


def limit_a_mixture(scope: str) -> None:
    mesh = square()
    sources = tensors_to_place()
    placements: list[tuple[Placement, ...]] = [(Shard(0), Shard(1)), (Replicate(), Shard(2)), (Shard(1), Replicate())]
    params: list[nn.Parameter] = [nn.Parameter(torch.ones(9))]
    for source, where in zip(sources, placements, strict=True):
        params += placed([source], mesh, where)
    twins = [nn.Parameter(whole(param).clone()) for param in params]
    options: dict[str, Any] = {"max_update_norm": 0.02, "update_norm": scope}
    optimizers = [
        make_optimizer([{"params": tensors[:3]}, {"params": tensors[3:]}], **options) for tensors in (params, twins)
    ]
    for step in range(2):
        for optimizer in optimizers:
            set_grads(params_of(optimizer), step)
        with communicates(3):  # over both dimensions of the mesh for the first group, over one for the second
            optimizers[0].step()
        optimizers[1].step()
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(whole(param), twin.detach(), rtol=0, atol=1e-6)
    assert_replicas_agree(params[1:])


@pytest.mark.parametrize("scope", SCOPES)
def test_limit_of_whole_and_sharded_parameters(four: Ranks, scope: str) -> None:
    """Sharded in different ways, and in several groups: each counts once."""
    on_all(four, limit_a_mixture, scope)


def rest_on_all_ranks(scope: str) -> None:
    mesh = line()
    optimizer = make_optimizer(
        placed([torch.ones(5, 4), torch.ones(6, 2)], mesh, [Shard(0)]), max_update_norm=0.1, update_norm=scope
    )
    first, second = params_of(optimizer)
    set_grads([first, second], 0)
    assert isinstance(first, DTensor)
    assert isinstance(first.grad, DTensor)
    bad = torch.zeros(5, 4, dtype=torch.bool)
    bad[0, 1] = True  # of the first rank
    first.grad = share(whole(first.grad).masked_fill(bad, INF), first)
    optimizer.step()
    assert whole(first)[bad].isnan().all()
    assert (whole(first)[~bad] == 1).all()
    assert bool((whole(second) == 1).all()) == (scope == "global")


@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_not_finite_on_one_rank_rests_on_all(two: Ranks, scope: str) -> None:
    on_all(two, rest_on_all_ranks, scope)


def limit_in_the_backward() -> None:
    models = [make_model() for _ in range(2)]
    for model in models:
        fully_shard(model)
    options: dict[str, Any] = {"lr": 0.5, "max_update_norm": 0.02}
    handle = optimizer_in_backward(models[0], make_rule(seeded(1)), **options)
    optimizer = LearnedOptimizer(models[1].parameters(), make_rule(seeded(1)), **options)
    for step in range(2):
        for model in models:
            loss_of(model, step, dist.get_rank()).backward()  # type: ignore[no-untyped-call]
        for trained in (optimizer, handle):
            trained.step()
            trained.zero_grad()
    assert_same(shards(list(models[0].parameters())), shards(list(models[1].parameters())))
    assert len(handle.state) == 8


def test_limit_in_the_backward(two: Ranks) -> None:
    on_all(two, limit_in_the_backward)


def shard_too_late() -> None:
    def tensor_parallel(model: nn.Sequential) -> None:
        parallelize_module(model, line(), {"0": ColwiseParallel(output_layouts=Replicate())})

    def sharded_in_part(model: nn.Sequential) -> None:
        fully_shard(model[2], mesh=line())

    for shard in (functools.partial(fully_shard, mesh=line()), tensor_parallel, sharded_in_part):
        model = make_model()
        handle = optimizer_in_backward(model, make_rule(seeded(1)))
        handle.zero_grad()
        shard(model)
        loss_of(model, 0, dist.get_rank()).backward()  # type: ignore[no-untyped-call]
        for call in (handle.step, handle.zero_grad, handle.state_dict):
            with pytest.raises(RuntimeError, match=r"'weight' of shape \(.*\) was sharded after optimizer_in_backward"):
                call()
        handle.remove()
        handle.state_dict()


def test_sharding_after_the_hooks_is_noticed(two: Ranks) -> None:
    """They sit on parameters that are not those of the model any more."""
    on_all(two, shard_too_late)


def first_step_at_rate_0(options: dict[str, Any]) -> None:
    mesh = line()
    for value in (0.0, 1.0):
        (param,) = placed([torch.ones(4, 2)], mesh, [Shard(0)])
        optimizer = LearnedOptimizer([param], make_rule(seeded(1)), lr=0.0, **options)
        grad = torch.zeros(4, 2)
        grad[0] = value  # of the first rank
        param.grad = share(grad, param)  # type: ignore[arg-type]
        optimizer.step()
        assert optimizer.param_groups[0]["step"] == value


@pytest.mark.parametrize("options", [{}, {"max_update_norm": 0.1}], ids=str)
def test_ranks_agree_whether_a_first_step_counts(two: Ranks, options: dict[str, Any]) -> None:
    """One that makes no more than states is told by gradients that are all 0, on all ranks."""
    on_all(two, first_step_at_rate_0, options)


# ---- stochastic_rounding ----


def narrow(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.bfloat16() for tensor in tensors]


def round_with_placements(options: dict[str, Any]) -> None:
    mesh = square()
    starts = narrow(tensors_to_place())
    for placements in PLACEMENTS:
        rough = make_optimizer(placed(starts, mesh, placements), stochastic_rounding=True, **options)
        exact = make_optimizer([nn.Parameter(start.float()) for start in starts], **options)
        set_grads(params_of(exact), 0)
        for param, twin in zip(params_of(rough), params_of(exact), strict=True):
            assert isinstance(param, DTensor)
            assert twin.grad is not None
            twin.grad = twin.grad.bfloat16().float()
            param.grad = share(twin.grad.bfloat16(), param)
        with communicates(len([where for where in placements if isinstance(where, Shard)]) if options else 0):
            rough.step()
        exact.step()
        moved = 0
        for param, twin in zip(params_of(rough), params_of(exact), strict=True):
            unit = torch.finfo(torch.bfloat16).eps * twin.detach().abs()
            assert ((whole(param).float() - twin.detach()).abs() <= unit).all()
            moved += int((whole(param) != twin.detach().bfloat16()).sum())
        assert moved > 5  # not rounded to nearest
        assert_same([whole(state) for state in states_of(rough)], states_of(exact))
        assert_replicas_agree(params_of(rough))


@pytest.mark.parametrize("options", [{}, {"max_update_norm": 50.0}], ids=str)
def test_rounding_with_placements(four: Ranks, options: dict[str, Any]) -> None:
    """To a neighbour of the step in float32, replicas alike, and without communication of its own."""
    on_all(four, round_with_placements, options)


def ones(mesh: DeviceMesh, placements: Sequence[Placement], **options: Any) -> tuple[nn.Parameter, LearnedOptimizer]:
    """A parameter with an optimizer that adds half a unit in the last place to each coordinate."""
    (param,) = placed([torch.ones(16, 16, 16, dtype=torch.bfloat16)], mesh, placements)
    param.grad = share(torch.zeros(16, 16, 16, dtype=torch.bfloat16), param)  # type: ignore[arg-type]
    rule = constant_rule(torch.finfo(torch.bfloat16).eps / 2)
    return param, LearnedOptimizer([param], rule, stochastic_rounding=True, **options)


def draw_for_each_shard() -> None:
    mesh = square()
    for placements in PLACEMENTS:
        param, optimizer = ones(mesh, placements)
        optimizer.step()
        (found,) = shards_of_all_ranks([param])
        different = [replicas[0] for replicas in found.values()]
        assert len(different) == 2 ** sum(isinstance(placement, Shard) for placement in placements)
        assert not any(torch.equal(one, other) for k, one in enumerate(different) for other in different[:k])
        share_up = (whole(param) > 1).double().mean().item()
        assert abs(share_up - 0.5) < 5 * 0.5 / 64


def test_shards_round_independently(four: Ranks) -> None:
    on_all(four, draw_for_each_shard)


def draw_again() -> None:
    mesh = line()
    ends = []
    for seed in (0, 0, 1):
        param, optimizer = ones(mesh, [Shard(1)], rounding_seed=seed)
        optimizer.step()
        first = shards([param])
        saved = optimizer.state_dict()
        optimizer.step()
        second = shards([param])
        resumed_param, resumed = ones(mesh, [Shard(1)])
        with torch.no_grad():
            resumed_param.to_local().copy_(first[0])  # type: ignore[attr-defined]
        resumed.load_state_dict(saved)
        resumed.step()
        assert_same(shards([resumed_param]), second)
        ends.append(second[0])
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_rounding_is_repeated_and_resumed(two: Ranks) -> None:
    on_all(two, draw_again)


def draw_beside_whole_parameters() -> None:
    """On the part of the ranks that hold the sharded one, and on those that hold nothing of it."""
    ends = []
    for beside in (False, True):
        plain = [nn.Parameter(torch.ones(50, dtype=torch.bfloat16)) for _ in range(2)]
        sharded = placed([torch.ones(5, 3, dtype=torch.bfloat16)], DeviceMesh("cpu", [0, 1]), [Replicate()])
        params = [plain[0], *sharded, plain[1]] if beside else plain
        optimizer = LearnedOptimizer(params, constant_rule(2**-8), stochastic_rounding=True)
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        ends.append([param.detach() for param in plain])
    assert_same(ends[0], ends[1])
    assert all(((param > 1).any() and (param == 1).any()) for param in ends[1])
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, ends[1])
    assert_same(gathered[0], gathered[-1])


def test_whole_parameters_round_alike_on_all_ranks(four: Ranks) -> None:
    on_all(four, draw_beside_whole_parameters)

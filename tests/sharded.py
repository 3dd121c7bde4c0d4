"""What tests of sharded parameters share: models, optimizers and gradients, and what the ranks have to agree in.

Its functions run on the ranks of :mod:`ranks` as well as in the one process that they are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from plain_loop import make_rule
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from l2l_fast import LearnedOptimizer


def on_all(ranks: Ranks, function: Callable[..., Any], *arguments: object) -> None:
    """Run ``function``, with its assertions, on every rank; what one of them raises is raised here."""
    for result in ranks(function, *arguments):
        if isinstance(result, BaseException):
            raise result


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_model(seed: int = 0) -> nn.Sequential:
    """On four ranks some hold a row more than others, and of the last layers some hold nothing."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    generator = seeded(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    return model


def make_optimizer(params: Any, **options: Any) -> LearnedOptimizer:
    return LearnedOptimizer(params, make_rule(seeded(1)), lr=0.5, weight_decay=0.1, **options)


def params_of(optimizer: LearnedOptimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def share(tensor: Tensor, like: DTensor) -> DTensor:
    """``tensor``, which every rank has the whole of, placed as ``like`` is; nothing is communicated."""
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def set_grads(params: Sequence[Tensor], step: int) -> None:
    """Gradients that depend on the step alone, sharded like their parameters."""
    generator = seeded(100 + step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator)
        param.grad = share(grad, param) if isinstance(param, DTensor) else grad


def take_steps(optimizer: LearnedOptimizer, steps: range) -> None:
    for step in steps:
        set_grads(params_of(optimizer), step)
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def communicates(times: int) -> Iterator[None]:
    """Fails if anything but ``times`` collectives run inside the block."""
    with CommDebugMode() as communication:  # type: ignore[no-untyped-call]
        yield
    assert communication.get_total_counts() == times


def states_of(optimizer: LearnedOptimizer) -> list[Tensor]:
    return [entry["lstm"] for _, entry in sorted(optimizer.state_dict()["state"].items())]


def contents(optimizer: LearnedOptimizer) -> list[Tensor]:
    """All parameters and states, each whole."""
    return [whole(tensor) for tensor in (*params_of(optimizer), *states_of(optimizer))]


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 0.0) -> None:
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    local: Tensor = tensor.to_local()
    return local.detach()


def assert_same_shares(sharded: LearnedOptimizer, plain: LearnedOptimizer, tolerance: float = 0.0) -> None:
    """Each rank holds of parameters and states what one process has there."""
    pairs = zip((*params_of(sharded), *states_of(sharded)), (*params_of(plain), *states_of(plain)), strict=True)
    for own, all_of_it in pairs:
        assert isinstance(own, DTensor)
        assert own.shape == all_of_it.shape
        torch.testing.assert_close(_local(own), _local(share(all_of_it.detach(), own)), rtol=0, atol=tolerance)


def assert_placed_alike(optimizer: LearnedOptimizer) -> None:
    """States as the optimizer gives them out lie as their parameters do."""
    for param, state in zip(params_of(optimizer), states_of(optimizer), strict=True):
        assert isinstance(param, DTensor)
        assert isinstance(state, DTensor)
        assert (state.device_mesh, state.placements) == (param.device_mesh, param.placements)
        assert state.shape == (*param.shape, 2, 2, 20)
        assert state.is_contiguous()
        assert state.to_local().shape == (*param.to_local().shape, 2, 2, 20)


def sharded_and_plain(**options: Any) -> tuple[nn.Module, LearnedOptimizer, LearnedOptimizer]:
    model = make_model()
    fully_shard(model)
    return model, make_optimizer(model.parameters(), **options), make_optimizer(make_model().parameters(), **options)


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    result: Tensor = model(torch.randn(8, 5, generator=seeded(1000 * rank + step))).square().mean()
    return result


PLACEMENTS: list[tuple[Placement, ...]] = [
    (Replicate(), Replicate()),
    (Replicate(), Shard(0)),  # hybrid sharding
    (Shard(1), Replicate()),
    (Shard(0), Shard(1)),
    (Shard(2), Shard(0)),
    (Shard(1), Shard(1)),
]


def placed(tensors: Sequence[Tensor], mesh: DeviceMesh, placements: Sequence[Placement]) -> list[nn.Parameter]:
    return [nn.Parameter(distribute_tensor(tensor, mesh, placements)) for tensor in tensors]

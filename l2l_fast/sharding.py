"""Parameters that are sharded over processes: what this rank holds of one, and states that lie as their parameter does.

A coordinate's step depends on nothing but its own gradient and state, so every rank steps what it holds of a
``DTensor`` as if that were all, and no rank asks another. The norm of a whole tensor takes the others: ranks that hold
shards of it add up what they have, all in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


def types() -> tuple[type[DTensor], ...]:
    """``DTensor`` as :func:`isinstance` takes it; nothing while no one has imported it, so that none can exist.

    Its import takes half as long as that of PyTorch, so that importing this package must not bring it.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else (module.DTensor,)


def is_sharded(tensor: Any) -> TypeGuard[DTensor]:
    return isinstance(tensor, types())


@torch.no_grad()
def local_param(param: Tensor) -> Tensor:
    """What this rank holds of ``param``, sharing its memory; a parameter that is not sharded itself.

    Raises:
        ValueError: if the parameter is a sum over ranks that has not been taken.
    """
    if not is_sharded(param):
        return param
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"parameters must be sharded or replicated, got placements {param.placements} for one of shape "
            f"{tuple(param.shape)}; redistribute it first"
        )
    return param.to_local()


def local_pair(param: DTensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """What this rank holds of a parameter and of its gradient; without a tape.

    A gradient that lies as its parameter does, as FSDP leaves it, is taken as it is. Another one, such as the
    sum over ranks that is left to take for a replicated parameter, is redistributed: that communicates.

    Raises:
        RuntimeError: if shape or mesh of the gradient are not those of the parameter.
        TypeError: if the gradient is no ``DTensor``.
    """
    if not is_sharded(grad):
        raise TypeError(
            f"a parameter of shape {tuple(param.shape)} is a DTensor but its gradient is a "
            f"{type(grad).__name__}; set p.grad = distribute_tensor(gradient, p.device_mesh, p.placements)"
        )
    # Shards of two shapes may look alike to a rank.
    if grad.shape != param.shape or grad.device_mesh != param.device_mesh:
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} on {param.device_mesh} has a gradient of shape "
            f"{tuple(grad.shape)} on {grad.device_mesh}; call zero_grad() after sharding or replacing a parameter"
        )
    if grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return param.to_local(), _waited(grad.to_local())


def check_plain(param: Tensor, grad: Tensor) -> None:
    """Refuse a sharded gradient of a parameter that is not.

    Raises:
        TypeError: if ``grad`` is a ``DTensor``.
    """
    if is_sharded(grad):
        raise TypeError(
            f"a parameter of shape {tuple(param.shape)} is a plain tensor but its gradient is a DTensor; shard the "
            "model before the optimizer is made, or set p.grad = p.grad.full_tensor()"
        )


def like_param(param: Tensor, state: Tensor) -> Tensor:
    """A state ``[*shape, 2, 2, H]`` of what this rank holds of ``param`` as the state of the whole, placed like it."""
    if not is_sharded(param):
        return state
    from torch.distributed.tensor import DTensor

    shape = torch.Size((*param.shape, *state.shape[-3:]))
    stride = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(state, param.device_mesh, param.placements, shape=shape, stride=stride)
    # A parameter that is offloaded to the CPU is not on the device of its mesh, whereto its state has gone now.
    return whole.to(state.device)


def local_state(param: Tensor, state: Tensor) -> Tensor:
    """What this rank holds of a whole state ``[*param.shape, 2, 2, H]``: one placed like ``param``, or a plain one."""
    if not is_sharded(param):
        return state
    if not is_sharded(state):
        from torch.distributed.tensor import distribute_tensor

        # Every rank has the whole of it and takes its share.
        state = distribute_tensor(state, param.device_mesh, param.placements, src_data_rank=None)
    return _waited(state.to_local())


def check_state(key: Any, param: Tensor, state: Tensor) -> None:
    """Whether :func:`local_state` can take ``state``.

    Raises:
        ValueError: if it is sharded otherwise than ``param``.
    """
    if not is_sharded(state):
        return
    if not is_sharded(param):
        raise ValueError(
            f"the state of parameter {key} is a DTensor but the parameter is not; take state.full_tensor(), or load "
            "through torch.distributed.checkpoint"
        )
    if state.device_mesh != param.device_mesh or state.placements != param.placements:
        raise ValueError(
            f"the state of parameter {key} must have placements {param.placements} on {param.device_mesh}, got "
            f"{state.placements} on {state.device_mesh}; redistribute it, or load through torch.distributed.checkpoint"
        )


def shard_of(param: DTensor) -> tuple[int, ...]:
    """Which shard of ``param`` this rank holds: where it is in the mesh, less the dimensions of replicas.

    Replicas of a shard have the same, and other shards another.
    """
    where = param.device_mesh.get_coordinate() or ()  # a rank outside of the mesh holds nothing
    return tuple(where[dim] for dim in _split_dims(param))


def sum_over_shards(numbers: Tensor, params: Mapping[int, DTensor]) -> Tensor:
    """Sums over all shards of ``numbers``, of which each rank knows what its own shard contributes.

    One collective per process group, in the order in which the groups come up: the ranks of a mesh have to call this
    for the same parameters in the same order. No rank waits for its device.

    Args:
        numbers: floating point ``[P]``, one for each of ``P`` parameters.
        params: those of them that are ``DTensor``, by their index; the others are whole everywhere.
    """
    groups: dict[str, tuple[ProcessGroup, str]] = {}
    split: dict[str, list[int]] = {}
    for index, param in params.items():
        for dim in _split_dims(param):
            group = param.device_mesh.get_group(dim)
            # One group may come as several objects, but has one name.
            groups[group.group_name] = group, param.device_mesh.device_type
            split.setdefault(group.group_name, []).append(index)
    if not split:
        return numbers
    from torch.distributed import all_reduce

    parts = list(numbers.unbind())
    for name, indices in split.items():
        group, device = groups[name]
        # Parameters that are offloaded to the CPU are not on the device on which their process group communicates.
        sums = torch.stack([parts[index] for index in indices]).to(device)
        all_reduce(sums, group=group)
        for index, part in zip(indices, sums.to(numbers.device).unbind(), strict=True):
            parts[index] = part
    return torch.stack(parts)


def _split_dims(param: DTensor) -> list[int]:
    """Dimensions of the mesh over which ``param`` is split; over the others there are replicas. None outside it."""
    mesh = param.device_mesh
    if mesh.get_coordinate() is None:
        return []
    return [
        dim for dim, placement in enumerate(param.placements) if not placement.is_replicate() and mesh.size(dim) > 1
    ]


def _waited(tensor: Tensor) -> Tensor:
    """``tensor`` after the collective that makes it, if that is still under way."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor

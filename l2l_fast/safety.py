"""A limit on how far a step may move the parameters, enforced on their device without waiting for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from l2l_fast import sharding

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def distances(before: list[Tensor], after: list[Tensor], sharded: Mapping[int, DTensor]) -> Tensor:
    """Euclidean distances between tensors of two lists of one dtype and device, as a vector on it.

    Args:
        before, after: what this rank holds.
        sharded: parameters by the index of those tensors that are shards of them; their distances are those of the
            whole, for which the ranks that hold shards communicate.
    """
    norms = torch.stack(torch._foreach_norm(torch._foreach_sub(after, before)))
    if not sharded:
        return norms
    # float64 has room for the squares of all float32 numbers, so that a lone shard's norm keeps all its bits.
    squares = sharding.sum_over_shards(norms.double().square_(), sharded)
    return squares.sqrt_().to(norms.dtype)


def joint(distances_of_batches: Sequence[Tensor]) -> Tensor:
    """The distance that the moves of all batches make together, a scalar on the device of the first."""
    first = distances_of_batches[0]
    dtype = torch.float64 if any(d.dtype == torch.float64 for d in distances_of_batches) else torch.float32
    norm: Tensor = torch.linalg.vector_norm(torch.cat([d.to(first.device, dtype) for d in distances_of_batches]))
    return norm


def share(distance: Tensor, limit: float) -> Tensor:
    """Which share of a move of ``distance`` keeps within ``limit``: at most 1, and 0 where it is not finite.

    So what is finite rests where something else in the same norm is not.
    """
    return (limit / distance).clamp_(max=1.0).nan_to_num_(nan=0.0)

"""A limit on how far a step may move the parameters, enforced on their device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def distances(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """Euclidean distances between tensors of two lists of one dtype and device, as a vector on it."""
    return torch.stack(torch._foreach_norm(torch._foreach_sub(after, before)))


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

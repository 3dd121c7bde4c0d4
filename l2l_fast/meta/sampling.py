"""A random part of the coordinates that stands for all of them in a meta-gradient, without bias."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 16  # coordinates that are taken or left together, as the C++ kernels work on them

# Of the expected tiles this share is drawn evenly, so that no tile that matters is scaled up without bound.
_EVEN_SHARE = 0.1


def sample_coordinates(
    d_points: Tensor, loss_weights: Tensor, fraction: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Coordinates to keep and the factors that make up for the rest: ``(index [M], factor [M])``.

    The meta-gradient is linear in the derivatives by the updates, so a tile that is kept with probability ``p`` and
    scaled by ``1 / p`` is right on average. ``p`` is proportional to the norm of those derivatives over the run,
    at most 1, and such that ``fraction`` of the tiles are kept on average.

    Args:
        d_points: ``[T + 1, N]``, derivative of each term of the meta-loss by its point.
        loss_weights: ``[T + 1]``.
        generator: where the choice comes from; advanced by the same amount whatever is chosen.
    """
    n = d_points.shape[1]
    tiles = -(-n // TILE)
    d_update, squares = torch.zeros_like(d_points[0]), torch.zeros_like(d_points[0])
    for weight, d_point in zip(loss_weights[1:].flip(0).tolist(), d_points[1:].flip(0), strict=True):
        d_update.add_(d_point, alpha=weight)
        squares.addcmul_(d_update, d_update)
    norms = torch.nn.functional.pad(squares, (0, tiles * TILE - n)).view(tiles, TILE).sum(1).sqrt()
    keep = _probabilities(norms, fraction * tiles)
    source = "cpu" if generator is None else generator.device
    drawn = torch.rand(tiles, generator=generator, dtype=torch.float64, device=source).to(keep.device)
    chosen = (drawn < keep).nonzero().squeeze(1)
    index = (chosen.unsqueeze(1) * TILE + torch.arange(TILE, device=chosen.device)).view(-1)
    factor = keep[chosen].reciprocal().repeat_interleave(TILE)
    return index[index < n], factor[index < n]


def _probabilities(norms: Tensor, expected: float) -> Tensor:
    """Probabilities in float64, at most 1, that sum to ``expected`` (at most their number)."""
    count = len(norms)
    even = norms.new_full((count,), 1.0 / count, dtype=torch.float64)
    total = norms.double().sum()
    share = torch.where((total > 0) & total.isfinite(), norms.double() / total, even)
    share = (1 - _EVEN_SHARE) * share + _EVEN_SHARE * even
    low, high = 0.0, float(count) / _EVEN_SHARE
    for _ in range(60):  # the sum grows with the factor, so bisection finds it
        middle = (low + high) / 2
        if float((middle * share).clamp(max=1).sum()) < expected:
            low = middle
        else:
            high = middle
    return (high * share).clamp(max=1)

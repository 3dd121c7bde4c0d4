"""A state in 8 bits a number: 16 coordinates in a row share a power of 2 for each of their ``4 * H`` numbers.

A number is ``q * 2^(scale - 126)`` with ``q`` from -127 to 127, and the largest of those that share a scale has a ``q``
of 64 or more. ``q = -128`` is what was not finite: NaN. Powers of 2 lose up to one bit against a scale of any value,
but such numbers are bfloat16 numbers, and stored again in the same company they stay what they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 16  # coordinates that share scales

_LARGEST = 127
_NOT_FINITE = -128


def encode(state: Tensor) -> tuple[Tensor, Tensor]:
    """``state [N, 2, 2, H]`` rounded to nearest even: int8 ``[tiles, 16, 4 * H]`` and uint8 scales ``[tiles, 4 * H]``.

    Zeros stand past the end.
    """
    n, rows = state.shape[0], 4 * state.shape[-1]
    numbers = state.new_zeros(-(-n // TILE), TILE, rows, dtype=torch.float32)
    numbers.view(-1, rows)[:n].copy_(state.detach().reshape(n, rows))
    finite = numbers.isfinite()
    largest = torch.where(finite, numbers.abs(), 0).amax(1, keepdim=True)
    scales = ((largest.view(torch.int32) >> 23) - 7).clamp_(min=0)
    inverse = ((253 - scales) << 23).view(torch.float32)
    rounded = (numbers * inverse).round_().clamp_(-_LARGEST, _LARGEST)
    return torch.where(finite, rounded, _NOT_FINITE).to(torch.int8), scales.squeeze(1).to(torch.uint8)


def decode(numbers: Tensor, scales: Tensor, n: int) -> Tensor:
    """The first ``n`` coordinates of what :func:`encode` made, exactly, as bfloat16 ``[n, 2, 2, H]``."""
    size = ((scales.int() + 1) << 23).view(torch.float32).unsqueeze(1)
    values = torch.where(numbers == _NOT_FINITE, torch.nan, numbers * size)
    shape = (len(numbers) * TILE, 2, 2, numbers.shape[-1] // 4)
    return values.to(torch.bfloat16).reshape(shape)[:n].contiguous()


def pack(state: Tensor) -> Tensor:
    """``state [N, 2, 2, H]`` in one tensor, int8 ``[tiles, 4 * H + ceil(4 * H / 16), 16]``, a copy.

    Of a tile, the rows h1, c1, h2, c2 of ``H`` units each run along the coordinates, and their scales follow.
    """
    numbers, scales = encode(state)
    tiles, _, rows = numbers.shape
    packed = init(tiles * TILE, rows, state.device)
    packed[:, :rows].copy_(numbers.transpose(1, 2))
    packed[:, rows:].flatten(1)[:, :rows].copy_(scales.view(torch.int8))
    return packed


def unpack(packed: Tensor, n: int, rows: int) -> Tensor:
    """The first ``n`` coordinates of what :func:`pack` made as bfloat16 ``[n, 2, 2, rows / 4]``."""
    scales = packed[:, rows:].flatten(1)[:, :rows].view(torch.uint8)
    return decode(packed[:, :rows].transpose(1, 2), scales, n)


def init(n: int, rows: int, device: torch.device) -> Tensor:
    """A packed state of ``n`` coordinates with ``rows`` numbers each, all zero."""
    return torch.zeros(-(-n // TILE), rows + -(-rows // TILE), TILE, dtype=torch.int8, device=device)

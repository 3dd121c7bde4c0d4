"""The weights of a rule in the form that the kernels read, and their gradients back from it.

A product's inner dimension is cut in slices of 16 slots. Layer 1 has two: ``h1`` of units 0 to 15; then ``h1`` of
units 16 to 19 (slots 0, 2, 4, 6), features (8, 10) and bias (12), for which slots 1, 3, 5 hold the residuals of their
weights and slots 9 and 11 take the residuals of the features. Layer 2 has three: ``h1`` and ``h2`` of units 0 to 15;
then those of units 16 to 19 and bias. Columns are the gates, as :mod:`.cell` has them.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cell import RESIDUAL

SLICES = 5
HEAD = 16 * 64  # weights of a slice for the gates of units 0 to 15
TAIL = 16 * 16  # the same for units 16 to 19
VECTORS = 32 + 64 + 16  # output layer (20 weights, bias), padded; the identity feature's weights for head and tail

# Sums of the backward for one layer: gates of units 0 to 15 by 4 slices, 4 slices by gates of units 16 to 19.
LAYER_SUMS = 64 * 64 + 64 * 16
SUMS = 2 * LAYER_SUMS + 32  # then the output layer

_LOG2_E = 1.4426950408889634

_SLICES = tl.constexpr(SLICES)
_HEAD = tl.constexpr(HEAD)
_TAIL = tl.constexpr(TAIL)


class Packed(NamedTuple):
    """Weights as the kernels read them."""

    halves: Tensor  # float16 [2 * SLICES * (HEAD + TAIL)]: high and low parts of the heads, then of the tails
    vectors: Tensor  # float32 [VECTORS]


class _Map(NamedTuple):
    """Where each weight of a rule goes, all of shape ``[P]``."""

    head: Tensor  # index into [SLICES, 16, 64], or -1
    tail: Tensor  # index into [SLICES, 16, 16], or -1
    vector: Tensor  # index into the vectors, or -1
    sums: Tensor  # index into the sums of the backward
    scale: Tensor  # factor on the weight, float64


def _slots(features: int) -> dict[str, list[tuple[int, int]]]:
    """(slice, slot) of every input of every block of weights."""
    units = range(16)
    tails = range(4)
    return {
        "weight_ih_1": [(1, 8 + 2 * feature) for feature in range(features)],
        "weight_hh_1": [(0, unit) for unit in units] + [(1, 2 * unit) for unit in tails],
        "bias_1": [(1, 12)],
        "weight_ih_2": [(2, unit) for unit in units] + [(4, 2 * unit) for unit in tails],
        "weight_hh_2": [(3, unit) for unit in units] + [(4, 8 + 2 * unit) for unit in tails],
        "bias_2": [(4, 1)],
    }


# Where a layer's sums start, and which of the four slices joined there this one is: its slot s becomes 4 s + position.
_JOINED = {0: (0, 0), 1: (0, 1), 2: (LAYER_SUMS, 0), 3: (LAYER_SUMS, 1), 4: (LAYER_SUMS, 2)}


@cache
def _map(features: int, device: torch.device) -> _Map:
    head, tail, vector, sums, scale = [], [], [], [], []
    for name, inputs in _slots(features).items():
        for gate in range(4):
            factor = -2 * _LOG2_E if gate == 2 else -_LOG2_E
            for unit in range(20):
                column = 16 * gate + unit if unit < 16 else 8 * (gate // 2) + 2 * (unit - 16) + gate % 2
                for k, slot in inputs:
                    offset, position = _JOINED[k]
                    joined = 4 * slot + position
                    scale.append(factor)
                    if unit < 16:
                        head.append((16 * k + slot) * 64 + column)
                        tail.append(-1)
                        sums.append(offset + 64 * column + joined)
                    else:
                        head.append(-1)
                        tail.append((16 * k + slot) * 16 + column)
                        sums.append(offset + 64 * 64 + 16 * joined + column)
                    identity = features == 1 and name == "weight_ih_1"
                    vector.append((32 if unit < 16 else 96) + column if identity else -1)
    for unit in range(21):  # the output layer: weights, then bias
        head.append(-1)
        tail.append(-1)
        vector.append(unit)
        sums.append(2 * LAYER_SUMS + unit)
        scale.append(1.0)
    indices = (torch.tensor(index, device=device) for index in (head, tail, vector, sums))
    return _Map(*indices, torch.tensor(scale, dtype=torch.float64, device=device))


def _scatter(size: int, index: Tensor, values: Tensor) -> Tensor:
    """``values`` at ``index`` of a vector of ``size``, zeros elsewhere; an index of -1 drops the value."""
    return values.new_zeros(size + 1).index_put((index,), values)[:-1]


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """``(high, low)`` in float16 whose sum is ``values`` to 22 bits."""
    high = values.half()
    return high, (values - high.double()).half()


def _with_residuals(slices: Tensor) -> Tensor:
    """``slices [SLICES, 16, columns]`` with what the residuals of features and their weights are multiplied with."""
    high, low = _halves(slices)
    residual = slices - high.double() - low.double()
    slices = slices.clone()
    slices[1, 1:7:2] = RESIDUAL * residual[1, 8:14:2]
    slices[1, 9:13:2] = slices[1, 8:12:2] / RESIDUAL
    return slices


def pack(weights: Tensor, features: int) -> Packed:
    """The weights ``[P]`` of a rule of ``features`` features, without waiting for the device."""
    places = _map(features, weights.device)
    scaled = weights.detach().double() * places.scale
    limited = scaled.clamp(-65504, 65504)  # float16's range; a gate with such a weight is saturated anyway
    halves: list[Tensor] = []
    for index, columns in ((places.head, 64), (places.tail, 16)):
        slices = _scatter(SLICES * 16 * columns, index, limited).view(SLICES, 16, columns)
        halves += _halves(_with_residuals(slices))
    return Packed(torch.cat([part.flatten() for part in halves]), _scatter(VECTORS, places.vector, scaled).float())


def unpack_sums(sums: Tensor, features: int) -> Tensor:
    """The derivative ``[P]`` in float64 from ``sums [SUMS]`` of the backward."""
    places = _map(features, sums.device)
    return sums[places.sums] * places.scale


@triton.jit
def load_slice(halves, k: tl.constexpr):
    """Slice ``k``: ``(high, low)`` of the head, each ``[16, 64]``, and of the tail, each ``[16, 16]``."""
    slots = tl.arange(0, 16)[:, None]
    head = halves + k * _HEAD + slots * 64 + tl.arange(0, 64)[None, :]
    tail = halves + 2 * _SLICES * _HEAD + k * _TAIL + slots * 16 + tl.arange(0, 16)[None, :]
    return tl.load(head), tl.load(head + _SLICES * _HEAD), tl.load(tail), tl.load(tail + _SLICES * _TAIL)

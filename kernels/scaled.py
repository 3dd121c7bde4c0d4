"""The state of a tile in int8: 16 coordinates share a power of two for each of their numbers, as :mod:`l2l_fast.int8`.

The planes are those of :mod:`.tile` for 16-bit storage, in bytes, so that a thread has 8 of a plane in a row. Each is
followed by 64 scales, in the order ``warp quad pair bit``: the 16 coordinates of a warp share them, and a thread's are
4 bytes in a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # coordinates
GROUP = 16  # coordinates that share scales: those of a warp
SCALED_PLANE = 1024 + 64  # bytes: numbers and their scales

_NAN = tl.constexpr(tl.PropagateNan.ALL)
_NUMBERS = tl.constexpr(1024)
_SCALED_PLANE = tl.constexpr(SCALED_PLANE)
# Added to a number below 2^22 it leaves the nearest integer in the lowest bits.
_ROUNDER = tl.constexpr(12582912.0)


def pack(numbers: Tensor, scales: Tensor) -> Tensor:
    """int8 ``[ceil(groups / 4), 5, 1088]`` of numbers ``[groups, 16, 80]`` and uint8 scales ``[groups, 80]``; a copy.

    Zeros stand past the end.
    """
    groups, device = numbers.shape[0], numbers.device
    tiles = -(-groups * GROUP // TILE)
    all_numbers = torch.zeros(tiles * 4, GROUP, 80, dtype=torch.int8, device=device)
    all_numbers[:groups].copy_(numbers)
    all_scales = torch.zeros(tiles * 4, 80, dtype=torch.int8, device=device)
    all_scales[:groups].copy_(scales.view(torch.int8))
    packed = torch.empty(tiles, 5, SCALED_PLANE, dtype=torch.int8, device=device)
    for place, value in zip(_places(packed), _parts(all_numbers, all_scales), strict=True):
        place.copy_(value)
    return packed


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`pack`, with four groups for every tile."""
    groups = 4 * packed.shape[0]
    numbers = torch.empty(groups, GROUP, 80, dtype=torch.int8, device=packed.device)
    scales = torch.empty(groups, 80, dtype=torch.int8, device=packed.device)
    for place, value in zip(_parts(numbers, scales), _places(packed), strict=True):
        place.copy_(value)
    return numbers, scales.view(torch.uint8)


def _places(packed: Tensor) -> tuple[Tensor, ...]:
    """Views of a packed state: numbers of units 0 to 15 and of 16 to 19, then the scales of both."""
    numbers, scales = packed.split([1024, 64], dim=2)
    return (
        numbers[:, :4].unflatten(2, (4, 8, 4, 2, 2, 2)),  # tile | vector | warp row quad half pair bit
        numbers[:, 4].unflatten(1, (4, 8, 4, 2, 2, 2)),  # tile | warp row quad half pair bit
        scales[:, :4].unflatten(2, (4, 4, 2, 2)),  # tile | vector | warp quad pair bit
        scales[:, 4].unflatten(1, (4, 4, 2, 2)),  # tile | warp quad pair bit
    )


def _parts(numbers: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    """The same views of numbers ``[groups, 16, 80]`` and scales ``[groups, 80]``."""
    numbers = numbers.view(-1, 4, 2, 8, 4, 20)  # tile warp half row | vector unit
    scales = scales.view(-1, 4, 4, 20)  # tile warp | vector unit
    # Units 0 to 15 are pair quad bit; vectors of units 16 to 19 are pair bit, and the unit is the quad.
    return (
        numbers[..., :16].unflatten(5, (2, 4, 2)).permute(0, 4, 1, 3, 6, 2, 5, 7),
        numbers[..., 16:].unflatten(4, (2, 2)).permute(0, 1, 3, 6, 2, 4, 5),
        scales[..., :16].unflatten(3, (2, 4, 2)).permute(0, 2, 1, 4, 3, 5),
        scales[..., 16:].unflatten(2, (2, 2)).permute(0, 1, 4, 2, 3),
    )


@triton.jit
def _words(plane):
    """Where each thread's four scales of a plane are, ``[128]``, and whether it is of the first row that has them."""
    thread = tl.arange(0, 128)
    words = (plane + _NUMBERS).to(tl.pointer_type(tl.uint32)) + 4 * (thread // 32) + thread % 4
    return words, thread // 4 % 8 == 0


@triton.jit
def load_scaled(tile, k: tl.constexpr):
    """Plane ``k`` of a tile in float32, ``[4, 8, 4, 2, 2, 2]``."""
    plane = tile + k * _SCALED_PLANE
    numbers = tl.reshape(tl.load(plane + tl.arange(0, _NUMBERS)), (4, 8, 4, 2, 2, 2))
    # Every thread loads its four scales for itself: nothing moves between threads.
    words, _ = _words(plane)
    word = tl.reshape(tl.load(words), (4, 8, 4, 1, 1, 1))
    shift = tl.reshape(8 * tl.arange(0, 4), (1, 1, 1, 1, 2, 2))
    size = ((((word >> shift) & 255) + 1) << 23).to(tl.float32, bitcast=True)
    return tl.where(numbers == -128, float("nan"), numbers.to(tl.float32) * size)


@triton.jit
def store_scaled(tile, x, k: tl.constexpr):
    """Store ``x [4, 8, 4, 2, 2, 2]`` as plane ``k`` of a tile, with new scales."""
    plane = tile + k * _SCALED_PLANE
    # Magnitudes as unsigned numbers, moved on such that what is not finite wraps around and is the smallest.
    size = (x.to(tl.uint32, bitcast=True) << 1) + 0x01000000
    largest = tl.max(tl.max(size, axis=3, keep_dims=True), axis=1, keep_dims=True)
    scales = tl.maximum((largest >> 24).to(tl.int32) - 8, 0)
    shift = tl.reshape(8 * tl.arange(0, 4), (1, 1, 1, 1, 2, 2))
    word = tl.sum(tl.sum(scales << shift, axis=5), axis=4)
    word = tl.reshape(tl.broadcast_to(word, (4, 8, 4, 1)), (128,))
    words, first_row = _words(plane)
    tl.store(words, word.to(tl.uint32, bitcast=True), mask=first_row)
    inverse = ((253 - scales) << 23).to(tl.float32, bitcast=True)
    rounded = tl.clamp(x * inverse, -127.0, 127.0, _NAN) + _ROUNDER
    numbers = tl.where(tl.abs(x) < float("inf"), rounded.to(tl.int32, bitcast=True), -128)
    tl.store(plane + tl.arange(0, _NUMBERS), tl.reshape(numbers, (_NUMBERS,)).to(tl.int8))

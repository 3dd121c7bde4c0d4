"""How the state of a tile of 64 coordinates lies in memory and in registers.

A packed tile is five planes of 1024 numbers: ``h1, c1, h2, c2`` of units 0 to 15, then units 16 to 19 of all four.
Within a plane the numbers are in the order in which the threads hold them as tensor-core fragments: bit by bit
(most significant first) ``half warp row quad pair bit`` for 32-bit storage and ``warp row quad half pair bit`` for
16-bit storage, so that 16 bytes in a row belong to one thread. The coordinate is ``16 warp + 8 half + row``, the unit
``8 pair + 2 quad + bit``; in the fifth plane ``quad`` is the unit less 16, ``pair`` the layer and ``bit`` tells c
from h. Loads are whole vectors and nothing moves between threads: no shared memory, no barrier, no padded unit.
Storage in 8 bits has the order of 16 bits, and scales beside it: :mod:`.scaled`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scaled import load_scaled, store_scaled

TILE = 64  # coordinates
PLANE = 1024  # numbers: 64 coordinates x 16 units, or 64 x 4 units x 4
PACKED = 5 * PLANE  # numbers of a packed tile

_PLANE = tl.constexpr(PLANE)


def pack(state: Tensor, dtype: torch.dtype) -> Tensor:
    """``state [N, 2, 2, 20]`` as ``[ceil(N / 64), 5, 1024]`` of ``dtype``, zeros at the end; a copy."""
    n, tiles = state.shape[0], -(-state.shape[0] // TILE)
    rows = torch.zeros(tiles * TILE, 2, 2, 20, dtype=dtype, device=state.device)
    rows[:n].copy_(state)
    packed = torch.empty(tiles, 5, PLANE, dtype=dtype, device=state.device)
    head = rows[..., :16].view(tiles, 4, 2, 8, 4, 2, 4, 2)  # tile warp half row | vector | pair quad bit
    tail = rows[..., 16:].view(tiles, 4, 2, 8, 2, 2, 4)  # tile warp half row | pair bit | quad
    if dtype.itemsize == 4:
        packed[:, :4].view(tiles, 4, 2, 4, 8, 4, 2, 2).copy_(head.permute(0, 4, 2, 1, 3, 6, 5, 7))
        packed[:, 4].view(tiles, 2, 4, 8, 4, 2, 2).copy_(tail.permute(0, 2, 1, 3, 6, 4, 5))
    else:
        packed[:, :4].view(tiles, 4, 4, 8, 4, 2, 2, 2).copy_(head.permute(0, 4, 1, 3, 6, 2, 5, 7))
        packed[:, 4].view(tiles, 4, 8, 4, 2, 2, 2).copy_(tail.permute(0, 1, 3, 6, 2, 4, 5))
    return packed


def unpack(packed: Tensor, n: int) -> Tensor:
    """The first ``n`` coordinates of a packed state as ``[n, 2, 2, 20]``; a copy."""
    tiles = packed.shape[0]
    rows = torch.empty(tiles * TILE, 2, 2, 20, dtype=packed.dtype, device=packed.device)
    head = rows[..., :16].view(tiles, 4, 2, 8, 4, 2, 4, 2)
    tail = rows[..., 16:].view(tiles, 4, 2, 8, 2, 2, 4)
    if packed.dtype.itemsize == 4:
        head.copy_(packed[:, :4].view(tiles, 4, 2, 4, 8, 4, 2, 2).permute(0, 3, 2, 4, 1, 6, 5, 7))
        tail.copy_(packed[:, 4].view(tiles, 2, 4, 8, 4, 2, 2).permute(0, 2, 1, 3, 5, 6, 4))
    else:
        head.copy_(packed[:, :4].view(tiles, 4, 4, 8, 4, 2, 2, 2).permute(0, 2, 5, 3, 1, 6, 4, 7))
        tail.copy_(packed[:, 4].view(tiles, 4, 8, 4, 2, 2, 2).permute(0, 1, 4, 2, 5, 6, 3))
    return rows if n == tiles * TILE else rows[:n].clone()


@triton.jit
def _load(tile, k: tl.constexpr):
    """Plane ``k`` of a tile in float32, in its order."""
    if tile.dtype.element_ty.is_int8():
        plane = load_scaled(tile, k)
    else:
        plane = tl.load(tile + k * _PLANE + tl.arange(0, _PLANE)).to(tl.float32)
    return plane


@triton.jit
def _to_rows(plane, WIDE: tl.constexpr):
    """A plane of units 0 to 15 as ``[64, 16]``."""
    if WIDE:
        x = tl.reshape(plane, (2, 4, 8, 4, 2, 2)).permute(1, 0, 2, 4, 3, 5)
    else:
        x = tl.reshape(plane, (4, 8, 4, 2, 2, 2)).permute(0, 3, 1, 4, 2, 5)
    return tl.reshape(x, (64, 16))


@triton.jit
def _from_rows(rows, WIDE: tl.constexpr):
    """``[64, 16]`` as a plane, in its order but not flat."""
    x = tl.reshape(rows, (4, 2, 8, 2, 4, 2))
    return x.permute(1, 0, 2, 4, 3, 5) if WIDE else x.permute(0, 2, 4, 1, 3, 5)


@triton.jit
def load_plane(tile, k: tl.constexpr):
    """Plane ``k`` of a tile in float32, ``[64, 16]``."""
    return _to_rows(_load(tile, k), tile.dtype.element_ty.primitive_bitwidth == 32)


@triton.jit
def store_plane(tile, rows, k: tl.constexpr):
    """Store ``rows [64, 16]`` as plane ``k`` of a tile, in the tile's dtype."""
    dtype = tile.dtype.element_ty
    plane = _from_rows(rows.to(dtype), dtype.primitive_bitwidth == 32)
    tl.store(tile + k * _PLANE + tl.arange(0, _PLANE), tl.reshape(plane, (_PLANE,)))


@triton.jit
def load_tails(tile):
    """Units 16 to 19 of ``h1, c1, h2, c2`` in float32, each ``[64, 4]``."""
    x = _load(tile, 4)
    if tile.dtype.element_ty.primitive_bitwidth == 32:
        x = tl.reshape(x, (2, 4, 8, 4, 2, 2)).permute(1, 0, 2, 3, 4, 5)
    else:
        x = tl.reshape(x, (4, 8, 4, 2, 2, 2)).permute(0, 3, 1, 2, 4, 5)
    h, c = tl.split(tl.reshape(x, (64, 4, 2, 2)))
    h1, h2 = tl.split(h)
    c1, c2 = tl.split(c)
    return h1, c1, h2, c2


@triton.jit
def _tails(h1, c1, h2, c2, WIDE: tl.constexpr):
    """Four ``[64, 4]`` as the fifth plane, in its order but not flat."""
    x = tl.reshape(tl.join(tl.join(h1, h2), tl.join(c1, c2)), (4, 2, 8, 4, 2, 2))
    return x.permute(1, 0, 2, 3, 4, 5) if WIDE else x.permute(0, 2, 3, 1, 4, 5)


@triton.jit
def store_tails(tile, h1, c1, h2, c2):
    """Store units 16 to 19, each ``[64, 4]``, in the tile's dtype."""
    dtype = tile.dtype.element_ty
    plane = _tails(h1.to(dtype), c1.to(dtype), h2.to(dtype), c2.to(dtype), dtype.primitive_bitwidth == 32)
    tl.store(tile + 4 * _PLANE + tl.arange(0, _PLANE), tl.reshape(plane, (_PLANE,)))


@triton.jit
def _store_where(tile, plane, keep, k: tl.constexpr, MASKED: tl.constexpr):
    """Store a plane in its order; if ``MASKED``, only where ``keep``, of the same shape."""
    dtype = tile.dtype.element_ty
    if dtype.is_int8():
        # New scales are for all coordinates, so the others are stored again.
        store_scaled(tile, tl.where(keep, plane, load_scaled(tile, k)) if MASKED else plane, k)
    else:
        at = tile + k * _PLANE + tl.arange(0, _PLANE)
        tl.store(at, tl.reshape(plane.to(dtype), (_PLANE,)), mask=tl.reshape(keep, (_PLANE,)) if MASKED else None)


@triton.jit
def store_tile_where(tile, keep, h1, h1_tail, c1, c1_tail, h2, h2_tail, c2, c2_tail, MASKED: tl.constexpr):
    """Store a whole tile; if ``MASKED``, only the coordinates in ``keep [64]``."""
    WIDE: tl.constexpr = tile.dtype.element_ty.primitive_bitwidth == 32
    keep_rows = None
    keep_tails = None
    if MASKED:
        keep_rows = _from_rows(tl.broadcast_to(keep[:, None], (64, 16)), WIDE)
        tails = tl.broadcast_to(keep[:, None], (64, 4))
        keep_tails = _tails(tails, tails, tails, tails, WIDE)
    _store_where(tile, _from_rows(h1, WIDE), keep_rows, 0, MASKED)
    _store_where(tile, _from_rows(c1, WIDE), keep_rows, 1, MASKED)
    _store_where(tile, _from_rows(h2, WIDE), keep_rows, 2, MASKED)
    _store_where(tile, _from_rows(c2, WIDE), keep_rows, 3, MASKED)
    _store_where(tile, _tails(h1_tail, c1_tail, h2_tail, c2_tail, WIDE), keep_tails, 4, MASKED)


@triton.jit
def load_rows(state, k: tl.constexpr, rows):
    """Vector ``k`` of a state ``[N, 4, 20]``: units 0 to 15 ``[64, 16]`` and 16 to 19 ``[64, 4]``; zeros past the end.

    ``state`` points at the first coordinate of the tile, of which ``rows [64]`` exist.
    """
    at = state + tl.arange(0, 64)[:, None] * 80 + k * 20
    head = tl.load(at + tl.arange(0, 16)[None, :], mask=rows[:, None], other=0.0)
    tail = tl.load(at + 16 + tl.arange(0, 4)[None, :], mask=rows[:, None], other=0.0)
    return head.to(tl.float32), tail.to(tl.float32)


@triton.jit
def store_rows(state, head, tail, k: tl.constexpr, rows):
    """The inverse of :func:`load_rows`, for the coordinates that exist."""
    at = state + tl.arange(0, 64)[:, None] * 80 + k * 20
    tl.store(at + tl.arange(0, 16)[None, :], head, mask=rows[:, None])
    tl.store(at + 16 + tl.arange(0, 4)[None, :], tail, mask=rows[:, None])

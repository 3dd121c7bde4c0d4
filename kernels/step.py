"""The forward kernels: one step of a rule, in place for a whole model or out of place for a tape."""

import triton
import triton.language as tl

from .cell import cell, features, inputs_1, inputs_2, product, split_head, split_tail
from .scaled import SCALED_PLANE
from .tile import load_plane, load_rows, load_tails, store_rows, store_tile_where
from .weights import load_slice

_PACKED = tl.constexpr(5 * 1024)
_SCALED_PLANE = tl.constexpr(SCALED_PLANE)


@triton.jit
def first_inputs(grad, h1_tail, vectors, threshold, p, exp_p, LOG: tl.constexpr):
    """Layer 1's inputs but for ``h1`` of units 0 to 15, and what its gates start from: head and tail."""
    if LOG:
        x1, x2 = features(grad, threshold, p, exp_p)
        head = tl.zeros((64, 64), tl.float32)
        tail = tl.zeros((64, 16), tl.float32)
    else:
        # A gradient may be too large for float16, so its products are taken in float32.
        x1 = tl.zeros((64,), tl.float32)
        x2 = x1
        grad += grad * 0.0  # infinite becomes NaN
        head = grad[:, None] * tl.load(vectors + 32 + tl.arange(0, 64))[None, :]
        tail = grad[:, None] * tl.load(vectors + 96 + tl.arange(0, 16))[None, :]
    return inputs_1(h1_tail, x1, x2), head, tail


@triton.jit
def next_state(head, tail, c, c_tail):
    """A layer's state ``(h', h' tail, c', c' tail)`` from its gates."""
    i, f, g, o = split_head(head)
    c, h = cell(i, f, g, o, c)
    i, f, g, o = split_tail(tail)
    c_tail, h_tail = cell(i, f, g, o, c_tail)
    return h, h_tail, c, c_tail


@triton.jit
def advance_1(
    grad, h1, h1_tail, c1, c1_tail, w0, w1, vectors, threshold, p, exp_p, LOG: tl.constexpr, TERMS: tl.constexpr
):
    """Layer 1's state after ``grad [64]``; ``TERMS`` of :func:`product` is for ``h1``."""
    rest, head, tail = first_inputs(grad, h1_tail, vectors, threshold, p, exp_p, LOG)
    # A logarithm may be as large as 89 / p.
    head = product(rest, w1[0], w1[1], product(h1, w0[0], w0[1], head, TERMS), 4 if LOG else 3)
    tail = product(rest, w1[2], w1[3], product(h1, w0[2], w0[3], tail, TERMS), 4 if LOG else 3)
    return next_state(head, tail, c1, c1_tail)


@triton.jit
def advance_2(h1, h1_tail, h2, h2_tail, c2, c2_tail, w2, w3, w4, TERMS: tl.constexpr):
    """Layer 2's state after layer 1 has come to ``h1``; ``TERMS`` is for ``h2``."""
    rest = inputs_2(h1_tail, h2_tail)
    head = tl.zeros((64, 64), tl.float32)
    tail = tl.zeros((64, 16), tl.float32)
    head = product(rest, w4[0], w4[1], product(h1, w2[0], w2[1], product(h2, w3[0], w3[1], head, TERMS), 3), 3)
    tail = product(rest, w4[2], w4[3], product(h1, w2[2], w2[3], product(h2, w3[2], w3[3], tail, TERMS), 3), 3)
    return next_state(head, tail, c2, c2_tail)


@triton.jit
def output_layer(h2, h2_tail, vectors):
    """``w_out · h2 + b_out``, with the weights loaded for every tile: registers are short, and the cache has them."""
    head = tl.sum(h2 * tl.load(vectors + tl.arange(0, 16))[None, :], axis=1)
    tail = tl.sum(h2_tail * tl.load(vectors + 16 + tl.arange(0, 4))[None, :], axis=1)
    return head + tail + tl.load(vectors + 20)


@triton.jit(do_not_specialize=["n_tiles"])
def step_in_place_kernel(
    table, tiles, n_tiles, halves, vectors, threshold, p, exp_p, sign, scale, decay,
    PARAM: tl.constexpr, STATE: tl.constexpr, LOG: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
    PREFETCH: tl.constexpr,
):  # fmt: skip
    """``param <- decay * param + scale * output`` and the state, in place, over all tensors of a list.

    ``table`` int64 ``[tensors, 4]``: addresses of parameter, gradient and packed state, and the number of coordinates.
    ``tiles`` int32 ``[n_tiles, 2]``: tensor of each tile, and which tile of that tensor it is.
    ``PREFETCH``: load layer 2's state ahead of layer 1's work, which hides latency and takes registers.
    """
    INT8: tl.constexpr = STATE.is_int8()
    TILE_SIZE: tl.constexpr = 5 * _SCALED_PLANE if INT8 else _PACKED
    TERMS: tl.constexpr = 2 if STATE.is_fp16() or INT8 else 3
    # What pads a tensor's last tile must not count for the scales of others, and NaN does not.
    PADDING: tl.constexpr = float("nan") if INT8 else 0.0
    w0 = load_slice(halves, 0)
    w1 = load_slice(halves, 1)
    w2 = load_slice(halves, 2)
    w3 = load_slice(halves, 3)
    w4 = load_slice(halves, 4)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        entry = table + 4 * tl.load(tiles + 2 * tile)
        within = tl.load(tiles + 2 * tile + 1).to(tl.int64)
        coordinate = within * 64 + tl.arange(0, 64)
        exists = coordinate < tl.load(entry + 3)
        param = tl.load(entry).to(tl.pointer_type(PARAM)) + coordinate
        grad = tl.load(entry + 1).to(tl.pointer_type(PARAM)) + coordinate
        state = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(STATE)), 16) + within * TILE_SIZE

        g = tl.load(grad, mask=exists, other=PADDING).to(tl.float32) * sign
        h1_tail, c1_tail, h2_tail, c2_tail = load_tails(state)
        h1 = load_plane(state, 0)
        c1 = load_plane(state, 1)
        if PREFETCH:
            h2 = load_plane(state, 2)
            c2 = load_plane(state, 3)
        h1, h1_tail, c1, c1_tail = advance_1(
            g, h1, h1_tail, c1, c1_tail, w0, w1, vectors, threshold, p, exp_p, LOG, TERMS
        )
        if not PREFETCH:
            h2 = load_plane(state, 2)
            c2 = load_plane(state, 3)
        h2, h2_tail, c2, c2_tail = advance_2(h1, h1_tail, h2, h2_tail, c2, c2_tail, w2, w3, w4, TERMS)
        output = output_layer(h2, h2_tail, vectors)
        keep = tl.abs(g) < float("inf")
        store_tile_where(state, keep, h1, h1_tail, c1, c1_tail, h2, h2_tail, c2, c2_tail, SKIP_NONFINITE)
        if SKIP_NONFINITE:
            exists &= keep
        theta = tl.load(param, mask=exists, other=0.0).to(tl.float32)
        tl.store(param, (theta * decay + output * scale).to(PARAM), mask=exists)


@triton.jit(do_not_specialize=["n"])
def step_kernel(grads, states, updates, new_states, n, halves, vectors, threshold, p, exp_p, scale, LOG: tl.constexpr):
    """``updates [N]`` and ``new_states [N, 4, 20]`` from ``grads`` and ``states``, all float32 and contiguous."""
    w0 = load_slice(halves, 0)
    w1 = load_slice(halves, 1)
    w2 = load_slice(halves, 2)
    w3 = load_slice(halves, 3)
    w4 = load_slice(halves, 4)
    for tile in range(tl.program_id(0), tl.cdiv(n, 64), tl.num_programs(0)):
        first = tl.full((), 64, tl.int64) * tile
        exists = first + tl.arange(0, 64) < n
        state = states + first * 80
        h1, h1_tail = load_rows(state, 0, exists)
        c1, c1_tail = load_rows(state, 1, exists)
        g = tl.load(grads + first + tl.arange(0, 64), mask=exists, other=0.0)
        h1, h1_tail, c1, c1_tail = advance_1(g, h1, h1_tail, c1, c1_tail, w0, w1, vectors, threshold, p, exp_p, LOG, 3)
        h2, h2_tail = load_rows(state, 2, exists)
        c2, c2_tail = load_rows(state, 3, exists)
        h2, h2_tail, c2, c2_tail = advance_2(h1, h1_tail, h2, h2_tail, c2, c2_tail, w2, w3, w4, 3)
        output = output_layer(h2, h2_tail, vectors)
        tl.store(updates + first + tl.arange(0, 64), output * scale, mask=exists)
        new_state = new_states + first * 80
        store_rows(new_state, h1, h1_tail, 0, exists)
        store_rows(new_state, c1, c1_tail, 1, exists)
        store_rows(new_state, h2, h2_tail, 2, exists)
        store_rows(new_state, c2, c2_tail, 3, exists)

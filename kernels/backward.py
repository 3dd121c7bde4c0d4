"""The backward kernel: the derivative of a whole unroll in one launch, forward recomputed.

For each tile it walks forward through the steps, leaving the state before each in a scratch of the program's own;
then back through the steps with layer 2, which leaves what layer 1 needs of it in the scratch; then back with layer 1.
A layer at a time needs half the registers. Derivatives by the weights are summed over the steps of a tile in float32
and over tiles in float64, by one program in a fixed order, so results do not vary from run to run.
"""

import triton
import triton.language as tl

from .cell import (
    cell_backward,
    features_backward,
    half_parts,
    inputs_2,
    join_head,
    join_tail,
    split_head,
    split_tail,
)
from .step import first_inputs, next_state
from .tile import load_plane, load_rows, load_tails, store_plane, store_rows, store_tails
from .weights import LAYER_SUMS, SUMS, load_slice

_PACKED = tl.constexpr(5 * 1024)
_LAYER_SUMS = tl.constexpr(LAYER_SUMS)
_SUMS = tl.constexpr(SUMS)
_LOW_SCALE = tl.constexpr(2048.0)


@triton.jit
def _largest(x, y):
    """The largest finite magnitude in two tiles, a scalar."""
    x = tl.where(x < float("inf"), x, 0.0)  # false for NaN too
    y = tl.where(y < float("inf"), y, 0.0)
    return tl.max(tl.maximum(tl.max(x, axis=1), tl.max(y, axis=1)), axis=0)


@triton.jit
def _powers(peak):
    """Powers of two ``(up, down)`` with product 1, such that ``up * peak`` is in ``[2^12, 2^13)``: float16 has room."""
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 13), 253)
    up = ((266 - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 12) << 23).to(tl.float32, bitcast=True)
    return up, down


@triton.jit
def _scaled_gates(i, f, g, o, i_tail, f_tail, g_tail, o_tail):
    """Derivatives by the gates as float16 parts of both blocks, and the factor that undoes their scaling."""
    size = tl.maximum(tl.maximum(tl.abs(i), tl.abs(f)), tl.maximum(tl.abs(g), tl.abs(o)))
    size_tail = tl.maximum(tl.maximum(tl.abs(i_tail), tl.abs(f_tail)), tl.maximum(tl.abs(g_tail), tl.abs(o_tail)))
    up, down = _powers(_largest(size, size_tail))
    high, low = half_parts(join_head(i * up, f * up, g * up, o * up))
    high_tail, low_tail = half_parts(join_tail(i_tail * up, f_tail * up, g_tail * up, o_tail * up))
    return high, low, high_tail, low_tail, down


@triton.jit
def _gates_1(x0, x1, w0, w1, head, tail):
    """``head + x @ w`` and ``tail + x @ w`` over layer 1's two slices, as :func:`product`, but finer.

    Derivatives by weights are sums over all coordinates, in which what the forward neglects would show.
    """
    high0, low0 = half_parts(x0, _LOW_SCALE)
    high1, low1 = half_parts(x1, _LOW_SCALE)
    low_head = tl.dot(low1, w1[1], tl.dot(low1, w1[0], tl.dot(low0, w0[0], tl.zeros((64, 64), tl.float32))))
    low_tail = tl.dot(low1, w1[3], tl.dot(low1, w1[2], tl.dot(low0, w0[2], tl.zeros((64, 16), tl.float32))))
    head += low_head * (1 / _LOW_SCALE)
    tail += low_tail * (1 / _LOW_SCALE)
    head = tl.dot(high1, w1[1], tl.dot(high0, w0[1], head))
    tail = tl.dot(high1, w1[3], tl.dot(high0, w0[3], tail))
    head = tl.dot(high1, w1[0], tl.dot(high0, w0[0], head))
    tail = tl.dot(high1, w1[2], tl.dot(high0, w0[2], tail))
    return head, tail


@triton.jit
def _gates_2(x0, x1, x2, w0, w1, w2):
    """The same over layer 2's three slices."""
    high0, low0 = half_parts(x0, _LOW_SCALE)
    high1, low1 = half_parts(x1, _LOW_SCALE)
    high2, low2 = half_parts(x2, _LOW_SCALE)
    head = tl.dot(low2, w2[0], tl.dot(low1, w1[0], tl.dot(low0, w0[0], tl.zeros((64, 64), tl.float32))))
    tail = tl.dot(low2, w2[2], tl.dot(low1, w1[2], tl.dot(low0, w0[2], tl.zeros((64, 16), tl.float32))))
    head = tl.dot(high2, w2[1], tl.dot(high1, w1[1], tl.dot(high0, w0[1], head * (1 / _LOW_SCALE))))
    tail = tl.dot(high2, w2[3], tl.dot(high1, w1[3], tl.dot(high0, w0[3], tail * (1 / _LOW_SCALE))))
    head = tl.dot(high2, w2[0], tl.dot(high1, w1[0], tl.dot(high0, w0[0], head)))
    tail = tl.dot(high2, w2[2], tl.dot(high1, w1[2], tl.dot(high0, w0[2], tail)))
    return head, tail


@triton.jit
def _by_inputs(high, low, high_tail, low_tail, w):
    """Derivatives by the 16 inputs of a slice, ``[64, 16]``, scaled as the gates are."""
    acc = tl.zeros((64, 16), tl.float32)
    acc = tl.dot(high, tl.trans(w[1]), acc)
    acc = tl.dot(low, tl.trans(w[0]), acc)
    acc = tl.dot(high_tail, tl.trans(w[3]), acc)
    acc = tl.dot(low_tail, tl.trans(w[2]), acc)
    return tl.dot(high_tail, tl.trans(w[2]), tl.dot(high, tl.trans(w[0]), acc))


@triton.jit
def _by_weights(high, low, high_tail, low_tail, x0, x1, x2):
    """Derivatives by weights of three slices: ``[64 gates, 64 slots]``, ``[64 slots, 16 gates]``, scaled as gates."""
    nothing = tl.zeros((64, 16), tl.float32)
    x = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, nothing)), (64, 64))
    x_high, x_low = half_parts(x)
    head = tl.zeros((64, 64), tl.float32)
    head = tl.dot(tl.trans(high), x_low, head)
    head = tl.dot(tl.trans(low), x_high, head)
    head = tl.dot(tl.trans(high), x_high, head)
    tail = tl.zeros((64, 16), tl.float32)
    tail = tl.dot(tl.trans(x_low), high_tail, tail)
    tail = tl.dot(tl.trans(x_high), low_tail, tail)
    tail = tl.dot(tl.trans(x_high), high_tail, tail)
    return head, tail


@triton.jit
def _add(sums, head, tail):
    """Add a layer's sums over a tile to those in memory, in float64."""
    at = sums + tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(at, tl.load(at) + head.to(tl.float64))
    at = sums + 64 * 64 + tl.arange(0, 64)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(at, tl.load(at) + tail.to(tl.float64))


@triton.jit
def _store_state(slot, h1, h1_tail, c1, c1_tail, h2, h2_tail, c2, c2_tail):
    """Leave the state of a tile in a slot of the scratch."""
    store_plane(slot, h1, 0)
    store_plane(slot, c1, 1)
    store_plane(slot, h2, 2)
    store_plane(slot, c2, 3)
    store_tails(slot, h1_tail, c1_tail, h2_tail, c2_tail)


@triton.jit
def _parts(block):
    """Of the derivatives ``[64, 16]`` by joined inputs those by the first and the third, ``[64, 4]`` each."""
    first, _, third, _ = split_tail(block)
    return first, third


# Rows of gradients begin anywhere, and are read number by number.
@triton.jit(do_not_specialize=["n", "steps"], do_not_specialize_on_alignment=["grads", "d_points", "d_grads"])
def backward_kernel(
    grads, d_points, point_weights, states, d_new_states, d_grads, d_states, scratch, sums, n, steps, halves, vectors,
    threshold, p, exp_p, scale,
    LOG: tl.constexpr, HAS_STATE: tl.constexpr, HAS_D_NEW_STATE: tl.constexpr,
    STORE_D_STATE: tl.constexpr, STORE_D_GRAD: tl.constexpr,
):  # fmt: skip
    """Derivatives of a linear function of the points visited, by the weights, the first state and the gradients.

    The update of step ``t`` moves all later points: its derivative is ``sum_{s >= t} point_weights[s] * d_points[s]``.

    Everything is float32 and contiguous but the sums, and ``N`` long where not stated:

    - ``grads [steps, N]``: what enters the rule; ``d_points [steps, N]``: the derivative by the point after each step,
      to be multiplied by ``point_weights [steps]``;
    - ``states [N, 4, 20]``: before the first step, zeros if not ``HAS_STATE``; ``d_new_states``: the derivative by the
      state after the last step, zeros if not ``HAS_D_NEW_STATE``;
    - ``d_states [N, 4, 20]`` and ``d_grads [steps, N]``: written if ``STORE_D_STATE`` and ``STORE_D_GRAD``;
    - ``scratch [programs, steps + 1, 5120]``: written and read back;
    - ``sums [programs, SUMS]`` float64: added to.
    """
    w0 = load_slice(halves, 0)
    w1 = load_slice(halves, 1)
    w2 = load_slice(halves, 2)
    w3 = load_slice(halves, 3)
    w4 = load_slice(halves, 4)
    program = tl.program_id(0)
    slots = scratch + program.to(tl.int64) * (steps + 1) * _PACKED
    sums += program.to(tl.int64) * _SUMS
    n = n.to(tl.int64)
    for tile in range(program, tl.cdiv(n, 64).to(tl.int32), tl.num_programs(0)):
        first = tl.full((), 64, tl.int64) * tile
        coordinate = first + tl.arange(0, 64)
        exists = coordinate < n

        # Forward: slot t holds the state before step t.
        if HAS_STATE:
            h1, h1_tail = load_rows(states + first * 80, 0, exists)
            c1, c1_tail = load_rows(states + first * 80, 1, exists)
            h2, h2_tail = load_rows(states + first * 80, 2, exists)
            c2, c2_tail = load_rows(states + first * 80, 3, exists)
        else:
            h1 = tl.zeros((64, 16), tl.float32)
            h1_tail = tl.zeros((64, 4), tl.float32)
            c1, c1_tail, h2, h2_tail, c2, c2_tail = h1, h1_tail, h1, h1_tail, h1, h1_tail
        for t in range(steps):
            _store_state(slots + t * _PACKED, h1, h1_tail, c1, c1_tail, h2, h2_tail, c2, c2_tail)
            grad = tl.load(grads + t * n + coordinate, mask=exists, other=0.0)
            rest, head, tail = first_inputs(grad, h1_tail, vectors, threshold, p, exp_p, LOG)
            head, tail = _gates_1(h1, rest, w0, w1, head, tail)
            h1, h1_tail, c1, c1_tail = next_state(head, tail, c1, c1_tail)
            rest = inputs_2(h1_tail, h2_tail)
            head, tail = _gates_2(h1, h2, rest, w2, w3, w4)
            h2, h2_tail, c2, c2_tail = next_state(head, tail, c2, c2_tail)
        _store_state(slots + steps * _PACKED, h1, h1_tail, c1, c1_tail, h2, h2_tail, c2, c2_tail)
        tl.debug_barrier()

        # Layer 2 backward. What it asks of h1 after step t is left in the place of h2 in slot t.
        out = tl.load(vectors + tl.arange(0, 16))
        out_tail = tl.load(vectors + 16 + tl.arange(0, 4))
        if HAS_D_NEW_STATE:
            d_h, d_h_tail = load_rows(d_new_states + first * 80, 2, exists)
            d_c, d_c_tail = load_rows(d_new_states + first * 80, 3, exists)
        else:
            d_h = tl.zeros((64, 16), tl.float32)
            d_h_tail = tl.zeros((64, 4), tl.float32)
            d_c, d_c_tail = d_h, d_h_tail
        h1_tail, _, _, _ = load_tails(slots + steps * _PACKED)
        sum_head = tl.zeros((64, 64), tl.float32)
        sum_tail = tl.zeros((64, 16), tl.float32)
        sum_out = tl.zeros((64, 16), tl.float32)
        sum_out_tail = tl.zeros((64, 4), tl.float32)
        # These two grow with the steps and are few: float64 costs nothing.
        sum_bias = tl.zeros((64,), tl.float64)
        d_point = tl.zeros((64,), tl.float64)
        for back in range(steps):
            t = steps - 1 - back
            slot = slots + t * _PACKED
            d_point += tl.load(point_weights + t) * tl.load(d_points + t * n + coordinate, mask=exists, other=0.0)
            d_output = d_point.to(tl.float32) * scale
            h1 = load_plane(slot + _PACKED, 0)
            h2 = load_plane(slot, 2)
            c2 = load_plane(slot, 3)
            h1_before_tail, c1_tail, h2_tail, c2_tail = load_tails(slot)
            rest = inputs_2(h1_tail, h2_tail)
            head, tail = _gates_2(h1, h2, rest, w2, w3, w4)
            d_h += d_output[:, None] * out[None, :]
            d_h_tail += d_output[:, None] * out_tail[None, :]
            i, f, g, o = split_head(head)
            d_i, d_f, d_g, d_o, d_c, h_new = cell_backward(i, f, g, o, c2, d_h, d_c, False)
            i, f, g, o = split_tail(tail)
            e_i, e_f, e_g, e_o, d_c_tail, h_new_tail = cell_backward(i, f, g, o, c2_tail, d_h_tail, d_c_tail, False)
            sum_out += h_new * d_output[:, None]
            sum_out_tail += h_new_tail * d_output[:, None]
            sum_bias += d_point
            high, low, high_tail, low_tail, down = _scaled_gates(d_i, d_f, d_g, d_o, e_i, e_f, e_g, e_o)
            d_below_tail, d_h_tail = _parts(_by_inputs(high, low, high_tail, low_tail, w4) * down)
            d_h = _by_inputs(high, low, high_tail, low_tail, w3) * down
            store_plane(slot, _by_inputs(high, low, high_tail, low_tail, w2) * down, 2)
            store_tails(slot, h1_before_tail, c1_tail, d_below_tail, c2_tail)
            head, tail = _by_weights(high, low, high_tail, low_tail, h1, h2, rest)
            sum_head += head * down
            sum_tail += tail * down
            h1_tail = h1_before_tail
        _add(sums + _LAYER_SUMS, sum_head, sum_tail)
        at = sums + 2 * _LAYER_SUMS
        units = at + tl.arange(0, 16)
        tl.store(units, tl.load(units) + tl.sum(sum_out.to(tl.float64), axis=0))
        units = at + 16 + tl.arange(0, 4)
        tl.store(units, tl.load(units) + tl.sum(sum_out_tail.to(tl.float64), axis=0))
        tl.store(at + 20, tl.load(at + 20) + tl.sum(sum_bias, axis=0) * scale)
        if STORE_D_STATE:
            store_rows(d_states + first * 80, d_h, d_h_tail, 2, exists)
            store_rows(d_states + first * 80, d_c, d_c_tail, 3, exists)
        tl.debug_barrier()

        # Layer 1 backward.
        if HAS_D_NEW_STATE:
            d_h, d_h_tail = load_rows(d_new_states + first * 80, 0, exists)
            d_c, d_c_tail = load_rows(d_new_states + first * 80, 1, exists)
        else:
            d_h = tl.zeros((64, 16), tl.float32)
            d_h_tail = tl.zeros((64, 4), tl.float32)
            d_c, d_c_tail = d_h, d_h_tail
        sum_head = tl.zeros((64, 64), tl.float32)
        sum_tail = tl.zeros((64, 16), tl.float32)
        for back in range(steps):
            t = steps - 1 - back
            slot = slots + t * _PACKED
            grad = tl.load(grads + t * n + coordinate, mask=exists, other=0.0)
            h1 = load_plane(slot, 0)
            c1 = load_plane(slot, 1)
            h1_tail, c1_tail, d_above_tail, _ = load_tails(slot)
            rest, head, tail = first_inputs(grad, h1_tail, vectors, threshold, p, exp_p, LOG)
            head, tail = _gates_1(h1, rest, w0, w1, head, tail)
            d_h += load_plane(slot, 2)
            d_h_tail += d_above_tail
            i, f, g, o = split_head(head)
            d_i, d_f, d_g, d_o, d_c, _ = cell_backward(i, f, g, o, c1, d_h, d_c, not LOG)
            i, f, g, o = split_tail(tail)
            e_i, e_f, e_g, e_o, d_c_tail, _ = cell_backward(i, f, g, o, c1_tail, d_h_tail, d_c_tail, not LOG)
            high, low, high_tail, low_tail, down = _scaled_gates(d_i, d_f, d_g, d_o, e_i, e_f, e_g, e_o)
            d_h_tail, d_extra = _parts(_by_inputs(high, low, high_tail, low_tail, w1) * down)
            d_h = _by_inputs(high, low, high_tail, low_tail, w0) * down
            if STORE_D_GRAD:
                unit = tl.arange(0, 4)[None, :]
                d_x1 = tl.sum(tl.where(unit == 0, d_extra, 0.0), axis=1)
                if LOG:
                    d_x2 = tl.sum(tl.where(unit == 1, d_extra, 0.0), axis=1)
                    d_x1 = features_backward(grad, d_x1, d_x2, threshold, p, exp_p)
                tl.store(d_grads + t * n + coordinate, d_x1, mask=exists)
            if LOG:
                head, tail = _by_weights(high, low, high_tail, low_tail, h1, rest, tl.zeros((64, 16), tl.float32))
                sum_head += head * down
                sum_tail += tail * down
            else:
                # The feature may be too large for float16: it goes in scaled, and its column comes out unscaled.
                x_up, x_down = _powers(_largest(tl.abs(grad)[:, None], tl.abs(grad)[:, None]))
                x = grad * x_up
                slot_of = tl.arange(0, 16)[None, :]
                rest = tl.where(slot_of == 8, x[:, None], rest)
                head, tail = _by_weights(high, low, high_tail, low_tail, h1, rest, tl.zeros((64, 16), tl.float32))
                factor = tl.where(tl.arange(0, 64) == 33, x_down, 1.0)
                sum_head += head * down * factor[None, :]
                sum_tail += tail * down * factor[:, None]
        _add(sums, sum_head, sum_tail)
        if STORE_D_STATE:
            store_rows(d_states + first * 80, d_h, d_h_tail, 0, exists)
            store_rows(d_states + first * 80, d_c, d_c_tail, 1, exists)
        tl.debug_barrier()

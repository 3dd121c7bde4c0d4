"""The arithmetic of the kernels: preprocessing, products of float32 precision, the LSTM cell and its derivative.

Gates of a layer come as two blocks: units 0 to 15 as ``[64, 64]`` with column ``16 gate + unit``, and units 16 to 19
as ``[64, 16]`` with column ``8 (gate // 2) + 2 (unit - 16) + gate % 2``; gates in the order i, f, g, o. The tensor
cores hold them such that splitting them by gate, and joining gates to a block again, renames registers and moves
nothing. Weights come scaled, so that a gate is ``sigmoid = 1 / (1 + 2^z)`` or ``tanh = (1 - 2^z) / (1 + 2^z)`` of
what the products sum up to (``z``).
"""

import triton
import triton.language as tl

_NAN = tl.constexpr(tl.PropagateNan.ALL)
_MINUS_2_LOG2_E = tl.constexpr(-2.8853900817779268)
_MINUS_LN_2 = tl.constexpr(-0.6931471805599453)

RESIDUAL = 1024.0  # what residuals are multiplied with, lest they be too small for float16
_RESIDUAL = tl.constexpr(RESIDUAL)


@triton.jit
def features(grad, threshold, p, exp_p):
    """Both features of ``grad [64]``, NaN where it is not finite. Source: Andrychowicz et al. 2016, appendix A."""
    size = tl.abs(grad)
    large = size >= threshold
    log = tl.where(large, tl.log(tl.where(large, size, 1.0)) / p, -1.0)
    sign = tl.where(large, tl.where(grad > 0, 1.0, -1.0), grad * exp_p)
    not_finite = grad * 0.0
    return log + not_finite, sign + not_finite


@triton.jit
def features_backward(grad, d_log, d_sign, threshold, p, exp_p):
    """Derivative by ``grad [64]`` from those by its features."""
    large = tl.abs(grad) >= threshold
    return tl.where(large, d_log / (p * tl.where(large, grad, 1.0)), d_sign * exp_p)


@triton.jit
def inverse(x):
    """``1 / x`` for normal, positive ``x``, rounded nearly always right: a division costs twice the instructions."""
    r = tl.rsqrt(x)
    r = r * r
    return r - r * tl.fma(x, r, -1.0)


@triton.jit
def half_parts(x, LOW_SCALE: tl.constexpr = 1.0):
    """``(high, low)`` in float16 with ``high + low / LOW_SCALE`` equal to ``x`` to 22 bits.

    Unscaled, the low part of a number below 2^-3 is subnormal, and the error no smaller than 2^-25.
    """
    high = x.to(tl.float16)
    return high, ((x - high.to(tl.float32)) * LOW_SCALE).to(tl.float16)


@triton.jit
def product(x, w_high, w_low, acc, TERMS: tl.constexpr):
    """``acc + x @ w`` with float32's precision from float16 products, small terms first.

    Three ``TERMS`` are enough for an ``x`` of magnitude 1, two if it is a number of float16 or, having seven bits, less
    than 2^-25 away from one, and all four keep the precision where ``x`` is larger.
    """
    high, low = half_parts(x)
    if TERMS == 4:
        acc = tl.dot(low, w_low, acc)
    acc = tl.dot(high, w_low, acc)
    if TERMS >= 3:
        acc = tl.dot(low, w_high, acc)
    return tl.dot(high, w_high, acc)


@triton.jit
def join_tail(i, f, g, o):
    """Four ``[64, 4]`` as one block ``[64, 16]``, in the order of gates."""
    x = tl.join(tl.join(i, g), tl.join(f, o))
    return tl.reshape(x.permute(0, 2, 1, 3), (64, 16))


@triton.jit
def join_head(i, f, g, o):
    """Four ``[64, 16]`` as one block ``[64, 64]``, in the order of gates."""
    x = tl.join(tl.join(i, g), tl.join(f, o))
    return tl.reshape(x.permute(0, 2, 3, 1), (64, 64))


@triton.jit
def _split(x):
    even, odd = tl.split(x)
    i, g = tl.split(even)
    f, o = tl.split(odd)
    return i, f, g, o


@triton.jit
def split_head(block):
    """The inverse of :func:`join_head`."""
    return _split(tl.reshape(block, (64, 2, 2, 16)).permute(0, 3, 1, 2))


@triton.jit
def split_tail(block):
    """The inverse of :func:`join_tail`."""
    return _split(tl.reshape(block, (64, 2, 4, 2)).permute(0, 2, 1, 3))


@triton.jit
def inputs_1(h1_tail, x1, x2):
    """What of layer 1's input is not ``h1`` of units 0 to 15: ``h1`` of the others, features, 1 for the bias.

    Features may be large, and all coordinates share their weights, so that errors of either would add up. Both come
    twice: multiplied by the residual of the weights, and the residual of theirs by the weights.
    """
    unit = tl.arange(0, 4)[None, :]
    zero = tl.zeros((64, 4), tl.float32)
    extra = tl.where(unit == 0, x1[:, None], tl.where(unit == 1, x2[:, None], tl.where(unit == 2, 1.0, zero)))
    high, low = half_parts(extra)
    residual = extra - high.to(tl.float32) - low.to(tl.float32)
    return join_tail(h1_tail, extra * (1 / _RESIDUAL), extra, residual * _RESIDUAL)


@triton.jit
def inputs_2(h1_tail, h2_tail):
    """What of layer 2's input is not ``h1`` or ``h2`` of units 0 to 15, and 1 for the bias."""
    zero = tl.zeros((64, 4), tl.float32)
    one = tl.where(tl.arange(0, 4)[None, :] == 0, 1.0, 0.0) + zero
    return join_tail(h1_tail, one, h2_tail, zero)


@triton.jit
def exp2(z):
    """``2^z`` up to ``2^60``, beyond which products overflow; NaN stays NaN."""
    return tl.exp2(tl.minimum(z, 60.0, _NAN))


@triton.jit
def cell(i, f, g, o, c):
    """The cell ``(c', h')`` from its gates' ``z`` and ``c``, with one division for each of the two.

    Three factors share a denominator, so their exponents stop at 30: a sigmoid is never below 2^-30.
    """
    ei = tl.exp2(tl.minimum(i, 30.0, _NAN))
    ef = tl.exp2(tl.minimum(f, 30.0, _NAN))
    eg = tl.exp2(tl.minimum(g, 30.0, _NAN))
    ig = (1.0 + ei) * (1.0 + eg)
    forget = 1.0 + ef
    c = (c * ig + (1.0 - eg) * forget) * inverse(ig * forget)
    eo = exp2(o)
    ec = exp2(c * _MINUS_2_LOG2_E)
    return c, (1.0 - ec) * inverse((1.0 + eo) * (1.0 + ec))


@triton.jit
def _slope(z, power, r, HUGE: tl.constexpr):
    """``2^z / (1 + 2^z)^2``, exactly 0 where the power was capped if ``HUGE`` inputs may yet multiply it."""
    slope = power * r * r
    if HUGE:
        slope = tl.where(z < 60.0, slope, 0.0)
    return slope


@triton.jit
def cell_backward(i, f, g, o, c, d_h, d_c, HUGE: tl.constexpr):
    """Derivatives by the ``z`` of the gates, by ``c``, and ``h'``: ``(d_i, d_f, d_g, d_o, d_c, h')``.

    ``i`` to ``o`` are the gates' ``z``, ``c`` the cell before, ``d_h`` and ``d_c`` derivatives by ``h'`` and ``c'``;
    ``HUGE`` says that an input of the cell may be of any magnitude.
    """
    ei = exp2(i)
    ef = exp2(f)
    eg = exp2(g)
    eo = exp2(o)
    ri = inverse(1.0 + ei)  # sigmoid(i); 1 - sigmoid(i) is ei * ri, free of cancellation
    rf = inverse(1.0 + ef)
    rg = inverse(1.0 + eg)
    ro = inverse(1.0 + eo)
    tanh_g = (1.0 - eg) * rg
    new = rf * c + ri * tanh_g
    ec = exp2(new * _MINUS_2_LOG2_E)
    rc = inverse(1.0 + ec)
    tanh_c = (1.0 - ec) * rc
    d_c = d_c + d_h * ro * (4.0 * ec * rc * rc)
    by_z = d_c * _MINUS_LN_2
    d_i = by_z * tanh_g * _slope(i, ei, ri, HUGE)
    d_f = by_z * c * _slope(f, ef, rf, HUGE)
    d_g = by_z * ri * 2.0 * _slope(g, eg, rg, HUGE)
    d_o = d_h * _MINUS_LN_2 * tanh_c * _slope(o, eo, ro, HUGE)
    return d_i, d_f, d_g, d_o, d_c * rf, ro * tanh_c

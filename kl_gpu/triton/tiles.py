"""Device functions the Triton kernels share: differences, the function g, the row state (docs/numerics.md).

A state (m, c, Z, A1, A2) stands for part of a row of KL(a‖b): with w = exp(a − m) and x = (b − a) − c,
Z = Σ w, A1 = Σ w x, A2 = Σ w g(x). m is kept as n ≈ m·k, a `level`: in units of log2, and whole. c is in
raw logits where both temperatures are equal (SAME_SCALE), else in scaled ones; c_scale turns it into nats.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter multiplies and adds in two roundings where the hardware's fma rounds once.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
# m before any column was seen: finite, so that −inf logits weigh 0 rather than NaN.
NO_REFERENCE = tl.constexpr(-1e30)


@triton.jit
def row_start(base, row, n_inner, outer_stride, inner_stride):
    # 64 bits before the multiply: 2³¹ elements are 16 744 rows of 128 256. The division fits in 32.
    outer = row // n_inner
    inner = row - outer * n_inner
    return base + outer.to(tl.int64) * outer_stride + inner.to(tl.int64) * inner_stride


@triton.jit
def tile_offsets(R: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr):
    """Columns of a `[R, VEC]` tile; axis 1 lies inside a thread, so sums over it stay there.

    WIDE: a thread owns VEC neighbouring columns, one access of 16 bytes. Otherwise neighbouring threads own
    neighbouring columns: where rows start at odd addresses, scattered accesses would take VEC times as many
    cache lines each. Which of the two depends on V alone, lest a row's bits depend on where it lies. WIDE
    is 2 where rows also start at multiples of four bytes, which changes how tiles are loaded, not their bits.
    """
    if WIDE:
        return tl.arange(0, R)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    else:
        return tl.arange(0, R)[:, None] + tl.arange(0, VEC)[None, :] * R


@triton.jit
def tile_pointers(start, R: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr):
    """start + tile_offsets, in two sums: the second is of constants, which cost no instruction."""
    if WIDE:
        return start + tl.arange(0, R)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    else:
        return start + tl.arange(0, R)[:, None] + tl.arange(0, VEC)[None, :] * R


@triton.jit
def load_tile(start, inside, R: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr):
    """A whole tile from `start` where `inside`, as it lies in memory; `unpacked` makes logits of it.

    16-bit logits stay in pairs: a loop that carried them to its next pass one by one would pay an
    instruction and a register for each.
    """
    everywhere = tl.full([R, 1], 1, tl.int1) & inside
    if WIDE == 2 and start.dtype.element_ty.primitive_bitwidth == 16:
        words = start.to(tl.pointer_type(tl.int32))
        return tl.load(tile_pointers(words, R, VEC // 2, WIDE), mask=everywhere)
    else:
        return tl.load(tile_pointers(start, R, VEC, WIDE), mask=everywhere)


@triton.jit
def unpacked(tile, dtype: tl.constexpr, CT: tl.constexpr):
    """The logits `[R, VEC]` of a tile that `load_tile` read."""
    if tile.dtype == tl.int32:
        if dtype == tl.bfloat16:
            first = (tile << 16).to(tl.float32, bitcast=True)
            second = (tile & -65536).to(tl.float32, bitcast=True)
        else:
            first = tile.to(tl.int16).to(dtype, bitcast=True)
            second = (tile >> 16).to(tl.int16).to(dtype, bitcast=True)
        tile = tl.reshape(tl.join(first, second), [tile.shape[0], 2 * tile.shape[1]])
    return tile.to(CT)


@triton.jit
def halves(tile):
    """The first and the second half of a tile's rows."""
    rows: tl.constexpr = tile.shape[0] // 2
    return tl.split(tl.permute(tl.reshape(tile, [2, rows, tile.shape[1]]), (1, 2, 0)))


@triton.jit
def fma(a, b, c):
    """a·b + c, rounded once."""
    if INTERPRETED and a.dtype == tl.float32:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def level(top, k):
    """n for logits of at most `top`, so that their weights 2^(k·logit − n) reach from 2^8 down.

    An exponent is rounded by up to a 2^24th of itself: from the top itself, weights of 2^-32 would have a
    relative error of 1.3e-6. So none above 2^-39 has more than 6.6e-7, and the largest, which a sum over
    the row inherits, 1.7e-7.
    """
    return tl.floor(top * k) - 7.0


@triton.jit
def exponent(logit, k, n):
    """k·logit − n"""
    return fma(logit, k, -n)


@triton.jit
def weights(logit, k, n):
    """2^(k·logit − n)"""
    return tl.exp2(exponent(logit, k, n))


@triton.jit
def normalised(n, inv, k, scale, TOP: tl.constexpr, CT: tl.constexpr):
    """(k, n, gain, drift) of a side whose weights about n sum to 1/inv: see `probability`.

    n is lowered once more, from 7 below the row's largest exponent to TOP. At 15, exponents are rounded by
    no more than 3.3e-7 down to probabilities of 2^-31 and 6.6e-7 down to 2^-47, at 31 by 6.6e-7 all the way
    from 1 to 2^-63 (e^-44). drift makes up for the rounding of k, which moves tokens 30 nats below the top
    by up to 9e-7.
    """
    low = n - (TOP - 7.0)
    gain = inv * tl.exp2(low - n)  # of 7 − TOP, unless n is too large to have units
    drift = ((scale * LOG2E / k - 1.0) * 0.6931471805599453).to(CT) * gain
    return k, low, gain - TOP * drift, drift


@triton.jit
def gain_at(e, gain, drift):
    """What a weight 2^e is to be multiplied by for a probability."""
    return fma(tl.maximum(e, -1000.0), drift, gain)  # −inf would come out of it as NaN


@triton.jit
def probability(logit, k, n, gain, drift):
    """A side's probabilities, from what `normalised` gave."""
    e = exponent(logit, k, n)
    return tl.exp2(e) * gain_at(e, gain, drift)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x in the dtype it is stored as, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter cuts a bfloat16 off where the hardware rounds.
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def is_near(x):
    """Where g(x) comes from its polynomial, and beyond which eˣ may be taken from b's own logit.

    In float32 that second exponential has an error of its own; past 1.5 at most 2.3 times it is left of what
    cancels against 1 + x.
    """
    return tl.abs(x) < (0.5 if x.dtype == tl.float64 else 1.5)


@triton.jit
def g_near(x):
    """g(x)/x for near x, minimax: relative error 1.1e-7 in float32, 2.7e-18 in float64."""
    if x.dtype == tl.float64:
        r = 1.60781323987752627e-10 * x + 2.09628524967962601e-9
        r = r * x + 2.50522102680160090e-8
        r = r * x + 2.75570772820632509e-7
        r = r * x + 2.75573187753331313e-6
        r = r * x + 2.48015876147344761e-5
        r = r * x + 1.98412698418661383e-4
        r = r * x + 1.38888888887058076e-3
        r = r * x + 8.33333333333303912e-3
        r = r * x + 4.16666666666670578e-2
        r = r * x + 1.66666666666666671e-1
        r = r * x + 0.5
    else:
        r = 2.792558007e-6 * x + 2.605212831e-5
        r = r * x + 1.985545678e-4
        r = r * x + 1.387154451e-3
        r = r * x + 8.333069272e-3
        r = r * x + 4.166742414e-2
        r = r * x + 1.666667610e-1
        r = r * x + 0.4999999404
    return r * x


@triton.jit
def g(x):
    """g(x) = eˣ − 1 − x ≥ 0."""
    return tl.where(is_near(x), g_near(x) * x, (tl.exp2(x * LOG2E) - 1.0) - x)


@triton.jit
def expm1_near(x):
    """eˣ − 1 for |x| < 1/2, minimax: relative error 1.2e-7 in float32."""
    if x.dtype == tl.float64:
        return g_near(x) * x + x
    r = 1.387576340e-3 * x + 8.402397856e-3
    r = r * x + 4.166897014e-2
    r = r * x + 1.666613519e-1
    r = r * x + 0.4999998212
    return (r * x + 1.0) * x


@triton.jit
def one_minus_exp(v):
    """1 − e⁻ᵛ for v ≥ 0: relative error 2.2e-8 below 1/2 in float32, where the subtraction would cancel."""
    if v.dtype == tl.float64:
        near = v - g_near(-v) * -v
    else:
        r = 1.163279662e-3 * v - 8.237207267e-3
        r = r * v + 4.164961010e-2
        r = r * v - 1.666655951e-1
        r = r * v + 0.4999999891
        near = v - r * v * v
    return tl.where(v < 0.5, near, 1.0 - tl.exp2(v * -LOG2E))


@triton.jit
def log1p_parts(z, one_plus_z):
    """z − log1p(z) ≥ 0 and log1p(z), for z > −1.

    By 2·atanh(z/(2 + z)) where the subtraction would cancel, minimax: relative error 1e-7 in float32, 1e-15
    in float64. `one_plus_z` comes from the caller: near −1 adding 1 to z would keep few digits of it.
    """
    s = z / (2.0 + z)
    y = s * s
    if z.dtype == tl.float64:
        near = tl.abs(z) < 0.01
        p = 0.3333333333333333 + y * (0.2 + y * (0.14285714285714285 + y * 0.1111111111111111))
    else:
        near = tl.abs(z) < 0.5
        p = 1.161216497e-1 * y + 1.085328758e-1
        p = p * y + 1.429617852e-1
        p = p * y + 1.999985278e-1
        p = p * y + 3.333333433e-1
    tail = 2.0 * s * y * p
    log = tl.where(near, 2.0 * s + tail, tl.log(one_plus_z))
    return tl.where(near, z * s - tail, z - log), log


@triton.jit
def log1p_minus(y):
    """log1p(y) − y for float64 y > −1: by series below 1e-3, where the subtraction would cancel."""
    series = y * y * (-0.5 + y * (1.0 / 3.0 + y * (-0.25 + y * 0.2)))
    return tl.where(tl.abs(y) < 1e-3, series, tl.log(1.0 + tl.maximum(y, -1.0)) - y)


@triton.jit
def wide(high, low):
    """A float64 from the pair of float32 a launcher passes: Triton's scalar arguments are float32."""
    return tl.full([], high, tl.float64) + tl.full([], low, tl.float64)


@triton.jit
def difference(a, b, a_scale, b_scale, SAME_SCALE: tl.constexpr):
    """b − a in the units of c: good enough to find a reference, not to measure from it."""
    if SAME_SCALE:
        return b - a
    return (b.to(tl.float64) * b_scale - a.to(tl.float64) * a_scale).to(a.dtype)


@triton.jit
def log_ratio(a, b, c, scale, a_scale, b_scale, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr):
    """x = (scaled b − scaled a) − c in nats, with relative precision even where both are far larger.

    EXACT says that b − a may be taken as representable (both bfloat16 or both float16; the value kernel
    checks afterwards). Otherwise the rounding error of b − a is recovered (Knuth's TwoSum): at a = 0.3,
    b = 1.00001 it is as large as a thousandth of x.
    """
    if not SAME_SCALE:
        x = (b.to(tl.float64) * b_scale - a.to(tl.float64) * a_scale) - c.to(tl.float64)
        return x.to(a.dtype)
    d = b - a
    if EXACT:
        return (d - c) * scale
    back = d - b
    error = (b - (d - back)) - (a + back)
    return ((d - c) + error) * scale


@triton.jit
def log_probability_ratio(
    a, b, c, lam, scale, a_scale, b_scale, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr
):
    """r = log(b_i/a_i), ±inf where one logit is −inf, NaN where both are."""
    x = log_ratio(a, b, c, scale, a_scale, b_scale, SAME_SCALE, EXACT)
    if SAME_SCALE and not EXACT:
        # Where one logit is −inf the error term is NaN, the difference itself is not.
        x = tl.where(x == x, x, b - a)
    return x - lam


@triton.jit
def rebase(z, a1, a2, h, s):
    """Bring sums taken about c to c + h/c_scale and from weights e^{a−m} to s·e^{a−m}."""
    g_h = g(-h)
    return z * s, (a1 - h * z) * s, (tl.exp2(-h * LOG2E) * a2 + (g_h - h) * a1 + z * g_h) * s

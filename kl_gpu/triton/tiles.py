"""Device functions the Triton kernels share: differences, the function g, the row state (docs/numerics.md).

A state (m, c, Z, A1, A2) stands for part of a row of KL(a‖b): with w = exp(a − m) and x = (b − a) − c,
Z = Σ w, A1 = Σ w x, A2 = Σ w g(x). m is kept as n ≈ m·k, in units of log2 and whole. c is in raw
logits where both temperatures are equal (SAME_SCALE), else in scaled ones; c_scale turns it into nats.
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
    # 64 bits before the multiply: 2³¹ elements are 16 744 rows of 128 256.
    row = row.to(tl.int64)
    return base + (row // n_inner) * outer_stride + (row % n_inner) * inner_stride


@triton.jit
def tile_offsets(R: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr):
    """Columns of a `[R, VEC]` tile; axis 1 lies inside a thread, so sums over it stay there.

    WIDE: a thread owns VEC neighbouring columns, one access of 16 bytes. Otherwise neighbouring threads own
    neighbouring columns: where rows start at odd addresses, scattered accesses would take VEC times as many
    cache lines each. Which of the two depends on V alone, lest a row's bits depend on where it lies.
    """
    if WIDE:
        return tl.arange(0, R)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    else:
        return tl.arange(0, R)[:, None] + tl.arange(0, VEC)[None, :] * R


@triton.jit
def fma(a, b, c):
    """a·b + c, rounded once."""
    if INTERPRETED and a.dtype == tl.float32:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def scaled_exp(logit, k, n):
    """2^(k·logit − n) to 2e-6 down to e⁻⁴⁴, for a whole n.

    An exponent between −32 and −64 is rounded by up to 1.9e-6 of a unit, so those are taken from n − 32.
    """
    exponent = fma(logit, k, -n)
    deep = exponent < -32.0
    exponent = tl.where(deep, fma(logit, k, 32.0 - n), exponent)
    return tl.exp2(exponent) * tl.where(deep, 2.3283064365386963e-10, 1.0).to(logit.dtype)


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

    In float32 that second exponential has an error of its own, up to 1.3e-6 at e⁻²⁶; past 2 it no longer
    cancels against 1 + x.
    """
    return tl.abs(x) < (0.5 if x.dtype == tl.float64 else 2.0)


@triton.jit
def g_near(x):
    """g(x)/x for near x, minimax: relative error 1.0e-7 in float32, 2.7e-18 in float64."""
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
        r = 2.816236767e-7 * x + 2.984318851e-6
        r = r * x + 2.484794460e-5
        r = r * x + 1.977410854e-4
        r = r * x + 1.388697535e-3
        r = r * x + 8.334049426e-3
        r = r * x + 4.166684553e-2
        r = r * x + 1.666664661e-1
        r = r * x + 0.4999999766
    return r * x


@triton.jit
def g(x):
    """g(x) = eˣ − 1 − x ≥ 0."""
    return tl.where(is_near(x), g_near(x) * x, (tl.exp2(x * LOG2E) - 1.0) - x)


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

    EXACT says that b − a may be taken as representable (both bfloat16; the value kernel checks afterwards).
    Otherwise the rounding error of b − a is recovered (Knuth's TwoSum): at a = 0.3, b = 1.00001 it is as
    large as a thousandth of x.
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
    # Where one logit is −inf the error term is NaN, the difference itself is not.
    return tl.where(x == x, x, b - a) - lam


@triton.jit
def rebase(z, a1, a2, h, s):
    """Bring sums taken about c to c + h/c_scale and from weights e^{a−m} to s·e^{a−m}."""
    g_h = g(-h)
    return z * s, (a1 - h * z) * s, (tl.exp2(-h * LOG2E) * a2 + (g_h - h) * a1 + z * g_h) * s

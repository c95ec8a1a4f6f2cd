"""The formulas of `kl_gpu.kinds`, over probabilities a, b and r = log(b/a) of a tile of columns.

Each gives the divergence's terms ≥ 0, and a·∂D/∂a, b·∂D/∂b up to a multiple of a and of b. r is −inf where b
has no mass, +inf where a has none; a column without either comes as a = b = r = 0. See docs/numerics.md.

The value of nla and lk is no sum of terms: `finish` makes it of the sums of overlap and of tv, and the β of
their flows is the row's own.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ...formulas import NLA_SCALE
from .device_math import (
    LOG2E,
    Row,
    g_near,
    is_near,
    log1p_minus,
    log1p_parts,
    mul_add,
    mul_sub,
    one_minus_exp,
    polynomial,
    times,
)

INF = tl.constexpr(float("inf"))
_LN2 = tl.constexpr(math.log(2))
_NLA_SCALE = tl.constexpr(NLA_SCALE)
# What probabilities come times where sums of the smallest count: float32 holds them down to 2^-157 then.
_GAIN = tl.constexpr(2.0**31)


@triton.jit
def _mixture(x, o, r, own, other):
    """Terms of KL(x‖m) and log(m/x), for m = own·x + other·o and r = log(o/x)."""
    r = tl.minimum(r, 80.0)  # beyond it x is nothing beside o, and e^r would overflow into inf·0
    e = tl.exp2(r * LOG2E)
    z = other * tl.where(is_near(r), mul_add(g_near(r), r, r), e - 1.0)
    terms, u = log1p_parts(z, mul_add(other, e, own))
    return tl.where(r < 4.0, x * terms, mul_sub(other, o - x, x * u)), u


@triton.jit
def _times(x, r):
    """x·r with 0·inf = 0 where x has no mass."""
    return tl.where(r == INF, 0.0, x * r)


@triton.jit
def _kl(x, o, r):
    terms = tl.where(is_near(r), x * (g_near(r) * r), (o - x) - _times(x, r))
    return tl.where(r == -INF, INF, terms)  # also where x underflowed to 0


@triton.jit
def _difference(a, b, r):
    """b − a with relative precision."""
    return tl.where(r > 0, b, -a) * one_minus_exp(tl.abs(r))


@triton.jit
def _jeffreys(a, b, r, beta, rest):
    d = _difference(a, b, r)
    terms = mul_add(rest, _kl(a, b, r), beta * _kl(b, a, -r))
    flow_a = mul_sub(-rest, _times(a, r), beta * d)
    return terms, flow_a, mul_sub(rest, d, beta * _times(b, -r))


@triton.jit
def _js(a, b, r, beta, rest):
    to_a, u = _mixture(a, b, r, beta, rest)
    to_b, v = _mixture(b, a, -r, rest, beta)
    return mul_add(beta, to_a, rest * to_b), -beta * a * u, -rest * b * v


@triton.jit
def _skew(a, b, r, beta, rest):
    terms, u = _mixture(a, b, r, beta, rest)
    n = tl.where(u > 0, 1.0, -tl.exp2(-u * LOG2E)) * one_minus_exp(tl.abs(u))  # 1 − a/m
    return terms, a * mul_sub(beta, n, u), rest * b * n


@triton.jit
def _half_sign(a, r):
    """½ where b is the larger, −½ where a is, 0 where they are equal."""
    return tl.where(r > 0, 0.5, tl.where(r < 0, -0.5, 0.0)).to(a.dtype)


@triton.jit
def _tv(a, b, r, beta, rest):
    half = _half_sign(a, r)
    return tl.abs(_difference(a, b, r)) * 0.5, -a * half, b * half


@triton.jit
def _overlap(a, b, r, beta, rest):
    """tv's terms, and the two halves of α = Σ min(a, b): of a and of b where each is the smaller."""
    half = _half_sign(a, r)
    return tl.abs(_difference(a, b, r)) * 0.5, a * (half + 0.5), b * (0.5 - half)


@triton.jit
def _nla(a, b, r, beta, rest):
    """The gradient of −log α, for β = −1/(α·NLA_SCALE): up first, lest a probability of 2^-100 be lost."""
    terms, of_a, of_b = _overlap(a, b, r, beta, rest)
    return terms, of_a * _NLA_SCALE * beta, of_b * _NLA_SCALE * beta


@triton.jit
def _lk(a, b, r, beta, rest):
    """β of kl and 1 − β of tv."""
    d = _difference(a, b, r)
    half = rest * _half_sign(a, r)
    return tl.abs(d), mul_sub(-beta, _times(a, r), half * a), mul_add(beta, d, half * b)


@triton.jit
def _comparison(a, b, r, beta, rest):
    """The terms of js at ½ and of tv, and min(a, b): three numbers of token_stats.

    With x = min/max and t = (1 − x)/(1 + x) that of js is max/2 · ((1 + x) log(2/(1 + x)) + x log x), or
    max/2 · (1 + x) Σ t^2k/(2k(2k − 1)).
    """
    v = tl.abs(r)
    larger = tl.where(r > 0, b, a)
    away = one_minus_exp(v)
    if a.dtype == tl.float64:
        js, _, _ = _js(a, b, r, 0.5, 0.5)
    else:
        v = tl.minimum(v, 100.0)  # before x·v: 0 times inf
        x = tl.exp2(v * -LOG2E)
        y = 1.0 + x
        t = away / y
        square = t * t
        # Relative error 1.2e-7 at t = ½.
        coefficients: tl.constexpr = (1 / 240, 1 / 182, 1 / 132, 1 / 90, 1 / 56, 1 / 30, 1 / 12, 0.5)
        near = y * square * polynomial(square, coefficients)
        far = mul_sub(y, (tl.log(y) - _LN2) * -1.0, x * v)
        js = 0.5 * larger * tl.where(square < 0.25, near, far)
    return js, 0.5 * larger * away, tl.where(r > 0, a, b)


@triton.jit
def formula(a, b, r, beta, rest, FORMULA: tl.constexpr):
    """The terms and flows of FORMULA; rest = 1 − beta."""
    if FORMULA == "jeffreys":
        return _jeffreys(a, b, r, beta, rest)
    elif FORMULA == "js":
        return _js(a, b, r, beta, rest)
    elif FORMULA == "skew":
        return _skew(a, b, r, beta, rest)
    elif FORMULA == "overlap":
        return _overlap(a, b, r, beta, rest)
    elif FORMULA == "nla":
        return _nla(a, b, r, beta, rest)
    elif FORMULA == "lk":
        return _lk(a, b, r, beta, rest)
    elif FORMULA == "comparison":
        return _comparison(a, b, r, beta, rest)
    else:
        tl.static_assert(FORMULA == "tv", "no such formula")
        return _tv(a, b, r, beta, rest)


@triton.jit
def raised(row, FORMULA: tl.constexpr):
    """The row with its probabilities times the formula's gain, and what takes that off again."""
    if FORMULA == "overlap" or FORMULA == "nla" or FORMULA == "comparison":
        a = times(row.a, _GAIN)
        b = times(row.b, _GAIN)
        return Row(a, b, row.c, row.log_z_ratio, row.beta, row.rest, row.scales), 1 / _GAIN
    else:
        return row, 1.0


@triton.jit
def finish(kl, value, mean_a, mean_b, beta, FORMULA: tl.constexpr):
    """A row's value, what its flows sum to and their β, in float64: as `kl_gpu.formulas.finish`."""
    if FORMULA == "nla":
        alpha = mean_a + mean_b
        inverse = tl.where(value == 0, 0.0, 1.0 / alpha)
        tv = tl.minimum(value, 0.5)
        value = tl.where(value <= 0.5, tv - log1p_minus(-tv), -tl.log(alpha))
        return value, -mean_a * inverse, -mean_b * inverse, inverse * (-1 / _NLA_SCALE)
    elif FORMULA == "lk":
        weight = tl.exp2(-beta * tl.maximum(1.0 - value, 0.0) * LOG2E)
        rest = 1.0 - weight
        of_kl = weight * kl
        return mul_add(rest, value, of_kl), mul_add(rest, mean_a, of_kl), rest * mean_b, weight
    else:
        return value, mean_a, mean_b, beta

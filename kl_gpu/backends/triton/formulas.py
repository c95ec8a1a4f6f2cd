"""The formulas of `kl_gpu.kinds`, over probabilities a, b and r = log(b/a) of a tile of columns.

Each gives the divergence's terms ≥ 0, and a·∂D/∂a, b·∂D/∂b up to a multiple of a and of b. r is −inf where b
has no mass, +inf where a has none; a column without either comes as a = b = r = 0. See docs/numerics.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_math import LOG2E, g_near, is_near, log1p_parts, mul_add, mul_sub, one_minus_exp

INF = tl.constexpr(float("inf"))


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
def _tv(a, b, r, beta, rest):
    half = tl.where(r > 0, 0.5, tl.where(r < 0, -0.5, 0.0)).to(a.dtype)
    return tl.abs(_difference(a, b, r)) * 0.5, -a * half, b * half


@triton.jit
def formula(a, b, r, beta, rest, FORMULA: tl.constexpr):
    """The terms and flows of FORMULA; rest = 1 − beta."""
    if FORMULA == "jeffreys":
        return _jeffreys(a, b, r, beta, rest)
    elif FORMULA == "js":
        return _js(a, b, r, beta, rest)
    elif FORMULA == "skew":
        return _skew(a, b, r, beta, rest)
    else:
        tl.static_assert(FORMULA == "tv", "no such formula")
        return _tv(a, b, r, beta, rest)

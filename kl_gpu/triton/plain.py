"""The families' formulas as plain rows take them: float32, no −inf, no sum that cancelled, β away from its ends.

Here logarithms may be good to 2^-22 of 1, and nothing needs a case of its own, so that a column costs a
quarter of what `formulas` spends. Three things keep the promise all the same (docs/numerics.md): terms near
r = 0 come from a polynomial, flows are exactly 0 at r = 0, and a family whose mixture is nearly one side
itself is not plain.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from .. import reference
from .tiles import LOG2E, difference_of

LN2 = tl.constexpr(0.6931471805599453)
# Where terms come from their polynomial: beyond it logarithms have no more than 3 times the term to cancel
# against, within it 8 coefficients reach 4e-7.
NEAR = 1.25
_NEAR = tl.constexpr(NEAR)
# Families that have a plain form; any other takes the one it has in `formulas` everywhere.
_FAMILIES = ("jeffreys", "js", "skew", "tv")


def logarithm(family: str, dtype: torch.dtype, nvidia: bool) -> str:
    """LOG2, what plain rows take: NVIDIA's instruction "lg2", Triton's "log2", or "" where no row is plain."""
    if family not in _FAMILIES or dtype != torch.float32:
        return ""
    return "lg2" if nvidia else "log2"


@lru_cache(maxsize=256)
def near_coefficients(family: str, beta: float) -> tuple[float, ...]:
    """T of term = a·r²·T(r) for |r| < NEAR, highest power first: through the definition at Chebyshev's points."""
    if family not in ("jeffreys", "js", "skew"):
        return (0.0,) * 8
    r = NEAR * np.cos(np.pi * (np.arange(8) + 0.5) / 8)
    terms = reference.column_terms(r, family, beta)
    return tuple(np.linalg.solve(np.vander(r), terms / r**2).tolist())


@triton.jit
def is_plain(beta, rest, FAMILY: tl.constexpr):
    """Whether no side makes up so much of the mixture that its logarithm would have to be relative to itself."""
    if FAMILY == "js":
        return (beta > 0.33) & (rest > 0.33)
    elif FAMILY == "skew":
        return rest > 0.66
    else:
        return rest == rest


@triton.jit
def _log2(x, LOG2: tl.constexpr):
    if LOG2 == "lg2":
        return libdevice.fast_log2f(x)
    else:
        return tl.log2(x)


@triton.jit
def _logs(r, beta, rest, LOG2: tl.constexpr):
    """log(a/m) and log(b/m), m = beta·a + rest·b: by m over the larger of a and b, which lies near 1."""
    rest = 1.0 - beta  # so that they sum to 1 and equal logits give a logarithm of exactly 0
    e = tl.exp2(tl.abs(r) * -LOG2E)
    up = r > 0
    log = _log2(tl.where(up, beta, rest) * e + tl.where(up, rest, beta), LOG2)
    return log * -LN2 - tl.maximum(r, 0.0), log * -LN2 + tl.minimum(r, 0.0)


@triton.jit
def plain_flows(a, b, r, beta, rest, FAMILY: tl.constexpr, LOG2: tl.constexpr):
    """a·∂D/∂a and b·∂D/∂b. Their sum is the column's term: divergences are homogeneous in (a, b)."""
    if FAMILY == "js":
        log_a, log_b = _logs(r, beta, rest, LOG2)
        return beta * log_a * a, rest * log_b * b
    elif FAMILY == "skew":
        log_a, _ = _logs(r, beta, rest, LOG2)
        n = 1.0 - tl.exp2(log_a * LOG2E)  # 1 − a/m
        return (beta * n + log_a) * a, rest * n * b
    elif FAMILY == "jeffreys":
        d = tl.where(r == 0, 0.0, b - a)
        return -rest * r * a - beta * d, beta * r * b + rest * d
    else:
        tl.static_assert(FAMILY == "tv")
        half = tl.where(r > 0, 0.5, tl.where(r < 0, -0.5, 0.0))
        return a * -half, b * half


@triton.jit
def plain_terms(a, b, r, beta, rest, near, FAMILY: tl.constexpr, LOG2: tl.constexpr):
    """The divergence's terms, and b·∂D/∂b."""
    flow_a, flow_b = plain_flows(a, b, r, beta, rest, FAMILY, LOG2)
    if FAMILY == "tv":
        return tl.abs(difference_of(a, b, r)) * 0.5, flow_b
    t0, t1, t2, t3, t4, t5, t6, t7 = near
    t = t0 * r + t1
    t = t * r + t2
    t = t * r + t3
    t = t * r + t4
    t = t * r + t5
    t = t * r + t6
    t = t * r + t7
    return tl.where(tl.abs(r) < _NEAR, a * (r * r) * t, flow_a + flow_b), flow_b

"""The formulas on the fast path: float32 rows without −inf or a sum that cancelled, β away from its limits.

There logarithms may be good to 2^-22 of 1, and no column needs a case of its own, so that one costs a quarter
of what it does in `formulas`. Three things keep the promise all the same (docs/numerics.md): terms near r = 0
come from a polynomial, flows are exactly 0 at r = 0, and a mixture that is nearly one side itself keeps its
rows off the fast path.

r = log(b/a), and a and b come times their `shares`, factors that a whole row has in common.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from ...formulas import SUMMED, column_terms
from .device_math import LOG2E, expm1_near, fma, log_ratio, mul_add, mul_sub, polynomial

LN2 = tl.constexpr(math.log(2))
# Where terms come from their polynomial: beyond it what cancels is at most four times the term, within it 8
# coefficients reach 4e-7.
NEAR = 1.25
_NEAR = tl.constexpr(NEAR)
# Formulas that have a fast path; any other takes the form it has in `formulas` everywhere.
_FAST_FORMULAS = ("jeffreys", "js", "skew", "tv")


def logarithm(formula: str, dtype: torch.dtype, nvidia: bool) -> str:
    """LOG2: NVIDIA's instruction "lg2" or Triton's "log2" for the fast path, "" where there is none.

    The sums of lk are those of tv, and take its path.
    """
    if SUMMED.get(formula, formula) not in _FAST_FORMULAS or dtype != torch.float32:
        return ""
    return "lg2" if nvidia else "log2"


@lru_cache(maxsize=256)
def near_coefficients(formula: str, beta: float) -> tuple[float, ...]:
    """T of term = a·r²·T(r) for |r| < NEAR, highest power first, from the definition at Chebyshev points."""
    if formula not in _FAST_FORMULAS or formula == "tv":
        return (0.0,) * 8
    share = beta if formula == "js" else 1.0
    r = NEAR * np.cos(np.pi * (np.arange(8) + 0.5) / 8)
    ratios = torch.from_numpy(r)
    terms = column_terms(formula, (torch.ones_like(ratios), ratios.exp()), ratios, beta)[0].numpy()
    coefficients = np.linalg.solve(np.vander(r), terms / (share * r**2))
    return tuple(coefficients.astype(np.float32).tolist())


@triton.jit
def beta_allows_fast_path(beta, rest, FORMULA: tl.constexpr):
    """Whether β keeps far enough from where all but one side drowns in rounding; rest = 1 − β."""
    if FORMULA == "js":
        return (beta > 0.01) & (rest > 0.01)
    elif FORMULA == "skew":
        return rest > 0.66
    else:
        tl.static_assert(FORMULA == "jeffreys" or FORMULA == "tv", "this formula has no fast path")
        return rest == rest


@triton.jit
def shares(beta, rest, FORMULA: tl.constexpr):
    """What a and b are multiplied by before the fast path's formula sees them."""
    if FORMULA == "js":
        return beta, rest
    elif FORMULA == "skew":
        return 1.0, rest
    elif FORMULA == "tv":
        return 0.5, 0.5
    else:
        tl.static_assert(FORMULA == "jeffreys", "this formula has no fast path")
        return 1.0, 1.0


@triton.jit
def fast_log_ratio(a, b, row, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr):
    """log(b_i/a_i) of logits a and b, finite on the fast path."""
    if SAME_SCALE and EXACT:
        # The rounding of c + log_z_ratio is the same in all columns, and shows in D by its square: a row with
        # a D that is small beside c² comes without EXACT.
        return fma(b - a, row.scales.shared, -(row.c + row.log_z_ratio))
    else:
        return log_ratio(a, b, row.c, row.scales, SAME_SCALE, EXACT) - row.log_z_ratio


@triton.jit
def _log2(x, LOG2: tl.constexpr):
    if LOG2 == "lg2":
        return libdevice.fast_log2f(x)
    else:
        return tl.log2(x)


@triton.jit
def _logs(r, beta, LOG2: tl.constexpr):
    """log(a/m) and log(b/m), m = βa + (1 − β)b: by m over the larger of a and b, which lies near 1."""
    rest = 1.0 - beta  # not rounded by itself: the two sum to 1, so that equal logits give exactly 0
    up = r > 0
    log = _log2(fma(tl.where(up, beta, rest), tl.exp2(tl.abs(r) * -LOG2E), tl.where(up, rest, beta)), LOG2)
    return mul_sub(log, -LN2, tl.maximum(r, 0.0)), mul_add(log, -LN2, tl.minimum(r, 0.0))


@triton.jit
def _lopsided(a, b, r, beta, rest, log_a, log_b, both):
    """`both`, the sum of js's flows, where one side x is most of the mixture: log(x/m) relative to itself.

    Otherwise the other side's few per cent would drown in the rounding of x's own logarithm.
    """
    heavy_a = beta > rest
    z = tl.minimum(beta, rest) * (tl.exp2(tl.where(heavy_a, r, -r) * LOG2E) - 1.0)  # m/x − 1; r is not near 0
    # −log1p(z)/z, minimax on [−1/3, 1/2]: relative error 1.8e-7.
    coefficients: tl.constexpr = (
        -8.047387009e-02, 1.476304026e-01, -1.542494763e-01, 1.653500997e-01, -1.990202708e-01,
        2.500166878e-01, -3.333592815e-01, 5.000000759e-01, -9.999999037e-01,
    )  # fmt: skip
    own = z * polynomial(z, coefficients)
    series = mul_add(tl.where(heavy_a, a, b), own, tl.where(heavy_a, b * log_b, a * log_a))
    return tl.where(z < 0.5, series, both)


@triton.jit
def _derivatives(r, mean_a, mean_b, beta, rest, FORMULA: tl.constexpr, LOG2: tl.constexpr):
    """∂D/∂a − mean_a and ∂D/∂b − mean_b."""
    if FORMULA == "js":
        log_a, log_b = _logs(r, beta, LOG2)
        return log_a - mean_a, log_b - mean_b
    elif FORMULA == "skew":
        log_a, _ = _logs(r, beta, LOG2)
        n = 1.0 - tl.exp2(log_a * LOG2E)  # 1 − a/m
        return mul_add(beta, n, log_a - mean_a), n - mean_b
    else:
        tl.static_assert(FORMULA == "tv", "this formula has no fast path")
        to_a = tl.where(r > 0, -1.0 - mean_a, tl.where(r < 0, 1.0 - mean_a, 0.0 - mean_a))
        return to_a, tl.where(r > 0, 1.0 - mean_b, tl.where(r < 0, -1.0 - mean_b, 0.0 - mean_b))


@triton.jit
def _jeffreys_flows(a, b, r, mean_a, mean_b, beta, rest):
    d = tl.where(r == 0, 0.0, b - a)
    flow_a = mul_sub(a, mul_sub(r, -rest, mean_a), beta * d)
    return flow_a, mul_add(b, mul_sub(r, beta, mean_b), rest * d)


@triton.jit
def fast_flows(a, b, r, mean_a, mean_b, beta, rest, FORMULA: tl.constexpr, LOG2: tl.constexpr):
    """a·(∂D/∂a − mean_a) and b·(∂D/∂b − mean_b)."""
    if FORMULA == "jeffreys":
        return _jeffreys_flows(a, b, r, mean_a, mean_b, beta, rest)
    else:
        to_a, to_b = _derivatives(r, mean_a, mean_b, beta, rest, FORMULA, LOG2)
        return a * to_a, b * to_b


@triton.jit
def fast_terms(a, b, r, beta, rest, near, FORMULA: tl.constexpr, LOG2: tl.constexpr):
    """The divergence's terms, and b·∂D/∂b.

    Away from r = 0 a term is the sum of both flows: divergences are homogeneous in (a, b).
    """
    if FORMULA == "tv":
        flow_b = tl.where(r > 0, b, tl.where(r < 0, b * -1.0, 0.0))
        return tl.abs(tl.where(tl.abs(r) < 0.5, a * expm1_near(r), b - a)), flow_b
    if FORMULA == "jeffreys":
        flow_a, flow_b = _jeffreys_flows(a, b, r, 0.0, 0.0, beta, rest)
        far = flow_a + flow_b
    else:
        to_a, to_b = _derivatives(r, 0.0, 0.0, beta, rest, FORMULA, LOG2)
        flow_b = b * to_b
        far = mul_add(a, to_a, flow_b)
        if FORMULA == "js":
            if tl.minimum(beta, rest) < 0.33:
                far = _lopsided(a, b, r, beta, rest, to_a, to_b, far)
    return tl.where(tl.abs(r) < _NEAR, a * (r * r) * polynomial(r, near), far), flow_b

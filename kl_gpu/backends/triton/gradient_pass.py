"""Gradients to the logits of both sides, from the statistics that a row's earlier sweeps left."""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

from .device_math import (
    expm1_near,
    exponent,
    fma,
    load_one,
    load_ragged,
    load_tile,
    log_probability_ratio,
    log_ratio,
    lowest,
    mul_sub,
    no_lower,
    own_columns,
    probability,
    scale_at,
    scale_by_logit,
    store_one,
    store_ragged,
    store_tile,
    sub_mul,
    times,
    unpacked,
    weights,
)
from .fast_formulas import fast_flows, fast_log_ratio, shares
from .formula_pass import formula_tile

# The means of a row's flows, which are taken off them, and the factors that its gradients come times.
Incoming = namedtuple("Incoming", "mean_a mean_b up_a up_b")


@triton.jit
def _over_factor(a, b, row, up):
    """a's and b − a's probabilities, of one temperature, over a factor that they share; and that factor.

    Its rounding is common to both, so that their difference does not feel it.
    """
    e_a = exponent(a, row.a.k, row.a.n)
    e_b = exponent(b, row.b.k, row.b.n)
    factor = scale_at(tl.maximum(e_a, e_b), times(row.a, up))
    mass_a = tl.exp2(e_a)
    return mass_a, mul_sub(tl.exp2(e_b), row.b.scale / row.a.scale, mass_a), factor


@triton.jit
def _kl_tile(
    a, b, row, near_a, to, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, TO_A: tl.constexpr,
    TO_B: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile to the logits of a and of b.

    To b it is b − a, by expm1 of r = log b − log a where the two are nearly equal, so that there too it has
    relative precision. To a it is −a (r + KL).
    """
    r = log_probability_ratio(a, b, row.c, row.log_z_ratio, row.scales, SAME_SCALE, EXACT)
    to_a = r
    to_b = r
    # Factors come last, so that a row without a gradient is NaN also where weights are 0.
    if TO_B:
        if SAME_SCALE:
            mass_a, b_less_a, factor = _over_factor(a, b, row, to.up_b)
        else:
            mass_a = probability(a, row.a)
            e_b = exponent(b, row.b.k, row.b.n)
            b_less_a = mul_sub(tl.exp2(e_b), scale_at(e_b, row.b), mass_a)
            factor = to.up_b
        # −inf on both sides gives a NaN r, which is not near: 0 − 0.
        to_b = tl.where(tl.abs(r) < 0.5, mass_a * expm1_near(r), b_less_a) * factor
    if TO_A:
        e_a = exponent(a, near_a.k, near_a.n)
        weight = tl.exp2(e_a)
        to_a = tl.where(weight == 0, 0.0, weight * (r + to.mean_a)) * scale_at(e_a, times(near_a, -to.up_a))
    return to_a, to_b


@triton.jit
def _fast_kl_tile(
    a, b, row, near_a, to, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, DIRECT: tl.constexpr,
    TO_A: tl.constexpr, TO_B: tl.constexpr,
):  # fmt: skip
    """`_kl_tile` of a row whose logits are finite, as are their differences: no column needs a case.

    DIRECT takes b − a as two exponentials' difference: good to 2e-6 of the larger, not of itself.
    """
    x = log_ratio(a, b, row.c, row.scales, SAME_SCALE, EXACT)
    to_a = x
    to_b = x
    if TO_B:
        scale_a, correction_a = scale_by_logit(times(row.a, to.up_b))
        scale_b, correction_b = scale_by_logit(times(row.b, to.up_b))
        mass_a = weights(a, row.a.k, row.a.n) * fma(a, correction_a, scale_a)
        to_b = mul_sub(weights(b, row.b.k, row.b.n), fma(b, correction_b, scale_b), mass_a)
        if not DIRECT:
            r = x - row.log_z_ratio
            to_b = tl.where(tl.abs(r) < 0.5, mass_a * expm1_near(r), to_b)
    if TO_A:
        scale, correction = scale_by_logit(times(near_a, -to.up_a))
        weight = weights(a, near_a.k, near_a.n)
        to_a = weight * (x + (to.mean_a - row.log_z_ratio)) * fma(a, correction, scale)
    return to_a, to_b


@triton.jit
def _gradient_tile(
    a, b, row, near_a, to, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, FORMULA: tl.constexpr,
    FAST: tl.constexpr, ONLY_FINITE: tl.constexpr, DIRECT: tl.constexpr, LOG2: tl.constexpr,
    TO_A: tl.constexpr, TO_B: tl.constexpr,
):  # fmt: skip
    if not FAST:
        a -= row.a.shift
        b -= row.b.shift
    elif not ONLY_FINITE:
        a = no_lower(a, lowest(row.scales.a, a.dtype))
        b = no_lower(b, lowest(row.scales.b, a.dtype))
    if FORMULA == "kl" and FAST:
        return _fast_kl_tile(a, b, row, near_a, to, SAME_SCALE, EXACT, DIRECT, TO_A, TO_B)
    elif FORMULA == "kl":
        return _kl_tile(a, b, row, near_a, to, SAME_SCALE, EXACT, TO_A, TO_B)
    elif FAST:
        share_a, share_b = shares(row.beta, row.rest, FORMULA)
        mean_a = to.mean_a / share_a
        mean_b = to.mean_b / share_b
        r = fast_log_ratio(a, b, row, SAME_SCALE, EXACT and ONLY_FINITE)
        if SAME_SCALE:
            # Means are finite here, and the same factor fits both sides.
            share_a *= to.up_b
            share_b *= to.up_b
        p_a = probability(a, times(row.a, share_a))
        p_b = probability(b, times(row.b, share_b))
        to_a, to_b = fast_flows(p_a, p_b, r, mean_a, mean_b, row.beta, row.rest, FORMULA, LOG2)
        if not SAME_SCALE:
            to_a *= to.up_a
            to_b *= to.up_b
        return to_a, to_b
    else:
        p_a, p_b, _, flow_a, flow_b = formula_tile(a, b, row, SAME_SCALE, EXACT, FORMULA)
        return sub_mul(flow_a, p_a, to.mean_a) * to.up_a, sub_mul(flow_b, p_b, to.mean_b) * to.up_b


@triton.jit
def write_gradient(
    a_row, b_row, grad_a, grad_b, first, last, V, row, near_a, to,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, FORMULA: tl.constexpr, FAST: tl.constexpr,
    ONLY_FINITE: tl.constexpr, DIRECT: tl.constexpr, LOG2: tl.constexpr, CT: tl.constexpr,
    TO_A: tl.constexpr, TO_B: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Write columns [first, last) of the gradients asked for, or those that `own_columns` gives instead.

    near_a is a's `Softmax` for the gradient of KL to a, which multiplies one exponential.
    """
    BLOCK: tl.constexpr = R * VEC
    begin, start, end = own_columns(grad_b if TO_B else grad_a, first, last, V, LAYOUT)
    if start < begin:
        a = load_one(a_row + start, CT)
        b = load_one(b_row + start, CT)
        to_a, to_b = _gradient_tile(
            a, b, row, near_a, to, SAME_SCALE, EXACT, FORMULA, FAST, ONLY_FINITE, DIRECT, LOG2, TO_A, TO_B
        )
        if TO_A:
            store_one(grad_a + start, to_a)
        if TO_B:
            store_one(grad_b + start, to_b)
    full = end - (end - begin) % BLOCK
    for start in range(begin, full, BLOCK):
        a = unpacked(load_tile(a_row, start, R, VEC, LAYOUT), a_row, CT, R, VEC)
        b = unpacked(load_tile(b_row, start, R, VEC, LAYOUT), b_row, CT, R, VEC)
        to_a, to_b = _gradient_tile(
            a, b, row, near_a, to, SAME_SCALE, EXACT, FORMULA, FAST, ONLY_FINITE, DIRECT, LOG2, TO_A, TO_B
        )
        if TO_A:
            store_tile(grad_a, start, to_a, R, VEC, LAYOUT)
        if TO_B:
            store_tile(grad_b, start, to_b, R, VEC, LAYOUT)
    if full < end:
        a = load_ragged(a_row, full, end, 0.0, CT, R, VEC, LAYOUT)
        b = load_ragged(b_row, full, end, 0.0, CT, R, VEC, LAYOUT)
        to_a, to_b = _gradient_tile(
            a, b, row, near_a, to, SAME_SCALE, EXACT, FORMULA, FAST, ONLY_FINITE, DIRECT, LOG2, TO_A, TO_B
        )
        if TO_A:
            store_ragged(grad_a, full, end, to_a, R, VEC, LAYOUT)
        if TO_B:
            store_ragged(grad_b, full, end, to_b, R, VEC, LAYOUT)

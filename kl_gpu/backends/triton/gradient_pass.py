"""Gradients to the logits of both sides, from the statistics that a row's earlier sweeps left."""

from __future__ import annotations

import triton
import triton.language as tl

from .device_math import (
    by_logit,
    expm1_near,
    exponent,
    fma,
    gain_at,
    load_one,
    load_ragged,
    load_tile,
    log_probability_ratio,
    log_ratio,
    own_columns,
    probability,
    store_one,
    store_ragged,
    store_tile,
    unpacked,
    weights,
)
from .fast_formulas import plain_flows, plain_ratio, shares
from .formula_pass import formula_tile


@triton.jit
def _over_factor(a, b, side_a, side_b, up):
    """Probabilities of both sides, of one temperature, over a factor they share; and that factor.

    Its rounding is common to both, so that a difference of the two does not feel it.
    """
    k_a, n_a, gain_a, drift_a = side_a
    k_b, n_b, gain_b, _ = side_b
    e_a = exponent(a, k_a, n_a)
    e_b = exponent(b, k_b, n_b)
    factor = gain_at(tl.maximum(e_a, e_b), gain_a * up, drift_a * up)
    return tl.exp2(e_a), tl.exp2(e_b) * (gain_b / gain_a), factor


@triton.jit
def _kl_tile(
    a, b, side_a, near_a, side_b, c, lam, kl, up_a, up_b, scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, TO_A: tl.constexpr, TO_B: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile to the logits of a and of b.

    To b: b − a, by expm1 of r = log b − log a where the two are nearly equal, so that there too it has
    relative precision. To a: −a (r + KL).
    """
    r = log_probability_ratio(a, b, c, lam, scale, a_scale, b_scale, SAME_SCALE, EXACT)
    to_a = r
    to_b = r
    # Factors come last, so that a row without a gradient is NaN also where weights are 0.
    if TO_B:
        if SAME_SCALE:
            mass_a, mass_b, factor = _over_factor(a, b, side_a, side_b, up_b)
        else:
            k_a, n_a, gain_a, drift_a = side_a
            k_b, n_b, gain_b, drift_b = side_b
            mass_a = probability(a, k_a, n_a, gain_a, drift_a)
            mass_b = probability(b, k_b, n_b, gain_b, drift_b)
            factor = up_b
        # −inf on both sides gives a NaN r, which is not near: 0 − 0.
        to_b = tl.where(tl.abs(r) < 0.5, mass_a * expm1_near(r), mass_b - mass_a) * factor
    if TO_A:
        k_a, n_a, gain_a, drift_a = near_a
        e_a = exponent(a, k_a, n_a)
        weight = tl.exp2(e_a)
        to_a = tl.where(weight == 0, 0.0, weight * (r + kl)) * gain_at(e_a, -gain_a * up_a, -drift_a * up_a)
    return to_a, to_b


@triton.jit
def _plain_kl_tile(
    a, b, side_a, near_a, side_b, c, lam, kl, up_a, up_b, scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, DIRECT: tl.constexpr, TO_A: tl.constexpr,
    TO_B: tl.constexpr,
):  # fmt: skip
    """`_kl_tile` of a row whose logits are finite, as are their differences: no column needs a case.

    DIRECT takes b − a as two exponentials' difference: good to 2e-6 of the larger, not of itself.
    """
    x = log_ratio(a, b, c, scale, a_scale, b_scale, SAME_SCALE, EXACT)
    to_a = x
    to_b = x
    if TO_B and DIRECT:
        mass_a, mass_b, factor = _over_factor(a, b, side_a, side_b, up_b)
        to_b = (mass_b - mass_a) * factor
    elif TO_B:
        r = x - lam
        k_a, n_a, gain_a, drift_a = side_a
        k_b, n_b, gain_b, drift_b = side_b
        gain_a, drift_a = by_logit(k_a, n_a, gain_a * up_b, drift_a * up_b)
        gain_b, drift_b = by_logit(k_b, n_b, gain_b * up_b, drift_b * up_b)
        mass_a = weights(a, k_a, n_a) * fma(a, drift_a, gain_a)
        mass_b = weights(b, k_b, n_b) * fma(b, drift_b, gain_b)
        to_b = tl.where(tl.abs(r) < 0.5, mass_a * expm1_near(r), mass_b - mass_a)
    if TO_A:
        k_a, n_a, gain_a, drift_a = near_a
        gain, drift = by_logit(k_a, n_a, -gain_a * up_a, -drift_a * up_a)
        to_a = weights(a, k_a, n_a) * (x + (kl - lam)) * fma(a, drift, gain)
    return to_a, to_b


@triton.jit
def _gradient_tile(
    a, b, shift_a, side_a, near_a, shift_b, side_b, c, lam, mean_a, mean_b, up_a, up_b, beta, rest,
    scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, FAMILY: tl.constexpr, PLAIN: tl.constexpr,
    DIRECT: tl.constexpr, LOG2: tl.constexpr, TO_A: tl.constexpr, TO_B: tl.constexpr,
):  # fmt: skip
    if not PLAIN:
        a -= shift_a
        b -= shift_b
    if FAMILY == "kl" and PLAIN:
        return _plain_kl_tile(
            a, b, side_a, near_a, side_b, c, lam, mean_a, up_a, up_b, scale, a_scale, b_scale,
            SAME_SCALE, EXACT, DIRECT, TO_A, TO_B,
        )  # fmt: skip
    elif FAMILY == "kl":
        return _kl_tile(
            a, b, side_a, near_a, side_b, c, lam, mean_a, up_a, up_b, scale, a_scale, b_scale,
            SAME_SCALE, EXACT, TO_A, TO_B,
        )  # fmt: skip
    elif PLAIN:
        k_a, n_a, gain_a, drift_a = side_a
        k_b, n_b, gain_b, drift_b = side_b
        share_a, share_b = shares(beta, rest, FAMILY)
        mean_a = mean_a / share_a
        mean_b = mean_b / share_b
        r = plain_ratio(a, b, c, lam, scale, a_scale, b_scale, SAME_SCALE, EXACT)
        if SAME_SCALE:
            # Means are finite here, and the same factor fits both sides.
            share_a *= up_b
            share_b *= up_b
        p_a = probability(a, k_a, n_a, gain_a * share_a, drift_a * share_a)
        p_b = probability(b, k_b, n_b, gain_b * share_b, drift_b * share_b)
        to_a, to_b = plain_flows(p_a, p_b, r, mean_a, mean_b, beta, rest, FAMILY, LOG2)
        if not SAME_SCALE:
            to_a *= up_a
            to_b *= up_b
        return to_a, to_b
    else:
        p_a, p_b, _, flow_a, flow_b = formula_tile(
            a, b, side_a, side_b, c, lam, beta, rest, scale, a_scale, b_scale, SAME_SCALE, EXACT, FAMILY
        )
        return (flow_a - p_a * mean_a) * up_a, (flow_b - p_b * mean_b) * up_b


@triton.jit
def write_gradient(
    a_row, b_row, grad_a, grad_b, first, last, V,
    shift_a, side_a, near_a, shift_b, side_b, c, lam, mean_a, mean_b, up_a, up_b, beta, rest,
    scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, FAMILY: tl.constexpr, PLAIN: tl.constexpr,
    DIRECT: tl.constexpr, LOG2: tl.constexpr, CT: tl.constexpr, TO_A: tl.constexpr, TO_B: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Columns [first, last) of the gradients asked for, or those that `own_columns` gives instead."""
    BLOCK: tl.constexpr = R * VEC
    begin, start, end = own_columns(grad_b if TO_B else grad_a, first, last, V, LAYOUT)
    if start < begin:
        a = load_one(a_row + start, CT)
        b = load_one(b_row + start, CT)
        to_a, to_b = _gradient_tile(
            a, b, shift_a, side_a, near_a, shift_b, side_b, c, lam, mean_a, mean_b, up_a, up_b, beta, rest,
            scale, a_scale, b_scale, SAME_SCALE, EXACT, FAMILY, PLAIN, DIRECT, LOG2, TO_A, TO_B,
        )  # fmt: skip
        if TO_A:
            store_one(grad_a + start, to_a)
        if TO_B:
            store_one(grad_b + start, to_b)
    full = end - (end - begin) % BLOCK
    for start in range(begin, full, BLOCK):
        a = unpacked(load_tile(a_row, start, R, VEC, LAYOUT), a_row, CT, R, VEC)
        b = unpacked(load_tile(b_row, start, R, VEC, LAYOUT), b_row, CT, R, VEC)
        to_a, to_b = _gradient_tile(
            a, b, shift_a, side_a, near_a, shift_b, side_b, c, lam, mean_a, mean_b, up_a, up_b, beta, rest,
            scale, a_scale, b_scale, SAME_SCALE, EXACT, FAMILY, PLAIN, DIRECT, LOG2, TO_A, TO_B,
        )  # fmt: skip
        if TO_A:
            store_tile(grad_a, start, to_a, R, VEC, LAYOUT)
        if TO_B:
            store_tile(grad_b, start, to_b, R, VEC, LAYOUT)
    if full < end:
        a = load_ragged(a_row, full, end, 0.0, CT, R, VEC, LAYOUT)
        b = load_ragged(b_row, full, end, 0.0, CT, R, VEC, LAYOUT)
        to_a, to_b = _gradient_tile(
            a, b, shift_a, side_a, near_a, shift_b, side_b, c, lam, mean_a, mean_b, up_a, up_b, beta, rest,
            scale, a_scale, b_scale, SAME_SCALE, EXACT, FAMILY, PLAIN, DIRECT, LOG2, TO_A, TO_B,
        )  # fmt: skip
        if TO_A:
            store_ragged(grad_a, full, end, to_a, R, VEC, LAYOUT)
        if TO_B:
            store_ragged(grad_b, full, end, to_b, R, VEC, LAYOUT)

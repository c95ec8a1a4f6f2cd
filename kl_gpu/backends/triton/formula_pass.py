"""The formula pass: a row's sums of a formula that needs both normalisers first, in a second sweep."""

from __future__ import annotations

import triton
import triton.language as tl

from .device_math import (
    load_ragged,
    load_tile,
    log_probability_ratio,
    lowest,
    mul_add,
    no_lower,
    probability,
    tile_offsets,
    unpacked,
    weights,
)
from .fast_formulas import fast_log_ratio, fast_terms, shares
from .formulas import formula


@triton.jit
def formula_tile(a, b, row, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, FORMULA: tl.constexpr):
    """Probabilities of both sides, and the formula's terms and flows, of a tile of logits."""
    p_a = probability(a, row.a)
    p_b = probability(b, row.b)
    r = log_probability_ratio(a, b, row.c, row.log_z_ratio, row.scales, SAME_SCALE, EXACT)
    r = tl.where(r == r, r, 0.0)
    # The lowest number over a temperature below 1 gives ±inf, and excludes nothing: opposite a weight of 0
    # its term is 0.
    nothing = ((r < 0) & (p_a == 0)) | ((r > 0) & (p_b == 0))
    nothing &= (a > -float("inf")) & (b > -float("inf"))
    r = tl.where(nothing, tl.minimum(tl.maximum(r, -3.4e38), 3.4e38), r)
    terms, flow_a, flow_b = formula(p_a, p_b, r, row.beta, row.rest, FORMULA)
    return p_a, p_b, terms, flow_a, flow_b


@triton.jit
def _add_tile(a, b, value, mean_a, mean_b, row, SAME_SCALE: tl.constexpr, FORMULA: tl.constexpr):
    # Never EXACT: a common shift makes r small beside b − a in rows that the first sweep looked at twice.
    _, _, terms, flow_a, flow_b = formula_tile(a, b, row, SAME_SCALE, False, FORMULA)
    return value + tl.sum(terms, axis=1), mean_a + tl.sum(flow_a, axis=1), mean_b + tl.sum(flow_b, axis=1)


@triton.jit
def formula_sums(
    a_row, b_row, first, last, row, SAME_SCALE: tl.constexpr, FORMULA: tl.constexpr, CT: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """The formula's terms, and its flows to a and to b, summed over columns [first, last)."""
    BLOCK: tl.constexpr = R * VEC
    value = tl.zeros([R], CT)
    mean_a = tl.zeros([R], CT)
    mean_b = tl.zeros([R], CT)
    full = last - (last - first) % BLOCK
    for start in range(first, full, BLOCK):
        a = unpacked(load_tile(a_row, start, R, VEC, LAYOUT), a_row, CT, R, VEC) - row.a.shift
        b = unpacked(load_tile(b_row, start, R, VEC, LAYOUT), b_row, CT, R, VEC) - row.b.shift
        value, mean_a, mean_b = _add_tile(a, b, value, mean_a, mean_b, row, SAME_SCALE, FORMULA)
    if full < last:
        a = load_ragged(a_row, full, last, -float("inf"), CT, R, VEC, LAYOUT) - row.a.shift
        b = load_ragged(b_row, full, last, -float("inf"), CT, R, VEC, LAYOUT) - row.b.shift
        value, mean_a, mean_b = _add_tile(a, b, value, mean_a, mean_b, row, SAME_SCALE, FORMULA)
    return tl.sum(value), tl.sum(mean_a), tl.sum(mean_b)


@triton.jit
def _add_fast_tile(
    a, b, value, mean_b, row, ratio, near, inside, ONLY_FINITE: tl.constexpr,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, FORMULA: tl.constexpr, LOG2: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    if not ONLY_FINITE:
        a = no_lower(a, lowest(row.scales.a, a.dtype))
        b = no_lower(b, lowest(row.scales.b, a.dtype))
    r = fast_log_ratio(a, b, row, SAME_SCALE, EXACT)
    p_a = weights(a, row.a.k, row.a.n)
    p_b = weights(b, row.b.k, row.b.n) * ratio
    terms, flow_b = fast_terms(p_a, p_b, r, row.beta, row.rest, near, FORMULA, LOG2)
    if MASKED:
        terms = tl.where(inside, terms, 0.0)
        flow_b = tl.where(inside, flow_b, 0.0)
    return value + tl.sum(terms, axis=1), mean_b + tl.sum(flow_b, axis=1)


@triton.jit
def fast_formula_sums(
    a_row, b_row, first, last, row, near, ONLY_FINITE: tl.constexpr,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, FORMULA: tl.constexpr, LOG2: tl.constexpr,
    CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """`formula_sums` on the fast path. All sums are linear in (a, b), so a's normaliser comes last.

    ONLY_FINITE says that no logit is −inf.
    """
    BLOCK: tl.constexpr = R * VEC
    offsets = tile_offsets(R, VEC, LAYOUT)
    # Sums do without the correction for the rounding of k: on the whole they do not feel it.
    share_a, share_b = shares(row.beta, row.rest, FORMULA)
    scale = mul_add(row.a.scale_correction, 15.0, row.a.scale) * share_a
    ratio = mul_add(row.b.scale_correction, 15.0, row.b.scale) * share_b / scale
    value = tl.zeros([R], CT)
    mean_b = tl.zeros([R], CT)
    full = last - (last - first) % BLOCK
    for start in range(first, full, BLOCK):
        a = unpacked(load_tile(a_row, start, R, VEC, LAYOUT), a_row, CT, R, VEC)
        b = unpacked(load_tile(b_row, start, R, VEC, LAYOUT), b_row, CT, R, VEC)
        value, mean_b = _add_fast_tile(
            a, b, value, mean_b, row, ratio, near, True, ONLY_FINITE, SAME_SCALE, EXACT, FORMULA, LOG2, False
        )
    if full < last:
        inside = full + offsets < last
        a = load_ragged(a_row, full, last, 0.0, CT, R, VEC, LAYOUT)
        b = load_ragged(b_row, full, last, 0.0, CT, R, VEC, LAYOUT)
        value, mean_b = _add_fast_tile(
            a, b, value, mean_b, row, ratio, near, inside, ONLY_FINITE, SAME_SCALE, EXACT, FORMULA, LOG2, True
        )
    value = tl.sum(value) * scale
    mean_b = tl.sum(mean_b) * scale
    return value, value - mean_b, mean_b

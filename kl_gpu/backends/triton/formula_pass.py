"""The second sweep of families that need both normalisers first: row sums of the family's formula."""

from __future__ import annotations

import triton
import triton.language as tl

from .device_math import (
    load_ragged,
    load_tile,
    log_probability_ratio,
    probability,
    tile_offsets,
    unpacked,
    weights,
)
from .fast_formulas import plain_ratio, plain_terms, shares
from .formulas import formula


@triton.jit
def formula_tile(
    a, b, side_a, side_b, c, lam, beta, rest, scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, FAMILY: tl.constexpr,
):  # fmt: skip
    """Probabilities of both sides and the formula's three parts, of a tile of logits."""
    p_a = probability(a, *side_a)
    p_b = probability(b, *side_b)
    r = log_probability_ratio(a, b, c, lam, scale, a_scale, b_scale, SAME_SCALE, EXACT)
    r = tl.where(r == r, r, 0.0)
    # The lowest number over a temperature below 1 gives ±inf, and excludes nothing: opposite a weight of 0
    # its term is 0.
    nothing = ((r < 0) & (p_a == 0)) | ((r > 0) & (p_b == 0))
    nothing &= (a > -float("inf")) & (b > -float("inf"))
    r = tl.where(nothing, tl.minimum(tl.maximum(r, -3.4e38), 3.4e38), r)
    terms, flow_a, flow_b = formula(p_a, p_b, r, beta, rest, FAMILY)
    return p_a, p_b, terms, flow_a, flow_b


@triton.jit
def _add_tile(
    a, b, value, mean_a, mean_b, side_a, side_b, c, lam, beta, rest, scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, FAMILY: tl.constexpr,
):  # fmt: skip
    _, _, terms, flow_a, flow_b = formula_tile(
        a, b, side_a, side_b, c, lam, beta, rest, scale, a_scale, b_scale, SAME_SCALE, EXACT, FAMILY,
    )  # fmt: skip
    return value + tl.sum(terms, axis=1), mean_a + tl.sum(flow_a, axis=1), mean_b + tl.sum(flow_b, axis=1)


@triton.jit
def formula_sums(
    a_row, b_row, first, last, shift_a, side_a, shift_b, side_b, c, lam, beta, rest, scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, FAMILY: tl.constexpr, CT: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """The formula's terms, and what its flows to a and to b sum to, over columns [first, last)."""
    # Never EXACT: a common shift makes r small beside b − a in rows that the first sweep looked at twice.
    EXACT: tl.constexpr = False
    BLOCK: tl.constexpr = R * VEC
    value = tl.zeros([R], CT)
    mean_a = tl.zeros([R], CT)
    mean_b = tl.zeros([R], CT)
    full = last - (last - first) % BLOCK
    for start in range(first, full, BLOCK):
        a = unpacked(load_tile(a_row, start, R, VEC, LAYOUT), a_row, CT, R, VEC) - shift_a
        b = unpacked(load_tile(b_row, start, R, VEC, LAYOUT), b_row, CT, R, VEC) - shift_b
        value, mean_a, mean_b = _add_tile(
            a, b, value, mean_a, mean_b, side_a, side_b, c, lam, beta, rest, scale, a_scale, b_scale,
            SAME_SCALE, EXACT, FAMILY,
        )  # fmt: skip
    if full < last:
        a = load_ragged(a_row, full, last, -float("inf"), CT, R, VEC, LAYOUT) - shift_a
        b = load_ragged(b_row, full, last, -float("inf"), CT, R, VEC, LAYOUT) - shift_b
        value, mean_a, mean_b = _add_tile(
            a, b, value, mean_a, mean_b, side_a, side_b, c, lam, beta, rest, scale, a_scale, b_scale,
            SAME_SCALE, EXACT, FAMILY,
        )  # fmt: skip
    return tl.sum(value), tl.sum(mean_a), tl.sum(mean_b)


@triton.jit
def _add_plain_tile(
    a, b, value, mean_b, side_a, side_b, c, lam, beta, rest, near, scale, a_scale, b_scale, valid,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, FAMILY: tl.constexpr, LOG2: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    k_a, n_a = side_a
    k_b, n_b, ratio = side_b
    r = plain_ratio(a, b, c, lam, scale, a_scale, b_scale, SAME_SCALE, EXACT)
    terms, flow_b = plain_terms(
        weights(a, k_a, n_a), weights(b, k_b, n_b) * ratio, r, beta, rest, near, FAMILY, LOG2
    )
    if MASKED:
        terms = tl.where(valid, terms, 0.0)
        flow_b = tl.where(valid, flow_b, 0.0)
    return value + tl.sum(terms, axis=1), mean_b + tl.sum(flow_b, axis=1)


@triton.jit
def plain_sums(
    a_row, b_row, first, last, side_a, side_b, c, lam, beta, rest, near, scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, FAMILY: tl.constexpr, LOG2: tl.constexpr,
    CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """`formula_sums` of a plain row. All sums are linear in (a, b), so a's normaliser comes last."""
    BLOCK: tl.constexpr = R * VEC
    offsets = tile_offsets(R, VEC, LAYOUT)
    k_a, n_a, gain, drift_a = side_a
    k_b, n_b, gain_b, drift_b = side_b
    # A sum feels the rounding of k, which `drift` makes up for in gradients, on the whole as nothing.
    share_a, share_b = shares(beta, rest, FAMILY)
    gain = (gain + 15.0 * drift_a) * share_a
    side_a = (k_a, n_a)
    side_b = (k_b, n_b, (gain_b + 15.0 * drift_b) * share_b / gain)
    value = tl.zeros([R], CT)
    mean_b = tl.zeros([R], CT)
    full = last - (last - first) % BLOCK
    for start in range(first, full, BLOCK):
        a = unpacked(load_tile(a_row, start, R, VEC, LAYOUT), a_row, CT, R, VEC)
        b = unpacked(load_tile(b_row, start, R, VEC, LAYOUT), b_row, CT, R, VEC)
        value, mean_b = _add_plain_tile(
            a, b, value, mean_b, side_a, side_b, c, lam, beta, rest, near, scale, a_scale, b_scale, True,
            SAME_SCALE, EXACT, FAMILY, LOG2, False,
        )  # fmt: skip
    if full < last:
        inside = full + offsets < last
        a = load_ragged(a_row, full, last, 0.0, CT, R, VEC, LAYOUT)
        b = load_ragged(b_row, full, last, 0.0, CT, R, VEC, LAYOUT)
        value, mean_b = _add_plain_tile(
            a, b, value, mean_b, side_a, side_b, c, lam, beta, rest, near, scale, a_scale, b_scale, inside,
            SAME_SCALE, EXACT, FAMILY, LOG2, True,
        )  # fmt: skip
    value = tl.sum(value) * gain
    mean_b = tl.sum(mean_b) * gain
    return value, value - mean_b, mean_b

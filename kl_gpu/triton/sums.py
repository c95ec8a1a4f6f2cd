"""The second sweep of families that need both normalisers first: row sums of the family's formula."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..kinds import STATS
from ..problem import Problem
from .formulas import formula
from .launch import ProgramShape, configuration, geometry, high_low
from .tiles import (
    LOG2E,
    load_row_statistics,
    log_probability_ratio,
    row_start,
    scaled_exp,
    tile_offsets,
    wide,
)

_STATS = tl.constexpr(STATS)


@triton.jit
def formula_tile(
    a, b, n_a, inv_a, n_b, inv_b, c, lam, beta, rest, k_a, k_b, scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, FAMILY: tl.constexpr,
):  # fmt: skip
    """Probabilities of both sides and the formula's three parts, of a tile of logits."""
    p_a = scaled_exp(a, k_a, n_a) * inv_a
    p_b = scaled_exp(b, k_b, n_b) * inv_b
    r = log_probability_ratio(a, b, c, lam, scale, a_scale, b_scale, SAME_SCALE, EXACT)
    r = tl.where(r == r, r, 0.0)
    terms, flow_a, flow_b = formula(p_a, p_b, r, beta, rest, FAMILY)
    return p_a, p_b, terms, flow_a, flow_b


@triton.jit
def _add_tile(
    a, b, value, mean_a, mean_b, n_a, inv_a, n_b, inv_b, c, lam, beta, rest,
    k_a, k_b, scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, FAMILY: tl.constexpr,
):  # fmt: skip
    _, _, terms, flow_a, flow_b = formula_tile(
        a, b, n_a, inv_a, n_b, inv_b, c, lam, beta, rest, k_a, k_b, scale, a_scale, b_scale,
        SAME_SCALE, EXACT, FAMILY,
    )  # fmt: skip
    return value + tl.sum(terms, axis=1), mean_a + tl.sum(flow_a, axis=1), mean_b + tl.sum(flow_b, axis=1)


@triton.jit(do_not_specialize=["n_inner"])
def _sums_kernel(
    a_ptr, b_ptr, rows_ptr, value_ptr, stats_ptr,
    n_inner, a_outer, a_inner, b_outer, b_inner, V,
    a_scale_high, a_scale_low, b_scale_high, b_scale_low, beta_high, beta_low,
    HAS_ROWS: tl.constexpr, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, FAMILY: tl.constexpr,
    CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if HAS_ROWS:
        if tl.load(rows_ptr + row) == 0:
            return
    stats = stats_ptr + row.to(tl.int64) * _STATS
    n_a, inv_a, n_b, inv_b, c, lam, kl = load_row_statistics(stats)
    a_row = row_start(a_ptr, row, n_inner, a_outer, a_inner)
    b_row = row_start(b_ptr, row, n_inner, b_outer, b_inner)
    a_scale = wide(a_scale_high, a_scale_low)
    b_scale = wide(b_scale_high, b_scale_low)
    k_a = (a_scale * LOG2E).to(CT)
    k_b = (b_scale * LOG2E).to(CT)
    scale = a_scale.to(CT)
    beta = wide(beta_high, beta_low)
    rest = (1.0 - beta).to(CT)
    beta = beta.to(CT)

    BLOCK: tl.constexpr = R * VEC
    offsets = tile_offsets(R, VEC)
    value = tl.zeros([R], CT)
    mean_a = tl.zeros([R], CT)
    mean_b = tl.zeros([R], CT)
    full = V - V % BLOCK
    for start in range(0, full, BLOCK):
        a = tl.load(a_row + start + offsets).to(CT)
        b = tl.load(b_row + start + offsets).to(CT)
        value, mean_a, mean_b = _add_tile(
            a, b, value, mean_a, mean_b, n_a, inv_a, n_b, inv_b, c, lam, beta, rest,
            k_a, k_b, scale, a_scale, b_scale, SAME_SCALE, EXACT, FAMILY,
        )  # fmt: skip
    if full < V:
        inside = full + offsets < V
        a = tl.load(a_row + full + offsets, mask=inside, other=-float("inf")).to(CT)
        b = tl.load(b_row + full + offsets, mask=inside, other=-float("inf")).to(CT)
        value, mean_a, mean_b = _add_tile(
            a, b, value, mean_a, mean_b, n_a, inv_a, n_b, inv_b, c, lam, beta, rest,
            k_a, k_b, scale, a_scale, b_scale, SAME_SCALE, EXACT, FAMILY,
        )  # fmt: skip
    total = tl.sum(value)
    total = tl.where(total < 0, 0.0, total)
    total = tl.where(kl == kl, total, kl)  # a row without a distribution
    tl.store(value_ptr + row, total)
    tl.store(stats + 6, total)
    tl.store(stats + 7, tl.sum(mean_a))
    tl.store(stats + 8, tl.sum(mean_b))


SUMS_SHAPES = {2: ProgramShape(8), 4: ProgramShape(8), 8: ProgramShape(4)}


def add_sums(p: Problem, value: Tensor, stats: Tensor) -> None:
    """Replace the KL in `value` and `stats` by the family's divergence, and add its other two row sums."""
    # Never EXACT: a common shift makes r small beside b − a in rows that the first sweep looked at twice.
    config = {**configuration(p, SUMS_SHAPES), "EXACT": False}
    _sums_kernel[(p.n_rows,)](
        p.a, p.b, p.rows, value, stats, *geometry(p), *high_low(p.beta),
        HAS_ROWS=p.rows is not None, FAMILY=p.family, **config,
    )  # fmt: skip

"""Gradients to the logits of both sides, from the row statistics that the value's sweeps left."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..kinds import STATS
from ..problem import Problem
from .launch import ProgramShape, configuration, geometry, high_low
from .sums import formula_tile
from .tiles import (
    LOG2E,
    load_row_statistics,
    log_probability_ratio,
    narrow,
    one_minus_exp,
    row_start,
    scaled_exp,
    tile_offsets,
    wide,
)

_STATS = tl.constexpr(STATS)


@triton.jit
def _kl_tile(
    a, b, n_a, inv_a, n_b, inv_b, c, lam, kl, up_a, up_b, k_a, k_b, scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, TO_A: tl.constexpr, TO_B: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile to the logits of a and of b.

    To b: b − a, written sign(r)·max(a, b)·(1 − e^−|r|) with r = log b − log a: relative precision also where
    the two are nearly equal, and nothing overflows. To a: −a (r + KL).
    """
    r = log_probability_ratio(a, b, c, lam, scale, a_scale, b_scale, SAME_SCALE, EXACT)
    to_a = r
    to_b = r
    if TO_B:
        rises = r > 0
        base = scaled_exp(tl.where(rises, b, a), tl.where(rises, k_b, k_a), tl.where(rises, n_b, n_a))
        factor = tl.where(rises, inv_b, -inv_a) * up_b
        # base = 0 also where both logits are −inf and r is NaN; times factor, so that a NaN row stays NaN.
        to_b = tl.where(base == 0, 0.0, base * one_minus_exp(tl.abs(r))) * factor
    if TO_A:
        weight = scaled_exp(a, k_a, n_a)
        to_a = tl.where(weight == 0, 0.0, weight * (r + kl)) * (-up_a * inv_a)
    return to_a, to_b


@triton.jit
def _gradient_tile(
    a, b, n_a, inv_a, n_b, inv_b, c, lam, mean_a, mean_b, up_a, up_b, beta, rest,
    k_a, k_b, scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, FAMILY: tl.constexpr,
    TO_A: tl.constexpr, TO_B: tl.constexpr,
):  # fmt: skip
    if FAMILY == "kl":
        return _kl_tile(
            a, b, n_a, inv_a, n_b, inv_b, c, lam, mean_a, up_a, up_b, k_a, k_b, scale, a_scale, b_scale,
            SAME_SCALE, EXACT, TO_A, TO_B,
        )  # fmt: skip
    else:
        p_a, p_b, _, flow_a, flow_b = formula_tile(
            a, b, n_a, inv_a, n_b, inv_b, c, lam, beta, rest, k_a, k_b, scale, a_scale, b_scale,
            SAME_SCALE, EXACT, FAMILY,
        )  # fmt: skip
        return (flow_a - p_a * mean_a) * up_a, (flow_b - p_b * mean_b) * up_b


@triton.jit(do_not_specialize=["n_inner"])
def _gradient_kernel(
    a_ptr, b_ptr, rows_ptr, stats_ptr, row_scale_ptr, grad_a_ptr, grad_b_ptr,
    n_inner, a_outer, a_inner, b_outer, b_inner, ga_outer, ga_inner, gb_outer, gb_inner, V,
    a_scale_high, a_scale_low, b_scale_high, b_scale_low, beta_high, beta_low,
    HAS_ROWS: tl.constexpr, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, FAMILY: tl.constexpr,
    TO_A: tl.constexpr, TO_B: tl.constexpr, CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start = tl.program_id(1) * (R * VEC)
    offsets = start + tile_offsets(R, VEC)
    inside = offsets < V
    grad_a = row_start(grad_a_ptr, row, n_inner, ga_outer, ga_inner) + offsets
    grad_b = row_start(grad_b_ptr, row, n_inner, gb_outer, gb_inner) + offsets
    if HAS_ROWS:
        if tl.load(rows_ptr + row) == 0:
            if TO_A:
                tl.store(grad_a, 0.0, mask=inside)
            if TO_B:
                tl.store(grad_b, 0.0, mask=inside)
            return
    a_row = row_start(a_ptr, row, n_inner, a_outer, a_inner) + offsets
    b_row = row_start(b_ptr, row, n_inner, b_outer, b_inner) + offsets
    stats = stats_ptr + row.to(tl.int64) * _STATS
    n_a, inv_a, n_b, inv_b, c, lam, value = load_row_statistics(stats)
    # What a·∂D/∂a and b·∂D/∂b sum to over the row: for KL(a‖b), −a·r gives the KL and b − a gives 0.
    mean_a = value
    mean_b = tl.zeros_like(value)
    if FAMILY != "kl":
        mean_a = tl.load(stats + 7)
        mean_b = tl.load(stats + 8)
    upstream = tl.load(row_scale_ptr + row)
    a_scale = wide(a_scale_high, a_scale_low)
    b_scale = wide(b_scale_high, b_scale_low)
    # A row without a divergence has no gradient, also where a probability of 0 would hide it. An infinite
    # mean leaves its side no gradient either: NaN, never a silent 0.
    nan = tl.full([], float("nan"), CT)
    up_a = tl.where((value == value) & (tl.abs(mean_a) < float("inf")), upstream * a_scale.to(CT), nan)
    up_b = tl.where((value == value) & (tl.abs(mean_b) < float("inf")), upstream * b_scale.to(CT), nan)
    beta = wide(beta_high, beta_low)
    rest = (1.0 - beta).to(CT)
    beta = beta.to(CT)
    k_a = (a_scale * LOG2E).to(CT)
    k_b = (b_scale * LOG2E).to(CT)
    scale = a_scale.to(CT)
    if start + R * VEC <= V:
        a = tl.load(a_row).to(CT)
        b = tl.load(b_row).to(CT)
        to_a, to_b = _gradient_tile(
            a, b, n_a, inv_a, n_b, inv_b, c, lam, mean_a, mean_b, up_a, up_b, beta, rest,
            k_a, k_b, scale, a_scale, b_scale, SAME_SCALE, EXACT, FAMILY, TO_A, TO_B,
        )  # fmt: skip
        if TO_A:
            tl.store(grad_a, narrow(to_a, grad_a_ptr.dtype.element_ty))
        if TO_B:
            tl.store(grad_b, narrow(to_b, grad_b_ptr.dtype.element_ty))
    else:
        a = tl.load(a_row, mask=inside, other=0.0).to(CT)
        b = tl.load(b_row, mask=inside, other=0.0).to(CT)
        to_a, to_b = _gradient_tile(
            a, b, n_a, inv_a, n_b, inv_b, c, lam, mean_a, mean_b, up_a, up_b, beta, rest,
            k_a, k_b, scale, a_scale, b_scale, SAME_SCALE, EXACT, FAMILY, TO_A, TO_B,
        )  # fmt: skip
        if TO_A:
            tl.store(grad_a, narrow(to_a, grad_a_ptr.dtype.element_ty), mask=inside)
        if TO_B:
            tl.store(grad_b, narrow(to_b, grad_b_ptr.dtype.element_ty), mask=inside)


# The kernel has no loop; in 16 bits 16 columns a thread halve what its prologue costs each.
GRADIENT_SHAPES = {2: ProgramShape(16), 4: ProgramShape(8), 8: ProgramShape(4)}


def gradient(
    p: Problem, stats: Tensor, row_scale: Tensor, grad_a: Tensor | None, grad_b: Tensor | None
) -> None:
    """Write row_scale · ∂divergence/∂logits into the given `[A, B, V]` buffers; either may be None."""
    config = configuration(p, GRADIENT_SHAPES)
    grid = (p.n_rows, triton.cdiv(p.a.shape[2], config["R"] * config["VEC"]))
    # A side without a gradient passes its logits: a pointer that is never stored through.
    out_a, out_b = p.a if grad_a is None else grad_a, p.b if grad_b is None else grad_b
    n_inner, a_outer, a_inner, b_outer, b_inner, columns, *scales = geometry(p)
    _gradient_kernel[grid](
        p.a, p.b, p.rows, stats, row_scale, out_a, out_b, n_inner, a_outer, a_inner, b_outer, b_inner,
        out_a.stride(0), out_a.stride(1), out_b.stride(0), out_b.stride(1), columns, *scales,
        *high_low(p.beta), HAS_ROWS=p.rows is not None, FAMILY=p.family,
        TO_A=grad_a is not None, TO_B=grad_b is not None, **config,
    )  # fmt: skip

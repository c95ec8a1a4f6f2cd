"""Gradients to the logits of both sides, from the statistics that a row's earlier sweeps left."""

from __future__ import annotations

import triton
import triton.language as tl

from .sums import formula_tile
from .tiles import log_probability_ratio, narrow, one_minus_exp, scaled_exp, tile_offsets


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
        k = k_a if SAME_SCALE else tl.where(rises, k_b, k_a)
        base = scaled_exp(tl.where(rises, b, a), k, tl.where(rises, n_b, n_a))
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


@triton.jit
def write_gradient(
    a_row, b_row, grad_a, grad_b, first, last,
    n_a, inv_a, n_b, inv_b, c, lam, mean_a, mean_b, up_a, up_b, beta, rest,
    k_a, k_b, scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, FAMILY: tl.constexpr, CT: tl.constexpr,
    TO_A: tl.constexpr, TO_B: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Columns [first, last) of the gradients asked for."""
    BLOCK: tl.constexpr = R * VEC
    offsets = tile_offsets(R, VEC, WIDE)
    full = last - (last - first) % BLOCK
    for start in range(first, full, BLOCK):
        a = tl.load(a_row + start + offsets).to(CT)
        b = tl.load(b_row + start + offsets).to(CT)
        to_a, to_b = _gradient_tile(
            a, b, n_a, inv_a, n_b, inv_b, c, lam, mean_a, mean_b, up_a, up_b, beta, rest,
            k_a, k_b, scale, a_scale, b_scale, SAME_SCALE, EXACT, FAMILY, TO_A, TO_B,
        )  # fmt: skip
        if TO_A:
            tl.store(grad_a + start + offsets, narrow(to_a, grad_a.dtype.element_ty))
        if TO_B:
            tl.store(grad_b + start + offsets, narrow(to_b, grad_b.dtype.element_ty))
    if full < last:
        inside = full + offsets < last
        a = tl.load(a_row + full + offsets, mask=inside, other=0.0).to(CT)
        b = tl.load(b_row + full + offsets, mask=inside, other=0.0).to(CT)
        to_a, to_b = _gradient_tile(
            a, b, n_a, inv_a, n_b, inv_b, c, lam, mean_a, mean_b, up_a, up_b, beta, rest,
            k_a, k_b, scale, a_scale, b_scale, SAME_SCALE, EXACT, FAMILY, TO_A, TO_B,
        )  # fmt: skip
        if TO_A:
            tl.store(grad_a + full + offsets, narrow(to_a, grad_a.dtype.element_ty), mask=inside)
        if TO_B:
            tl.store(grad_b + full + offsets, narrow(to_b, grad_b.dtype.element_ty), mask=inside)


@triton.jit
def write_zeros(grad, first, last, R: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr):
    """Columns [first, last) of a row that does not count."""
    offsets = tile_offsets(R, VEC, WIDE)
    for start in range(first, last, R * VEC):
        tl.store(grad + start + offsets, 0.0, mask=start + offsets < last)

"""Rows of which only a shard is here: statistics from the whole rows' normalisers, and the formula pass."""

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from ...formulas import SUMMED
from ..interface import RowPair, Scale
from .device_math import Row, from_high_low, normalised, row_start, scales_of, stored_side
from .formula_pass import formula_sums as sums_of_columns
from .formulas import raised
from .launch import configuration, geometry, high_low, kernel, splits_of, step_of
from .pair import _STATS, FORMULA_SHAPES
from .prepared import PreparedLaunch, place, place_if_any, plan

_LN2 = math.log(2)
# A shard's own n this many powers of 2 below the whole row's normaliser would make 1/Z underflow.
_LOWEST = 60.0


@kernel
def formula_sums_kernel(
    a_ptr, b_ptr,  # [A, B, V] fp16, bf16, fp32 or fp64, each
    valid_ptr,  # [A*B] bool, or None
    scales_ptr,  # [A*B, 1] or [A*B, 2] fp64, or None
    stats_ptr,  # [A*B, STATS] CT, of the whole rows
    out_ptr,  # [num_splits, 3, A*B] fp64, zeroed
    n_rows, n_inner, a_outer, a_inner, b_outer, b_inner, V,
    a_scale_high, a_scale_low, b_scale_high, b_scale_low,
    a_log2_high, b_log2_high, a_over_low, b_over_low, a_under_low,
    beta_high, beta_low, num_splits, split_columns,
    HAS_VALID: tl.constexpr, HAS_SCALES: tl.constexpr, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr,
    FORMULA: tl.constexpr, CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """The formula's three sums over one split of one row."""
    row = tl.program_id(0) // num_splits
    split = tl.program_id(0) % num_splits
    out = out_ptr + split.to(tl.int64) * 3 * n_rows + row
    valid = True
    if HAS_VALID:
        valid = tl.load(valid_ptr + row) != 0
    if valid:
        first = split * split_columns
        stats = stats_ptr + row.to(tl.int64) * _STATS
        stored_a = stored_side(tl.load(stats), tl.load(stats + 1))
        stored_b = stored_side(tl.load(stats + 2), tl.load(stats + 3))
        scale_parts = (
            a_scale_high, a_scale_low, b_scale_high, b_scale_low,
            a_log2_high, b_log2_high, a_over_low, b_over_low, a_under_low,
        )  # fmt: skip
        scales = scales_of(row, scales_ptr, scale_parts, HAS_SCALES, SAME_SCALE, CT)
        beta = from_high_low(beta_high, beta_low)
        TOP: tl.constexpr = 15 if FORMULA != "overlap" and FORMULA != "comparison" else 31
        a = normalised(*stored_a, scales.k_a, scales.over_k_a, TOP)
        b = normalised(*stored_b, scales.k_b, scales.over_k_b, TOP)
        whole, unit = raised(
            Row(a, b, tl.load(stats + 4), tl.load(stats + 5), beta.to(CT), (1.0 - beta).to(CT), scales),
            FORMULA,
        )
        value, mean_a, mean_b = sums_of_columns(
            row_start(row, n_inner, a_ptr, a_outer, a_inner),
            row_start(row, n_inner, b_ptr, b_outer, b_inner), first, tl.minimum(first + split_columns, V),
            whole, SAME_SCALE, FORMULA, CT, R, VEC, LAYOUT,
        )  # fmt: skip
        tl.store(out, value.to(tl.float64) * unit)
        tl.store(out + n_rows, mean_a.to(tl.float64) * unit)
        tl.store(out + 2 * n_rows, mean_b.to(tl.float64) * unit)


@plan
def _plan(
    a: Tensor, b: Tensor, has_valid: bool, row_scales: Tensor | None, formula: str, beta: float,
    scales: tuple[float, float], dtype: torch.dtype,
) -> tuple[PreparedLaunch, tuple[int, int, int]]:  # fmt: skip
    """Of places: the launch, and the shape of what it writes."""
    p = RowPair(a, b, None, formula, beta, *scales, dtype, row_scales)
    config = configuration(p, FORMULA_SHAPES)
    splits = splits_of(a.shape[-1], step_of(p, config))
    numbers = p.n_rows, *geometry(p), *high_low(beta), *splits
    launch = PreparedLaunch(
        formula_sums_kernel, p.n_rows * splits.number, a.device, numbers,
        HAS_VALID=has_valid, FORMULA=SUMMED.get(formula, formula), **config,
    )  # fmt: skip
    return launch, (splits.number, 3, p.n_rows)


def formula_sums(p: RowPair, stats: Tensor) -> Tensor:
    """The formula's terms and its two flows, summed over the columns: float64 `[A*B, 3]`."""
    a, b, valid, formula, beta, a_scale, b_scale, dtype, scales = p
    launch, shape = _plan(
        place(a), place(b), valid is not None, place_if_any(scales), formula, beta, (a_scale, b_scale), dtype
    )
    out = torch.zeros(shape, dtype=torch.float64, device=a.device)
    launch(a, b, valid, scales, stats.contiguous(), out)
    return out.sum(0).T.contiguous()


def _over_rounded(x: Scale, dtype: torch.dtype) -> Scale:
    """x over what `dtype` holds of it."""
    if isinstance(x, Tensor):
        return x / x.to(dtype).double()
    return x / torch.tensor(x, dtype=dtype, device="cpu").item()


def _rounding_of_scale(scale: Scale, dtype: torch.dtype) -> Scale:
    """The factor that corrects a normaliser summed with log2(e)/T rounded to `dtype`.

    It changes one by 2e-5 at a normaliser of −2000, which a shard of masked columns may have.
    """
    return _over_rounded(scale * math.log2(math.e), dtype)


def _nats_per_unit(a_scale: Scale, b_scale: Scale, dtype: torch.dtype) -> Scale:
    """Nats in a unit of c and log_z_ratio, which the sweeps take with a common 1/T rounded to `dtype`.

    It changes them by 1.3e-5 between sides 300 apart.
    """
    if isinstance(a_scale, Tensor) or isinstance(b_scale, Tensor):
        return _over_rounded(a_scale, dtype) if a_scale is b_scale else 1.0
    return _over_rounded(a_scale, dtype) if a_scale == b_scale else 1.0


def _side(n: Tensor, inv: Tensor, scale: Scale) -> tuple[Tensor, Tensor, Tensor]:
    """As `stored_side`, with the shift in nats."""
    out_of_range = inv < 0
    return torch.where(out_of_range, n * scale, 0.0), torch.where(out_of_range, -7.0, n), inv.abs()


def normalisers(stats: Tensor, a_scale: Scale, b_scale: Scale) -> tuple[Tensor, Tensor]:
    """Of rows whose statistics these are, in float64 nats: log Σ e^a, and log Σ e^b less that."""
    n_a, inv_a, n_b, inv_b, c, log_z_ratio = stats[..., :6].double().unbind(-1)
    shift_a, n_a, inv_a = _side(n_a, inv_a, a_scale)
    shift_b, _, _ = _side(n_b, inv_b, b_scale)
    log_a = (n_a - inv_a.log2()) * (_LN2 * _rounding_of_scale(a_scale, stats.dtype))
    return log_a + shift_a, (c + log_z_ratio) * _nats_per_unit(a_scale, b_scale, stats.dtype) + (
        shift_b - shift_a
    )


def _exp2_offset(own: Tensor, inv: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """n and 1/Z of a side whose weights 2^(exponent − n) sum to 2^(lse − n) over the whole row.

    The shard's own n stays where it may: it is the one that suits the exponents of its columns.
    """
    floor = lse.floor() - _LOWEST
    known = torch.isfinite(inv) & (inv > 0) & (own > floor)
    n = torch.where(known, own, floor)
    return n, torch.exp2(n - lse)


def statistics(
    local: Tensor, a_scale: Scale, b_scale: Scale, formula: str, log_a: Tensor, ratio: Tensor, sums: Tensor
) -> Tensor:
    """As `Backend.statistics`, in the order of `pair.py`."""
    sides, shifts = [], []
    for at, log_z, scale in ((0, log_a, a_scale), (2, log_a + ratio, b_scale)):
        stored, inv = local[..., at].double(), local[..., at + 1].double()
        shift, _, _ = _side(stored, inv, scale)
        lse = (log_z - shift) / (_LN2 * _rounding_of_scale(scale, local.dtype))
        n, whole = _exp2_offset(stored, inv, lse)
        # A side taken about its own largest logit here stays so; 0 would not be negative.
        out_of_range = inv < 0
        sides += [
            torch.where(out_of_range, stored, n),
            torch.where(out_of_range, -torch.exp2(-7.0 - lse).clamp(min=2.0**-126), whole),
        ]
        shifts.append(shift)
    shift = (ratio - (shifts[1] - shifts[0])) / _nats_per_unit(a_scale, b_scale, local.dtype)
    c = shift.to(local.dtype).double()
    *of_formula, own = sums.unbind(-1)
    nothing = torch.zeros_like(ratio)
    numbers = [*sides, c, shift - c, *of_formula, nothing, own, nothing]
    return torch.stack([x.to(local.dtype) for x in numbers], -1)

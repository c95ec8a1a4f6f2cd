"""Rows of which only a part is here: statistics from normalisers of the whole, the formula's sums."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import STATS, RowPair
from .device_math import LOG2E, normalised, row_start, stored_side, wide
from .formula_pass import formula_sums as sums_of_columns
from .launch import configuration, geometry, high_low, parts_of, step_of
from .pair import _STATS, FORMULA_SHAPES

_LN2 = math.log(2)
# Below the whole row's normaliser by this many powers of 2, a part's own level would make 1/Z underflow.
_LOWEST = 60.0


@triton.jit(do_not_specialize=["n_rows", "n_inner", "parts"])
def formula_sums_kernel(
    a_ptr, b_ptr, rows_ptr, stats_ptr, out_ptr,
    n_rows, n_inner, a_outer, a_inner, b_outer, b_inner, V,
    a_scale_high, a_scale_low, b_scale_high, b_scale_low, beta_high, beta_low, parts, part_columns,
    HAS_ROWS: tl.constexpr, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, FAMILY: tl.constexpr,
    CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """One part of one row: its three sums to `[part, 3, row]`."""
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    out = out_ptr + part.to(tl.int64) * 3 * n_rows + row
    counts = True
    if HAS_ROWS:
        counts = tl.load(rows_ptr + row) != 0
    if counts:
        first = part * part_columns
        stats = stats_ptr + row.to(tl.int64) * _STATS
        shift_a, n_a, inv_a = stored_side(tl.load(stats), tl.load(stats + 1))
        shift_b, n_b, inv_b = stored_side(tl.load(stats + 2), tl.load(stats + 3))
        a_scale = wide(a_scale_high, a_scale_low)
        b_scale = wide(b_scale_high, b_scale_low)
        beta = wide(beta_high, beta_low)
        value, mean_a, mean_b = sums_of_columns(
            row_start(a_ptr, row, n_inner, a_outer, a_inner),
            row_start(b_ptr, row, n_inner, b_outer, b_inner), first, tl.minimum(first + part_columns, V),
            shift_a, normalised(n_a, inv_a, (a_scale * LOG2E).to(CT), a_scale, 15, CT),
            shift_b, normalised(n_b, inv_b, (b_scale * LOG2E).to(CT), b_scale, 15, CT),
            tl.load(stats + 4), tl.load(stats + 5), beta.to(CT), (1.0 - beta).to(CT),
            a_scale.to(CT), a_scale, b_scale, SAME_SCALE, FAMILY, CT, R, VEC, LAYOUT,
        )  # fmt: skip
        tl.store(out, value.to(tl.float64))
        tl.store(out + n_rows, mean_a.to(tl.float64))
        tl.store(out + 2 * n_rows, mean_b.to(tl.float64))


def formula_sums(p: RowPair, stats: Tensor) -> Tensor:
    """The formula's terms and its two flows, summed over the columns: float64 `[A*B, 3]`."""
    config = configuration(p, FORMULA_SHAPES)
    parts = parts_of(p.a.shape[2], step_of(p, config))
    out = torch.zeros((parts.number, 3, p.n_rows), dtype=torch.float64, device=p.a.device)
    formula_sums_kernel[(p.n_rows * parts.number,)](
        p.a, p.b, p.valid, stats.contiguous(), out, p.n_rows, *geometry(p), *high_low(p.beta),
        parts.number, parts.columns, HAS_ROWS=p.valid is not None, FAMILY=p.formula, **config,
    )  # fmt: skip
    return out.sum(0).T.contiguous()


def _over_rounded(x: float, dtype: torch.dtype) -> float:
    """x over what `dtype` holds of it."""
    return x / torch.tensor(x, dtype=dtype, device="cpu").item()


def _stretch(scale: float, dtype: torch.dtype) -> float:
    """What a normaliser summed with log2(e)/T rounded to `dtype` is to be multiplied by.

    2e-5 at a normaliser of −2000, which a shard of masked columns may have.
    """
    return _over_rounded(scale * math.log2(math.e), dtype)


def _unit(a_scale: float, b_scale: float, dtype: torch.dtype) -> float:
    """Nats in a unit of c and lam, which the sweeps take with a common 1/T rounded to `dtype`.

    1.3e-5 between sides 300 apart.
    """
    return _over_rounded(a_scale, dtype) if a_scale == b_scale else 1.0


def _side(n: Tensor, inv: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `stored_side`, and the shift in nats."""
    vast = inv < 0
    return torch.where(vast, n * scale, 0.0), torch.where(vast, -7.0, n), inv.abs()


def normalisers(stats: Tensor, a_scale: float, b_scale: float) -> tuple[Tensor, Tensor]:
    """Of rows whose statistics these are, in float64 nats: log Σ e^a, and log Σ e^b less that."""
    n_a, inv_a, n_b, inv_b, c, lam = stats[..., :6].double().unbind(-1)
    shift_a, n_a, inv_a = _side(n_a, inv_a, a_scale)
    shift_b, _, _ = _side(n_b, inv_b, b_scale)
    log_a = (n_a - inv_a.log2()) * (_LN2 * _stretch(a_scale, stats.dtype))
    return log_a + shift_a, (c + lam) * _unit(a_scale, b_scale, stats.dtype) + (shift_b - shift_a)


def _level(own: Tensor, inv: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """n and 1/Z of a side whose weights 2^(exponent − n) sum to 2^(lse − n) over the whole row.

    The part's own n stays where it may: it is the one that suits the exponents of its columns.
    """
    floor = lse.floor() - _LOWEST
    known = torch.isfinite(inv) & (inv > 0) & (own > floor)
    n = torch.where(known, own, floor)
    return n, torch.exp2(n - lse)


def statistics(
    local: Tensor, a_scale: float, b_scale: float, formula: str, log_a: Tensor, ratio: Tensor, sums: Tensor
) -> Tensor:
    """As `Backend.statistics`, in the order of `pair.py`."""
    sides, shifts = [], []
    for at, log_z, scale in ((0, log_a, a_scale), (2, log_a + ratio, b_scale)):
        stored, inv = local[..., at].double(), local[..., at + 1].double()
        shift, _, _ = _side(stored, inv, scale)
        lse = (log_z - shift) / (_LN2 * _stretch(scale, local.dtype))
        n, whole = _level(stored, inv, lse)
        # A side taken about its own largest logit here stays so; 0 would not be negative.
        vast = inv < 0
        sides += [
            torch.where(vast, stored, n),
            torch.where(vast, -torch.exp2(-7.0 - lse).clamp(min=2.0**-126), whole),
        ]
        shifts.append(shift)
    shift = (ratio - (shifts[1] - shifts[0])) / _unit(a_scale, b_scale, local.dtype)
    c = shift.to(local.dtype).double()
    numbers = [*sides, c, shift - c]
    numbers += sums.unbind(-1)
    numbers += [torch.zeros_like(ratio)] * (STATS - len(numbers))
    return torch.stack([x.to(local.dtype) for x in numbers], -1)

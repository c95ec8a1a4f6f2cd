"""KL(a‖b) from logits: value in one pass over memory, and the statistics that later sweeps start from."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kinds import STATS
from ..problem import Problem
from .launch import ProgramShape, configuration, geometry
from .tiles import (
    LOG2E,
    NO_REFERENCE,
    difference,
    fma,
    g,
    g_near,
    is_near,
    log1p_minus,
    log_ratio,
    rebase,
    row_start,
    tile_offsets,
    wide,
)

# Row statistics: n_a, 1/Z_a, n_b, 1/Z_b (so that a_i = 2^(k_a·logit − n_a)/Z_a), then c and lam with
# log(b_i/a_i) = x_i − lam, and the value. The sums of other families follow (sums.py).
_STATS = tl.constexpr(STATS)


@triton.jit
def _tile_reference(a, b, n, k, valid, a_scale, b_scale, SAME_SCALE: tl.constexpr):
    """The mean of the difference over one tile, weights 2^(k·a − n): the c that fits this tile."""
    d = difference(a, b, a_scale, b_scale, SAME_SCALE)
    valid = valid & (tl.abs(d) < 1e30)
    w = tl.where(valid, tl.exp2(fma(a, k, -n)), 0.0)
    # Sum about the largest difference, not about 0, so that a common shift of 1000 costs no digits.
    top = tl.max(tl.where(valid, d, -1e30))
    total = tl.sum(w)
    mean = top + tl.sum(tl.where(valid, w * (d - top), 0.0)) / total
    return tl.where(total > 0, mean, 0.0)


@triton.jit
def _other_level(n, c, k_a, k_b, a_scale, b_scale, c_scale):
    """l with 2^(k_b·b − l) = w·eˣ, in float64: side b's exponent as side a's weights see it.

    Corrected for the rounding of k_a and k_b to float32, which would show at logits of a thousand.
    """
    n, c, k_a, k_b = n.to(tl.float64), c.to(tl.float64), k_a.to(tl.float64), k_b.to(tl.float64)
    level = n + c * c_scale * LOG2E - (k_a - a_scale * LOG2E) * (n / k_a)
    return level + (k_b - b_scale * LOG2E) * (level / k_b)


@triton.jit
def _accumulate(
    a, b, valid, n, c, n_b, to_a, z, a1, a2, k_a, k_b, scale, a_scale, b_scale, c_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add a `[R, VEC]` tile to the sums `[R]`, first moving the reference where the tile holds a new maximum.

    A reference fixed by the first tile would do for Gaussian logits. A trained teacher puts most of its mass
    on a token of some later tile, and sums about a distant c cancel: the row would have to be swept again.
    """
    n_tile = tl.floor(tl.max(a) * k_a)
    if n_tile > n:
        c_tile = _tile_reference(a, b, n_tile, k_a, valid, a_scale, b_scale, SAME_SCALE)
        h = (c_tile - c) * scale if SAME_SCALE else c_tile - c
        h = tl.where(n == NO_REFERENCE, 0.0, h)
        z, a1, a2 = rebase(z, a1, a2, h, tl.exp2(n - n_tile))
        n = n_tile
        c = c_tile
        # b is measured from its own maximum, where exponents are small, and brought to a's by one factor:
        # an exponent of 64 or more would be rounded by 2.6e-6.
        n_b = tl.floor(tl.max(b) * k_b)
        level = _other_level(n, c, k_a, k_b, a_scale, b_scale, c_scale)
        to_a = tl.exp2(n_b.to(tl.float64) - level).to(n.dtype)
    w = tl.exp2(fma(a, k_a, -n))
    v = tl.exp2(fma(b, k_b, -n_b))
    x = log_ratio(a, b, c, scale, a_scale, b_scale, SAME_SCALE, EXACT)
    if MASKED:
        w = tl.where(valid, w, 0.0)
        v = tl.where(valid, v, 0.0)
        x = tl.where(valid, x, 0.0)
    wx = w * x
    z += tl.sum(w, axis=1)
    a1 += tl.sum(wx, axis=1)
    a2 += tl.sum(tl.where(is_near(x), wx * g_near(x), (v * to_a - w) - wx), axis=1)
    return n, c, n_b, to_a, z, a1, a2


@triton.jit
def _finish(z, a1, a2):
    """Value and lam = log(Z_b/(Z_a e^c)) from a row's sums in float64, and whether they were good enough."""
    a1 = a1 / z
    a2 = a2 / z
    y = a1 + a2
    rest = log1p_minus(y)
    near = tl.abs(y) < 0.5
    # Not rest + y throughout: y reaches e^40, and log(1 + y) − y + y has lost its digits there.
    lam = tl.where(near, rest + y, tl.log(1.0 + y))
    # The same number twice; the second form does not subtract two large ones where y is large.
    value = tl.where(near, a2 + rest, lam - a1)
    size = tl.where(near, a2, tl.abs(a1) + tl.abs(lam))
    return value, lam, (size <= 4.0 * value) & (size < float("inf"))


@triton.jit
def _careful_row(
    a_row, b_row, V, k_a, k_b, scale, a_scale, b_scale, c_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """A row that the one-pass sums cannot do: −inf logits, disjoint supports, overflow. Three sweeps.

    Sides are normalised by their own maxima, and columns where x is large add b's mass instead of w·g(x).
    """
    INF: tl.constexpr = float("inf")
    offsets = tile_offsets(R, VEC)
    top_a = tl.full([R, VEC], -INF, CT)
    top_b = tl.full([R, VEC], -INF, CT)
    for start in range(0, V, R * VEC):
        inside = start + offsets < V
        top_a = tl.maximum(top_a, tl.load(a_row + start + offsets, mask=inside, other=-INF).to(CT))
        top_b = tl.maximum(top_b, tl.load(b_row + start + offsets, mask=inside, other=-INF).to(CT))
    m_a = tl.max(top_a)
    m_b = tl.max(top_b)
    n_a = tl.floor(m_a * k_a)
    n_b = tl.floor(m_b * k_b)

    # Any c near the mean serves; the difference of the maxima keeps a common shift out of the sum.
    c_start = difference(m_a, m_b, a_scale, b_scale, SAME_SCALE)
    z_a = tl.zeros([R, VEC], CT)
    z_b = tl.zeros([R, VEC], CT)
    shift = tl.zeros([R, VEC], CT)
    holes = tl.zeros([R, VEC], tl.int32)
    for start in range(0, V, R * VEC):
        inside = start + offsets < V
        a = tl.load(a_row + start + offsets, mask=inside, other=-INF).to(CT)
        b = tl.load(b_row + start + offsets, mask=inside, other=-INF).to(CT)
        w = tl.exp2(fma(a, k_a, -n_a))
        d = difference(a, b, a_scale, b_scale, SAME_SCALE)
        z_a += w
        z_b += tl.exp2(fma(b, k_b, -n_b))
        shift += tl.where((a == -INF) | (b == -INF), 0.0, w * (d - c_start))
        holes |= ((a > -INF) & (b == -INF)).to(tl.int32)
    z_a = tl.sum(z_a)
    z_b = tl.sum(z_b)
    c = c_start + tl.sum(shift) / z_a

    a1 = tl.zeros([R, VEC], CT)
    a2 = tl.zeros([R, VEC], CT)
    mass_b = tl.zeros([R, VEC], CT)
    for start in range(0, V, R * VEC):
        inside = start + offsets < V
        a = tl.load(a_row + start + offsets, mask=inside, other=-INF).to(CT)
        b = tl.load(b_row + start + offsets, mask=inside, other=-INF).to(CT)
        w = tl.exp2(fma(a, k_a, -n_a))
        x = log_ratio(a, b, c, scale, a_scale, b_scale, SAME_SCALE, EXACT)
        x = tl.where((a == -INF) | (b == -INF), 0.0, x)  # a NaN stays
        far = (x > 2.0) | (a == -INF)
        mass_b += tl.where(far, tl.exp2(fma(b, k_b, -n_b)), 0.0)
        a1 += w * x
        a2 += tl.where(far, -w - w * x, w * g(x))

    # Everything below is one number a row, in float64.
    z_a = z_a.to(tl.float64)
    z_b = z_b.to(tl.float64)
    a1 = tl.sum(a1).to(tl.float64) / z_a
    # b's sums are in units of e^gap of a's.
    gap = (n_b.to(tl.float64) - _other_level(n_a, c, k_a, k_b, a_scale, b_scale, c_scale)) / LOG2E
    a2 = (tl.sum(a2).to(tl.float64) + tl.exp(tl.minimum(gap, 60.0)) * tl.sum(mass_b).to(tl.float64)) / z_a
    y = a1 + a2
    rest = log1p_minus(y)
    hole = tl.max(tl.max(holes, axis=1)) > 0
    near = (tl.abs(y) < 0.5) & (gap < 60.0) & (not hole)
    lam = tl.where(near, rest + y, gap + tl.log(z_b / z_a))
    value = tl.where(near, a2 + rest, lam - a1)
    # NaN sums (a NaN, a +inf, a row of −inf) must stay NaN where there is a hole too.
    value = tl.where(hole, tl.where(value == value, INF, value), value)
    return n_a, z_a, n_b, z_b, c, lam, value


@triton.jit(do_not_specialize=["n_inner"])
def _value_kernel(
    a_ptr, b_ptr, rows_ptr, value_ptr, stats_ptr,
    n_inner, a_outer, a_inner, b_outer, b_inner, V,
    a_scale_high, a_scale_low, b_scale_high, b_scale_low,
    HAS_ROWS: tl.constexpr, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr,
    CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    out = stats_ptr + row.to(tl.int64) * _STATS
    if HAS_ROWS:
        if tl.load(rows_ptr + row) == 0:
            tl.store(value_ptr + row, 0.0)
            return
    a_row = row_start(a_ptr, row, n_inner, a_outer, a_inner)
    b_row = row_start(b_ptr, row, n_inner, b_outer, b_inner)
    a_scale = wide(a_scale_high, a_scale_low)
    b_scale = wide(b_scale_high, b_scale_low)
    c_scale = a_scale if SAME_SCALE else tl.full([], 1.0, tl.float64)
    k_a = (a_scale * LOG2E).to(CT)
    k_b = (b_scale * LOG2E).to(CT)
    scale = a_scale.to(CT)

    BLOCK: tl.constexpr = R * VEC
    offsets = tile_offsets(R, VEC)
    n = tl.full([], NO_REFERENCE, CT)
    c = tl.full([], 0.0, CT)
    n_b = tl.full([], 0.0, CT)
    to_a = tl.full([], 1.0, CT)
    z = tl.zeros([R], CT)
    a1 = tl.zeros([R], CT)
    a2 = tl.zeros([R], CT)
    everywhere = tl.full([R, VEC], 1, tl.int1)
    full = V - V % BLOCK
    for start in range(0, full, BLOCK):
        a = tl.load(a_row + start + offsets).to(CT)
        b = tl.load(b_row + start + offsets).to(CT)
        n, c, n_b, to_a, z, a1, a2 = _accumulate(
            a, b, everywhere, n, c, n_b, to_a, z, a1, a2, k_a, k_b, scale, a_scale, b_scale, c_scale,
            SAME_SCALE, EXACT, False,
        )  # fmt: skip
    if full < V:
        inside = full + offsets < V
        a = tl.load(a_row + full + offsets, mask=inside, other=-float("inf")).to(CT)
        b = tl.load(b_row + full + offsets, mask=inside, other=-float("inf")).to(CT)
        n, c, n_b, to_a, z, a1, a2 = _accumulate(
            a, b, inside, n, c, n_b, to_a, z, a1, a2, k_a, k_b, scale, a_scale, b_scale, c_scale,
            SAME_SCALE, EXACT, True,
        )  # fmt: skip

    z_a = tl.sum(z).to(tl.float64)
    value, lam, good = _finish(z_a, tl.sum(a1).to(tl.float64), tl.sum(a2).to(tl.float64))
    level = _other_level(n, c, k_a, k_b, a_scale, b_scale, c_scale)
    z_b = z_a * tl.exp(lam) * tl.exp2(level - n_b.to(tl.float64))
    if EXACT:
        # 0.75 − 1e-6 needs 26 bits: fl(b − a) is off by up to 2^-25·|c|, which shows in D where c is far
        # larger than the usual x.
        shift = c.to(tl.float64) * c_scale
        good = good & (value >= 4.5e-4 * shift * shift)
    if not good:
        n, z_a, n_b, z_b, c, lam, value = _careful_row(
            a_row, b_row, V, k_a, k_b, scale, a_scale, b_scale, c_scale, SAME_SCALE, False, CT, R, VEC
        )
    # max keeps NaN out only by the comparison's direction: NaN < 0 is false, so NaN stays.
    value = tl.where(value < 0, 0.0, value)
    tl.store(value_ptr + row, value.to(value_ptr.dtype.element_ty))
    tl.store(out, n)
    tl.store(out + 1, (1.0 / z_a).to(CT))
    tl.store(out + 2, n_b)
    tl.store(out + 3, (1.0 / z_b).to(CT))
    # The gradient measures from where log b = log a: a large lam of its own would round r there.
    shift = c.to(tl.float64) + lam / c_scale
    c = shift.to(CT)
    tl.store(out + 4, c)
    tl.store(out + 5, ((shift - c.to(tl.float64)) * c_scale).to(CT))
    tl.store(out + 6, value.to(CT))


# By the wider logit's bytes. At 16 columns the kernel spills on sm_80; at 8 four programs of four warps share
# an SM and cover one another's barriers. Left alone, ptxas holds its float32 form to 96 registers and spills
# two of them; told 112, it needs 97 to 104 and spills none.
VALUE_SHAPES = {2: ProgramShape(8, 112), 4: ProgramShape(8, 112), 8: ProgramShape(4)}


def kl_value(p: Problem) -> tuple[Tensor, Tensor]:
    """KL(a‖b) per row `[A*B]`, and row statistics `[A*B, STATS]`."""
    result = torch.empty(p.n_rows, dtype=p.dtype, device=p.a.device)
    stats = torch.zeros((p.n_rows, STATS), dtype=p.dtype, device=p.a.device)
    _value_kernel[(p.n_rows,)](
        p.a, p.b, p.rows, result, stats, *geometry(p), HAS_ROWS=p.rows is not None,
        **configuration(p, VALUE_SHAPES),
    )  # fmt: skip
    return result, stats

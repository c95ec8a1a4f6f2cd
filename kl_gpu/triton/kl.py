"""KL(a‖b) from logits: value in one pass over memory, gradients from the row statistics it leaves."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kinds import KINDS, STATS
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
    narrow,
    one_minus_exp,
    rebase,
    scaled_exp,
    wide,
)

# Row statistics: n_a, 1/Z_a, n_b, 1/Z_b (so that a_i = 2^(k_a·logit − n_a)/Z_a), then c and lam with
# log(b_i/a_i) = x_i − lam, and the value.
_STATS = tl.constexpr(STATS)


@triton.jit
def _row_start(base, row, n_inner, outer_stride, inner_stride):
    # 64 bits before the multiply: 2³¹ elements are 16 744 rows of 128 256.
    row = row.to(tl.int64)
    return base + (row // n_inner) * outer_stride + (row % n_inner) * inner_stride


@triton.jit
def _tile_offsets(R: tl.constexpr, VEC: tl.constexpr):
    # A thread owns VEC neighbouring columns (16 bytes), so sums over axis 1 stay inside the thread.
    return tl.arange(0, R)[:, None] * VEC + tl.arange(0, VEC)[None, :]


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
    offsets = _tile_offsets(R, VEC)
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
    a_row = _row_start(a_ptr, row, n_inner, a_outer, a_inner)
    b_row = _row_start(b_ptr, row, n_inner, b_outer, b_inner)
    a_scale = wide(a_scale_high, a_scale_low)
    b_scale = wide(b_scale_high, b_scale_low)
    c_scale = a_scale if SAME_SCALE else tl.full([], 1.0, tl.float64)
    k_a = (a_scale * LOG2E).to(CT)
    k_b = (b_scale * LOG2E).to(CT)
    scale = a_scale.to(CT)

    BLOCK: tl.constexpr = R * VEC
    offsets = _tile_offsets(R, VEC)
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
    if not good:
        n, z_a, n_b, z_b, c, lam, value = _careful_row(
            a_row, b_row, V, k_a, k_b, scale, a_scale, b_scale, c_scale, SAME_SCALE, EXACT, CT, R, VEC
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


@triton.jit
def _gradient_tile(
    a, b, n_a, n_b, f_a, f_b, c, lam, value, k_a, k_b, scale, a_scale, b_scale, f_weights,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, TO_A: tl.constexpr, TO_B: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile to the logits of a and of b.

    To b: b − a, written sign(r)·max(a, b)·(1 − e^−|r|) with r = log b − log a: relative precision also where
    the two are nearly equal, and nothing overflows. To a: −a (r + KL).
    """
    x = log_ratio(a, b, c, scale, a_scale, b_scale, SAME_SCALE, EXACT)
    # Where one logit is −inf the error term is NaN, the difference itself is not.
    r = tl.where(x == x, x, b - a) - lam
    to_a = r
    to_b = r
    if TO_B:
        rises = r > 0
        base = scaled_exp(tl.where(rises, b, a), tl.where(rises, k_b, k_a), tl.where(rises, n_b, n_a))
        factor = tl.where(rises, f_b, -f_a)
        # base = 0 also where both logits are −inf and r is NaN; times factor, so that a NaN row stays NaN.
        to_b = tl.where(base == 0, 0.0, base * one_minus_exp(tl.abs(r))) * factor
    if TO_A:
        weight = scaled_exp(a, k_a, n_a)
        to_a = tl.where(weight == 0, 0.0, weight * (r + value)) * f_weights
    return to_a, to_b


@triton.jit(do_not_specialize=["n_inner"])
def _gradient_kernel(
    a_ptr, b_ptr, rows_ptr, stats_ptr, row_scale_ptr, grad_a_ptr, grad_b_ptr,
    n_inner, a_outer, a_inner, b_outer, b_inner, ga_outer, ga_inner, gb_outer, gb_inner, V,
    a_scale_high, a_scale_low, b_scale_high, b_scale_low,
    HAS_ROWS: tl.constexpr, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr,
    TO_A: tl.constexpr, TO_B: tl.constexpr, CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start = tl.program_id(1) * (R * VEC)
    offsets = start + _tile_offsets(R, VEC)
    inside = offsets < V
    grad_a = _row_start(grad_a_ptr, row, n_inner, ga_outer, ga_inner) + offsets
    grad_b = _row_start(grad_b_ptr, row, n_inner, gb_outer, gb_inner) + offsets
    if HAS_ROWS:
        if tl.load(rows_ptr + row) == 0:
            if TO_A:
                tl.store(grad_a, 0.0, mask=inside)
            if TO_B:
                tl.store(grad_b, 0.0, mask=inside)
            return
    a_row = _row_start(a_ptr, row, n_inner, a_outer, a_inner) + offsets
    b_row = _row_start(b_ptr, row, n_inner, b_outer, b_inner) + offsets
    stats = stats_ptr + row.to(tl.int64) * _STATS
    n_a = tl.load(stats)
    n_b = tl.load(stats + 2)
    c = tl.load(stats + 4)
    lam = tl.load(stats + 5)
    value = tl.load(stats + 6)
    upstream = tl.load(row_scale_ptr + row)
    a_scale = wide(a_scale_high, a_scale_low)
    b_scale = wide(b_scale_high, b_scale_low)
    f_a = upstream * b_scale.to(CT) * tl.load(stats + 1)
    f_b = upstream * b_scale.to(CT) * tl.load(stats + 3)
    f_weights = -upstream * a_scale.to(CT) * tl.load(stats + 1)
    # A row without a divergence has no gradient either, also where a probability of 0 would hide it.
    f_a = tl.where(value == value, f_a, value)
    f_b = tl.where(value == value, f_b, value)
    # An infinite divergence has no gradient to its weights: NaN, never a silent 0.
    f_weights = tl.where(value < float("inf"), f_weights, float("nan"))
    k_a = (a_scale * LOG2E).to(CT)
    k_b = (b_scale * LOG2E).to(CT)
    scale = a_scale.to(CT)
    if start + R * VEC <= V:
        a = tl.load(a_row).to(CT)
        b = tl.load(b_row).to(CT)
        to_a, to_b = _gradient_tile(
            a, b, n_a, n_b, f_a, f_b, c, lam, value, k_a, k_b, scale, a_scale, b_scale, f_weights,
            SAME_SCALE, EXACT, TO_A, TO_B,
        )  # fmt: skip
        if TO_A:
            tl.store(grad_a, narrow(to_a, grad_a_ptr.dtype.element_ty))
        if TO_B:
            tl.store(grad_b, narrow(to_b, grad_b_ptr.dtype.element_ty))
    else:
        a = tl.load(a_row, mask=inside, other=0.0).to(CT)
        b = tl.load(b_row, mask=inside, other=0.0).to(CT)
        to_a, to_b = _gradient_tile(
            a, b, n_a, n_b, f_a, f_b, c, lam, value, k_a, k_b, scale, a_scale, b_scale, f_weights,
            SAME_SCALE, EXACT, TO_A, TO_B,
        )  # fmt: skip
        if TO_A:
            tl.store(grad_a, narrow(to_a, grad_a_ptr.dtype.element_ty), mask=inside)
        if TO_B:
            tl.store(grad_b, narrow(to_b, grad_b_ptr.dtype.element_ty), mask=inside)


_TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def _high_low(x: float) -> tuple[float, float]:
    """x as a sum of two float32: Triton passes Python floats as float32."""
    high = float(np.float32(x))
    return high, float(np.float32(x - high))


class ProgramShape(NamedTuple):
    """Columns a thread holds, and the registers ptxas may use for it (None: its own choice)."""

    columns: int
    registers: int | None = None


# By the wider logit's bytes. At 16 columns the value kernel spills on sm_80; at 8 four programs of four warps
# share an SM and cover one another's barriers. Left alone, ptxas holds its float32 form to 96 registers and
# spills two of them; told 112, it needs 97 to 104 and spills none. The gradient kernel has no loop, and 16
# columns halve what its prologue costs each.
VALUE_SHAPES = {2: ProgramShape(8, 112), 4: ProgramShape(8, 112), 8: ProgramShape(4)}
GRADIENT_SHAPES = {2: ProgramShape(16), 4: ProgramShape(8), 8: ProgramShape(4)}


def configuration(
    a: Tensor, b: Tensor, a_scale: float, b_scale: float, shapes: dict[int, ProgramShape]
) -> dict[str, Any]:
    """What the compiled kernels depend on: dtypes and the size of V, never N or any float."""
    itemsize = max(a.element_size(), b.element_size())
    shape = shapes[itemsize]
    vec = 16 // itemsize
    per_warp = 32 * shape.columns
    block = min(max(triton.next_power_of_2(a.shape[-1]), per_warp), 4 * per_warp)
    # Only NVIDIA's compiler knows the option.
    limit = shape.registers is not None and a.device.type != "xpu" and not torch.version.hip
    ct = torch.float64 if itemsize == 8 else torch.float32
    return {
        **({"maxnreg": shape.registers} if limit else {}),
        "SAME_SCALE": a_scale == b_scale,
        "EXACT": a.dtype == b.dtype == torch.bfloat16,
        "CT": _TRITON_DTYPE[ct],
        "R": block // vec,
        "VEC": vec,
        "num_warps": block // per_warp,
    }


def value(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    kind: str,
    student_scale: float,
    teacher_scale: float,
) -> tuple[Tensor, Tensor]:
    """Per-row divergence `[A*B]` and row statistics `[A*B, STATS]` of logits `[A, B, V]`."""
    order = KINDS[kind].order
    a, b = order(student, teacher)
    a_scale, b_scale = order(student_scale, teacher_scale)
    n_rows = a.shape[0] * a.shape[1]
    config = configuration(a, b, a_scale, b_scale, VALUE_SHAPES)
    dtype = torch.float64 if config["CT"] == tl.float64 else torch.float32
    result = torch.empty(n_rows, dtype=dtype, device=a.device)
    stats = torch.zeros((n_rows, STATS), dtype=dtype, device=a.device)
    _value_kernel[(n_rows,)](
        a, b, rows, result, stats, a.shape[1], a.stride(0), a.stride(1), b.stride(0), b.stride(1), a.shape[2],
        *_high_low(a_scale), *_high_low(b_scale), HAS_ROWS=rows is not None, **config,
    )  # fmt: skip
    return result, stats


def gradient(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    stats: Tensor,
    row_scale: Tensor,
    kind: str,
    student_scale: float,
    teacher_scale: float,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
) -> None:
    """Write row_scale · ∂divergence/∂logits into the given `[A, B, V]` buffers; either may be None."""
    order = KINDS[kind].order
    a, b = order(student, teacher)
    a_scale, b_scale = order(student_scale, teacher_scale)
    grad_a, grad_b = order(grad_student, grad_teacher)
    config = configuration(a, b, a_scale, b_scale, GRADIENT_SHAPES)
    grid = (a.shape[0] * a.shape[1], triton.cdiv(a.shape[2], config["R"] * config["VEC"]))
    # A side without a gradient passes its logits: a pointer that is never stored through.
    out_a, out_b = a if grad_a is None else grad_a, b if grad_b is None else grad_b
    _gradient_kernel[grid](
        a, b, rows, stats, row_scale, out_a, out_b, a.shape[1],
        a.stride(0), a.stride(1), b.stride(0), b.stride(1),
        out_a.stride(0), out_a.stride(1), out_b.stride(0), out_b.stride(1), a.shape[2],
        *_high_low(a_scale), *_high_low(b_scale),
        HAS_ROWS=rows is not None, TO_A=grad_a is not None, TO_B=grad_b is not None, **config,
    )  # fmt: skip

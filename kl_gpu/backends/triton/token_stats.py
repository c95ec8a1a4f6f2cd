"""Token statistics: both KLs, both entropies, the tokens' log-probabilities and equal top-1, in one sweep.

One kernel leaves the state of every split of every row, another merges a row's splits. A state is that of
kl_pass.py, (n, c, z, a1, a2) with w = exp(a − m) and x = (b − a) − c, and of the other direction, which
measures −x with the weights u = w·eˣ, zb = Σ u and b2 = Σ u g(−x), while Σ u (−x) = −(a1 + a2 + b2) follows.
The entropies take ea = Σ w e_a and eb = Σ u e_b, where e_a = k_a·a − n and e_b = k_b·b − n_b are exponents of
2. c is log(Z_b/Z_a), between the two directions' means of b − a: about either the other's sum would cancel.
"""

from __future__ import annotations

from collections import namedtuple
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import TOKEN_STATS, RowPair
from .device_math import (
    LOG2E,
    NO_REFERENCE,
    Scales,
    Sums,
    add_products,
    exp2_offset,
    exponent,
    g,
    g_near,
    is_near,
    load_ragged,
    load_tile,
    log_ratio,
    lowest,
    mul_add,
    mul_sub,
    no_lower,
    row_start,
    scales_of,
    store_state,
    sub_mul,
    tile_ahead,
    tile_offsets,
    uniform,
    unpacked,
    weights,
)
from .kl_pass import (
    BOTH_LACK,
    Reference,
    column_class,
    fallback_row,
    finish,
    is_held,
    other_exp2_offset,
    rounding_is_small,
    worst_class,
)
from .launch import ProgramShape, configuration, geometry, kernel, room_for, splits_of
from .prepared import PreparedLaunch, place, place_if_any, plan

# A split's state: n, c, n_b, the `BothSums`, then each side's largest logit and its first tile.
STATE = 16
_STATE = tl.constexpr(STATE)
_FIELDS = tl.constexpr(TOKEN_STATS)
_LN2 = tl.constexpr(0.6931471805599453)


# A state's sums, and what a2 and b2 have lost to rebasing: a2 is good to the rounding of a2 + lost_a.
BothSums = namedtuple("BothSums", "z a1 a2 zb b2 ea eb lost_a lost_b")
# Each thread's largest logit of both sides, and the first column of the first tile that holds it.
Largest = namedtuple("Largest", "top_a at_a top_b at_b")
# What a sweep carries; from the limits on, logits rebase the references.
State = namedtuple("State", "reference sums limit_a limit_b largest")


@triton.jit
def _gap(sums):
    """zb − z = a1 + a2: the left side is exact where it is large, the right side where it is small."""
    z, zb, gap = sums.z, sums.zb, sums.a1 + sums.a2
    return tl.where(2.0 * tl.abs(gap) < tl.minimum(z, zb), gap, zb - z)


@triton.jit
def _rebase_both(sums, ea, eb, h, s):
    """Bring the sums taken about c to c + h and to weights s·w; ea and eb are brought there already.

    a2 and b2 have two forms each. Terms of the first are small where h is, and cancel where most of b's mass
    lies far above c and c rises to it, or most of a's far below and c falls. The second takes the other
    side's mass, known by itself, and cancels where h is small. What cancelled in the better one took digits
    with it, which lost_a and lost_b count.
    """
    gap = _gap(sums)
    z, a1, a2, zb, b2, _, _, lost_a, lost_b = sums
    b1 = -(gap + b2)
    size_b1 = b2 + lost_b + tl.minimum(tl.abs(a1) + a2, z + zb)
    g_h = g(-h)
    e_h = tl.exp2(-h * LOG2E)
    fall = h - g_h  # 1 − e^−h
    # e^−h g(h), by the first form where the second would cancel.
    from_zb = tl.where(tl.abs(h) < 1.0, mul_sub(h, h, g_h * (1.0 + h)), sub_mul(1.0, 1.0 + h, e_h))
    size_near = mul_add(z, g_h, mul_add(e_h, a2 + lost_a, tl.abs(fall * a1)))
    size_far = mul_add(z, tl.abs(1.0 - h), mul_add(e_h, zb, tl.abs(a1)))
    near_a2 = mul_add(z, g_h, mul_sub(e_h, a2, fall * a1))
    new_a2 = tl.where(size_near <= size_far, near_a2, mul_sub(e_h, zb, mul_add(z, 1.0 - h, a1)))
    lost_a = tl.minimum(size_near, size_far) - new_a2
    size_near = mul_add(zb, from_zb, mul_add(tl.abs(fall), size_b1, b2 + lost_b))
    size_far = mul_add(e_h, mul_add(zb, tl.abs(1.0 + h), size_b1), z)
    near_b2 = mul_add(zb, from_zb, mul_add(fall, b1, b2))
    new_b2 = tl.where(size_near <= size_far, near_b2, sub_mul(z, e_h, mul_add(zb, 1.0 + h, b1)))
    lost_b = tl.minimum(size_near, size_far) - new_b2
    return BothSums(
        z * s, sub_mul(a1, h, z) * s, new_a2 * s, zb * e_h * s, new_b2 * s, ea, eb, lost_a * s, lost_b * s
    )


@triton.jit
def _limits(n, n_b, scales):
    """The logits of a and of b from which on the references are rebased.

    For b not before it lies well above: that changes nothing but the references, whose rows most often have
    had a's new maximum in the same tile.
    """
    return (n + 8.0) / scales.k_a, (n_b + 11.0) / scales.k_b


@triton.jit
def _rebase_to_tile(a, b, top_a, top_b, reference, sums, scales, SAME_SCALE: tl.constexpr):
    """The references that suit a tile with a new maximum of a or of b, and the sums rebased to them.

    c goes to where log(Z_b/Z_a) lies with the tile counted: about it nothing cancels in the end. About that
    of this tile alone, b's mass in others would be seen from afar.
    """
    n, c, n_b, b_to_a = reference
    to_n = tl.maximum(exp2_offset(tl.max(top_a), scales.k_a), n)
    to_n_b = tl.maximum(exp2_offset(tl.max(top_b), scales.k_b), n_b)
    s = tl.exp2(n - to_n)
    mass_a = tl.sum(weights(a, scales.k_a, to_n)).to(tl.float64) + (tl.sum(sums.z) * s).to(tl.float64)
    mass_b = tl.sum(weights(b, scales.k_b, to_n_b)).to(tl.float64)
    before = (tl.sum(sums.zb) / b_to_a).to(tl.float64)
    mass_b = mul_add(before, tl.exp2((n_b - to_n_b).to(tl.float64)), mass_b)
    to_c = tl.log(mass_b / mass_a) + (to_n_b - to_n).to(tl.float64) * _LN2
    to_c = tl.where(tl.abs(to_c) < 1e30, to_c, 0.0).to(c.dtype)
    h = tl.where(n == NO_REFERENCE, 0.0, to_c - c)
    ea = mul_add(n - to_n, sums.z, sums.ea) * s
    eb = mul_add(n_b - to_n_b, sums.zb, sums.eb) * (tl.exp2(-h * LOG2E) * s)
    sums = _rebase_both(sums, ea, eb, h, s)
    n_b_as_a = other_exp2_offset(to_n, to_n_b, to_c, scales, SAME_SCALE)
    b_to_a = tl.exp2(to_n_b.to(tl.float64) - n_b_as_a).to(n.dtype)
    return Reference(to_n, to_c, to_n_b, b_to_a), sums


@triton.jit
def _accumulate(
    a, b, inside, start, state, scales,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add a `[R, VEC]` tile to the sums `[R]`, rebasing them first where it has a new maximum."""
    reference, sums, limit_a, limit_b, largest = state
    top_a, at_a, top_b, at_b = largest
    here_a = tl.max(a, axis=1)
    at_a = tl.where(here_a > top_a, start, at_a)
    top_a = tl.maximum(here_a, top_a)
    here_b = tl.max(b, axis=1)
    at_b = tl.where(here_b > top_b, start, at_b)
    top_b = tl.maximum(here_b, top_b)
    # One bit for both sides: a maximum of integers is one instruction of a warp.
    if tl.max(((here_a >= limit_a) | (here_b >= limit_b)).to(tl.int32)) != 0:
        reference, sums = _rebase_to_tile(a, b, here_a, here_b, reference, sums, scales, SAME_SCALE)
        limit_a, limit_b = _limits(reference.n, reference.n_b, scales)
    e_a = exponent(a, scales.k_a, reference.n)
    e_b = exponent(b, scales.k_b, reference.n_b)
    x = log_ratio(a, b, reference.c, scales, SAME_SCALE, EXACT)
    w = tl.exp2(e_a)
    u = tl.exp2(e_b) * reference.b_to_a
    if MASKED:
        w = tl.where(inside, w, 0.0)
        u = tl.where(inside, u, 0.0)
        x = tl.where(inside, x, 0.0)
        e_a = tl.where(inside, e_a, 0.0)
        e_b = tl.where(inside, e_b, 0.0)
    wx = w * x
    near = is_near(x)
    g_x = g_near(x)
    z, a1, a2, zb, b2, ea, eb, lost_a, lost_b = sums
    z += tl.sum(w, axis=1)
    a1 += tl.sum(wx, axis=1)
    a2 += tl.sum(tl.where(near, wx * g_x, (u - w) - wx), axis=1)
    zb += tl.sum(u, axis=1)
    # u g(−x) = w (x² + (x − 1) g(x)): at x = −1.125 a quarter of the two terms is left, elsewhere more.
    b2 += tl.sum(tl.where(near, wx * mul_add(x - 1.0, g_x, x), mul_add(u, x, w - u)), axis=1)
    ea = add_products(ea, w, e_a)
    eb = add_products(eb, u, e_b)
    sums = BothSums(z, a1, a2, zb, b2, ea, eb, lost_a, lost_b)
    return State(reference, sums, limit_a, limit_b, Largest(top_a, at_a, top_b, at_b))


@triton.jit
def _no_columns(first, scales, R: tl.constexpr, CT: tl.constexpr):
    """The `State` before the first column."""
    n = tl.full([], NO_REFERENCE, CT)
    reference = Reference(n, tl.full([], 0.0, CT), n, tl.full([], 1.0, CT))
    zeros = tl.zeros([R], CT)
    sums = BothSums(zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros)
    top = tl.full([R], -float("inf"), CT)
    at = tl.full([R], 0, tl.int32) + first
    limit_b = tl.full([], float("inf"), CT)  # the first tile with a's mass brings both
    return State(reference, sums, (n + 8.0) / scales.k_a, limit_b, Largest(top, at, top, at))


@triton.jit
def _total(sums):
    return BothSums(
        tl.sum(sums.z), tl.sum(sums.a1), tl.sum(sums.a2), tl.sum(sums.zb), tl.sum(sums.b2), tl.sum(sums.ea),
        tl.sum(sums.eb), tl.sum(sums.lost_a), tl.sum(sums.lost_b),
    )  # fmt: skip


@triton.jit
def _fast_sweep(
    a_row, b_row, first, last, scales, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, CT: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """The references, sums and largest logits of columns [first, last), and whether they are right.

    They are not where a column is −inf, nor where EXACT takes differences for more exact than they are.
    """
    BLOCK: tl.constexpr = R * VEC
    offsets = tile_offsets(R, VEC, LAYOUT)
    everywhere = tl.full([R, VEC], 1, tl.int1)
    state = _no_columns(first, scales, R, CT)
    full = last // BLOCK * BLOCK  # splits begin with a tile
    if first < full:
        # A tile ahead: the barriers of a tile's maximum would otherwise wait for its loads as well. Runs are
        # held one by one: in words, ptxas spills on sm_100.
        next_a = load_tile(a_row, first, R, VEC, LAYOUT, False)
        next_b = load_tile(b_row, first, R, VEC, LAYOUT, False)
        for start in range(first, full, BLOCK):
            a = unpacked(next_a, a_row, CT, R, VEC)
            b = unpacked(next_b, b_row, CT, R, VEC)
            ahead = tile_ahead(start, full, BLOCK)
            next_a = load_tile(a_row, ahead, R, VEC, LAYOUT, False)
            next_b = load_tile(b_row, ahead, R, VEC, LAYOUT, False)
            state = _accumulate(a, b, everywhere, start, state, scales, SAME_SCALE, EXACT, False)
    if full < last:
        inside = full + offsets < last
        a = load_ragged(a_row, full, last, -float("inf"), CT, R, VEC, LAYOUT)
        b = load_ragged(b_row, full, last, -float("inf"), CT, R, VEC, LAYOUT)
        state = _accumulate(a, b, inside, full, state, scales, SAME_SCALE, EXACT, True)
    sums = _total(state.sums)
    gap = sums.a1 + sums.a2
    fits = (gap + sums.b2) * 0.0 == 0.0
    if EXACT:
        if SAME_SCALE:
            fits = fits & rounding_is_small(Sums(sums.z, sums.a1, sums.a2), state.reference.c)
            of_b = Sums(sums.zb, -(gap + sums.b2), sums.b2)
            fits = fits & rounding_is_small(of_b, state.reference.c)
    return state.reference, sums, state.largest, fits


@triton.jit
def _robust_sweep(
    a_row, b_row, first, last, scales, SAME_SCALE: tl.constexpr, CT: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """`_fast_sweep` of columns that may be −inf on both sides; where one side alone is, the sums are NaN."""
    BLOCK: tl.constexpr = R * VEC
    everywhere = tl.full([R, VEC], 1, tl.int1)
    state = _no_columns(first, scales, R, CT)
    worst = tl.zeros([R], tl.int32)
    lowest_a = lowest(scales.a, CT)
    lowest_b = lowest(scales.b, CT)
    for start in range(first, last, BLOCK):
        # What lies behind the last column comes as one that neither side has.
        a = load_ragged(a_row, start, last, -float("inf"), CT, R, VEC, LAYOUT)
        b = load_ragged(b_row, start, last, -float("inf"), CT, R, VEC, LAYOUT)
        worst = tl.maximum(worst, tl.max(column_class(a, b, lowest_a, lowest_b), axis=1))
        a = no_lower(a, lowest_a)
        b = no_lower(b, lowest_b)
        state = _accumulate(a, b, everywhere, start, state, scales, SAME_SCALE, False, False)
    reference, sums, _, _, largest = state
    worst = worst_class(tl.max(worst), reference.n, lowest_a, lowest_b, scales)
    z, a1, a2, zb, b2, ea, eb, lost_a, lost_b = _total(sums)
    z = tl.where(worst > BOTH_LACK, float("nan"), z)
    return reference, BothSums(z, a1, a2, zb, b2, ea, eb, lost_a, lost_b), largest


@triton.jit
def _first_tile(top, at, BLOCK: tl.constexpr):
    """A split's largest logit, and the number of the first tile that holds it."""
    most = tl.max(top)
    return most, tl.min(tl.where(top == most, at, 2147483647)) // BLOCK


@kernel
def token_stats_splits_kernel(
    a_ptr, b_ptr,  # [A, B, V] fp16, bf16, fp32 or fp64, each
    valid_ptr,  # [A*B] bool, or None
    scales_ptr,  # [A*B, 1] or [A*B, 2] fp64, or None
    states_ptr,  # [A*B, STATE, SPLITS] CT
    n_inner, a_outer, a_inner, b_outer, b_inner, V,
    a_scale_high, a_scale_low, b_scale_high, b_scale_low,
    a_log2_high, b_log2_high, a_over_low, b_over_low, a_under_low, num_splits, split_columns,
    HAS_VALID: tl.constexpr, HAS_SCALES: tl.constexpr, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr,
    CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The state of one split of one row."""
    BLOCK: tl.constexpr = R * VEC
    row = tl.program_id(0) // num_splits
    split = tl.program_id(0) % num_splits
    valid = True
    if HAS_VALID:
        valid = tl.load(valid_ptr + row) != 0
    if valid:
        first = split * split_columns
        last = tl.minimum(first + split_columns, V)
        a_row = row_start(row, n_inner, a_ptr, a_outer, a_inner)
        b_row = row_start(row, n_inner, b_ptr, b_outer, b_inner)
        scale_parts = (
            a_scale_high, a_scale_low, b_scale_high, b_scale_low,
            a_log2_high, b_log2_high, a_over_low, b_over_low, a_under_low,
        )  # fmt: skip
        scales = scales_of(row, scales_ptr, scale_parts, HAS_SCALES, SAME_SCALE, CT)
        reference, sums, largest, fits = _fast_sweep(
            a_row, b_row, first, last, scales, SAME_SCALE, EXACT, CT, R, VEC, LAYOUT
        )
        if uniform(~fits, R):
            reference, sums, largest = _robust_sweep(
                a_row, b_row, first, last, scales, SAME_SCALE, CT, R, VEC, LAYOUT
            )
        most_a, tile_a = _first_tile(largest.top_a, largest.at_a, BLOCK)
        most_b, tile_b = _first_tile(largest.top_b, largest.at_b, BLOCK)
        mine = states_ptr + row.to(tl.int64) * (_STATE * SPLITS) + split
        store_state(mine, (reference.n, reference.c, reference.n_b), SPLITS)
        for i in tl.static_range(len(sums)):
            tl.store(mine + (3 + i) * SPLITS, sums[i])
        store_state(mine + 12 * SPLITS, (most_a, tile_a.to(CT), most_b, tile_b.to(CT)), SPLITS)


@triton.jit
def _load_states(states, which: tl.constexpr, num_splits, SPLITS: tl.constexpr, other: tl.constexpr):
    split = tl.arange(0, SPLITS)
    return tl.load(states + which * SPLITS + split, mask=split < num_splits, other=other).to(tl.float64)


@triton.jit
def _merged(states, num_splits, SPLITS: tl.constexpr):
    """A row's (n, c, n_b, sums) in float64 from those of its splits."""
    n = _load_states(states, 0, num_splits, SPLITS, NO_REFERENCE)
    c = _load_states(states, 1, num_splits, SPLITS, 0.0)
    n_b = _load_states(states, 2, num_splits, SPLITS, 0.0)
    z = _load_states(states, 3, num_splits, SPLITS, 0.0)
    a1 = _load_states(states, 4, num_splits, SPLITS, 0.0)
    a2 = _load_states(states, 5, num_splits, SPLITS, 0.0)
    zb = _load_states(states, 6, num_splits, SPLITS, 0.0)
    b2 = _load_states(states, 7, num_splits, SPLITS, 0.0)
    ea = _load_states(states, 8, num_splits, SPLITS, 0.0)
    eb = _load_states(states, 9, num_splits, SPLITS, 0.0)
    lost_a = _load_states(states, 10, num_splits, SPLITS, 0.0)
    lost_b = _load_states(states, 11, num_splits, SPLITS, 0.0)
    # A split without mass has no reference to bring, but a NaN of it must reach the sums.
    has_mass = z > 0
    top = tl.max(n)
    top_n_b = tl.max(tl.where(has_mass, n_b, NO_REFERENCE))
    s = tl.exp2(n - top)
    c_top = tl.max(tl.where(has_mass, c, NO_REFERENCE))
    mass_b = tl.sum(tl.where(has_mass, zb * s * tl.exp(c - c_top), 0.0))
    shared = c_top + tl.log(mass_b / tl.sum(z * s))
    h = tl.where(has_mass, shared - c, 0.0)
    fall = tl.where(has_mass, n - top, 0.0)
    n_b = tl.where(has_mass, n_b, top_n_b)
    sums = BothSums(z, a1, a2, zb, b2, ea, eb, lost_a, lost_b)
    ea = mul_add(fall, z, ea) * s
    eb = mul_add(n_b - top_n_b, zb, eb) * (tl.exp(-h) * s)
    z, a1, a2, zb, b2, ea, eb, lost_a, lost_b = _rebase_both(sums, ea, eb, h, s)
    sums = _total(BothSums(z, a1, a2, zb, b2, ea, eb, lost_a, lost_b))
    return top, shared, top_n_b, sums


@triton.jit
def _weighted_exponents(
    row, shift, n, k, V, CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr
):
    """Σ 2^e e over a row's columns, e = k·(logit − shift) − n."""
    total = tl.zeros([R, VEC], CT)
    for start in range(0, V, R * VEC):
        logit = load_ragged(row, start, V, -float("inf"), CT, R, VEC, LAYOUT) - shift
        e = tl.maximum(exponent(logit, k, n), -10000.0)  # 0 · −inf has no place in the sum
        total = mul_add(tl.exp2(e), e, total)
    return tl.sum(total).to(tl.float64)


@triton.jit
def _first_column(row, tile, most, V, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr):
    columns = tile * (R * VEC) + tile_offsets(R, VEC, LAYOUT)
    logits = tl.load(row + columns, mask=columns < V, other=-float("inf")).to(tl.float64)
    return tl.min(tl.where((logits == most) & (columns < V), columns, 2147483647))


@triton.jit
def _first_split(states, which: tl.constexpr, num_splits, SPLITS: tl.constexpr):
    """A row's largest logit, and the number of the first tile that holds it."""
    most = _load_states(states, which, num_splits, SPLITS, -float("inf"))
    tile = _load_states(states, which + 1, num_splits, SPLITS, 0.0)
    top = tl.max(most)
    return top, tl.min(tl.where(most == top, tile, 2147483647.0)).to(tl.int32)


@kernel
def token_stats_merge_kernel(
    a_ptr, b_ptr,  # [A, B, V] fp16, bf16, fp32 or fp64, each
    valid_ptr,  # [A*B] bool, or None
    scales_ptr,  # [A*B, 1] or [A*B, 2] fp64, or None
    tokens_ptr,  # [A*B] int64, where HAS_TOKENS
    states_ptr,  # [A*B, STATE, SPLITS] CT
    out_ptr,  # [TOKEN_STATS, A*B] CT
    n_rows, n_inner, a_outer, a_inner, b_outer, b_inner, V,
    a_scale_high, a_scale_low, b_scale_high, b_scale_low,
    a_log2_high, b_log2_high, a_over_low, b_over_low, a_under_low, num_splits,
    HAS_VALID: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_TOKENS: tl.constexpr, SAME_SCALE: tl.constexpr,
    EXACT: tl.constexpr, CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """A row's statistics from the states of its splits; a row that they cannot do is swept again here."""
    row = tl.program_id(0)
    out = out_ptr + row
    n_rows = tl.full([], 0, tl.int64) + n_rows
    valid = True
    if HAS_VALID:
        valid = tl.load(valid_ptr + row) != 0
    if not valid:
        for field in range(_FIELDS):
            tl.store(out + field * n_rows, 0.0)
    else:
        a_row = row_start(row, n_inner, a_ptr, a_outer, a_inner)
        b_row = row_start(row, n_inner, b_ptr, b_outer, b_inner)
        states = states_ptr + row.to(tl.int64) * (_STATE * SPLITS)
        scale_parts = (
            a_scale_high, a_scale_low, b_scale_high, b_scale_low,
            a_log2_high, b_log2_high, a_over_low, b_over_low, a_under_low,
        )  # fmt: skip
        scales = scales_of(row, scales_ptr, scale_parts, HAS_SCALES, SAME_SCALE, CT)
        k_a = scales.k_a
        k_b = scales.k_b

        n, c, n_b, sums = _merged(states, num_splits, SPLITS)
        z, a1, a2, zb, b2, ea, eb, lost_a, lost_b = sums
        gap = _gap(sums)
        forward, _, good = finish(z, a1, gap - a1)
        reverse, _, good_b = finish(zb, -(gap + b2), b2)
        # Exponents of 2: a sums to 2^log_a, b to 2^log_b.
        n_b_as_a = other_exp2_offset(n, n_b, c, scales, SAME_SCALE)
        log_a = tl.log2(z)
        log_b = tl.log2(zb) + (n_b_as_a - n_b)
        entropy_a = log_a - ea / z
        entropy_b = log_b - eb / zb
        good = good & (a2 + lost_a <= 4.0 * z * forward) & (b2 + lost_b <= 4.0 * zb * reverse)
        good = good & is_held(n.to(CT)) & is_held(n_b.to(CT))
        good = good & good_b & (entropy_a + entropy_b < float("inf"))
        if not good:
            swapped = Scales(
                k_b,
                k_a,
                scales.shared,
                scales.b,
                scales.a,
                scales.over_k_b,
                scales.over_k_a,
                scales.under_shared,
            )
            f = fallback_row(a_row, b_row, V, scales, SAME_SCALE, False, CT, R, VEC, LAYOUT)
            r = fallback_row(b_row, a_row, V, swapped, SAME_SCALE, False, CT, R, VEC, LAYOUT)
            forward = f.value
            reverse = r.value
            n = f.shift_a.to(tl.float64) * k_a.to(tl.float64) + f.n_a.to(tl.float64)
            n_b = r.shift_a.to(tl.float64) * k_b.to(tl.float64) + r.n_a.to(tl.float64)
            log_a = tl.log2(f.z_a)
            log_b = tl.log2(r.z_a)
            exponents_a = _weighted_exponents(a_row, f.shift_a, f.n_a, k_a, V, CT, R, VEC, LAYOUT)
            exponents_b = _weighted_exponents(b_row, r.shift_a, r.n_a, k_b, V, CT, R, VEC, LAYOUT)
            entropy_a = log_a - exponents_a / f.z_a
            entropy_b = log_b - exponents_b / r.z_a
        # max keeps NaN out only by the comparison's direction: NaN < 0 is false, so NaN stays.
        forward = tl.where(forward < 0, 0.0, forward)
        reverse = tl.where(reverse < 0, 0.0, reverse)
        if V == 1:
            forward = forward * 0.0
            reverse = reverse * 0.0
            entropy_a = entropy_a * 0.0
            entropy_b = entropy_b * 0.0
        tl.store(out, forward.to(CT))
        tl.store(out + n_rows, reverse.to(CT))
        tl.store(out + 2 * n_rows, (tl.where(entropy_b < 0, 0.0, entropy_b) * _LN2).to(CT))
        tl.store(out + 3 * n_rows, (tl.where(entropy_a < 0, 0.0, entropy_a) * _LN2).to(CT))

        of_a = tl.full([], float("nan"), tl.float64)
        of_b = tl.full([], float("nan"), tl.float64)
        if HAS_TOKENS:
            token = tl.load(tokens_ptr + row)
            if (token >= 0) & (token < V):
                of_a = (tl.load(a_row + token).to(tl.float64) * k_a.to(tl.float64) - n) - log_a
                of_b = (tl.load(b_row + token).to(tl.float64) * k_b.to(tl.float64) - n_b) - log_b
        if V == 1:
            of_a = of_a * 0.0
            of_b = of_b * 0.0
        tl.store(out + 4 * n_rows, (tl.where(of_b > 0, 0.0, of_b) * _LN2).to(CT))
        tl.store(out + 5 * n_rows, (tl.where(of_a > 0, 0.0, of_a) * _LN2).to(CT))

        most_a, tile_a = _first_split(states, 12, num_splits, SPLITS)
        most_b, tile_b = _first_split(states, 14, num_splits, SPLITS)
        agree = tl.full([], 0.0, tl.float64)
        if tile_a == tile_b:
            column_a = _first_column(a_row, tile_a, most_a, V, R, VEC, LAYOUT)
            column_b = _first_column(b_row, tile_b, most_b, V, R, VEC, LAYOUT)
            agree = (column_a == column_b).to(tl.float64)
        # NaN where a side has no distribution.
        agree += (entropy_a + entropy_b) * 0.0
        tl.store(out + 6 * n_rows, agree.to(CT))


# By the wider logit's bytes, as in pair.py; float32 spills a register at 128 on sm_90.
SHAPES = {2: ProgramShape(8, 128, of_runs=144), 4: ProgramShape(8, 136), 8: ProgramShape(4)}


class _Plan(NamedTuple):
    sweep: PreparedLaunch
    merge: PreparedLaunch
    states: tuple[int, int, int]


@plan
def _plan(
    a: Tensor, b: Tensor, has_valid: bool, row_scales: Tensor | None, scales: tuple[float, float],
    dtype: torch.dtype, has_tokens: bool,
) -> _Plan:  # fmt: skip
    """Of places."""
    p = RowPair(a, b, None, "kl", 0.0, *scales, dtype, row_scales)
    config = configuration(p, SHAPES)
    splits = splits_of(a.shape[-1], config["R"] * config["VEC"])
    width = room_for(splits.number)
    config |= {"HAS_VALID": has_valid, "SPLITS": width}
    sweep = PreparedLaunch(
        token_stats_splits_kernel, p.n_rows * splits.number, a.device, (*geometry(p), *splits), **config
    )
    config.pop("maxnreg", None)
    merge = PreparedLaunch(
        token_stats_merge_kernel, p.n_rows, a.device, (p.n_rows, *geometry(p), splits.number),
        HAS_TOKENS=has_tokens, **config,
    )  # fmt: skip
    return _Plan(sweep, merge, (p.n_rows, STATE, width))


def token_stats(p: RowPair, tokens: Tensor | None) -> Tensor:
    """`[TOKEN_STATS, A*B]`, in the order of `TOKEN_STATS`; tokens int64 `[A, B]` where there are any.

    2 U of memory traffic, and a tile of a row that both sides' largest logits lie in once more.
    """
    a, b, valid, scales = p.a, p.b, p.valid, p.scales
    sweep, merge, shape = _plan(
        place(a), place(b), valid is not None, place_if_any(scales), (p.a_scale, p.b_scale), p.dtype,
        tokens is not None,
    )  # fmt: skip
    states = torch.empty(shape, dtype=p.dtype, device=a.device)
    out = torch.empty((TOKEN_STATS, shape[0]), dtype=p.dtype, device=a.device)
    sweep(a, b, valid, scales, states)
    merge(a, b, valid, scales, None if tokens is None else tokens.contiguous(), states, out)
    return out

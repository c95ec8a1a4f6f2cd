"""Token statistics: both KLs, both entropies, the tokens' log-probabilities and equal top-1, in one sweep.

One kernel leaves the state of every part of every row, another folds a row's parts. A state is that of kl.py,
(n, c, z, a1, a2) with w = exp(a − m) and x = (b − a) − c, and of the other direction, which measures −x with
the weights u = w·eˣ, zb = Σ u and b2 = Σ u g(−x), while Σ u (−x) = −(a1 + a2 + b2) follows. The entropies
take ea = Σ w e_a and eb = Σ u e_b, where e_a = k_a·a − n and e_b = k_b·b − n_b are exponents of 2. c is
log(Z_b/Z_a), between the two directions' means of b − a: about either mean the other's sum would cancel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import TOKEN_STATS, RowPair
from .device_math import (
    LOG2E,
    NO_REFERENCE,
    RUNS,
    RUNS_IN_WORDS,
    exponent,
    g,
    g_near,
    is_near,
    level,
    load_ragged,
    load_tile,
    log_ratio,
    row_start,
    tile_ahead,
    tile_offsets,
    unpacked,
    weights,
    wide,
)
from .kl_pass import careful_row, finish, is_held, other_level
from .launch import ProgramShape, configuration, geometry, parts_of

# A part's state: n, c, n_b, z, a1, a2, zb, b2, ea, eb, lost_a, lost_b, then each side's largest logit and its
# first tile.
STATE = 16
_STATE = tl.constexpr(STATE)
_FIELDS = tl.constexpr(TOKEN_STATS)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _gap(z, a1, a2, zb):
    """zb − z = a1 + a2: the left side is exact where it is large, the right side where it is small."""
    return tl.where(2.0 * tl.abs(a1 + a2) < tl.minimum(z, zb), a1 + a2, zb - z)


@triton.jit
def _rebase_both(z, a1, a2, zb, b2, lost_a, lost_b, h, s):
    """Bring sums taken about c to c + h and to weights s·w; lost_a and lost_b say what a2 and b2 have lost.

    a2 and b2 have two forms each. Terms of the first are small where h is, and cancel where most of b's mass
    lies far above c and c rises to it, or most of a's far below and c falls. The second takes the other
    side's mass, known by itself, and cancels where h is small. What cancelled in the better one took digits
    with it: a2 is good to the rounding of a2 + lost_a.
    """
    gap = _gap(z, a1, a2, zb)
    b1 = -(gap + b2)
    size_b1 = b2 + lost_b + tl.minimum(tl.abs(a1) + a2, z + zb)
    g_h = g(-h)
    e_h = tl.exp2(-h * LOG2E)
    fall = h - g_h  # 1 − e^−h
    # e^−h g(h), by the first form where the second would cancel.
    moved = tl.where(tl.abs(h) < 1.0, h * h - g_h * (1.0 + h), 1.0 - (1.0 + h) * e_h)
    spent_near = e_h * (a2 + lost_a) + tl.abs(fall * a1) + z * g_h
    spent_far = e_h * zb + tl.abs(a1) + z * tl.abs(1.0 - h)
    new_a2 = tl.where(
        spent_near <= spent_far, e_h * a2 - fall * a1 + z * g_h, e_h * zb - (a1 + z * (1.0 - h))
    )
    lost_a = tl.minimum(spent_near, spent_far) - new_a2
    spent_near = b2 + lost_b + tl.abs(fall) * size_b1 + zb * moved
    spent_far = z + e_h * (size_b1 + zb * tl.abs(1.0 + h))
    new_b2 = tl.where(spent_near <= spent_far, b2 + fall * b1 + zb * moved, z - e_h * (b1 + zb * (1.0 + h)))
    lost_b = tl.minimum(spent_near, spent_far) - new_b2
    return z * s, (a1 - h * z) * s, new_a2 * s, zb * e_h * s, new_b2 * s, lost_a * s, lost_b * s


@triton.jit
def _limits(n, n_b, k_a, k_b):
    """The logits of a and of b from which on the references move.

    For b not before it lies well above: that moves nothing but the references, whose rows most often have had
    a's new maximum in the same tile.
    """
    return (n + 8.0) / k_a, (n_b + 11.0) / k_b


@triton.jit
def _moved(
    a, b, top_a, top_b, n, c, n_b, to_a, z, a1, a2, zb, b2, ea, eb, lost_a, lost_b,
    k_a, k_b, scale, a_scale, b_scale, SAME_SCALE: tl.constexpr,
):  # fmt: skip
    """References moved to a tile that holds a new maximum of a or of b, and the sums brought to them.

    c goes to where log(Z_b/Z_a) lies with the tile counted: about it nothing cancels in the end. About that
    of this tile alone, b's mass in others would be seen from afar.
    """
    to_n = tl.maximum(level(tl.max(top_a), k_a), n)
    to_n_b = tl.maximum(level(tl.max(top_b), k_b), n_b)
    s = tl.exp2(n - to_n)
    mass_a = tl.sum(weights(a, k_a, to_n)).to(tl.float64) + (tl.sum(z) * s).to(tl.float64)
    mass_b = tl.sum(weights(b, k_b, to_n_b)).to(tl.float64)
    mass_b += (tl.sum(zb) / to_a).to(tl.float64) * tl.exp2((n_b - to_n_b).to(tl.float64))
    to_c = tl.log(mass_b / mass_a) + (to_n_b - to_n).to(tl.float64) * _LN2
    to_c = tl.where(tl.abs(to_c) < 1e30, to_c, 0.0).to(c.dtype)
    h = tl.where(n == NO_REFERENCE, 0.0, to_c - c)
    ea = (ea + (n - to_n) * z) * s
    eb = (eb + (n_b - to_n_b) * zb) * (tl.exp2(-h * LOG2E) * s)
    z, a1, a2, zb, b2, lost_a, lost_b = _rebase_both(z, a1, a2, zb, b2, lost_a, lost_b, h, s)
    n_b_as_a = other_level(to_n, to_n_b, to_c, k_a, k_b, scale, a_scale, b_scale, SAME_SCALE)
    to_a = tl.exp2(to_n_b.to(tl.float64) - n_b_as_a).to(n.dtype)
    return to_n, to_c, to_n_b, to_a, z, a1, a2, zb, b2, ea, eb, lost_a, lost_b


@triton.jit
def _accumulate(
    a, b, valid, start, n, c, n_b, to_a, z, a1, a2, zb, b2, ea, eb, lost_a, lost_b,
    limit_a, limit_b, top_a, at_a, top_b, at_b,
    k_a, k_b, scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add a `[R, VEC]` tile to the sums `[R]`, moving the references first at a new maximum."""
    here_a = tl.max(a, axis=1)
    at_a = tl.where(here_a > top_a, start, at_a)
    top_a = tl.maximum(here_a, top_a)
    here_b = tl.max(b, axis=1)
    at_b = tl.where(here_b > top_b, start, at_b)
    top_b = tl.maximum(here_b, top_b)
    # One bit for both sides: a maximum of integers is one instruction of a warp.
    if tl.max(((here_a >= limit_a) | (here_b >= limit_b)).to(tl.int32)) != 0:
        n, c, n_b, to_a, z, a1, a2, zb, b2, ea, eb, lost_a, lost_b = _moved(
            a, b, here_a, here_b, n, c, n_b, to_a, z, a1, a2, zb, b2, ea, eb, lost_a, lost_b,
            k_a, k_b, scale, a_scale, b_scale, SAME_SCALE,
        )  # fmt: skip
        limit_a, limit_b = _limits(n, n_b, k_a, k_b)
    e_a = exponent(a, k_a, n)
    e_b = exponent(b, k_b, n_b)
    x = log_ratio(a, b, c, scale, a_scale, b_scale, SAME_SCALE, EXACT)
    w = tl.exp2(e_a)
    u = tl.exp2(e_b) * to_a
    if MASKED:
        w = tl.where(valid, w, 0.0)
        u = tl.where(valid, u, 0.0)
        x = tl.where(valid, x, 0.0)
        e_a = tl.where(valid, e_a, 0.0)
        e_b = tl.where(valid, e_b, 0.0)
    wx = w * x
    near = is_near(x)
    g_x = g_near(x)
    z += tl.sum(w, axis=1)
    a1 += tl.sum(wx, axis=1)
    a2 += tl.sum(tl.where(near, wx * g_x, (u - w) - wx), axis=1)
    zb += tl.sum(u, axis=1)
    # u g(−x) = w (x² + (x − 1) g(x)): at least a quarter of the parts is left, at x = −1.125.
    b2 += tl.sum(tl.where(near, wx * (x + (x - 1.0) * g_x), (w - u) + u * x), axis=1)
    ea += tl.sum(w * e_a, axis=1)
    eb += tl.sum(u * e_b, axis=1)
    return (
        n, c, n_b, to_a, z, a1, a2, zb, b2, ea, eb, lost_a, lost_b, limit_a, limit_b,
        top_a, at_a, top_b, at_b,
    )  # fmt: skip


@triton.jit
def _first_tile(top, at, BLOCK: tl.constexpr):
    """A part's largest logit, and the number of the first tile that holds it."""
    most = tl.max(top)
    return most, tl.min(tl.where(top == most, at, 2147483647)) // BLOCK


@triton.jit(do_not_specialize=["n_inner", "parts"])
def token_stats_parts_kernel(
    a_ptr, b_ptr, rows_ptr, states_ptr, n_inner, a_outer, a_inner, b_outer, b_inner, V,
    a_scale_high, a_scale_low, b_scale_high, b_scale_low, parts, part_columns,
    HAS_ROWS: tl.constexpr, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr,
    CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The state of one part of one row."""
    BLOCK: tl.constexpr = R * VEC
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    counts = True
    if HAS_ROWS:
        counts = tl.load(rows_ptr + row) != 0
    if counts:
        first = part * part_columns
        last = tl.minimum(first + part_columns, V)
        a_row = row_start(a_ptr, row, n_inner, a_outer, a_inner)
        b_row = row_start(b_ptr, row, n_inner, b_outer, b_inner)
        a_scale = wide(a_scale_high, a_scale_low)
        b_scale = wide(b_scale_high, b_scale_low)
        k_a = (a_scale * LOG2E).to(CT)
        k_b = (b_scale * LOG2E).to(CT)
        scale = a_scale.to(CT)
        offsets = tile_offsets(R, VEC, LAYOUT)
        n = tl.full([], NO_REFERENCE, CT)
        c = tl.full([], 0.0, CT)
        n_b = tl.full([], NO_REFERENCE, CT)
        to_a = tl.full([], 1.0, CT)
        limit_a = (n + 8.0) / k_a
        limit_b = tl.full([], float("inf"), CT)  # the first tile with a's mass brings both
        z = tl.zeros([R], CT)
        a1 = tl.zeros([R], CT)
        a2 = tl.zeros([R], CT)
        zb = tl.zeros([R], CT)
        b2 = tl.zeros([R], CT)
        ea = tl.zeros([R], CT)
        eb = tl.zeros([R], CT)
        lost_a = tl.zeros([R], CT)
        lost_b = tl.zeros([R], CT)
        top_a = tl.full([R], -float("inf"), CT)
        top_b = tl.full([R], -float("inf"), CT)
        at_a = tl.full([R], 0, tl.int32) + first
        at_b = tl.full([R], 0, tl.int32) + first
        everywhere = tl.full([R, VEC], 1, tl.int1)
        full = last - (last - first) % BLOCK
        # Runs of one tile a pass are held one by one: in words, ptxas spills on sm_100.
        HELD: tl.constexpr = RUNS if LAYOUT == RUNS_IN_WORDS else LAYOUT
        if first < full:
            # A tile ahead: the barriers of a tile's maximum would otherwise wait for its loads as well.
            next_a = load_tile(a_row, first, R, VEC, HELD)
            next_b = load_tile(b_row, first, R, VEC, HELD)
            for start in range(first, full, BLOCK):
                a = unpacked(next_a, a_row, CT, R, VEC)
                b = unpacked(next_b, b_row, CT, R, VEC)
                ahead = tile_ahead(start, full, BLOCK)
                next_a = load_tile(a_row, ahead, R, VEC, HELD)
                next_b = load_tile(b_row, ahead, R, VEC, HELD)
                (
                    n, c, n_b, to_a, z, a1, a2, zb, b2, ea, eb, lost_a, lost_b, limit_a, limit_b,
                    top_a, at_a, top_b, at_b,
                ) = _accumulate(
                    a, b, everywhere, start, n, c, n_b, to_a, z, a1, a2, zb, b2, ea, eb, lost_a, lost_b,
                    limit_a, limit_b, top_a, at_a, top_b, at_b,
                    k_a, k_b, scale, a_scale, b_scale, SAME_SCALE, EXACT, False,
                )  # fmt: skip
        if full < last:
            inside = full + offsets < last
            a = load_ragged(a_row, full, last, -float("inf"), CT, R, VEC, LAYOUT)
            b = load_ragged(b_row, full, last, -float("inf"), CT, R, VEC, LAYOUT)
            (
                n, c, n_b, to_a, z, a1, a2, zb, b2, ea, eb, lost_a, lost_b, limit_a, limit_b,
                top_a, at_a, top_b, at_b,
            ) = _accumulate(
                a, b, inside, full, n, c, n_b, to_a, z, a1, a2, zb, b2, ea, eb, lost_a, lost_b,
                limit_a, limit_b, top_a, at_a, top_b, at_b,
                k_a, k_b, scale, a_scale, b_scale, SAME_SCALE, EXACT, True,
            )  # fmt: skip
        most_a, tile_a = _first_tile(top_a, at_a, BLOCK)
        most_b, tile_b = _first_tile(top_b, at_b, BLOCK)
        mine = states_ptr + row.to(tl.int64) * (_STATE * PARTS) + part
        tl.store(mine, n)
        tl.store(mine + PARTS, c)
        tl.store(mine + 2 * PARTS, n_b)
        tl.store(mine + 3 * PARTS, tl.sum(z))
        tl.store(mine + 4 * PARTS, tl.sum(a1))
        tl.store(mine + 5 * PARTS, tl.sum(a2))
        tl.store(mine + 6 * PARTS, tl.sum(zb))
        tl.store(mine + 7 * PARTS, tl.sum(b2))
        tl.store(mine + 8 * PARTS, tl.sum(ea))
        tl.store(mine + 9 * PARTS, tl.sum(eb))
        tl.store(mine + 10 * PARTS, tl.sum(lost_a))
        tl.store(mine + 11 * PARTS, tl.sum(lost_b))
        tl.store(mine + 12 * PARTS, most_a)
        tl.store(mine + 13 * PARTS, tile_a.to(CT))
        tl.store(mine + 14 * PARTS, most_b)
        tl.store(mine + 15 * PARTS, tile_b.to(CT))


@triton.jit
def _published(states, which: tl.constexpr, parts, PARTS: tl.constexpr, other: tl.constexpr):
    part = tl.arange(0, PARTS)
    return tl.load(states + which * PARTS + part, mask=part < parts, other=other).to(tl.float64)


@triton.jit
def _folded(states, parts, PARTS: tl.constexpr):
    """A row's state in float64 from those of its parts, and the largest |c| that columns were seen from."""
    n = _published(states, 0, parts, PARTS, NO_REFERENCE)
    c = _published(states, 1, parts, PARTS, 0.0)
    n_b = _published(states, 2, parts, PARTS, 0.0)
    z = _published(states, 3, parts, PARTS, 0.0)
    a1 = _published(states, 4, parts, PARTS, 0.0)
    a2 = _published(states, 5, parts, PARTS, 0.0)
    zb = _published(states, 6, parts, PARTS, 0.0)
    b2 = _published(states, 7, parts, PARTS, 0.0)
    ea = _published(states, 8, parts, PARTS, 0.0)
    eb = _published(states, 9, parts, PARTS, 0.0)
    lost_a = _published(states, 10, parts, PARTS, 0.0)
    lost_b = _published(states, 11, parts, PARTS, 0.0)
    # A part without mass has no reference to bring, but a NaN of it must reach the sums.
    has_mass = z > 0
    top = tl.max(n)
    level_b = tl.max(tl.where(has_mass, n_b, NO_REFERENCE))
    furthest = tl.max(tl.where(has_mass, tl.abs(c), 0.0))
    s = tl.exp2(n - top)
    c_top = tl.max(tl.where(has_mass, c, NO_REFERENCE))
    mass_b = tl.sum(tl.where(has_mass, zb * s * tl.exp(c - c_top), 0.0))
    shared = c_top + tl.log(mass_b / tl.sum(z * s))
    h = tl.where(has_mass, shared - c, 0.0)
    fall = tl.where(has_mass, n - top, 0.0)
    n_b = tl.where(has_mass, n_b, level_b)
    ea = (ea + fall * z) * s
    eb = (eb + (n_b - level_b) * zb) * (tl.exp(-h) * s)
    z, a1, a2, zb, b2, lost_a, lost_b = _rebase_both(z, a1, a2, zb, b2, lost_a, lost_b, h, s)
    return (
        top, shared, level_b, tl.sum(z), tl.sum(a1), tl.sum(a2), tl.sum(zb), tl.sum(b2), tl.sum(ea),
        tl.sum(eb), tl.sum(lost_a), tl.sum(lost_b), furthest,
    )  # fmt: skip


@triton.jit
def _weighted_exponents(
    row, shift, n, k, V, CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr
):
    """Σ 2^e e over a row's columns, e = k·(logit − shift) − n."""
    total = tl.zeros([R, VEC], CT)
    for start in range(0, V, R * VEC):
        logit = load_ragged(row, start, V, -float("inf"), CT, R, VEC, LAYOUT) - shift
        e = tl.maximum(exponent(logit, k, n), -10000.0)  # 0 · −inf has no place in the sum
        total += tl.exp2(e) * e
    return tl.sum(total).to(tl.float64)


@triton.jit
def _first_column(row, tile, most, V, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr):
    columns = tile * (R * VEC) + tile_offsets(R, VEC, LAYOUT)
    logits = tl.load(row + columns, mask=columns < V, other=-float("inf")).to(tl.float64)
    return tl.min(tl.where((logits == most) & (columns < V), columns, 2147483647))


@triton.jit
def _first_part(states, which: tl.constexpr, parts, PARTS: tl.constexpr):
    """A row's largest logit, and the number of the first tile that holds it."""
    most = _published(states, which, parts, PARTS, -float("inf"))
    tile = _published(states, which + 1, parts, PARTS, 0.0)
    top = tl.max(most)
    return top, tl.min(tl.where(most == top, tile, 2147483647.0)).to(tl.int32)


@triton.jit(do_not_specialize=["n_rows", "n_inner", "parts"])
def token_stats_rows_kernel(
    a_ptr, b_ptr, rows_ptr, tokens_ptr, states_ptr, out_ptr,
    n_rows, n_inner, a_outer, a_inner, b_outer, b_inner, V,
    a_scale_high, a_scale_low, b_scale_high, b_scale_low, parts,
    HAS_ROWS: tl.constexpr, HAS_TOKENS: tl.constexpr, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr,
    CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A row's statistics from the states of its parts; a row that they cannot do is swept again here."""
    row = tl.program_id(0)
    out = out_ptr + row
    n_rows = tl.full([], 0, tl.int64) + n_rows
    counts = True
    if HAS_ROWS:
        counts = tl.load(rows_ptr + row) != 0
    if not counts:
        for field in range(_FIELDS):
            tl.store(out + field * n_rows, 0.0)
    else:
        a_row = row_start(a_ptr, row, n_inner, a_outer, a_inner)
        b_row = row_start(b_ptr, row, n_inner, b_outer, b_inner)
        states = states_ptr + row.to(tl.int64) * (_STATE * PARTS)
        a_scale = wide(a_scale_high, a_scale_low)
        b_scale = wide(b_scale_high, b_scale_low)
        k_a = (a_scale * LOG2E).to(CT)
        k_b = (b_scale * LOG2E).to(CT)
        scale = a_scale.to(CT)

        n, c, n_b, z, a1, a2, zb, b2, ea, eb, lost_a, lost_b, furthest = _folded(states, parts, PARTS)
        gap = _gap(z, a1, a2, zb)
        forward, _, good = finish(z, a1, gap - a1)
        reverse, _, good_b = finish(zb, -(gap + b2), b2)
        # Exponents of 2: a sums to 2^log_a, b to 2^log_b.
        n_b_as_a = other_level(n, n_b, c, k_a, k_b, scale, a_scale, b_scale, SAME_SCALE)
        log_a = tl.log2(z)
        log_b = tl.log2(zb) + (n_b_as_a - n_b)
        entropy_a = log_a - ea / z
        entropy_b = log_b - eb / zb
        good = good & (a2 + lost_a <= 4.0 * z * forward) & (b2 + lost_b <= 4.0 * zb * reverse)
        good = good & is_held(n.to(CT)) & is_held(n_b.to(CT))
        good = good & good_b & (entropy_a + entropy_b < float("inf"))
        if EXACT:
            # As in kl.py: fl(b − a) may be off by up to 2^-25·|c|.
            good = good & (tl.minimum(forward, reverse) >= 4.5e-4 * furthest * furthest)
        if not good:
            shift_a, n_f, z_f, _, _, _, _, _, forward = careful_row(
                a_row, b_row, V, k_a, k_b, scale, a_scale, b_scale,
                SAME_SCALE, False, CT, R, VEC, LAYOUT,
            )  # fmt: skip
            shift_b, n_r, z_r, _, _, _, _, _, reverse = careful_row(
                b_row, a_row, V, k_b, k_a, scale, b_scale, a_scale,
                SAME_SCALE, False, CT, R, VEC, LAYOUT,
            )  # fmt: skip
            n = shift_a.to(tl.float64) * k_a.to(tl.float64) + n_f.to(tl.float64)
            n_b = shift_b.to(tl.float64) * k_b.to(tl.float64) + n_r.to(tl.float64)
            log_a = tl.log2(z_f)
            log_b = tl.log2(z_r)
            entropy_a = log_a - _weighted_exponents(a_row, shift_a, n_f, k_a, V, CT, R, VEC, LAYOUT) / z_f
            entropy_b = log_b - _weighted_exponents(b_row, shift_b, n_r, k_b, V, CT, R, VEC, LAYOUT) / z_r
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

        most_a, tile_a = _first_part(states, 12, parts, PARTS)
        most_b, tile_b = _first_part(states, 14, parts, PARTS)
        agree = tl.full([], 0.0, tl.float64)
        if tile_a == tile_b:
            column_a = _first_column(a_row, tile_a, most_a, V, R, VEC, LAYOUT)
            column_b = _first_column(b_row, tile_b, most_b, V, R, VEC, LAYOUT)
            agree = (column_a == column_b).to(tl.float64)
        # NaN where a side has no distribution.
        agree += (entropy_a + entropy_b) * 0.0
        tl.store(out + 6 * n_rows, agree.to(CT))


# By the wider logit's bytes, as in pair.py.
SHAPES = {2: ProgramShape(8, 128), 4: ProgramShape(8, 128), 8: ProgramShape(4)}


def token_stats(p: RowPair, tokens: Tensor | None) -> Tensor:
    """`[TOKEN_STATS, A*B]`, in the order of `TOKEN_STATS`; tokens int64 `[A, B]` where there are any.

    2 U of memory traffic, and a tile of a row that both sides' largest logits lie in once more.
    """
    out = torch.empty((TOKEN_STATS, p.n_rows), dtype=p.dtype, device=p.a.device)
    config = configuration(p, SHAPES)
    parts = parts_of(p.a.shape[2], config["R"] * config["VEC"])
    width = triton.next_power_of_2(parts.number)
    states = torch.empty((p.n_rows, STATE, width), dtype=p.dtype, device=p.a.device)
    tokens = None if tokens is None else tokens.contiguous()
    has_rows = p.valid is not None
    token_stats_parts_kernel[(p.n_rows * parts.number,)](
        p.a, p.b, p.valid, states, *geometry(p), parts.number, parts.columns,
        HAS_ROWS=has_rows, PARTS=width, **config,
    )  # fmt: skip
    config.pop("maxnreg", None)
    token_stats_rows_kernel[(p.n_rows,)](
        p.a, p.b, p.valid, tokens, states, out, p.n_rows, *geometry(p), parts.number,
        HAS_ROWS=has_rows, HAS_TOKENS=tokens is not None, PARTS=width, **config,
    )  # fmt: skip
    return out

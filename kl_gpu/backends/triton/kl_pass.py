"""KL(a‖b) of a row in one pass over memory, and the statistics that the row's later sweeps start from."""

from __future__ import annotations

import triton
import triton.language as tl

from .device_math import (
    LOG2E,
    NO_REFERENCE,
    difference,
    g,
    g_near,
    is_near,
    level,
    load_ragged,
    load_tile,
    log1p_minus,
    log_probability_ratio,
    log_ratio,
    rebase,
    tile_ahead,
    tile_offsets,
    unpacked,
    vast_shift,
    weights,
)

# The reference moves where some thread's weights of a step sum to as much. That tells a new maximum from sums
# that are there anyway: a maximum itself would take an instruction per column.
_ROOM = tl.constexpr(256.0)
# A reference leaves the largest of those sums below this power of 2, so that one twice as large moves
# nothing: a move costs about as much as its step. One eight times as large would cancel about the old c.
_FILLED = tl.constexpr(7.0)


@triton.jit
def _tile_reference(a, b, w, valid, scale, a_scale, b_scale, SAME_SCALE: tl.constexpr):
    """The mean of the difference over one tile with weights w: the c that fits this tile."""
    d = difference(a, b, a_scale, b_scale, SAME_SCALE)
    # Not where one side is masked with a number as low as -1e9: about that, the mean would have no digits.
    valid = valid & (tl.abs(d) < 1e6)
    w = tl.where(valid, w, 0.0)
    # Sum about the largest difference, not about 0, so that a common shift of 1000 costs no digits.
    top = tl.max(tl.where(valid, d, -1e6))
    total = tl.sum(w)
    mean = top + tl.sum(tl.where(valid, w * (d - top), 0.0)) / total
    if SAME_SCALE:
        mean = mean * scale
    return tl.where(total > 0, mean, 0.0)


@triton.jit
def other_level(n, n_b, c, k_a, k_b, scale, a_scale, b_scale, SAME_SCALE: tl.constexpr):
    """The level with 2^(k_b·b − level) = w·eˣ, in float64: side b's exponent as side a's weights see it.

    Corrected for the rounding of k_a and k_b to float32, which would show at logits of a thousand, and of the
    scale that x and so c were taken with, which would at sides a few hundred apart. b's mass lies about its
    own level n_b, which at small temperatures may be thousands away from where c puts it.
    """
    n, c, k_a, k_b = n.to(tl.float64), c.to(tl.float64), k_a.to(tl.float64), k_b.to(tl.float64)
    if SAME_SCALE:
        c *= a_scale / scale.to(tl.float64)
    level_b = n + c * LOG2E - (k_a - a_scale * LOG2E) * (n / k_a)
    return level_b + (k_b - b_scale * LOG2E) * (n_b.to(tl.float64) / k_b)


@triton.jit
def _weighed(a, later_a, k, n, TWO: tl.constexpr):
    """The weights of a step of one or two `[R, VEC]` tiles, and their sums `[R]`."""
    w = weights(a, k, n)
    mass = tl.sum(w, axis=1)
    later_w = w
    if TWO:
        later_w = weights(later_a, k, n)
        mass += tl.sum(later_w, axis=1)
    return w, later_w, mass


@triton.jit
def _moved(
    a, b, later_a, later_b, valid, n, c, z, a1, a2, k_a, k_b, scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """The reference moved to a step of one or two tiles, and the sums brought to it.

    A reference fixed by the first tile would do for Gaussian logits. A trained teacher puts most of its mass
    on a token of some later tile, and sums about a distant c cancel: the row would have to be swept again.
    """
    n_step = level(tl.max(tl.maximum(a, later_a) if TWO else a), k_a)
    w, later_w, mass = _weighed(a, later_a, k_a, n_step, TWO)
    w_top = w
    if TWO:
        is_later = tl.max(later_a) > tl.max(a)
        a = tl.where(is_later, later_a, a)
        b = tl.where(is_later, later_b, b)
        w_top = tl.where(is_later, later_w, w)
    c_step = _tile_reference(a, b, w_top, valid, scale, a_scale, b_scale, SAME_SCALE)
    rise = tl.floor(tl.log2(tl.max(mass))) - (_FILLED - 1.0)
    n_step += rise
    # In float64: what e^−h is off by, a column that outweighs all others hands on to Z_b, so to all of b.
    h = tl.where(n == NO_REFERENCE, 0.0, c_step.to(tl.float64) - c.to(tl.float64))
    # b's sum z + a1 + a2 has a1's rounding in it, and where that sum is then multiplied by e^−h > 1, nothing
    # tells in the end: a NaN has the row swept again where it is more than `store_row` allows.
    lost = (tl.sum(6.0 * (z + a1 + a2) - tl.abs(a1)) < 0) & (h < 0)
    z = tl.where(lost, float("nan"), z)
    z, a1, a2 = rebase(z, a1, a2, h, tl.exp2(n - n_step))
    # b is measured from its own maximum, where exponents are small, and brought to a's by one factor: an
    # exponent of 64 or more would be rounded by 2.6e-6. That maximum is at 2^-4, no worse than at 2^4: so
    # tops of b alone, which move nothing, may lie 36 powers of 2 above it before their exponents reach 32.
    n_b = level(tl.max(b), k_b) + 11.0
    n_b_as_a = other_level(n_step, n_b, c_step, k_a, k_b, scale, a_scale, b_scale, SAME_SCALE)
    to_a = tl.exp2(n_b.to(tl.float64) - n_b_as_a).to(n.dtype)
    return n_step, c_step, n_b, to_a, z, a1, a2


@triton.jit
def _tile_sums(
    a, b, w, valid, c, n_b, to_a, k_b, scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What a `[R, VEC]` tile of weights w adds to a1 and a2."""
    v = weights(b, k_b, n_b)
    x = log_ratio(a, b, c, scale, a_scale, b_scale, SAME_SCALE, EXACT)
    if MASKED:  # w is 0 there
        v = tl.where(valid, v, 0.0)
        x = tl.where(valid, x, 0.0)
    wx = w * x
    terms = tl.where(is_near(x), wx * g_near(x), (v * to_a - w) - wx)
    return tl.sum(wx, axis=1), tl.sum(terms, axis=1)


@triton.jit
def _added(
    a, b, later_a, later_b, valid, n, c, n_b, to_a, z, a1, a2, k_a, k_b, scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """The state with a step of one or two tiles added."""
    w, later_w, mass = _weighed(a, later_a, k_a, n, TWO)
    if tl.max(mass) >= _ROOM:
        n, c, n_b, to_a, z, a1, a2 = _moved(
            a, b, later_a, later_b, valid, n, c, z, a1, a2, k_a, k_b, scale, a_scale, b_scale, SAME_SCALE, TWO
        )
        w, later_w, mass = _weighed(a, later_a, k_a, n, TWO)
    z += mass
    s1, s2 = _tile_sums(a, b, w, valid, c, n_b, to_a, k_b, scale, a_scale, b_scale, SAME_SCALE, EXACT, MASKED)
    a1 += s1
    a2 += s2
    if TWO:
        s1, s2 = _tile_sums(
            later_a, later_b, later_w, valid, c, n_b, to_a, k_b, scale, a_scale, b_scale,
            SAME_SCALE, EXACT, MASKED,
        )  # fmt: skip
        a1 += s1
        a2 += s2
    return n, c, n_b, to_a, z, a1, a2


@triton.jit
def is_held(n):
    """Whether float32 holds a side's n to a fraction of 1."""
    return tl.abs(n) <= 16777216.0 if n.dtype == tl.float32 else n == n


@triton.jit
def finish(z, a1, a2):
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
    # Where a logit was masked with a number as low as -1e9, what is left of y is the sums' rounding.
    return value, lam, (size <= 4.0 * value) & (size < 64.0)


@triton.jit
def careful_row(
    a_row, b_row, V, k_a, k_b, scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, CT: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """A row that the one-pass sums cannot do: −inf logits, disjoint supports, overflow. Three sweeps.

    Sides are normalised by their own maxima, and columns where x is large add b's mass instead of w·g(x).
    n and c are those of logits less shift_a and shift_b, which are 0 in all but vast rows.
    """
    INF: tl.constexpr = float("inf")
    top_a = tl.full([R, VEC], -INF, CT)
    top_b = tl.full([R, VEC], -INF, CT)
    for start in range(0, V, R * VEC):
        top_a = tl.maximum(top_a, load_ragged(a_row, start, V, -INF, CT, R, VEC, LAYOUT))
        top_b = tl.maximum(top_b, load_ragged(b_row, start, V, -INF, CT, R, VEC, LAYOUT))
    m_a = tl.max(top_a)
    m_b = tl.max(top_b)
    shift_a = vast_shift(m_a, k_a)
    shift_b = vast_shift(m_b, k_b)
    m_a -= shift_a
    m_b -= shift_b
    n_a = level(m_a, k_a)
    n_b = level(m_b, k_b)

    # Any c near the mean serves; the difference of the maxima keeps a common shift out of the sum.
    c_start = difference(m_a, m_b, a_scale, b_scale, SAME_SCALE)
    if SAME_SCALE:
        c_start = c_start * scale
    z_a = tl.zeros([R, VEC], CT)
    z_b = tl.zeros([R, VEC], CT)
    shift = tl.zeros([R, VEC], CT)
    holes = tl.zeros([R, VEC], tl.int32)
    for start in range(0, V, R * VEC):
        a = load_ragged(a_row, start, V, -INF, CT, R, VEC, LAYOUT) - shift_a
        b = load_ragged(b_row, start, V, -INF, CT, R, VEC, LAYOUT) - shift_b
        w = weights(a, k_a, n_a)
        z_a += w
        z_b += weights(b, k_b, n_b)
        # Not from where one side is masked with a number: c would lie as far out, and round every x.
        away = log_ratio(a, b, c_start, scale, a_scale, b_scale, SAME_SCALE, EXACT)
        shift += tl.where(tl.abs(away) < 1e4 * tl.maximum(scale, 1.0), w * away, 0.0)
        holes |= ((a > -INF) & (b == -INF)).to(tl.int32)
    z_a = tl.sum(z_a)
    z_b = tl.sum(z_b)
    # c in two numbers: one of 300 is rounded by 1.5e-5, beside which a divergence of 1e-12 would be lost.
    exact_c = c_start.to(tl.float64) + (tl.sum(shift) / z_a).to(tl.float64)
    c = exact_c.to(CT)
    c_rest = (exact_c - c.to(tl.float64)).to(CT)
    inv_a = 1.0 / z_a  # in the terms, not behind the sums: x may be the lowest number, and w larger than 1

    a1 = tl.zeros([R, VEC], CT)
    a2 = tl.zeros([R, VEC], CT)
    mass_b = tl.zeros([R, VEC], CT)
    for start in range(0, V, R * VEC):
        a = load_ragged(a_row, start, V, -INF, CT, R, VEC, LAYOUT) - shift_a
        b = load_ragged(b_row, start, V, -INF, CT, R, VEC, LAYOUT) - shift_b
        w = weights(a, k_a, n_a)
        x = log_probability_ratio(a, b, c, c_rest, scale, a_scale, b_scale, SAME_SCALE, EXACT)
        x = tl.where((a == -INF) | (b == -INF), 0.0, x)  # a NaN stays
        # A column that b lacks takes all of its p from y, and adds no mass.
        far = (x > 2.0) | (a == -INF) | (b == -INF)
        mass_b += tl.where(far, weights(b, k_b, n_b), 0.0)
        p = w * inv_a
        # The lowest number over a temperature below 1 is infinite, and what has no weight counts as nothing.
        nothing = (p == 0) & (x == x)
        px = tl.where(nothing, 0.0, p * x)
        a1 += px
        a2 += tl.where(far, -p - px, tl.where(nothing, 0.0, p * g(x)))

    # Everything below is one number a row, in float64.
    z_a = z_a.to(tl.float64)
    z_b = z_b.to(tl.float64)
    a1 = tl.sum(a1).to(tl.float64)
    # b's sums are in units of e^gap of a's.
    n_b_as_a = other_level(n_a, n_b, exact_c, k_a, k_b, scale, a_scale, b_scale, SAME_SCALE)
    gap = (n_b.to(tl.float64) - n_b_as_a) / LOG2E
    far_b = tl.exp(tl.minimum(gap, 60.0)) * tl.sum(mass_b).to(tl.float64) / z_a
    a2 = tl.sum(a2).to(tl.float64) + far_b
    y = a1 + a2
    rest = log1p_minus(y)
    hole = tl.max(tl.max(holes, axis=1)) > 0
    # a2 < 1: what is left of two large sums is their rounding, and may be 0.
    near = (tl.abs(y) < 0.5) & (a2 < 1.0) & (gap < 60.0)
    lam = tl.where(near, rest + y, gap + tl.log(z_b / z_a))
    value = tl.where(near, a2 + rest, lam - a1)
    # NaN sums (a NaN, a +inf, a row of −inf) must stay NaN where there is a hole too.
    value = tl.where(hole, tl.where(value == value, INF, value), value)
    return shift_a, n_a, z_a, shift_b, n_b, z_b, c, lam + c_rest.to(tl.float64), value


@triton.jit
def sweep(
    a_row, b_row, first, last, k_a, k_b, scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, CT: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """The state of columns [first, last): n, c, b's level n_b, and the sums z, a1, a2."""
    BLOCK: tl.constexpr = R * VEC
    offsets = tile_offsets(R, VEC, LAYOUT)
    n = tl.full([], NO_REFERENCE, CT)
    c = tl.full([], 0.0, CT)
    n_b = tl.full([], 0.0, CT)
    to_a = tl.full([], 1.0, CT)
    z = tl.zeros([R], CT)
    a1 = tl.zeros([R], CT)
    a2 = tl.zeros([R], CT)
    everywhere = tl.full([R, VEC], 1, tl.int1)
    # Two tiles a step where threads hold them in words: half as often a maximum that all threads wait for.
    # Held one by one, two tiles and the next two take more registers than there are.
    a_bits: tl.constexpr = a_row.dtype.element_ty.primitive_bitwidth
    b_bits: tl.constexpr = b_row.dtype.element_ty.primitive_bitwidth
    TWO: tl.constexpr = a_bits + b_bits == 32
    STEP: tl.constexpr = 2 * BLOCK if TWO else BLOCK
    LATER: tl.constexpr = STEP - BLOCK
    full = last - (last - first) % STEP
    if first < full:
        # A step ahead: the barriers of a maximum would otherwise wait for its loads as well.
        next_a = load_tile(a_row, first, R, VEC, LAYOUT)
        next_b = load_tile(b_row, first, R, VEC, LAYOUT)
        if TWO:
            behind_a = load_tile(a_row + LATER, first, R, VEC, LAYOUT)
            behind_b = load_tile(b_row + LATER, first, R, VEC, LAYOUT)
        for start in range(first, full, STEP):
            a = unpacked(next_a, a_row, CT, R, VEC)
            b = unpacked(next_b, b_row, CT, R, VEC)
            later_a = a
            later_b = b
            if TWO:
                later_a = unpacked(behind_a, a_row, CT, R, VEC)
                later_b = unpacked(behind_b, b_row, CT, R, VEC)
            ahead = tile_ahead(start, full, STEP)
            next_a = load_tile(a_row, ahead, R, VEC, LAYOUT)
            next_b = load_tile(b_row, ahead, R, VEC, LAYOUT)
            if TWO:
                behind_a = load_tile(a_row + LATER, ahead, R, VEC, LAYOUT)
                behind_b = load_tile(b_row + LATER, ahead, R, VEC, LAYOUT)
            n, c, n_b, to_a, z, a1, a2 = _added(
                a, b, later_a, later_b, everywhere, n, c, n_b, to_a, z, a1, a2,
                k_a, k_b, scale, a_scale, b_scale, SAME_SCALE, EXACT, False, TWO,
            )  # fmt: skip
    for start in range(full, last, BLOCK):
        inside = start + offsets < last
        a = load_ragged(a_row, start, last, -float("inf"), CT, R, VEC, LAYOUT)
        b = load_ragged(b_row, start, last, -float("inf"), CT, R, VEC, LAYOUT)
        n, c, n_b, to_a, z, a1, a2 = _added(
            a, b, a, b, inside, n, c, n_b, to_a, z, a1, a2, k_a, k_b, scale, a_scale, b_scale,
            SAME_SCALE, EXACT, True, False,
        )  # fmt: skip
    return n, c, n_b, tl.sum(z), tl.sum(a1), tl.sum(a2)


@triton.jit
def merged(n, c, n_b, z, a1, a2, CT: tl.constexpr):
    """One state from a vector of them, the sums in float64; and the largest |c| that columns were seen from.

    A part without mass (z = 0) has no reference to bring, but a NaN of it must reach the sums.
    """
    top = tl.max(n)
    weight = tl.exp2((n - top).to(tl.float64))
    mass = z.to(tl.float64) * weight
    shared = (tl.sum(mass * c.to(tl.float64)) / tl.sum(mass)).to(CT)
    h = shared.to(tl.float64) - c.to(tl.float64)
    z, a1, a2 = rebase(z.to(tl.float64), a1.to(tl.float64), a2.to(tl.float64), h, weight)
    furthest = tl.max(tl.where(mass > 0, tl.abs(c), 0.0))
    mass_b = z + a1 + a2
    level_b = tl.max(tl.where(mass_b == tl.max(mass_b), n_b, NO_REFERENCE))  # of the part with most of b
    return top, shared, level_b, tl.sum(z), tl.sum(a1), tl.sum(a2), furthest


@triton.jit
def store_row(
    value_out, stats, a_row, b_row, V, n, c, n_b, z_a, a1, a2, furthest,
    k_a, k_b, scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, CT: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Value and statistics of a row from its state; rows that the state cannot do are swept again here."""
    value, lam, good = finish(z_a, a1, a2)
    # Z_b, which all of b inherits, may be off by more than the value: by a 2^24th of a1 over e^lam; by 1.3e-6
    # where b's top lies so far above n_b, which is of the reference's last move, that its exponent passes 32.
    ratio = tl.exp(lam)
    n_b_as_a = other_level(n, n_b, c, k_a, k_b, scale, a_scale, b_scale, SAME_SCALE)
    level_b = n_b_as_a + tl.log2(z_a * ratio)
    good = good & (tl.abs(a1) <= 6.0 * ratio * z_a) & (level_b < n_b + 32.0)
    # For the gradient, whose weights are about n_b too, it goes to where `level` puts a column with all of b.
    n_b = (tl.floor(level_b) - 7.0).to(CT)
    n_b_as_a = other_level(n, n_b, c, k_a, k_b, scale, a_scale, b_scale, SAME_SCALE)
    z_b = z_a * ratio * tl.exp2(n_b_as_a - n_b.to(tl.float64))
    if EXACT:
        # 0.75 − 1e-6 needs 26 bits: fl(b − a) is off by up to 2^-25·|c|, which shows in D where c is far
        # larger than the usual x.
        shift = furthest.to(tl.float64)
        good = good & (value >= 4.5e-4 * shift * shift)
    good = good & is_held(n) & is_held(n_b)
    if not good:
        shift_a, n, z_a, shift_b, n_b, z_b, c, lam, value = careful_row(
            a_row, b_row, V, k_a, k_b, scale, a_scale, b_scale, SAME_SCALE, False, CT, R, VEC, LAYOUT
        )
        # `stored_side` tells them apart.
        n = tl.where(shift_a != 0, shift_a, n)
        z_a = tl.where(shift_a != 0, -z_a, z_a)
        n_b = tl.where(shift_b != 0, shift_b, n_b)
        z_b = tl.where(shift_b != 0, -z_b, z_b)
    # max keeps NaN out only by the comparison's direction: NaN < 0 is false, so NaN stays.
    value = tl.where(value < 0, 0.0, value)
    tl.store(value_out, value.to(value_out.dtype.element_ty))
    tl.store(stats, n)
    tl.store(stats + 1, (1.0 / z_a).to(CT))
    tl.store(stats + 2, n_b)
    tl.store(stats + 3, (1.0 / z_b).to(CT))
    # The gradient measures from where log b = log a: a large lam of its own would round r there.
    shift = c.to(tl.float64) + lam
    c = shift.to(CT)
    tl.store(stats + 4, c)
    tl.store(stats + 5, (shift - c.to(tl.float64)).to(CT))
    tl.store(stats + 6, value.to(CT))
    return good

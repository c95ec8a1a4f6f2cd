"""KL(a‖b) of a row in one pass over memory, and the statistics that the row's later sweeps start from."""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

from .device_math import (
    LN2,
    LN2_LOW,
    LOG2E,
    NO_REFERENCE,
    Sums,
    add_products,
    any_reaches,
    difference,
    exp2_offset,
    exp2_pair,
    exp_minus,
    floor_log2,
    fma,
    g,
    g_near,
    is_near,
    load_ragged,
    load_tile,
    log1p_minus,
    log2_ratio,
    log_probability_ratio,
    log_ratio,
    lowest,
    mul_add,
    mul_sub,
    no_lower,
    out_of_range_shift,
    rebase,
    scaled_g,
    sub_mul,
    tile_ahead,
    tile_offsets,
    times_log2e,
    top_of,
    two_sum,
    uniform,
    unpacked,
    weights,
)

# The reference is rebased where a thread's weights of a step sum to this much. That tells a new maximum from
# sums that are there anyway: a maximum itself would take an instruction per column.
_REBASE_ABOVE = tl.constexpr(16.0)
# A new reference leaves the largest of those sums below this power of 2, so that one twice as large rebases
# nothing: rebasing costs about as much as its step. One eight times as large would cancel about the old c.
_REBASED_LOG2 = tl.constexpr(3)
# What a step's terms come times, so that those with eˣ beyond 2^16, whose exponent is rounded, are infinite.
_G_SCALE = tl.constexpr(2.0**112)
_G_SCALE_64 = tl.constexpr(2.0**900)
# The least KL, beside c², at which fl(b − a) may be taken for b − a where both have 16 bits. 0.75 − 1e-6 has
# 26: the difference may be off by 2^-25·|c|, which shows where c is far larger than the usual x.
_LEAST_KL = tl.constexpr(4.5e-4)
# How much higher than `exp2_offset` has it the sweep takes n_b: tops of b alone rebase nothing.
_B_RAISED = tl.constexpr(6.0)


# A column past all others, with which a sweep ends early.
MISFIT = tl.constexpr(1 << 30)
# What a column is where a logit is −inf, or lower than `lowest`; a row is the largest of these. UNDECIDED is
# one that b alone masks, and with a number: `fallback_row` finds what it adds.
BOTH_LACK = tl.constexpr(1)
A_LACKS = tl.constexpr(2)
B_LACKS = tl.constexpr(3)
UNDECIDED = tl.constexpr(4)

# a's mass in columns that b lacks, a vector of a sum per thread, and the offset that it is about.
Alone = namedtuple("Alone", "mass n")
# The path that a row's later sweeps take: the formulas of `formulas.py`; or the fast ones, with a row's −inf
# taken for `lowest` and its differences as exact as they are (ALIKE where −inf stands on both sides or on
# none), or without either.
FALLBACK = tl.constexpr(0)
PLAIN = tl.constexpr(1)
MASKED_ALIKE = tl.constexpr(2)
ONE_SIDED = tl.constexpr(3)

# What sums are taken about: a's n, c, b's own n_b, and the factor b_to_a = 2^n_b over w·eˣ's unit.
Reference = namedtuple("Reference", "n c n_b b_to_a")
# The fast sweep's: n, and c in units of log2, as its x and a1 are.
FastReference = namedtuple("FastReference", "n c")
# A row as `fallback_row` leaves it: n and c are of logits less the shifts, the rest is in float64.
Fallback = namedtuple("Fallback", "shift_a n_a z_a shift_b n_b z_b c log_z_ratio value")


@triton.jit
def _moment(w, a, b, inside, start, scales, SAME_SCALE: tl.constexpr, MASKED: tl.constexpr):
    """The sum `[R]` of w·((b − a) − start) over a tile."""
    d = difference(a, b, scales, SAME_SCALE) - start
    if MASKED:
        d = tl.where(inside, d, 0.0)
    return add_products(tl.zeros([a.shape[0]], a.dtype), w, d)


@triton.jit
def _careful_moment(w, a, b, inside, start, scales, SAME_SCALE: tl.constexpr, MASKED: tl.constexpr):
    """`_moment` and the sum of w, but for columns of which one side is masked with a number as low as -1e9.

    A mean about those would have no digits.
    """
    d = difference(a, b, scales, SAME_SCALE) - start
    if MASKED:
        d = tl.where(inside, d, 0.0)
    w = tl.where(tl.abs(d) < 1e6, w, 0.0)
    d = tl.where(tl.abs(d) < 1e6, d, 0.0)
    return add_products(tl.zeros([a.shape[0]], a.dtype), w, d), tl.sum(w, axis=1)


@triton.jit
def _step_weights(a, later_a, k, n, TWO: tl.constexpr):
    """The weights of a step of one or two `[R, VEC]` tiles, and their sums `[R]`."""
    w = weights(a, k, n)
    mass = tl.sum(w, axis=1)
    later_w = w
    if TWO:
        later_w = weights(later_a, k, n)
        mass += tl.sum(later_w, axis=1)
    return w, later_w, mass


@triton.jit
def _mean_difference(
    w, later_w, mass, a, b, later_a, later_b, inside, start, scales,
    SAME_SCALE: tl.constexpr, MASKED: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """The mean of a step's differences with weights w, less a scale that both sides have.

    And whether they are finite. It is taken about `start`, where a common shift of 1000 costs no digits.
    """
    moment = _moment(w, a, b, inside, start, scales, SAME_SCALE, MASKED)
    if TWO:
        moment += _moment(later_w, later_a, later_b, inside, start, scales, SAME_SCALE, MASKED)
    far = tl.where(tl.abs(moment) * scales.shared > mass * 1000.0, 1, 0)
    far = tl.max(tl.where(moment * 0.0 == 0.0, far, 2))
    total = tl.sum(mass)
    all_moment = tl.sum(moment)
    if far == 1:
        moment, mass = _careful_moment(w, a, b, inside, start, scales, SAME_SCALE, MASKED)
        if TWO:
            later, later_mass = _careful_moment(
                later_w, later_a, later_b, inside, start, scales, SAME_SCALE, MASKED
            )
            moment += later
            mass += later_mass
        all_moment = tl.sum(moment)
        total = tl.sum(mass)
    mean = start + all_moment / total
    return tl.where(total > 0, mean, 0.0), far < 2


@triton.jit
def other_exp2_offset(n, n_b, c, scales, SAME_SCALE: tl.constexpr):
    """The offset with 2^(k_b·b − offset) = w·eˣ, in float64: side b's exponent as side a's weights see it.

    It is corrected for the rounding of k_a and k_b to float32, which would show at logits of a thousand, and
    of the scale that x and so c were taken with, which would at sides a few hundred apart. b's mass lies
    about its own offset n_b, which at small temperatures may be thousands away from where c puts it.
    """
    c = c.to(tl.float64)
    if SAME_SCALE:
        c = mul_add(c, scales.under_shared.to(tl.float64), c)
    n = n.to(tl.float64)
    offset = sub_mul(mul_add(c, tl.full([], LOG2E, tl.float64), n), n, scales.over_k_a.to(tl.float64))
    return mul_add(n_b.to(tl.float64), scales.over_k_b.to(tl.float64), offset)


@triton.jit
def exp2_over_offset(n, n_b, c, scales, SAME_SCALE: tl.constexpr):
    """2^(n_b − `other_exp2_offset`), from pairs of float32: many a GPU has few units for float64."""
    if c.dtype == tl.float64:
        return tl.exp2(n_b - other_exp2_offset(n, n_b, c, scales, SAME_SCALE))
    apart, apart_low = two_sum(n_b, -n)
    from_c, from_c_low = times_log2e(c, c * scales.under_shared if SAME_SCALE else c * 0.0)
    high, low = two_sum(apart, -from_c)
    low += apart_low - from_c_low
    if SAME_SCALE:
        return exp2_pair(high, sub_mul(low, n_b - n, scales.over_k_a))
    return exp2_pair(high, low + mul_sub(n, scales.over_k_a, n_b * scales.over_k_b))


@triton.jit
def exp2_over_log2(n, n_b, c, scales, SAME_SCALE: tl.constexpr):
    """`exp2_over_offset` of a `FastReference`, whose x has the rounding of k in it as both weights have."""
    apart, apart_low = two_sum(n_b, -n)
    high, low = two_sum(apart, -c)
    low += apart_low
    if not SAME_SCALE:
        low += mul_sub(n, scales.over_k_a, n_b * scales.over_k_b)
    return tl.exp2(high) if c.dtype == tl.float64 else exp2_pair(high, low)


@triton.jit
def _rise_of(mass):
    """By how much n must rise for the largest of the sums to lie below 2^_REBASED_LOG2."""
    if mass.dtype == tl.float64:
        return floor_log2(tl.max(mass)) - (_REBASED_LOG2 - 1.0)
    # Of positive numbers the bits: a maximum of integers is one instruction of a warp.
    top = tl.max(mass.to(tl.int32, bitcast=True))
    return floor_log2(top.to(tl.float32, bitcast=True)) - (_REBASED_LOG2 - 1.0)


@triton.jit
def _rebased(sums, h, e_h, s):
    """`rebase` of sums, or NaN."""
    # b's sum z + a1 + a2 has a1's rounding in it, and where that sum is then multiplied by e^−h > 1, nothing
    # tells in the end: a NaN has the row swept again where it is more than `store_row` allows.
    lost = (tl.sum(mul_sub(sums.z + sums.a1 + sums.a2, 6.0, tl.abs(sums.a1))) < 0) & (h < 0)
    return rebase(Sums(tl.where(lost, float("nan"), sums.z), sums.a1, sums.a2), h, e_h, s)


@triton.jit
def _step_reference(
    a, b, later_a, later_b, inside, scales,
    SAME_SCALE: tl.constexpr, MASKED: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """The n that suits a step of one or two tiles, its `_mean_difference`, and b's largest logit.

    And whether the differences are finite. A reference fixed by the first tile would do for Gaussian logits.
    A trained teacher puts most of its mass on a token of some later tile, and sums about a distant c cancel:
    the row would have to be swept again.
    """
    top_a = top_of(tl.maximum(a, later_a) if TWO else a)
    top_b = top_of(tl.maximum(b, later_b) if TWO else b)
    n = exp2_offset(top_a, scales.k_a)
    apart = difference(top_a, top_b, scales, SAME_SCALE)
    w, later_w, mass = _step_weights(a, later_a, scales.k_a, n, TWO)
    mean, finite = _mean_difference(
        w, later_w, mass, a, b, later_a, later_b, inside, apart, scales, SAME_SCALE, MASKED, TWO
    )
    return n + _rise_of(mass), mean, top_b, finite


@triton.jit
def _rebase_to_step(
    a, b, later_a, later_b, inside, reference, sums, scales,
    SAME_SCALE: tl.constexpr, MASKED: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """The fast sweep's reference that suits a step of one or two tiles, and the sums rebased to it.

    And whether `_fast_sweep` looks to be right for these columns.
    """
    n, mean, _, fits = _step_reference(a, b, later_a, later_b, inside, scales, SAME_SCALE, MASKED, TWO)
    c = mean * scales.k_a if SAME_SCALE else mean * LOG2E
    if uniform(reference.n != NO_REFERENCE, a.shape[0]):
        # In pairs: where one column outweighs the others, an error of e^−h is one of Z_b, and so of all of b.
        h, h_low = two_sum(c, -reference.c)
        e_h = tl.exp2(-h) if c.dtype == tl.float64 else exp2_pair(-h, -h_low)
        sums = Sums(sums.z, sums.a1 * LN2, sums.a2)
        z, a1, a2 = _rebased(sums, h * LN2, e_h, tl.exp2(reference.n - n))
        sums = Sums(z, a1 * LOG2E, a2)
    return FastReference(n, c), sums, fits


@triton.jit
def _robust_rebase(a, b, inside, reference, sums, scales, SAME_SCALE: tl.constexpr, MASKED: tl.constexpr):
    """The robust sweep's reference that suits a tile, and the sums rebased to it."""
    n, c, top_b, _ = _step_reference(a, b, a, b, inside, scales, SAME_SCALE, MASKED, False)
    if SAME_SCALE:
        c = c * scales.shared
    if uniform(reference.n != NO_REFERENCE, a.shape[0]):
        # In pairs, as above.
        h, h_low = two_sum(c, -reference.c)
        if c.dtype == tl.float64:
            e_h = exp_minus(h)
        else:
            high, low = times_log2e(-h, -h_low)
            e_h = exp2_pair(high, low)
        sums = _rebased(sums, h, e_h, tl.exp2(reference.n - n))
    else:
        # Of columns in which b alone had mass, a2 is about b's own offset.
        alone = exp2_over_offset(n, reference.n_b, c, scales, SAME_SCALE)
        sums = Sums(sums.z * alone, sums.a1 * alone, sums.a2 * alone)
    # b is measured from its own maximum, where exponents are small, and brought to a's by one factor: an
    # exponent of 64 or more would be rounded by 2.6e-6. That maximum is at 2^1 or 2^2: so tops of b alone,
    # which rebase nothing, may lie 30 powers of 2 above it before their exponents reach 32.
    n_b = exp2_offset(top_b, scales.k_b) + _B_RAISED
    return Reference(n, c, n_b, exp2_over_offset(n, n_b, c, scales, SAME_SCALE)), sums


@triton.jit
def _terms(x, b, w, inside, n_b, b_to_a, scales, MASKED: tl.constexpr):
    """The sums `[R]` of w·x and of w·g(x) over a tile, with w·eˣ from b's own exponents."""
    v = weights(b, scales.k_b, n_b)
    if MASKED:  # w is 0 there
        v = tl.where(inside, v, 0.0)
        x = tl.where(inside, x, 0.0)
    wx = w * x
    terms = tl.where(is_near(x), wx * g_near(x), mul_sub(v, b_to_a, w) - wx)
    return tl.sum(wx, axis=1), tl.sum(terms, axis=1)


@triton.jit
def _tile_sums(
    a, b, w, inside, c, a1, a2, scales, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr
):
    """a1 and the scaled a2 of a fast sweep with a `[R, VEC]` tile of weights w added."""
    x = log2_ratio(a, b, c, scales, SAME_SCALE, EXACT)
    if MASKED:  # w is 0 there
        x = tl.where(inside, x, 0.0)
    return add_products(a1, w, x), add_products(a2, w, scaled_g(x, _g_scale(x.dtype)))


@triton.jit
def _g_scale(dtype: tl.constexpr):
    return tl.full([], _G_SCALE_64 if dtype == tl.float64 else _G_SCALE, dtype)


@triton.jit
def _fast_step(
    a, b, later_a, later_b, inside, start, reference, sums, scales,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """The `FastReference` and the sums with a step of one or two tiles added.

    And the column that it starts at, MISFIT where a new reference tells that `_fast_sweep` does not fit here.
    """
    w, later_w, mass = _step_weights(a, later_a, scales.k_a, reference.n, TWO)
    if any_reaches(mass, _REBASE_ABOVE):
        reference, sums, fits = _rebase_to_step(
            a, b, later_a, later_b, inside, reference, sums, scales, SAME_SCALE, MASKED, TWO
        )
        start = tl.where(fits, start, MISFIT)
        w, later_w, mass = _step_weights(a, later_a, scales.k_a, reference.n, TWO)
    n, c = reference
    z, a1, a2 = sums
    z += mass
    more = tl.zeros([a.shape[0]], a.dtype)
    a1, more = _tile_sums(a, b, w, inside, c, a1, more, scales, SAME_SCALE, EXACT, MASKED)
    if TWO:
        a1, more = _tile_sums(
            later_a, later_b, later_w, inside, c, a1, more, scales, SAME_SCALE, EXACT, MASKED
        )
    if any_reaches(more, float("inf")):
        # A token of b far above what a has of it: by b's own exponents, which are small where it is large.
        top_b = top_of(b)
        if TWO:  # one by one: of a maximum of both the compiler would make one with the rebase's, and always
            top_b = tl.maximum(top_b, top_of(later_b))
        n_b = exp2_offset(top_b, scales.k_b)
        b_to_a = exp2_over_log2(n, n_b, c, scales, SAME_SCALE)
        x = log2_ratio(a, b, c, scales, SAME_SCALE, EXACT) * LN2
        _, far = _terms(x, b, w, inside, n_b, b_to_a, scales, MASKED)
        a2 += far
        if TWO:
            x = log2_ratio(later_a, later_b, c, scales, SAME_SCALE, EXACT) * LN2
            _, far = _terms(x, later_b, later_w, inside, n_b, b_to_a, scales, MASKED)
            a2 += far
    else:
        a2 = mul_add(more, 1.0 / _g_scale(a.dtype), a2)
    return start, reference, Sums(z, a1, a2)


@triton.jit
def _add_tile(a, b, inside, reference, sums, scales, SAME_SCALE: tl.constexpr, MASKED: tl.constexpr):
    """The reference and the sums of a robust sweep with a tile added."""
    w = weights(a, scales.k_a, reference.n)
    mass = tl.sum(w, axis=1)
    if any_reaches(mass, _REBASE_ABOVE):
        reference, sums = _robust_rebase(a, b, inside, reference, sums, scales, SAME_SCALE, MASKED)
        w = weights(a, scales.k_a, reference.n)
        mass = tl.sum(w, axis=1)
    x = log_ratio(a, b, reference.c, scales, SAME_SCALE, False)
    a1, a2 = _terms(x, b, w, inside, reference.n_b, reference.b_to_a, scales, MASKED)
    return reference, Sums(sums.z + mass, sums.a1 + a1, sums.a2 + a2)


@triton.jit
def is_held(n):
    """Whether float32 holds a side's n to a fraction of 1."""
    return tl.abs(n) <= 16777216.0 if n.dtype == tl.float32 else n == n


@triton.jit
def finish(z, a1, a2):
    """A row's value, log_z_ratio = log(Z_b/(Z_a e^c)), and whether its float64 sums were good enough."""
    a1 = a1 / z
    a2 = a2 / z
    y = a1 + a2
    correction = log1p_minus(y)
    near = tl.abs(y) < 0.5
    # Not correction + y throughout: y reaches e^40, and log(1 + y) − y + y has lost its digits there.
    log_z_ratio = tl.where(near, correction + y, tl.log(1.0 + y))
    # The same number twice; the second form does not subtract two large ones where y is large.
    value = tl.where(near, a2 + correction, log_z_ratio - a1)
    size = tl.where(near, a2, tl.abs(a1) + tl.abs(log_z_ratio))
    # Where a logit was masked with a number as low as -1e9, what is left of y is the sums' rounding.
    return value, log_z_ratio, (size <= 4.0 * value) & (size < 64.0)


@triton.jit
def fallback_row(
    a_row, b_row, V, scales, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, CT: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """The `Fallback` of a row that the one-pass sums cannot do: −inf logits, disjoint supports, overflow.

    It takes three sweeps. Sides are normalised by their own maxima, and columns where x is large add b's mass
    instead of w·g(x). The shifts are 0 in all rows but those whose logits are out of range.
    """
    INF: tl.constexpr = float("inf")
    top_a = tl.full([R, VEC], -INF, CT)
    top_b = tl.full([R, VEC], -INF, CT)
    for start in range(0, V, R * VEC):
        top_a = tl.maximum(top_a, load_ragged(a_row, start, V, -INF, CT, R, VEC, LAYOUT))
        top_b = tl.maximum(top_b, load_ragged(b_row, start, V, -INF, CT, R, VEC, LAYOUT))
    m_a = tl.max(top_a)
    m_b = tl.max(top_b)
    shift_a = out_of_range_shift(m_a, scales.k_a)
    shift_b = out_of_range_shift(m_b, scales.k_b)
    m_a -= shift_a
    m_b -= shift_b
    n_a = exp2_offset(m_a, scales.k_a)
    n_b = exp2_offset(m_b, scales.k_b)

    # Any c near the mean serves; the difference of the maxima keeps a common shift out of the sum.
    c_start = difference(m_a, m_b, scales, SAME_SCALE)
    if SAME_SCALE:
        c_start = c_start * scales.shared
    z_a = tl.zeros([R, VEC], CT)
    z_b = tl.zeros([R, VEC], CT)
    shift = tl.zeros([R, VEC], CT)
    neg_inf = tl.zeros([R, VEC], tl.int32)
    for start in range(0, V, R * VEC):
        a = load_ragged(a_row, start, V, -INF, CT, R, VEC, LAYOUT) - shift_a
        b = load_ragged(b_row, start, V, -INF, CT, R, VEC, LAYOUT) - shift_b
        w = weights(a, scales.k_a, n_a)
        z_a += w
        z_b += weights(b, scales.k_b, n_b)
        # Not from where one side is masked with a number: c would lie as far out, and round every x.
        away = log_ratio(a, b, c_start, scales, SAME_SCALE, EXACT)
        shift += tl.where(tl.abs(away) < 1e4 * tl.maximum(scales.shared, 1.0), w * away, 0.0)
        neg_inf |= ((a > -INF) & (b == -INF)).to(tl.int32)
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
        w = weights(a, scales.k_a, n_a)
        x = log_probability_ratio(a, b, c, c_rest, scales, SAME_SCALE, EXACT)
        x = tl.where((a == -INF) | (b == -INF), 0.0, x)  # a NaN stays
        # A column that b lacks takes all of its p from y, and adds no mass.
        far = (x > 2.0) | (a == -INF) | (b == -INF)
        mass_b += tl.where(far, weights(b, scales.k_b, n_b), 0.0)
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
    n_b_as_a = other_exp2_offset(n_a, n_b, exact_c, scales, SAME_SCALE)
    gap = (n_b.to(tl.float64) - n_b_as_a) / LOG2E
    far_b = tl.exp(tl.minimum(gap, 60.0)) * tl.sum(mass_b).to(tl.float64) / z_a
    a2 = tl.sum(a2).to(tl.float64) + far_b
    y = a1 + a2
    correction = log1p_minus(y)
    has_neg_inf = tl.max(tl.max(neg_inf, axis=1)) > 0
    # a2 < 1: what is left of two large sums is their rounding, and may be 0.
    near = (tl.abs(y) < 0.5) & (a2 < 1.0) & (gap < 60.0)
    log_z_ratio = tl.where(near, correction + y, gap + tl.log(z_b / z_a))
    value = tl.where(near, a2 + correction, log_z_ratio - a1)
    # NaN sums (a NaN, a +inf, a row of −inf) must stay NaN where b has a −inf too.
    value = tl.where(has_neg_inf, tl.where(value == value, INF, value), value)
    log_z_ratio += c_rest.to(tl.float64)
    return Fallback(shift_a, n_a, z_a, shift_b, n_b, z_b, c, log_z_ratio, value)


@triton.jit
def _no_columns(n_b, R: tl.constexpr, CT: tl.constexpr):
    """The reference and the sums before the first column."""
    n = tl.full([], NO_REFERENCE, CT)
    c = tl.full([], 0.0, CT)
    reference = Reference(n, c, tl.full([], n_b, CT), tl.full([], 1.0, CT))
    return reference, Sums(tl.zeros([R], CT), tl.zeros([R], CT), tl.zeros([R], CT))


@triton.jit
def _total(sums):
    return Sums(tl.sum(sums.z), tl.sum(sums.a1), tl.sum(sums.a2))


@triton.jit
def _first_reference(a, b, scales, SAME_SCALE: tl.constexpr):
    """The reference that suits a split's first tile, where its differences are of one size.

    Where they are not, the first step rebases. That would cost twice as much, and all of the step again.
    """
    top_a = top_of(a)
    start = difference(top_a, top_of(b), scales, SAME_SCALE)
    n = exp2_offset(top_a, scales.k_a)
    w = weights(a, scales.k_a, n)
    mass = tl.sum(w, axis=1)
    everywhere = tl.full([a.shape[0], a.shape[1]], 1, tl.int1)
    moment = _moment(w, a, b, everywhere, start, scales, SAME_SCALE, False)
    mean = tl.sum(moment) / tl.sum(mass)
    near = tl.abs(mean) * scales.shared < 1000.0
    c = (start + mean) * (scales.k_a if SAME_SCALE else LOG2E)
    n += _rise_of(mass) + 1.0  # a step has twice as many columns
    return FastReference(tl.where(near, n, NO_REFERENCE), tl.where(near, c, 0.0))


@triton.jit
def _in_nats(reference, sums, scales, SAME_SCALE: tl.constexpr):
    """The `Reference` and the sums of a fast sweep as all others take them.

    c is rounded, as it is stored; the sums are brought to what that leaves of it.
    """
    n, c = reference
    z, a1, a2 = sums
    to_c = c * LN2
    rest = fma(c, tl.full([], LN2, c.dtype), -to_c)
    if c.dtype == tl.float32:
        unit = LN2_LOW
        if SAME_SCALE:  # shared/k
            unit = LN2_LOW - (scales.over_k_a + scales.under_shared) * LN2
        rest = mul_add(c, unit, rest)
    a1 = a1 * LN2
    a2 = mul_add(rest, a1 + a2, mul_add(rest * rest * 0.5, z, a2))
    a1 = mul_add(rest, z, a1)
    # As a reference of b's own mass would have it.
    n_b = tl.floor(n + c) + floor_log2(z + a1 + a2)
    return Reference(n, to_c, n_b + (_B_RAISED - 7.0), to_c * 0.0), Sums(z, a1, a2)


@triton.jit
def _fast_sweep(
    a_row, b_row, first, last, scales, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, CT: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """`sweep` of columns without −inf, whose b − a may be taken as it is rounded where EXACT.

    And whether that is so. It ends early where a new reference tells that it is not.
    """
    BLOCK: tl.constexpr = R * VEC
    offsets = tile_offsets(R, VEC, LAYOUT)
    reference = FastReference(tl.full([], NO_REFERENCE, CT), tl.full([], 0.0, CT))
    sums = Sums(tl.zeros([R], CT), tl.zeros([R], CT), tl.zeros([R], CT))
    everywhere = tl.full([R, VEC], 1, tl.int1)
    # Two tiles a step where threads hold them in words: half as often a maximum that all threads wait for.
    # Held one by one, two tiles and the next two take more registers than there are.
    a_bits: tl.constexpr = a_row.dtype.element_ty.primitive_bitwidth
    b_bits: tl.constexpr = b_row.dtype.element_ty.primitive_bitwidth
    TWO: tl.constexpr = a_bits + b_bits == 32
    STEP: tl.constexpr = 2 * BLOCK if TWO else BLOCK
    LATER: tl.constexpr = STEP - BLOCK
    full = last // STEP * STEP  # splits begin with a step
    start = first
    if first < full:
        # A step ahead: the barriers of a maximum would otherwise wait for its loads as well.
        next_a = load_tile(a_row, first, R, VEC, LAYOUT)
        next_b = load_tile(b_row, first, R, VEC, LAYOUT)
        if TWO:
            behind_a = load_tile(a_row + LATER, first, R, VEC, LAYOUT)
            behind_b = load_tile(b_row + LATER, first, R, VEC, LAYOUT)
        a = unpacked(next_a, a_row, CT, R, VEC)
        b = unpacked(next_b, b_row, CT, R, VEC)
        reference = _first_reference(a, b, scales, SAME_SCALE)
        while start < full:
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
            start, reference, sums = _fast_step(
                a, b, later_a, later_b, everywhere, start, reference, sums, scales,
                SAME_SCALE, EXACT, False, TWO,
            )  # fmt: skip
            start += STEP
    while start < last:
        inside = start + offsets < last
        a = load_ragged(a_row, start, last, -float("inf"), CT, R, VEC, LAYOUT)
        b = load_ragged(b_row, start, last, -float("inf"), CT, R, VEC, LAYOUT)
        start, reference, sums = _fast_step(
            a, b, a, b, inside, start, reference, sums, scales, SAME_SCALE, EXACT, True, False
        )
        start += BLOCK
    reference, sums = _in_nats(reference, _total(sums), scales, SAME_SCALE)
    fits = (start < MISFIT) & ((sums.a1 + sums.a2) * 0.0 == 0.0)  # an x of −inf, or one that is none
    fits = fits & (last - first > 1)  # c is rounded, and with V = 1 all is exactly 0
    if EXACT:
        if SAME_SCALE:
            if uniform(fits & ~rounding_is_small(sums, reference.c), R):
                fits = differences_are_exact(a_row, b_row, first, last, CT, R, VEC, LAYOUT)
    return reference, sums, fits


@triton.jit
def differences_are_exact(
    a_row, b_row, first, last, CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr
):
    """Whether b − a is what it is rounded to in columns [first, last), which begin with a tile.

    It most often is between logits of 16 bits, also where `rounding_is_small` cannot tell: one must be 2^16
    times the other.
    """
    BLOCK: tl.constexpr = R * VEC
    inexact = tl.zeros([R, VEC], tl.int1)
    full = last - (last - first) % BLOCK
    for start in range(first, full, BLOCK):
        a = unpacked(load_tile(a_row, start, R, VEC, LAYOUT), a_row, CT, R, VEC)
        b = unpacked(load_tile(b_row, start, R, VEC, LAYOUT), b_row, CT, R, VEC)
        d = b - a
        inexact |= (b - d != a) | (a + d != b)
    if full < last:
        a = load_ragged(a_row, full, last, 0.0, CT, R, VEC, LAYOUT)
        b = load_ragged(b_row, full, last, 0.0, CT, R, VEC, LAYOUT)
        d = b - a
        inexact |= (b - d != a) | (a + d != b)
    return tl.max(tl.max(inexact.to(tl.int32), axis=1)) == 0


@triton.jit
def rounding_is_small(sums, c):
    """Whether fl(b − a) may be taken for b − a in these columns, whose KL of their own is at least `least`.

    What the columns' KLs sum to, by the mass of each split, a row's KL exceeds: so it holds for the row.
    """
    z, a1, a2 = sums
    y = a1 + a2
    # KL is log1p(y) − a1 with sums over z, and log1p(y) at least y − y²/(2 + y), or y − y²/(1 + y) below 0.
    least = a2 - y * y / mul_add(z, tl.where(y < 0, 1.0, 2.0), y)
    return least >= c * c * (2.0 * _LEAST_KL) * z


@triton.jit
def column_class(a, b, lowest_a, lowest_b):
    low_a = a < lowest_a
    neither = tl.where(b > -float("inf"), tl.where(low_a, BOTH_LACK, UNDECIDED), B_LACKS)
    neither = tl.where((a == -float("inf")), BOTH_LACK, neither)
    return tl.where(b < lowest_b, neither, tl.where(low_a, A_LACKS, 0))


@triton.jit
def worst_class(worst, n, lowest_a, lowest_b, scales):
    """The largest `column_class` of columns that were swept about n: UNDECIDED where `lowest` was no −inf.

    That is a temperature at which it weighs something, or a split whose other logits are as low.
    """
    undecided = (lowest_a * scales.k_a > -1e29) | (lowest_b * scales.k_b > -1e29)
    undecided = undecided | ((n < -1e29) & (n != NO_REFERENCE))
    return tl.where(undecided & (worst > 0), UNDECIDED, worst)


@triton.jit
def _start_with_b(b, reference, sums, scales):
    """The reference of columns in which only b has mass so far: a2 is b's mass about n_b itself."""
    n_b = tl.maximum(exp2_offset(tl.max(b), scales.k_b) + _B_RAISED, reference.n_b)
    a2 = sums.a2 * tl.exp2(reference.n_b - n_b)
    return Reference(reference.n, reference.c, n_b, reference.b_to_a), Sums(sums.z, sums.a1, a2)


@triton.jit
def _add_alone(a, classes, alone, scales, lowest_a):
    """a's mass in columns that b lacks, with that of a tile added."""
    mass, n = alone
    a = tl.where(classes == B_LACKS, a, lowest_a)
    to_n = tl.maximum(exp2_offset(tl.max(a), scales.k_a), n)
    return Alone(mul_add(mass, tl.exp2(n - to_n), tl.sum(weights(a, scales.k_a, to_n), axis=1)), to_n)


@triton.jit
def _robust_step(
    a, b, inside, reference, sums, alone, worst, lowest_a, lowest_b, scales,
    SAME_SCALE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`_add_step` of one tile, in which −inf may stand; `worst` becomes the largest `column_class` so far."""
    classes = column_class(a, b, lowest_a, lowest_b)
    if MASKED:
        classes = tl.where(inside, classes, 0)
    worst = tl.maximum(worst, tl.max(classes, axis=1))
    alone = _add_alone(a, classes, alone, scales, lowest_a)
    a = no_lower(tl.where(classes == B_LACKS, lowest_a, a), lowest_a)
    b = no_lower(b, lowest_b)
    if uniform(reference.n == NO_REFERENCE, a.shape[0]):
        reference, sums = _start_with_b(b, reference, sums, scales)
    reference, sums = _add_tile(a, b, inside, reference, sums, scales, SAME_SCALE, MASKED)
    return reference, sums, alone, worst


@triton.jit
def _robust_sweep(
    a_row, b_row, first, last, scales, SAME_SCALE: tl.constexpr, CT: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """`sweep` where `_fast_sweep` met −inf, or differences that float32 does not hold.

    The sums leave out columns that b lacks: they would cancel about a c that fits the others.
    """
    BLOCK: tl.constexpr = R * VEC
    offsets = tile_offsets(R, VEC, LAYOUT)
    reference, sums = _no_columns(NO_REFERENCE, R, CT)
    alone = Alone(tl.zeros([R], CT), reference.n)
    worst = tl.zeros([R], tl.int32)
    everywhere = tl.full([R, VEC], 1, tl.int1)
    lowest_a = lowest(scales.a, CT)
    lowest_b = lowest(scales.b, CT)
    full = last - (last - first) % BLOCK
    for start in range(first, full, BLOCK):
        a = unpacked(load_tile(a_row, start, R, VEC, LAYOUT), a_row, CT, R, VEC)
        b = unpacked(load_tile(b_row, start, R, VEC, LAYOUT), b_row, CT, R, VEC)
        reference, sums, alone, worst = _robust_step(
            a, b, everywhere, reference, sums, alone, worst, lowest_a, lowest_b, scales, SAME_SCALE, False
        )
    if full < last:
        inside = full + offsets < last
        a = load_ragged(a_row, full, last, -float("inf"), CT, R, VEC, LAYOUT)
        b = load_ragged(b_row, full, last, -float("inf"), CT, R, VEC, LAYOUT)
        reference, sums, alone, worst = _robust_step(
            a, b, inside, reference, sums, alone, worst, lowest_a, lowest_b, scales, SAME_SCALE, True
        )
    n, c, n_b, b_to_a = reference
    z, a1, a2 = _total(sums)
    worst = worst_class(tl.max(worst), n, lowest_a, lowest_b, scales)
    if uniform(n == NO_REFERENCE, R):
        # No column in which both have mass: what one has alone is about its own offset.
        n = tl.where(a2 > 0, n_b, alone.n)
        as_a = tl.exp2(n.to(tl.float64) - other_exp2_offset(n, n, c, scales, SAME_SCALE)).to(CT)
        a2 = tl.where(a2 > 0, a2 * as_a, a2)
    mass = tl.sum(alone.mass) * tl.exp2(alone.n - n)
    return Reference(n, c, n_b, b_to_a), Sums(z, a1, a2), mass, worst


@triton.jit
def sweep(
    a_row, b_row, first, last, scales, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, CT: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """The state of columns [first, last): `Reference`, `Sums`, a's mass alone, largest `column_class`."""
    reference, sums, fits = _fast_sweep(
        a_row, b_row, first, last, scales, SAME_SCALE, EXACT, CT, R, VEC, LAYOUT
    )
    alone = tl.full([], 0.0, CT)
    worst = tl.full([], 0, tl.int32)
    if uniform(~fits, R):
        reference, sums, alone, worst = _robust_sweep(
            a_row, b_row, first, last, scales, SAME_SCALE, CT, R, VEC, LAYOUT
        )
    return reference, sums, alone, worst


@triton.jit
def merged(n, c, n_b, sums, alone, CT: tl.constexpr):
    """One state (n, c, n_b, sums, alone) from a vector of them, the sums in float64.

    A split without mass of a (z = 0) has no reference to bring, but b's mass or a NaN of it must reach the
    sums.
    """
    z, a1, a2 = sums
    top = tl.max(tl.where(z > 0, n, NO_REFERENCE))
    weight = tl.exp2((n - top).to(tl.float64))
    mass = z.to(tl.float64) * weight
    shared = (tl.sum(mass * c.to(tl.float64)) / tl.sum(mass)).to(CT)
    h = shared.to(tl.float64) - c.to(tl.float64)
    sums = Sums(z.to(tl.float64), a1.to(tl.float64), a2.to(tl.float64))
    z, a1, a2 = rebase(sums, h, exp_minus(h), weight)
    mass_b = z + a1 + a2
    top_n_b = tl.max(tl.where(mass_b == tl.max(mass_b), n_b, NO_REFERENCE))  # of the split with most of b
    alone = tl.sum(alone.to(tl.float64) * weight)
    return top, shared, top_n_b, Sums(tl.sum(z), tl.sum(a1), tl.sum(a2)), alone


@triton.jit
def store_row(
    value_out, stats, a_row, b_row, V, n, c, n_b, sums, alone, worst, scales,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, CT: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Store a row's value and statistics from its state; return its path.

    `worst` is the largest `column_class` of the row, `alone` a's mass in columns that b lacks.
    """
    z_a, a1, a2 = sums
    value, log_z_ratio, good = finish(z_a, a1, a2)
    ratio = tl.exp(log_z_ratio)
    good = good & (worst < UNDECIDED)
    # Z_b, which all of b inherits, may be off by more than the value: by a 2^24th of a1 over e^log_z_ratio;
    # by 1.3e-6 where b's top lies so far above n_b, which is of the last rebase, that its exponent passes 32.
    n_b_as_a = other_exp2_offset(n, n_b, c, scales, SAME_SCALE)
    log2_mass_b = n_b_as_a + tl.log2(z_a * ratio)
    good = good & (tl.abs(a1) <= 6.0 * ratio * z_a) & (log2_mass_b < n_b + 32.0)
    # The gradient's weights are about n_b too, as `exp2_offset` has it: by b's top of the last rebase, unless
    # b's sum tells of a top far above that one.
    n_b = n_b.to(tl.float64) - _B_RAISED
    n_b = tl.where(log2_mass_b < n_b + 14.0, n_b, tl.floor(log2_mass_b) - 7.0).to(CT)
    n_b_as_a = other_exp2_offset(n, n_b, c, scales, SAME_SCALE)
    z_b = z_a * ratio * tl.exp2(n_b_as_a - n_b.to(tl.float64))
    if worst == B_LACKS:
        value = tl.where(value == value, float("inf"), value)
        log_z_ratio -= tl.log(1.0 + alone / z_a)
        z_a += alone
        # They may hold a's top, far above the n of the others.
        rise = tl.where(z_a < 16384.0, 0.0, tl.floor(tl.log2(z_a)) - 7.0)
        n = (n + rise).to(CT)
        z_a *= tl.exp2(-rise)
        good = good & (z_a < float("inf"))
    good = good & is_held(n) & is_held(n_b)
    if not good:
        row = fallback_row(a_row, b_row, V, scales, SAME_SCALE, False, CT, R, VEC, LAYOUT)
        c = row.c
        log_z_ratio = row.log_z_ratio
        value = row.value
        # `stored_side` tells n and shift apart.
        n = tl.where(row.shift_a != 0, row.shift_a, row.n_a)
        z_a = tl.where(row.shift_a != 0, -row.z_a, row.z_a)
        n_b = tl.where(row.shift_b != 0, row.shift_b, row.n_b)
        z_b = tl.where(row.shift_b != 0, -row.z_b, row.z_b)
    # max keeps NaN out only by the comparison's direction: NaN < 0 is false, so NaN stays.
    value = tl.where(value < 0, 0.0, value)
    tl.store(value_out, value.to(value_out.dtype.element_ty))
    tl.store(stats, n)
    tl.store(stats + 1, (1.0 / z_a).to(CT))
    tl.store(stats + 2, n_b)
    tl.store(stats + 3, (1.0 / z_b).to(CT))
    # The gradient measures from where log b = log a: a large log_z_ratio of its own would round r there.
    shift = c.to(tl.float64) + log_z_ratio
    c = shift.to(CT)
    tl.store(stats + 4, c)
    tl.store(stats + 5, (shift - c.to(tl.float64)).to(CT))
    tl.store(stats + 6, value.to(CT))
    path = tl.where(worst > BOTH_LACK, ONE_SIDED, tl.where(worst > 0, MASKED_ALIKE, PLAIN))
    if EXACT:
        if SAME_SCALE:
            # Once rounded, c + log_z_ratio is off in all columns alike, in D by the square of that.
            path = tl.where((path == PLAIN) & (value < shift * shift * _LEAST_KL), MASKED_ALIKE, path)
    return tl.where(good, path, FALLBACK)

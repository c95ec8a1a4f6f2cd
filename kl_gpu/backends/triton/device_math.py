"""Device functions the Triton kernels share: differences, the function g, the row state (docs/numerics.md).

A state (m, c, Z, A1, A2) stands for a range of columns of a row of KL(a‖b): with w = exp(a − m) and
x = (b − a) − c, Z = Σ w, A1 = Σ w x, A2 = Σ w g(x). m is kept as the whole number n ≈ m·k that `exp2_offset`
gives, in units of log2. c is in nats, so that one fma takes it off the scaled difference. Where SAME_SCALE
says that both temperatures are equal, it is in nats of their 1/T rounded to the kernels' dtype, as x is.

Comments name these constexpr parameters once for all kernels: CT is the dtype that is computed in, a tile is
`[R, VEC]` columns that threads own as LAYOUT says, FORMULA is the divergence's formula.
"""

from __future__ import annotations

import os
from collections import namedtuple

import triton
import triton.language as tl

from . import launch
from .launch import Layout

# The interpreter multiplies and adds in two roundings where the hardware's fma rounds once.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
LOG2E = tl.constexpr(launch.LOG2E)
LOG2E_LOW = tl.constexpr(1.925963033500e-8)  # what float32 lacks of it
LN2 = tl.constexpr(0.6931471805599453)
LN2_LOW = tl.constexpr(-1.904654299957768e-09)  # what float32 lacks of it
# m before any column was seen: finite, so that −inf logits weigh 0 rather than NaN.
NO_REFERENCE = tl.constexpr(-1e30)

SINGLES = tl.constexpr(int(Layout.SINGLES))
RUNS = tl.constexpr(int(Layout.RUNS))
ALIGNED_RUNS = tl.constexpr(int(Layout.ALIGNED_RUNS))
PAIRS_IN_WORDS = tl.constexpr(int(Layout.PAIRS_IN_WORDS))
PAIRS = tl.constexpr(int(Layout.PAIRS))


# The two sides' 1/T: k is log2(e)/T and `shared` the 1/T of a, both in CT; a and b are in float64. In CT by
# how much of itself each k is too large, and `shared` too small.
Scales = namedtuple("Scales", "k_a k_b shared a b over_k_a over_k_b under_shared")
# How `probability` normalises one side: with e = k·(logit − shift) − n, 2^e · `scale_at` e.
Softmax = namedtuple("Softmax", "shift k n scale scale_correction")
# What the later sweeps know of a row: both sides' `Softmax`, log(b/a) = x − log_z_ratio, β and 1 − β.
Row = namedtuple("Row", "a b c log_z_ratio beta rest scales")
# Z, A1 and A2 of a state: scalars, or a vector of one sum per thread or split.
Sums = namedtuple("Sums", "z a1 a2")


@triton.jit
def stored_scale(scale_ptr):
    """A row's own 1/T: what `from_high_low` makes of a number that all rows share."""
    scale = tl.load(scale_ptr).to(tl.float64)
    high = scale.to(tl.float32)
    return from_high_low(high, (scale - high.to(tl.float64)).to(tl.float32))


@triton.jit
def scales_of(row, scales_ptr, parts, HAS_SCALES: tl.constexpr, SAME_SCALE: tl.constexpr, CT: tl.constexpr):
    """Of a row: its own, of `[A*B, 1]` or `[A*B, 2]`, or the two that all share, of `launch.scale_parts`."""
    if HAS_SCALES:
        own = scales_ptr + tl.full([], row, tl.int64) * (1 if SAME_SCALE else 2)
        a = stored_scale(own)
        b = a if SAME_SCALE else stored_scale(own + 1)
    else:
        a = from_high_low(parts[0], parts[1])
        b = from_high_low(parts[2], parts[3])
    if tl.float64 == CT:  # they are what they are taken for
        k_a = a * LOG2E
        return Scales(k_a, b * LOG2E, a, a, b, k_a * 0.0, k_a * 0.0, k_a * 0.0)
    if not HAS_SCALES:
        return Scales(
            tl.full([], parts[4], CT), tl.full([], parts[5], CT), tl.full([], parts[0], CT), a, b,
            tl.full([], parts[6], CT), tl.full([], parts[7], CT), tl.full([], parts[8], CT),
        )  # fmt: skip
    shared = a.to(CT)
    # As the host has them for all rows.
    log2_a = a * LOG2E
    log2_b = b * LOG2E
    k_a = log2_a.to(CT)
    k_b = log2_b.to(CT)
    over_a = ((k_a.to(tl.float64) - log2_a) / k_a.to(tl.float64)).to(CT)
    over_b = ((k_b.to(tl.float64) - log2_b) / k_b.to(tl.float64)).to(CT)
    return Scales(k_a, k_b, shared, a, b, over_a, over_b, ((a - shared.to(tl.float64)) / a).to(CT))


@triton.jit
def quotient(n, magic, shift):
    """n // d of n ≥ 0, with the numbers of `launch.divisor`: a division takes five times as long."""
    high = tl.umulhi((n + n).to(tl.uint32, bitcast=True), magic.to(tl.uint32, bitcast=True))
    return (high >> shift).to(tl.int32)


@triton.jit
def row_start(row, n_inner, base, outer_stride, inner_stride):
    outer = row // n_inner
    return place_start(outer, row - outer * n_inner, base, outer_stride, inner_stride)


@triton.jit
def place_start(outer, inner, base, outer_stride, inner_stride):
    # 64 bits before the multiply: 2³¹ elements are 16 744 rows of 128 256.
    return base + outer.to(tl.int64) * outer_stride + inner.to(tl.int64) * inner_stride


@triton.jit
def tile_pointers(start, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr):
    """start + tile_offsets, as two sums: the second is of constants, which cost no instruction."""
    RUN: tl.constexpr = 2 if LAYOUT >= PAIRS_IN_WORDS else VEC if LAYOUT >= RUNS else 1
    which = tl.arange(0, VEC)[None, :]
    if RUN == VEC:
        return start + tl.arange(0, R)[:, None] * VEC + which
    elif RUN == 1:
        return start + tl.arange(0, R)[:, None] + which * R
    else:
        return start + tl.arange(0, R)[:, None] * RUN + (which % RUN + which // RUN * (R * RUN))


@triton.jit
def tile_offsets(R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr):
    """Columns of a `[R, VEC]` tile; axis 1 lies inside a thread, so sums over it stay there."""
    return tile_pointers(0, R, VEC, LAYOUT)


@triton.jit
def tile_position(column, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr):
    """Where a column of a row would lie if each tile lay in memory as `[R, VEC]`: tile_offsets undone."""
    RUN: tl.constexpr = 2 if LAYOUT >= PAIRS_IN_WORDS else VEC if LAYOUT >= RUNS else 1
    within = column % (R * VEC)
    return column - within + within % (R * RUN) // RUN * VEC + within // (R * RUN) * RUN + within % RUN


@triton.jit
def _is_odd(row):
    """1 for a row of 16-bit numbers that starts in the middle of a 32-bit word, else 0."""
    return ((row.to(tl.int64) >> 1) & 1).to(tl.int32)


@triton.jit
def _is_paired(row, LAYOUT: tl.constexpr):
    return row.dtype.element_ty.primitive_bitwidth == 16 and LAYOUT >= PAIRS_IN_WORDS


@triton.jit
def _by_thread(pairs, R: tl.constexpr, VEC: tl.constexpr):
    """A tile's pairs `[R, VEC // 2]` from the order of their columns.

    Pairs lie in memory in one dimension because Triton orders threads by what is contiguous: in two, those of
    single 16-bit accesses would go to other threads than those of words, through shared memory.
    """
    return tl.trans(tl.reshape(pairs, [VEC // 2, R]))


@triton.jit
def _first(row, start, VEC: tl.constexpr, LAYOUT: tl.constexpr):
    """Where a tile starts; the compiler learns here that its runs are aligned.

    It would drop the same hint on the addresses of the whole tile where it moves a broadcast.
    """
    if LAYOUT == ALIGNED_RUNS:
        return tl.multiple_of(row + start, VEC * row.dtype.element_ty.primitive_bitwidth // 8)
    return row + start


@triton.jit
def _addresses(row, start, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr):
    return tile_pointers(_first(row, start, VEC, LAYOUT), R, VEC, LAYOUT)


@triton.jit
def _inside(start, last, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr):
    """Which columns of the tile at `start` lie before `last`: of a run all or none, where V is whole runs."""
    inside = start + tile_offsets(R, VEC, LAYOUT) < last
    if LAYOUT == ALIGNED_RUNS:
        inside = tl.max_constancy(inside, [1, VEC])
    return inside


@triton.jit
def _in_turn(x, y):
    """The columns of x `[R, n]` and of y, by turns."""
    return tl.reshape(tl.join(x, y), [x.shape[0], 2 * x.shape[1]])


@triton.jit
def _load_word(row, column):
    """The 16-bit numbers of this column and the next, in one word."""
    low = tl.load(row + column).to(tl.uint16, bitcast=True).to(tl.int32)
    return tl.load(row + column + 1).to(tl.uint16, bitcast=True).to(tl.int32) << 16 | low


@triton.jit
def _load_words(row, first, COUNT: tl.constexpr):
    """1, 2 or 4 words `[R, COUNT]` from the column `first` on. A thread owns all of a row."""
    if COUNT == 1:
        return _load_word(row, first)[:, None]
    elif COUNT == 2:
        return tl.join(_load_word(row, first), _load_word(row, first + 2))
    else:
        even = tl.join(_load_word(row, first), _load_word(row, first + 4))
        return _in_turn(even, tl.join(_load_word(row, first + 2), _load_word(row, first + 6)))


@triton.jit
def _load_column(row, column, last, other, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(row + column, mask=column < last, other=other)
    else:
        return tl.load(row + column)


@triton.jit
def _load_columns(row, first, step, last, other, COUNT: tl.constexpr, MASKED: tl.constexpr):
    """2 or 4 columns `[R, COUNT]`, `step` apart from `first` on. A thread owns all of a row."""
    x = _load_column(row, first, last, other, MASKED)
    if COUNT == 2:
        return tl.join(x, _load_column(row, first + step, last, other, MASKED))
    else:
        even = tl.join(x, _load_column(row, first + 2 * step, last, other, MASKED))
        y = _load_column(row, first + step, last, other, MASKED)
        return _in_turn(even, tl.join(y, _load_column(row, first + 3 * step, last, other, MASKED)))


@triton.jit
def _load_runs(row, start, last, other, R: tl.constexpr, VEC: tl.constexpr, MASKED: tl.constexpr):
    """A tile whose runs start anywhere, column by column: in one access, other threads would get them."""
    first = start + tl.arange(0, R) * VEC
    if VEC == 8:
        even = _load_columns(row, first, 2, last, other, 4, MASKED)
        return _in_turn(even, _load_columns(row, first + 1, 2, last, other, 4, MASKED))
    else:
        return _load_columns(row, first, 1, last, other, VEC, MASKED)


@triton.jit
def load_tile(
    row, start, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr, IN_WORDS: tl.constexpr = True
):
    """The whole tile at column `start`, as it lies in memory; `unpacked` makes logits of it.

    16-bit logits stay in words: a loop that carried them to its next pass one by one would pay an instruction
    and a register for each. Runs do not where IN_WORDS is False.
    """
    WORDS: tl.constexpr = R * VEC // 2
    AS_WORDS: tl.constexpr = row.dtype.element_ty.primitive_bitwidth == 16 and IN_WORDS
    if LAYOUT == RUNS:
        if AS_WORDS:
            return (_load_words(row + start, tl.arange(0, R) * VEC, VEC // 2),)
        else:
            return (_load_runs(row, start, 0, 0.0, R, VEC, False),)
    elif LAYOUT == ALIGNED_RUNS:
        if AS_WORDS:
            words = _first(row, start, VEC, LAYOUT).to(tl.pointer_type(tl.int32))
            return (tl.load(tile_pointers(words, R, VEC // 2, LAYOUT)),)
        else:
            return (tl.load(_addresses(row, start, R, VEC, LAYOUT)),)
    elif LAYOUT == SINGLES:
        return (tl.load(_addresses(row, start, R, VEC, LAYOUT)),)
    elif LAYOUT == PAIRS:
        # An odd row's pair lies in two words. Even rows load theirs twice, from the L1: a mask would have
        # registers cleared first. The second word lies in the row, whose columns no tile ends with (VEC does
        # not divide V, so there is a ragged one); half of the first may not, and is shifted out.
        odd = _is_odd(row)
        words = (row - odd + start).to(tl.pointer_type(tl.int32))
        beyond = (row + odd + start).to(tl.pointer_type(tl.int32))
        return tl.load(words + tl.arange(0, WORDS)), tl.load(beyond + tl.arange(0, WORDS))
    else:
        words = (row + start).to(tl.pointer_type(tl.int32))
        return (tl.load(words + tl.arange(0, WORDS)),)


@triton.jit
def tile_ahead(start, full, STEP: tl.constexpr):
    """Where the next pass starts; behind the last one its own start: a mask would clear registers first."""
    return tl.minimum(start + STEP, full - STEP)


@triton.jit
def unpacked(tile, row, CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr):
    """The logits `[R, VEC]` of a tile that `load_tile` read from `row`."""
    dtype: tl.constexpr = row.dtype.element_ty
    logits = tile[0]
    if logits.dtype == tl.int32:
        if len(tile) == 2:
            low = logits.to(tl.uint32, bitcast=True).to(tl.uint64)
            both = tile[1].to(tl.uint32, bitcast=True).to(tl.uint64) << 32 | low
            logits = (both >> (_is_odd(row) * 16).to(tl.uint64)).to(tl.uint32).to(tl.int32, bitcast=True)
        if len(logits.shape) == 1:
            logits = _by_thread(logits, R, VEC)
        if dtype == tl.bfloat16:
            first = (logits << 16).to(tl.float32, bitcast=True)
            second = (logits & -65536).to(tl.float32, bitcast=True)
        else:
            first = logits.to(tl.int16).to(dtype, bitcast=True)
            second = (logits >> 16).to(tl.int16).to(dtype, bitcast=True)
        logits = tl.reshape(tl.join(first, second), [R, VEC])
    return logits.to(CT)


@triton.jit
def load_ragged(
    row, start, last, other, CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr
):
    """The logits `[R, VEC]` of the tile at `start`, `other` from column `last` on."""
    if _is_paired(row, LAYOUT):
        first = start + tl.arange(0, R * VEC // 2) * 2
        second = tl.load(row + first + 1, mask=first + 1 < last, other=other)
        first = tl.load(row + first, mask=first < last, other=other)
        pairs = tl.join(_by_thread(first, R, VEC), _by_thread(second, R, VEC))
        return tl.reshape(pairs, [R, VEC]).to(CT)
    elif LAYOUT == RUNS:
        return _load_runs(row, start, last, other, R, VEC, True).to(CT)
    else:
        inside = _inside(start, last, R, VEC, LAYOUT)
        return tl.load(_addresses(row, start, R, VEC, LAYOUT), mask=inside, other=other).to(CT)


@triton.jit
def _pairs(values, R: tl.constexpr, VEC: tl.constexpr):
    """A tile `[R, VEC]` as pairs `[R * VEC // 2, 2]` in the order of their columns."""
    pairs = tl.permute(tl.reshape(values, [R, VEC // 2, 2]), (1, 0, 2))
    return tl.reshape(pairs, [R * VEC // 2, 2])


@triton.jit
def store_tile(row, start, values, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr):
    """A whole tile of gradients, rounded, to the columns from `start` on; pairs in words."""
    values = narrow(values, row.dtype.element_ty)
    if _is_paired(row, LAYOUT):
        words = tl.multiple_of(row + start, 4)
        words = words + tl.arange(0, R * VEC // 2)[:, None] * 2 + tl.arange(0, 2)[None, :]
        tl.store(words, _pairs(values, R, VEC))
    else:
        tl.store(_addresses(row, start, R, VEC, LAYOUT), values)


@triton.jit
def store_ragged(row, start, last, values, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr):
    """A tile of gradients, rounded, to the columns from `start` to `last`."""
    values = narrow(values, row.dtype.element_ty)
    if _is_paired(row, LAYOUT):
        first, second = tl.split(_pairs(values, R, VEC))
        column = start + tl.arange(0, R * VEC // 2) * 2
        tl.store(row + column, first, mask=column < last)
        tl.store(row + column + 1, second, mask=column + 1 < last)
    else:
        inside = _inside(start, last, R, VEC, LAYOUT)
        tl.store(_addresses(row, start, R, VEC, LAYOUT), values, mask=inside)


@triton.jit
def load_one(logit, CT: tl.constexpr):
    """A tile of one column."""
    return tl.load(logit + tl.arange(0, 1)[:, None] + tl.arange(0, 1)[None, :]).to(CT)


@triton.jit
def store_one(to, value):
    """A tile of one column, rounded; Triton lets one thread store it, which read it before."""
    tl.store(to + tl.arange(0, 1)[:, None] + tl.arange(0, 1)[None, :], narrow(value, to.dtype.element_ty))


@triton.jit
def own_columns(grad, first, last, V, LAYOUT: tl.constexpr):
    """The column where a split's tiles begin, and the columns [from, to) of the gradient that it writes.

    Pairs begin where the row's words do, a column later in odd rows: gradients do not depend on the thread.
    """
    if _is_paired(grad, LAYOUT):
        odd = _is_odd(grad)
        return first + odd, tl.where(first == 0, 0, first + odd), tl.minimum(last + odd, V)
    else:
        return first, first, last


@triton.jit
def write_zeros(grad, first, last, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr):
    """Zero the columns [first, last) of a row that is not valid."""
    for start in range(first, last, R * VEC):
        tl.store(_addresses(grad, start, R, VEC, LAYOUT), 0.0, mask=_inside(start, last, R, VEC, LAYOUT))


@triton.jit
def uniform(condition, R: tl.constexpr):
    """The scalar condition; the compiler then knows that all threads of a warp have the same.

    Of a maximum of integers it knows. Behind other branches it prepares every exchange between threads for
    a warp of which some have taken another way.
    """
    return tl.max(tl.zeros([R], tl.int32) + condition.to(tl.int32)) != 0


@triton.jit
def store_state(to, values, SPLITS: tl.constexpr):
    """Store a split's values, `SPLITS` apart."""
    for i in tl.static_range(len(values)):
        tl.store(to + i * SPLITS, values[i])


@triton.jit
def fma(a, b, c):
    """a·b + c, rounded once."""
    if INTERPRETED and a.dtype == tl.float32:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def mul_add(a, b, c):
    """a·b + c in one instruction: `fma` where a second rounding, the interpreter's, does no harm.

    The compiler makes none by itself (`launch.FP_FUSION`). Literals must be exact in float32.
    """
    return tl.fma(a, b, c)


@triton.jit
def mul_sub(a, b, c):
    """a·b − c. Triton's own −c is 0 − c, an instruction by itself: c · −1 becomes the fma's sign."""
    return tl.fma(a, b, c * -1.0)


@triton.jit
def sub_mul(c, a, b):
    """c − a·b"""
    return tl.fma(a * -1.0, b, c)


@triton.jit
def polynomial(x, coefficients):
    """Σ c_i x^i by Horner's rule, the highest power's coefficient first."""
    value = tl.full([], coefficients[0], x.dtype)
    for i in tl.static_range(1, len(coefficients)):
        value = tl.fma(value, x, tl.full([], coefficients[i], x.dtype))
    return value


@triton.jit
def add_products(total, x, y):
    """total `[R]` + Σ x·y over the columns of x and y `[R, VEC]`, which a thread owns: one fma each."""
    if INTERPRETED:
        return total + tl.sum(x * y, axis=1)
    elif x.shape[1] == 1:
        return tl.fma(tl.reshape(x, [x.shape[0]]), tl.reshape(y, [y.shape[0]]), total)
    else:
        even_x, odd_x = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
        even_y, odd_y = tl.split(tl.reshape(y, [y.shape[0], y.shape[1] // 2, 2]))
        return add_products(add_products(total, even_x, even_y), odd_x, odd_y)


@triton.jit
def exp2_offset(top, k):
    """n for logits of at most `top`, so that their weights 2^(k·logit − n) reach from 2^8 down.

    An exponent is rounded by up to a 2^24th of itself: from the top itself, weights of 2^-32 would have a
    relative error of 1.3e-6. So none above 2^-39 has more than 6.6e-7, and the largest, which a sum over
    the row inherits, 1.7e-7.
    """
    return tl.floor(top * k) - 7.0


@triton.jit
def exponent(logit, k, n):
    """k·logit − n"""
    return fma(logit, k, -n)


@triton.jit
def weights(logit, k, n):
    """2^(k·logit − n)"""
    return tl.exp2(exponent(logit, k, n))


@triton.jit
def normalised(shift, n, inv, k, over_k, TOP: tl.constexpr):
    """The `Softmax` of a side whose weights about n sum to 1/inv.

    n is lowered once more, from about 7 below the row's largest exponent to TOP. At 15, exponents are rounded
    by no more than 3.3e-7 down to probabilities of 2^-31 and 6.6e-7 down to 2^-47, at 31 by 6.6e-7 all the
    way from 1 to 2^-63 (e^-44). scale_correction makes up for the rounding of k, which moves tokens 30 nats
    below the top by up to 9e-7.
    """
    low = n - (TOP - 7.0)
    scale = inv * tl.exp2(low - n)  # of 7 − TOP, unless n is too large to have units
    correction = (over_k * -LN2) * scale
    return Softmax(shift, k, low, mul_add(correction, -1.0 * TOP, scale), correction)


@triton.jit
def out_of_range_shift(top, k):
    """The shift taken off a side's logits before all else: the largest one where n is out of range, else 0.

    Past 2^24 float32 does not hold n to a fraction of 1; past 2^31 weights about it overflow.
    """
    MOST: tl.constexpr = 16777216.0 if top.dtype == tl.float32 else 1e300
    out_of_range = (tl.abs(top * k) > MOST) & (tl.abs(top) < float("inf"))
    return tl.where(out_of_range, top, 0.0)


@triton.jit
def stored_side(n, inv):
    """(shift, n, 1/Z) of a side from its row statistics: a negative 1/Z says that n is a shift instead."""
    out_of_range = inv < 0
    return tl.where(out_of_range, n, 0.0), tl.where(out_of_range, -7.0, n), tl.abs(inv)


@triton.jit
def times(side, factor):
    """The `Softmax` whose probabilities are `factor` times those of `side`."""
    return Softmax(side.shift, side.k, side.n, side.scale * factor, side.scale_correction * factor)


@triton.jit
def scale_at(e, side):
    """The factor that makes a probability of a weight 2^e."""
    return fma(tl.maximum(e, -1000.0), side.scale_correction, side.scale)  # −inf would come out of it as NaN


@triton.jit
def scale_by_logit(side):
    """The (scale, correction) with which fma(logit, correction, scale) is `scale_at`, for finite logits."""
    return sub_mul(side.scale, side.n, side.scale_correction), side.k * side.scale_correction


@triton.jit
def probability(logit, side):
    """A side's probabilities of logits that are less the shift already."""
    e = exponent(logit, side.k, side.n)
    return tl.exp2(e) * scale_at(e, side)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x in the dtype it is stored as, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter cuts a bfloat16 off where the hardware rounds.
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def is_near(x):
    """Where g(x) comes from its polynomial, and beyond which eˣ may be taken from b's own logit.

    In float32 that second exponential has an error of its own; past 1.125 at most 3.2 times it is left of
    what cancels against 1 + x.
    """
    return tl.abs(x) < (0.5 if x.dtype == tl.float64 else 1.125)


@triton.jit
def g_near(x):
    """g(x)/x for near x, minimax: relative error 2.1e-7 in float32 and 0 where x is, 2.7e-18 in float64."""
    if x.dtype == tl.float64:
        of_float64: tl.constexpr = (
            1.60781323987752627e-10, 2.09628524967962601e-9, 2.50522102680160090e-8, 2.75570772820632509e-7,
            2.75573187753331313e-6, 2.48015876147344761e-5, 1.98412698418661383e-4, 1.38888888887058076e-3,
            8.33333333333303912e-3, 4.16666666666670578e-2, 1.66666666666666671e-1, 0.5,
        )  # fmt: skip
        return polynomial(x, of_float64) * x
    else:
        coefficients: tl.constexpr = (
            2.502492134e-5, 2.044598659e-4, 1.389198354e-3, 8.329651318e-3, 4.166644812e-2,
            1.666671932e-1, 0.5,
        )  # fmt: skip
        return polynomial(x, coefficients) * x


@triton.jit
def g(x):
    """g(x) = eˣ − 1 − x ≥ 0."""
    return tl.where(is_near(x), g_near(x) * x, (tl.exp2(x * LOG2E) - 1.0) - x)


@triton.jit
def top_of(logits):
    """The largest of a tile `[R, VEC]`; NaN, where there is one that a thread's own maximum shows."""
    top = tl.max(logits, axis=1)
    if top.dtype == tl.float64:
        return tl.max(top)
    # As integers of the same order: of those a maximum is one instruction of a warp.
    top = top.to(tl.int32, bitcast=True)
    top = tl.max(top ^ ((top >> 31) & 0x7FFFFFFF))
    return (top ^ ((top >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def any_reaches(values, bound: tl.constexpr):
    """Whether one of the numbers `[R]`, none of them negative, reaches a positive bound or is NaN.

    What branches follow comes from integers: of their maximum the compiler knows that all threads have the
    same, and it is one instruction of a warp.
    """
    if values.dtype == tl.float64:
        return tl.max(tl.where(values < bound, 0, 1)) != 0
    least = tl.full([], bound, tl.float32).to(tl.int32, bitcast=True)
    return tl.max(values.to(tl.int32, bitcast=True)) >= least


@triton.jit
def floor_log2(x):
    """Of a positive number, and no subnormal one in float32."""
    if x.dtype == tl.float64:
        return tl.floor(tl.log2(x))
    return ((x.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.float32)


@triton.jit
def scaled_g(x, scale):
    """scale·g of ln(2)·x, with 2^x from x itself: infinite where scale·2^x is.

    The polynomial is minimax on |x| < 0.8: relative error 1.4e-6 in float32. Beyond, at most 9.4 times the
    error of 2^x, 2^-22, is left of what cancels against 1 + ln(2)·x. A degree more costs an instruction a
    column for half of either.
    """
    if x.dtype == tl.float64:
        nats = x * LN2
        near = is_near(nats)
        p = g_near(nats) * nats * scale
    else:
        near = tl.abs(x) < 0.8
        coefficients: tl.constexpr = (
            1.543865365e-4, 1.345575787e-3, 9.618412703e-3, 5.550216138e-2, 2.402264774e-1,
        )  # fmt: skip
        p = tl.full([], coefficients[0], x.dtype) * scale
        for i in tl.static_range(1, len(coefficients)):
            p = tl.fma(p, x, tl.full([], coefficients[i], x.dtype) * scale)
        p = p * x * x
    return tl.where(near, p, sub_mul(mul_sub(tl.exp2(x), scale, scale), x, scale * LN2))


@triton.jit
def expm1_near(x):
    """eˣ − 1 for |x| < 1/2, minimax: relative error 1.2e-7 in float32."""
    if x.dtype == tl.float64:
        return mul_add(g_near(x), x, x)
    coefficients: tl.constexpr = (
        1.387576340e-3, 8.402397856e-3, 4.166897014e-2, 1.666613519e-1, 0.4999998212, 1.0,
    )  # fmt: skip
    return polynomial(x, coefficients) * x


@triton.jit
def one_minus_exp(v):
    """1 − e⁻ᵛ for v ≥ 0: relative error 2.2e-8 below 1/2 in float32, where the subtraction would cancel."""
    if v.dtype == tl.float64:
        near = mul_add(g_near(-v), v, v)
    else:
        coefficients: tl.constexpr = (
            1.163279662e-3, -8.237207267e-3, 4.164961010e-2, -1.666655951e-1, 0.4999999891,
        )  # fmt: skip
        near = sub_mul(v, polynomial(v, coefficients) * v, v)
    return tl.where(v < 0.5, near, 1.0 - tl.exp2(v * -LOG2E))


@triton.jit
def log1p_parts(z, one_plus_z):
    """z − log1p(z) ≥ 0 and log1p(z), for z > −1.

    By 2·atanh(z/(2 + z)) where the subtraction would cancel, minimax: relative error 1e-7 in float32, 1e-15
    in float64. `one_plus_z` comes from the caller: near −1 adding 1 to z would keep few digits of it.
    """
    s = z / (2.0 + z)
    y = s * s
    if z.dtype == tl.float64:
        near = tl.abs(z) < 0.01
        p = polynomial(y, (0.1111111111111111, 0.14285714285714285, 0.2, 0.3333333333333333))
    else:
        near = tl.abs(z) < 0.5
        p = polynomial(y, (1.161216497e-1, 1.085328758e-1, 1.429617852e-1, 1.999985278e-1, 3.333333433e-1))
    tail = 2.0 * s * y * p
    log = tl.where(near, mul_add(s, 2.0, tail), tl.log(one_plus_z))
    return tl.where(near, mul_sub(z, s, tail), z - log), log


@triton.jit
def log1p_minus(y):
    """log1p(y) − y for float64 y > −1: by series below 1e-3, where the subtraction would cancel."""
    series = y * y * polynomial(y, (0.2, -0.25, 0.3333333333333333, -0.5))
    return tl.where(tl.abs(y) < 1e-3, series, tl.log(1.0 + tl.maximum(y, -1.0)) - y)


@triton.jit
def from_high_low(high, low):
    """A float64 from the pair of float32 a launcher passes: Triton's scalar arguments are float32."""
    return tl.full([], high, tl.float64) + tl.full([], low, tl.float64)


@triton.jit
def difference(a, b, scales, SAME_SCALE: tl.constexpr):
    """b − a, less a scale that both have: good enough to find a reference, not to measure from it."""
    if SAME_SCALE:
        return b - a
    return mul_sub(b.to(tl.float64), scales.b, a.to(tl.float64) * scales.a).to(a.dtype)


@triton.jit
def lowest(scale, CT: tl.constexpr):
    """What −inf is taken for: its weight is 0, its difference from any logit finite, at every temperature."""
    return tl.maximum(-1e30 / scale, -3e38).to(CT)


@triton.jit
def no_lower(logit, lowest):
    """The logit, or `lowest` where it is below that; a NaN stays."""
    return tl.where(logit < lowest, lowest, logit)


@triton.jit
def log_ratio(a, b, c, scales, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr):
    """x = (scaled b − scaled a) − c, with relative precision even where both are far larger.

    EXACT says that b − a may be taken as representable (both bfloat16 or both float16; the value kernel
    checks afterwards). Otherwise the rounding error of b − a is recovered (Knuth's TwoSum): at a = 0.3,
    b = 1.00001 it is as large as a thousandth of x.
    """
    if not SAME_SCALE:
        scaled = mul_sub(b.to(tl.float64), scales.b, a.to(tl.float64) * scales.a)
        return (scaled - c.to(tl.float64)).to(a.dtype)
    d = b - a
    x = fma(d, scales.shared, -c)
    if EXACT:
        return x
    back = d - b
    error = (b - (d - back)) - (a + back)
    return fma(error, scales.shared, x)


@triton.jit
def log2_ratio(a, b, c, scales, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr):
    """`log_ratio` in units of log2, as is c: an exponential takes it as it is.

    Where both temperatures are equal, it is in units of the k that both sides' exponents have.
    """
    if not SAME_SCALE:
        scaled = mul_sub(b.to(tl.float64), scales.b * LOG2E, a.to(tl.float64) * (scales.a * LOG2E))
        return (scaled - c.to(tl.float64)).to(a.dtype)
    d = b - a
    x = fma(d, scales.k_a, -c)
    if EXACT:
        return x
    back = d - b
    error = (b - (d - back)) - (a + back)
    return fma(error, scales.k_a, x)


@triton.jit
def log_probability_ratio(a, b, c, log_z_ratio, scales, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr):
    """r = log(b_i/a_i), ±inf where one logit is −inf, NaN where both are."""
    x = log_ratio(a, b, c, scales, SAME_SCALE, EXACT)
    if SAME_SCALE and not EXACT:
        # Where one logit is −inf the error term is NaN, the difference itself is not.
        x = tl.where(x == x, x, b - a)
    return x - log_z_ratio


@triton.jit
def two_sum(x, y):
    """x + y as it is rounded, and what that leaves (Knuth)."""
    total = x + y
    back = total - x
    return total, (x - (total - back)) + (y - back)


@triton.jit
def log2e_times(x, x_low, less):
    """log2(e)·(x + x_low) − less of float32 numbers where that is small."""
    log2e = tl.full([], LOG2E, tl.float32)
    return fma(x, tl.full([], LOG2E_LOW, tl.float32), fma(x_low, log2e, fma(x, log2e, -less)))


@triton.jit
def times_log2e(x, x_low):
    """log2(e)·(x + x_low) as two float32."""
    high = x * LOG2E
    return high, log2e_times(x, x_low, high)


@triton.jit
def _power_of_2(whole):
    """2^whole for a whole number of −126 to 127, exactly."""
    return ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp2_pair(high, low):
    """2^(high + low) of float32 numbers, to a 2^23rd: an exponent of 64 in one alone is rounded by 2.6e-6."""
    total = high + low
    low = (high - total) + low
    whole = tl.floor(total + 0.5)
    fraction = (total - whole) + low
    coefficients: tl.constexpr = (
        1.534465371e-4, 1.340125800e-3, 9.618503538e-3, 5.550325471e-2, 2.402264666e-1, 6.931472073e-1, 1.0,
    )  # fmt: skip
    # Not beyond what is 0 or infinite anyway.
    whole = tl.minimum(tl.maximum(whole, -250.0), 250.0)
    half = tl.floor(whole * 0.5)
    return polynomial(fraction, coefficients) * _power_of_2(half) * _power_of_2(whole - half)


@triton.jit
def exp_minus(h):
    """e^−h of a float64 h, for float64 sums."""
    exponent_h = -h * LOG2E
    whole = tl.floor(exponent_h)  # by itself: an exponential of all of it takes more registers
    return tl.exp2(exponent_h - whole) * tl.exp2(whole)


@triton.jit
def rebase(sums, h, e_h, s):
    """Bring `Sums` taken about c to c + h and from weights e^{a−m} to s·e^{a−m}; e_h is e^−h.

    It comes from an h that is wider than the sums: in float32 one of 32 to 64 is rounded by 1.9e-6.
    """
    z, a1, a2 = sums
    near = is_near(h)
    g_h = tl.where(near, g_near(-h) * -h, (e_h - 1.0) + h)
    e_h_minus_1 = tl.where(near, g_h - h, e_h - 1.0)
    to_a2 = mul_add(z, g_h, mul_add(e_h_minus_1, a1, e_h * a2))
    return Sums(z * s, sub_mul(a1, h, z) * s, to_a2 * s)

"""The main kernel: a queue of splits of rows, each swept for its state, its formula's sums or its gradients.

A row longer than `launch.SPLIT_COLUMNS` is shared by several programs, each of one warp. Whoever finishes a
row's last split merges all of them, in the order of their columns. Where value and gradient are asked for
together, programs take their work from one counter: splits of a row's second and third sweep lie `lag` rows
behind its first, early enough to find its logits in the L2 and late enough to find its sums. A program waits
only for work with a smaller number, which a running program has taken, so the queue cannot lock whatever runs
at once.
"""

from __future__ import annotations

from collections import namedtuple
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import STATS, RowPair
from .device_math import (
    NO_REFERENCE,
    Row,
    Sums,
    from_high_low,
    normalised,
    place_start,
    quotient,
    scales_of,
    store_state,
    stored_side,
    write_zeros,
)
from .fast_formulas import beta_allows_fast_path, logarithm, near_coefficients
from .formula_pass import fast_formula_sums, formula_sums
from .formulas import finish, raised
from .gradient_pass import Incoming, write_gradient
from .kl_pass import FALLBACK, ONE_SIDED, PLAIN, merged, store_row, sweep
from .launch import (
    ProgramShape,
    cdiv,
    configuration,
    divisor,
    geometry,
    gradient_layout,
    high_low,
    kernel,
    resident_programs,
    room_for,
    splits_of,
    step_of,
    steps,
)
from .prepared import PreparedLaunch, place, place_if_any, plan

# Row statistics: n_a, 1/Z_a, n_b, 1/Z_b (so that a_i = 2^(k_a·logit − n_a)/Z_a), then c and log_z_ratio with
# log(b_i/a_i) = x_i − log_z_ratio, the value, and what a·∂D/∂a and b·∂D/∂b sum to. They come zeroed: behind
# them the splits that have arrived are counted, of the first sweep and of the second, and complete sweeps, in
# integers.
_STATS = tl.constexpr(STATS)
_ARRIVED = tl.constexpr(9)
_COMPLETE = tl.constexpr(11)
# Once the first sweep is complete: the row's path, of those in kl_pass.py.
_PATH = _ARRIVED
# Once the second is: the β of the row's flows, where they have one of their own.
_ROW_BETA = tl.constexpr(10)
# A launch that does all stages, taking its work from the queue.
ALL_STAGES = tl.constexpr(-1)
# The least KL of a row whose gradient to b, stored in 16 bits, is a difference of two exponentials.
_DIRECT = tl.constexpr(1e-3)
# A split's state, while it waits for the others: what `sweep` gives, n, c, n_b, z, a1, a2, a's mass alone and
# the worst column; then the formula's three sums. There is room for SPLITS of each, num_splits or more.
STATE = 11
_STATE = tl.constexpr(STATE)


# A `[A, B, V]` tensor and its first two strides.
Strided = namedtuple("Strided", "ptr outer inner")
# The kernel's run-time parameters; `_parts` are (high, low) of float64 numbers.
Launch = namedtuple(
    "Launch",
    "a b grad_a grad_b valid_ptr scales_ptr value_ptr stats_ptr states_ptr row_scale_ptr n_rows n_inner V "
    "scale_parts beta_parts near num_splits split_columns lag by_inner by_splits",
)
# Pointers to one row, and its split number `split`, the columns [first, last).
Work = namedtuple("Work", "a b grad_a grad_b value stats states split num_splits first last")


@triton.jit
def _counter(stats, which: tl.constexpr):
    """A statistic as an integer: not every GPU adds floats atomically in one step."""
    return (stats + which).to(tl.pointer_type(tl.int32))


@triton.jit
def _last_to_arrive(stats, sweep: tl.constexpr, num_splits):
    """Whether every other split of the row has been published."""
    tl.debug_barrier()  # every thread's stores come before the one thread's release
    return tl.atomic_add(_counter(stats, _ARRIVED + sweep), 1, sem="acq_rel") == num_splits - 1


@triton.jit
def _complete(stats):
    tl.debug_barrier()
    tl.atomic_add(_counter(stats, _COMPLETE), 1, sem="release")


@triton.jit
def _wait(stats, sweeps: tl.constexpr):
    while tl.atomic_add(_counter(stats, _COMPLETE), 0, sem="acquire") < sweeps:
        pass


@triton.jit
def _statistic(stats, which: tl.constexpr):
    # Past the L1, which may hold the line as it was before another program wrote it.
    return tl.load(stats + which, cache_modifier=".cg")


@triton.jit
def _load_states(work, which: tl.constexpr, SPLITS: tl.constexpr, other: tl.constexpr):
    split = tl.arange(0, SPLITS)
    at = work.states + which * SPLITS + split
    return tl.load(at, mask=split < work.num_splits, other=other, cache_modifier=".cg")


@triton.jit
def _load_row(stats, beta, rest, scales, TOP: tl.constexpr):
    a = stored_side(_statistic(stats, 0), _statistic(stats, 1))
    b = stored_side(_statistic(stats, 2), _statistic(stats, 3))
    return Row(
        normalised(*a, scales.k_a, scales.over_k_a, TOP), normalised(*b, scales.k_b, scales.over_k_b, TOP),
        _statistic(stats, 4), _statistic(stats, 5), beta, rest, scales,
    )  # fmt: skip


@triton.jit
def _place(launch, row):
    """Where a row lies in the two leading dimensions."""
    outer = quotient(row, *launch.by_inner)
    return outer, row - outer * launch.n_inner


@triton.jit
def _work(launch, row, split, SPLITS: tl.constexpr):
    first = split * launch.split_columns
    outer, inner = _place(launch, row)
    return Work(
        place_start(outer, inner, *launch.a),
        place_start(outer, inner, *launch.b),
        place_start(outer, inner, *launch.grad_a),
        place_start(outer, inner, *launch.grad_b),
        launch.value_ptr + row,
        launch.stats_ptr + row.to(tl.int64) * _STATS,
        launch.states_ptr + row.to(tl.int64) * (_STATE * SPLITS),
        split, launch.num_splits, first, tl.minimum(first + launch.split_columns, launch.V),
    )  # fmt: skip


@triton.jit
def _first_sweep(
    launch, row, split, scales, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, CT: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    first = split * launch.split_columns
    outer, inner = _place(launch, row)
    reference, sums, alone, worst = sweep(
        place_start(outer, inner, *launch.a), place_start(outer, inner, *launch.b),
        first, tl.minimum(first + launch.split_columns, launch.V), scales,
        SAME_SCALE, EXACT, CT, R, VEC, LAYOUT,
    )  # fmt: skip
    # Only now: the loop above has no registers to spare for pointers.
    work = _work(launch, row, split, SPLITS)
    n, c, n_b, _ = reference
    z, a1, a2 = sums
    complete = True
    alone = alone.to(tl.float64)
    sums = Sums(z.to(tl.float64), a1.to(tl.float64), a2.to(tl.float64))
    if SPLITS > 1:
        store_state(work.states + work.split, (n, c, n_b, z, a1, a2, alone, worst.to(CT)), SPLITS)
        complete = _last_to_arrive(work.stats, 0, work.num_splits)
    if complete:
        if SPLITS > 1:
            all_n = _load_states(work, 0, SPLITS, NO_REFERENCE)
            all_c = _load_states(work, 1, SPLITS, 0.0)
            all_n_b = _load_states(work, 2, SPLITS, 0.0)
            all_z = _load_states(work, 3, SPLITS, 0.0)
            all_a1 = _load_states(work, 4, SPLITS, 0.0)
            all_a2 = _load_states(work, 5, SPLITS, 0.0)
            all_alone = _load_states(work, 6, SPLITS, 0.0)
            worst = tl.max(_load_states(work, 7, SPLITS, 0.0)).to(tl.int32)
            n, c, n_b, sums, alone = merged(all_n, all_c, all_n_b, Sums(all_z, all_a1, all_a2), all_alone, CT)
        path = store_row(
            work.value, work.stats, work.a, work.b, launch.V, n, c, n_b, sums, alone, worst, scales,
            SAME_SCALE, EXACT, CT, R, VEC, LAYOUT,
        )  # fmt: skip
        tl.store(work.stats + _PATH, path.to(CT))
        _complete(work.stats)


@triton.jit
def _takes_fast_path(
    stats, upstream, beta, rest, FORMULA: tl.constexpr, DIRECT: tl.constexpr, LOG2: tl.constexpr
):
    if FORMULA == "kl":
        # Beyond these `scale_by_logit` would cancel, or overflow at the lowest number.
        small = (tl.abs(_statistic(stats, 0)) < 1e6) & (tl.abs(_statistic(stats, 2)) < 1e6)
        small &= tl.abs(upstream) < 1e9
        if DIRECT:
            # Its error is up to 2e-6 of a. Where D is less, b − a may be at most 1e-4 of a in all columns
            # that matter, and would have fewer digits than it is stored with.
            small &= _statistic(stats, 6) >= _DIRECT
        return (_statistic(stats, _PATH) != FALLBACK) & small
    elif LOG2 == "" or FORMULA == "lk":
        return False
    else:
        path = _statistic(stats, _PATH)
        fast = path != FALLBACK
        if FORMULA == "jeffreys":
            fast = fast & (path != ONE_SIDED)  # it is infinite there
        return fast & beta_allows_fast_path(beta, rest, FORMULA)


@triton.jit
def _second_sweep(
    work, beta, rest, near, scales, SPINS: tl.constexpr, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr,
    FORMULA: tl.constexpr, LOG2: tl.constexpr, CT: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    if SPINS:
        _wait(work.stats, 1)
    kl = _statistic(work.stats, 6)
    SUMS: tl.constexpr = "overlap" if FORMULA == "nla" else ("tv" if FORMULA == "lk" else FORMULA)
    row = _load_row(work.stats, beta, rest, scales, 31 if SUMS == "overlap" else 15)
    row, unit = raised(row, SUMS)
    if _takes_fast_path(work.stats, 1.0, beta, rest, SUMS, False, LOG2):
        if _statistic(work.stats, _PATH) == PLAIN:
            value, mean_a, mean_b = fast_formula_sums(
                work.a, work.b, work.first, work.last, row, near, True, SAME_SCALE, EXACT, SUMS, LOG2, CT,
                R, VEC, LAYOUT,
            )  # fmt: skip
        else:
            value, mean_a, mean_b = fast_formula_sums(
                work.a, work.b, work.first, work.last, row, near, False, SAME_SCALE, False, SUMS, LOG2, CT,
                R, VEC, LAYOUT,
            )  # fmt: skip
    else:
        value, mean_a, mean_b = formula_sums(
            work.a, work.b, work.first, work.last, row, SAME_SCALE, SUMS, CT, R, VEC, LAYOUT
        )
    complete = True
    if SPLITS > 1:
        store_state(work.states + 8 * SPLITS + work.split, (value, mean_a, mean_b), SPLITS)
        complete = _last_to_arrive(work.stats, 1, work.num_splits)
    if complete:
        if SPLITS > 1:
            value = tl.sum(_load_states(work, 8, SPLITS, 0.0))
            mean_a = tl.sum(_load_states(work, 9, SPLITS, 0.0))
            mean_b = tl.sum(_load_states(work, 10, SPLITS, 0.0))
        if FORMULA == "nla" or FORMULA == "lk":
            value, mean_a, mean_b, own = finish(
                kl.to(tl.float64), value.to(tl.float64) * unit, mean_a.to(tl.float64) * unit,
                mean_b.to(tl.float64) * unit, beta.to(tl.float64), FORMULA,
            )  # fmt: skip
            value, mean_a, mean_b = value.to(CT), mean_a.to(CT), mean_b.to(CT)
            tl.store(work.stats + _ROW_BETA, own.to(CT))
        value = tl.where(value < 0, 0.0, value)
        value = tl.where(kl == kl, value, kl)  # a row without a distribution
        tl.store(work.value, value)
        tl.store(work.stats + 6, value)
        tl.store(work.stats + 7, mean_a)
        tl.store(work.stats + 8, mean_b)
        _complete(work.stats)


@triton.jit
def _gradient(
    work, upstream, V, beta, rest, scales, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr,
    FORMULA: tl.constexpr, LOG2: tl.constexpr, CT: tl.constexpr, TO_A: tl.constexpr, TO_B: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    value = _statistic(work.stats, 6)
    # What a·∂D/∂a and b·∂D/∂b sum to over the row: for KL(a‖b), −a·r gives the KL and b − a gives 0.
    mean_a = value
    mean_b = value * 0.0
    if FORMULA != "kl":
        mean_a = _statistic(work.stats, 7)
        mean_b = _statistic(work.stats, 8)
    # A row without a divergence has no gradient, also where a probability of 0 would hide it. An infinite
    # mean leaves its side no gradient either: NaN, never a silent 0.
    nan = tl.full([], float("nan"), CT)
    up_a = tl.where((value == value) & (tl.abs(mean_a) < float("inf")), upstream * scales.shared, nan)
    has_b = value == value
    if FORMULA != "kl":
        has_b = has_b & (tl.abs(mean_b) < float("inf"))
    up_b = tl.where(has_b, upstream * (scales.shared if SAME_SCALE else scales.b.to(CT)), nan)
    if FORMULA == "nla" or FORMULA == "lk":
        beta = _statistic(work.stats, _ROW_BETA)
        rest = 1.0 - beta
    # The b − a of kl and tv subtracts exponentials that must be good far down; a (r + KL) multiplies one,
    # whose error near the top counts KL times.
    FAR: tl.constexpr = 31 if FORMULA == "kl" or FORMULA == "tv" or FORMULA == "nla" else 15
    row, unit = raised(_load_row(work.stats, beta, rest, scales, FAR), FORMULA)
    up_a *= unit
    up_b *= unit
    near_a = _load_row(work.stats, beta, rest, scales, 15).a
    to = Incoming(mean_a, mean_b, up_a, up_b)
    DIRECT: tl.constexpr = TO_B and SAME_SCALE and work.grad_b.dtype.element_ty.primitive_bitwidth == 16
    if _takes_fast_path(work.stats, upstream, beta, rest, FORMULA, DIRECT, LOG2):
        if _statistic(work.stats, _PATH) == PLAIN:
            write_gradient(
                work.a, work.b, work.grad_a, work.grad_b, work.first, work.last, V, row, near_a, to,
                SAME_SCALE, EXACT, FORMULA, True, True, DIRECT, LOG2, CT, TO_A, TO_B, R, VEC, LAYOUT,
            )  # fmt: skip
        else:
            write_gradient(
                work.a, work.b, work.grad_a, work.grad_b, work.first, work.last, V, row, near_a, to,
                SAME_SCALE, EXACT, FORMULA, True, False, DIRECT, LOG2, CT, TO_A, TO_B, R, VEC, LAYOUT,
            )  # fmt: skip
    else:
        write_gradient(
            work.a, work.b, work.grad_a, work.grad_b, work.first, work.last, V, row, near_a, to,
            SAME_SCALE, EXACT, FORMULA, False, False, DIRECT, LOG2, CT, TO_A, TO_B, R, VEC, LAYOUT,
        )  # fmt: skip


@triton.jit
def _item(
    item, incoming, launch, HAS_VALID: tl.constexpr, HAS_SCALES: tl.constexpr, SAME_SCALE: tl.constexpr,
    EXACT: tl.constexpr, FORMULA: tl.constexpr, SWEEPS: tl.constexpr, STAGES: tl.constexpr,
    STAGE: tl.constexpr, TO_A: tl.constexpr, TO_B: tl.constexpr, LOG2: tl.constexpr, CT: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr, OUT_LAYOUT: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One split of one row in one stage: a sweep, or behind the sweeps the gradient."""
    num_splits, V = launch.num_splits, launch.V
    row = quotient(item, *launch.by_splits)
    split = item - row * num_splits
    if STAGE == ALL_STAGES:
        stage = row % STAGES
        row = row // STAGES - stage * launch.lag
    else:
        stage = STAGE
    if (row >= 0) & (row < launch.n_rows):
        valid = True
        if HAS_VALID:
            valid = tl.load(launch.valid_ptr + row) != 0
        scales = scales_of(row, launch.scales_ptr, launch.scale_parts, HAS_SCALES, SAME_SCALE, CT)
        beta = tl.full([], 0.0, CT)
        rest = beta
        if FORMULA != "kl":
            exact = from_high_low(*launch.beta_parts)
            beta = exact.to(CT)
            rest = (1.0 - exact).to(CT)
        if not valid:
            work = _work(launch, row, split, SPLITS)
            if SWEEPS > 0:
                if (stage == 0) & (split == 0):
                    tl.store(work.value, 0.0)
            if stage == STAGES - 1:
                if TO_A:
                    write_zeros(work.grad_a, work.first, work.last, R, VEC, OUT_LAYOUT)
                if TO_B:
                    write_zeros(work.grad_b, work.first, work.last, R, VEC, OUT_LAYOUT)
        elif stage < SWEEPS:
            if SWEEPS > 0:
                if stage == 0:
                    _first_sweep(launch, row, split, scales, SAME_SCALE, EXACT, CT, R, VEC, LAYOUT, SPLITS)
                elif SWEEPS > 1:
                    _second_sweep(
                        _work(launch, row, split, SPLITS), beta, rest, launch.near, scales,
                        STAGE == ALL_STAGES, SAME_SCALE, EXACT, FORMULA, LOG2, CT, R, VEC, LAYOUT, SPLITS,
                    )  # fmt: skip
        elif TO_A or TO_B:
            work = _work(launch, row, split, SPLITS)
            if SWEEPS > 0 and STAGE == ALL_STAGES:
                _wait(work.stats, SWEEPS)
            upstream = tl.load(launch.row_scale_ptr + row).to(CT) * incoming
            _gradient(
                work, upstream, V, beta, rest, scales,
                SAME_SCALE, EXACT, FORMULA, LOG2, CT, TO_A, TO_B, R, VEC, OUT_LAYOUT,
            )  # fmt: skip


# Loose parameters: tuples of them double what Triton 3.4 takes to bind the arguments of a launch (21 µs).
@kernel
def pair_kernel(
    a_ptr, b_ptr,  # [A, B, V] fp16, bf16, fp32 or fp64, each
    valid_ptr,  # [A*B] bool, or None
    scales_ptr,  # [A*B, 1] or [A*B, 2] fp64, or None
    value_ptr,  # [A*B] CT
    stats_ptr,  # [A*B, STATS] CT, zeroed where VALUE, with one row more for the queue where STAGES > 1
    states_ptr,  # [A*B, STATE, SPLITS] CT, where VALUE and SPLITS > 1
    row_scale_ptr,  # [A*B] CT, where TO_A or TO_B
    incoming_ptr,  # [] CT, where HAS_INCOMING
    grad_a_ptr, grad_b_ptr,  # [A, B, V] in the dtype of its side, where TO_A and where TO_B
    n_rows, n_inner, a_outer, a_inner, b_outer, b_inner, V,
    a_scale_high, a_scale_low, b_scale_high, b_scale_low,
    a_log2_high, b_log2_high, a_over_low, b_over_low, a_under_low, beta_high, beta_low,
    near_0, near_1, near_2, near_3, near_4, near_5, near_6, near_7,
    grad_a_outer, grad_a_inner, grad_b_outer, grad_b_inner, num_splits, split_columns, lag,
    inner_magic, inner_shift, splits_magic, splits_shift,  # of `launch.divisor`
    HAS_VALID: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_INCOMING: tl.constexpr, SAME_SCALE: tl.constexpr,
    EXACT: tl.constexpr, FORMULA: tl.constexpr, VALUE: tl.constexpr, STAGE: tl.constexpr,
    TO_A: tl.constexpr, TO_B: tl.constexpr, LOG2: tl.constexpr, CT: tl.constexpr, R: tl.constexpr,
    VEC: tl.constexpr, LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """VALUE: sweep for the value (formulas other than KL twice). TO_A, TO_B: write gradients.

    STAGE is the one of these that this launch does, or ALL_STAGES.
    """
    SWEEPS: tl.constexpr = (1 if FORMULA == "kl" else 2) if VALUE else 0
    STAGES: tl.constexpr = SWEEPS + (1 if TO_A or TO_B else 0)
    launch = Launch(
        Strided(a_ptr, a_outer, a_inner), Strided(b_ptr, b_outer, b_inner),
        Strided(grad_a_ptr, grad_a_outer, grad_a_inner), Strided(grad_b_ptr, grad_b_outer, grad_b_inner),
        valid_ptr, scales_ptr, value_ptr, stats_ptr, states_ptr, row_scale_ptr, n_rows, n_inner, V,
        (a_scale_high, a_scale_low, b_scale_high, b_scale_low,
        a_log2_high, b_log2_high, a_over_low, b_over_low, a_under_low), (beta_high, beta_low),
        (near_0, near_1, near_2, near_3, near_4, near_5, near_6, near_7), num_splits, split_columns, lag,
        (inner_magic, inner_shift), (splits_magic, splits_shift),
    )  # fmt: skip
    begin = tl.program_id(0)
    incoming = tl.full([], 1.0, CT)
    if STAGES > 1 and STAGE == ALL_STAGES:
        # Not the program's number: only a number that was taken says that its predecessors run.
        # Relaxed: what predecessors wrote is waited for where it is read.
        queue = stats_ptr + n_rows.to(tl.int64) * _STATS
        begin = tl.atomic_add(queue.to(tl.pointer_type(tl.int32)), 1, sem="relaxed")
    if HAS_INCOMING:
        incoming = tl.load(incoming_ptr).to(CT)
        # For an incoming 1 the gradient is there already.
        end = tl.where(incoming == 1.0, 0, n_rows * num_splits)
        for item in range(begin, end, tl.num_programs(0)):
            # The interpreter's loops count in ints, which no cast takes; compiled, this is the item.
            one = begin + (item - begin)
            _item(
                one, incoming, launch, HAS_VALID, HAS_SCALES, SAME_SCALE, EXACT, FORMULA, SWEEPS, STAGES,
                STAGE, TO_A, TO_B, LOG2, CT, R, VEC, LAYOUT, OUT_LAYOUT, SPLITS,
            )  # fmt: skip
    else:
        _item(
            begin, incoming, launch, HAS_VALID, HAS_SCALES, SAME_SCALE, EXACT, FORMULA, SWEEPS, STAGES, STAGE,
            TO_A, TO_B, LOG2, CT, R, VEC, LAYOUT, OUT_LAYOUT, SPLITS,
        )  # fmt: skip


# By the wider logit's bytes. At 16 columns the kernel spills on sm_80. At 8 columns sixteen warps would share
# an SM with 128 registers, where value and gradient in 16 bits spill two on sm_100. With 132 nothing spills,
# and on sm_90 ptxas takes 128 of them; nor does it with 144 and 168 where a run or a pair is made of
# two words. Left alone, ptxas holds the float32 form to 96 registers and spills.
SHAPES = {2: ProgramShape(8, 132, 1, 144, 168), 4: ProgramShape(8, 128), 8: ProgramShape(4)}
# Bound by arithmetic, and in need of more registers than four programs leave them.
FORMULA_SHAPES = {2: ProgramShape(8, 168), 4: ProgramShape(8, 168), 8: ProgramShape(4)}


def _may_spin(device: torch.device) -> bool:
    """Whether a program may wait for another in a loop.

    On AMD's and Intel's GPUs Triton has compiled such a loop, of an atomic that reads one number, to one that
    never ends: stages are launches of their own there.
    """
    return device.type != "xpu" and not torch.version.hip


class _Plan(NamedTuple):
    """What all calls of the same sizes share: launches, and the shape of the states of splits."""

    launches: tuple[PreparedLaunch, ...]
    states: tuple[int, int, int] | None


@plan
def _plan(
    a: Tensor, b: Tensor, has_valid: bool, row_scales: Tensor | None, formula: str, beta: float,
    scales: tuple[float, float], dtype: torch.dtype, has_value: bool, grad_a: Tensor | None,
    grad_b: Tensor | None, has_incoming: bool, resident: int, spins: bool,
) -> _Plan:  # fmt: skip
    """Of places; `resident` programs run at a time, and may wait for one another where one `spins`."""
    p = RowPair(a, b, None, formula, beta, *scales, dtype, row_scales)
    config = configuration(p, SHAPES if formula == "kl" else FORMULA_SHAPES)
    splits = splits_of(a.shape[-1], step_of(p, config))
    width = room_for(splits.number)
    has_gradient = grad_a is not None or grad_b is not None
    stages = (0 if not has_value else 1 if formula == "kl" else 2) + has_gradient
    one_launch = stages == 1 or spins
    lag, programs = 0, p.n_rows * splits.number
    if stages > 1 and one_launch:
        lag = min(p.n_rows, cdiv(5 * resident, 4 * splits.number * stages))
        programs = (p.n_rows + (stages - 1) * lag) * splits.number * stages
    if has_incoming:
        # Most often there is nothing to do, which a few programs find out sooner than many.
        programs = min(programs, 2 * resident)
    numbers = (
        p.n_rows, *geometry(p), *high_low(beta), *near_coefficients(formula, beta),
        *steps(a if grad_a is None else grad_a), *steps(b if grad_b is None else grad_b), *splits, lag,
        *divisor(max(1, a.shape[-2])), *divisor(splits.number),
    )  # fmt: skip
    launches = tuple(
        PreparedLaunch(
            pair_kernel, programs, a.device, numbers,
            HAS_VALID=has_valid, HAS_INCOMING=has_incoming, FORMULA=formula,
            VALUE=has_value, STAGE=stage, TO_A=grad_a is not None, TO_B=grad_b is not None, SPLITS=width,
            OUT_LAYOUT=gradient_layout(config["LAYOUT"], a, b, grad_a, grad_b) if has_gradient else 0,
            LOG2=logarithm(formula, dtype, a.device.type == "cuda" and not torch.version.hip), **config,
        )
        for stage in ((ALL_STAGES.value,) if one_launch else range(stages))
    )  # fmt: skip
    return _Plan(launches, (p.n_rows, STATE, width) if has_value and splits.number > 1 else None)


def _launch(
    p: RowPair,
    value: Tensor | None,
    stats: Tensor,
    row_scale: Tensor | None,
    grad_a: Tensor | None,
    grad_b: Tensor | None,
    incoming: Tensor | None = None,
) -> None:
    a, b, valid, formula, beta, a_scale, b_scale, dtype, scales = p
    device = a.device
    launches, states = _plan(
        place(a), place(b), valid is not None, place_if_any(scales), formula, beta, (a_scale, b_scale), dtype,
        value is not None, place_if_any(grad_a), place_if_any(grad_b), incoming is not None,
        resident_programs(device), _may_spin(device),
    )  # fmt: skip
    # What has no tensor passes one that is never read or written through.
    tensors = (
        a, b, valid, scales, stats if value is None else value, stats,
        stats if states is None else stats.new_empty(states),
        stats if row_scale is None else row_scale, stats if incoming is None else incoming,
        a if grad_a is None else grad_a, b if grad_b is None else grad_b,
    )  # fmt: skip
    for launch in launches:
        launch(*tensors)


def _outputs(p: RowPair) -> tuple[Tensor, Tensor]:
    """Values, and statistics with a row more for the queue, which would be another tensor to fill."""
    n_rows, dtype, device = p.n_rows, p.dtype, p.a.device
    value = torch.empty(n_rows, dtype=dtype, device=device)
    return value, torch.zeros(n_rows + 1, STATS, dtype=dtype, device=device)


def value(p: RowPair) -> tuple[Tensor, Tensor]:
    """Per-row divergence `[A*B]` and the row statistics `[A*B, STATS]` that `gradient` needs.

    KL moves 2 U; the other formulas sweep the row a second time: 4 U, 2 U of them from an L2 that holds it.
    """
    value, stats = _outputs(p)
    _launch(p, value, stats, None, None, None)
    return value, stats[:-1]


def divergence(p: RowPair) -> Tensor:
    """`value` without the statistics, which the kernel passes from stage to stage all the same."""
    value, stats = _outputs(p)
    _launch(p, value, stats, None, None, None)
    return value


def gradient(
    p: RowPair,
    stats: Tensor,
    row_scale: Tensor,
    grad_a: Tensor | None,
    grad_b: Tensor | None,
    incoming: Tensor | None = None,
) -> None:
    """Write incoming · row_scale · ∂divergence/∂logits into the `[A, B, V]` buffers; either may be None.

    With an incoming gradient (0-d) that turns out to be 1, on the device, the buffers stay as they are.
    """
    _launch(p, None, stats, row_scale, grad_a, grad_b, incoming)


def value_and_gradient(
    p: RowPair, row_scale: Tensor, grad_a: Tensor | None, grad_b: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`value`, and row_scale · ∂divergence/∂logits into the buffers; 3 U of DRAM where the L2 holds a row."""
    value, stats = _outputs(p)
    _launch(p, value, stats, row_scale, grad_a, grad_b)
    return value, stats[:-1]

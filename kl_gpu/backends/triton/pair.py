"""The kernel: a queue of parts of rows, each swept for its state, its formula's sums or its gradients.

A row longer than `launch.PART` is shared by several programs. Whoever finishes the last part of a row folds
all of them, in the order of their columns. Where value and gradient are asked for together, programs take
their work from one counter: parts of a row's second and third sweep lie `lag` rows behind its first, early
enough to find its logits in the L2 and late enough to find its sums. A program waits only for work with a
smaller number, which a running program has taken, so the queue cannot lock whatever runs at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import STATS, RowPair
from .device_math import LOG2E, NO_REFERENCE, normalised, row_start, stored_side, wide, write_zeros
from .fast_formulas import is_plain, logarithm, near_coefficients
from .formula_pass import formula_sums, plain_sums
from .gradient_pass import write_gradient
from .kl_pass import merged, store_row, sweep
from .launch import (
    ProgramShape,
    configuration,
    geometry,
    gradient_layout,
    high_low,
    parts_of,
    resident_programs,
    step_of,
)

# Row statistics: n_a, 1/Z_a, n_b, 1/Z_b (so that a_i = 2^(k_a·logit − n_a)/Z_a), then c and lam with
# log(b_i/a_i) = x_i − lam, the value, and what a·∂D/∂a and b·∂D/∂b sum to. They come zeroed: behind them
# parts that have arrived are counted, of the first sweep and of the second, and sweeps that are complete.
_STATS = tl.constexpr(STATS)
_ARRIVED = tl.constexpr(9)
_COMPLETE = tl.constexpr(11)
# Once the first sweep is complete: whether the row needed no careful path.
_PLAIN = _ARRIVED
# The least KL of a row whose gradient to b, stored in 16 bits, is a difference of two exponentials.
_DIRECT = tl.constexpr(1e-3)
# A part's state, while it waits for the others: n, c, n_b, z, a1, a2; then the formula's three sums.
STATE = 9
_STATE = tl.constexpr(STATE)


@triton.jit
def _last_to_arrive(stats, sweep: tl.constexpr, parts):
    """Whether every other part of the row has been published."""
    tl.debug_barrier()  # every thread's stores come before the one thread's release
    return tl.atomic_add(stats + _ARRIVED + sweep, 1.0, sem="acq_rel") == parts - 1


@triton.jit
def _complete(stats):
    tl.debug_barrier()
    tl.atomic_add(stats + _COMPLETE, 1.0, sem="release")


@triton.jit
def _wait(stats, sweeps: tl.constexpr):
    while tl.atomic_add(stats + _COMPLETE, 0.0, sem="acquire") < sweeps:
        pass


@triton.jit
def _statistic(stats, which: tl.constexpr):
    # Past the L1, which may hold the line as it was before another program wrote it.
    return tl.load(stats + which, cache_modifier=".cg")


@triton.jit
def _published(states, which: tl.constexpr, parts, PARTS: tl.constexpr, other: tl.constexpr):
    part = tl.arange(0, PARTS)
    return tl.load(states + which * PARTS + part, mask=part < parts, other=other, cache_modifier=".cg")


@triton.jit
def _first_sweep(
    value_out, stats, states, a_row, b_row, V, part, parts, first, last,
    k_a, k_b, scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, CT: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    n, c, n_b, z, a1, a2 = sweep(
        a_row, b_row, first, last, k_a, k_b, scale, a_scale, b_scale,
        SAME_SCALE, EXACT, CT, R, VEC, LAYOUT,
    )  # fmt: skip
    complete = True
    z_row = z.to(tl.float64)
    a1_row = a1.to(tl.float64)
    a2_row = a2.to(tl.float64)
    furthest = tl.abs(c)
    if PARTS > 1:
        mine = states + part
        tl.store(mine, n)
        tl.store(mine + PARTS, c)
        tl.store(mine + 2 * PARTS, n_b)
        tl.store(mine + 3 * PARTS, z)
        tl.store(mine + 4 * PARTS, a1)
        tl.store(mine + 5 * PARTS, a2)
        complete = _last_to_arrive(stats, 0, parts)
    if complete:
        if PARTS > 1:
            n, c, n_b, z_row, a1_row, a2_row, furthest = merged(
                _published(states, 0, parts, PARTS, NO_REFERENCE), _published(states, 1, parts, PARTS, 0.0),
                _published(states, 2, parts, PARTS, 0.0), _published(states, 3, parts, PARTS, 0.0),
                _published(states, 4, parts, PARTS, 0.0), _published(states, 5, parts, PARTS, 0.0),
                CT,
            )  # fmt: skip
        good = store_row(
            value_out, stats, a_row, b_row, V, n, c, n_b, z_row, a1_row, a2_row, furthest,
            k_a, k_b, scale, a_scale, b_scale, SAME_SCALE, EXACT, CT, R, VEC, LAYOUT,
        )  # fmt: skip
        tl.store(stats + _PLAIN, good.to(CT))
        _complete(stats)


@triton.jit
def _is_plain(stats, upstream, beta, rest, FAMILY: tl.constexpr, DIRECT: tl.constexpr, LOG2: tl.constexpr):
    if FAMILY == "kl":
        # Beyond these `by_logit` would cancel, or overflow at the lowest number.
        small = (tl.abs(_statistic(stats, 0)) < 1e6) & (tl.abs(_statistic(stats, 2)) < 1e6)
        small &= tl.abs(upstream) < 1e9
        if DIRECT:
            # Its error is up to 2e-6 of a. Where D is less, b − a may be at most 1e-4 of a in all columns
            # that matter, and would have fewer digits than it is stored with.
            small &= _statistic(stats, 6) >= _DIRECT
        return (_statistic(stats, _PLAIN) != 0) & small
    elif LOG2 == "":
        return False
    else:
        return (_statistic(stats, _PLAIN) != 0) & is_plain(beta, rest, FAMILY)


@triton.jit
def _second_sweep(
    value_out, stats, states, a_row, b_row, part, parts, first, last, beta, rest, near,
    k_a, k_b, scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, FAMILY: tl.constexpr, LOG2: tl.constexpr, CT: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    _wait(stats, 1)
    kl = _statistic(stats, 6)
    shift_a, n_a, inv_a = stored_side(_statistic(stats, 0), _statistic(stats, 1))
    shift_b, n_b, inv_b = stored_side(_statistic(stats, 2), _statistic(stats, 3))
    side_a = normalised(n_a, inv_a, k_a, a_scale, 15, CT)
    side_b = normalised(n_b, inv_b, k_b, b_scale, 15, CT)
    c = _statistic(stats, 4)
    lam = _statistic(stats, 5)
    if _is_plain(stats, 1.0, beta, rest, FAMILY, False, LOG2):
        value, mean_a, mean_b = plain_sums(
            a_row, b_row, first, last, side_a, side_b, c, lam, beta, rest, near,
            scale, a_scale, b_scale, SAME_SCALE, EXACT, FAMILY, LOG2, CT, R, VEC, LAYOUT,
        )  # fmt: skip
    else:
        value, mean_a, mean_b = formula_sums(
            a_row, b_row, first, last, shift_a, side_a, shift_b, side_b, c, lam, beta, rest,
            scale, a_scale, b_scale, SAME_SCALE, FAMILY, CT, R, VEC, LAYOUT,
        )  # fmt: skip
    complete = True
    if PARTS > 1:
        mine = states + 6 * PARTS + part
        tl.store(mine, value)
        tl.store(mine + PARTS, mean_a)
        tl.store(mine + 2 * PARTS, mean_b)
        complete = _last_to_arrive(stats, 1, parts)
    if complete:
        if PARTS > 1:
            value = tl.sum(_published(states, 6, parts, PARTS, 0.0))
            mean_a = tl.sum(_published(states, 7, parts, PARTS, 0.0))
            mean_b = tl.sum(_published(states, 8, parts, PARTS, 0.0))
        value = tl.where(value < 0, 0.0, value)
        value = tl.where(kl == kl, value, kl)  # a row without a distribution
        tl.store(value_out, value)
        tl.store(stats + 6, value)
        tl.store(stats + 7, mean_a)
        tl.store(stats + 8, mean_b)
        _complete(stats)


@triton.jit
def _gradient(
    stats, upstream, a_row, b_row, grad_a, grad_b, first, last, V, beta, rest,
    k_a, k_b, scale, a_scale, b_scale,
    SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, FAMILY: tl.constexpr, LOG2: tl.constexpr,
    CT: tl.constexpr, TO_A: tl.constexpr, TO_B: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    value = _statistic(stats, 6)
    # What a·∂D/∂a and b·∂D/∂b sum to over the row: for KL(a‖b), −a·r gives the KL and b − a gives 0.
    mean_a = value
    mean_b = value * 0.0
    if FAMILY != "kl":
        mean_a = _statistic(stats, 7)
        mean_b = _statistic(stats, 8)
    # A row without a divergence has no gradient, also where a probability of 0 would hide it. An infinite
    # mean leaves its side no gradient either: NaN, never a silent 0.
    nan = tl.full([], float("nan"), CT)
    up_a = tl.where((value == value) & (tl.abs(mean_a) < float("inf")), upstream * a_scale.to(CT), nan)
    has_b = value == value
    if FAMILY != "kl":
        has_b = has_b & (tl.abs(mean_b) < float("inf"))
    up_b = tl.where(has_b, upstream * b_scale.to(CT), nan)
    # The b − a of kl and tv subtracts exponentials that must be good far down; a (r + KL) multiplies one,
    # whose error near the top counts KL times.
    FAR: tl.constexpr = 31 if FAMILY == "kl" or FAMILY == "tv" else 15
    shift_a, n_a, inv_a = stored_side(_statistic(stats, 0), _statistic(stats, 1))
    shift_b, n_b, inv_b = stored_side(_statistic(stats, 2), _statistic(stats, 3))
    side_a = normalised(n_a, inv_a, k_a, a_scale, FAR, CT)
    near_a = normalised(n_a, inv_a, k_a, a_scale, 15, CT)
    side_b = normalised(n_b, inv_b, k_b, b_scale, FAR, CT)
    c = _statistic(stats, 4)
    lam = _statistic(stats, 5)
    DIRECT: tl.constexpr = TO_B and SAME_SCALE and grad_b.dtype.element_ty.primitive_bitwidth == 16
    if _is_plain(stats, upstream, beta, rest, FAMILY, DIRECT, LOG2):
        write_gradient(
            a_row, b_row, grad_a, grad_b, first, last, V,
            shift_a, side_a, near_a, shift_b, side_b, c, lam, mean_a, mean_b, up_a, up_b, beta, rest,
            scale, a_scale, b_scale,
            SAME_SCALE, EXACT, FAMILY, True, DIRECT, LOG2, CT, TO_A, TO_B, R, VEC, LAYOUT,
        )  # fmt: skip
    else:
        write_gradient(
            a_row, b_row, grad_a, grad_b, first, last, V,
            shift_a, side_a, near_a, shift_b, side_b, c, lam, mean_a, mean_b, up_a, up_b, beta, rest,
            scale, a_scale, b_scale,
            SAME_SCALE, EXACT, FAMILY, False, DIRECT, LOG2, CT, TO_A, TO_B, R, VEC, LAYOUT,
        )  # fmt: skip


@triton.jit
def _item(
    item, incoming, a_ptr, b_ptr, rows_ptr, value_ptr, stats_ptr, states_ptr, row_scale_ptr,
    grad_a_ptr, grad_b_ptr, n_rows, n_inner, a_outer, a_inner, b_outer, b_inner, V,
    a_scale_high, a_scale_low, b_scale_high, b_scale_low, beta_high, beta_low, near,
    ga_outer, ga_inner, gb_outer, gb_inner, parts, part_columns, lag,
    HAS_ROWS: tl.constexpr, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr, FAMILY: tl.constexpr,
    SWEEPS: tl.constexpr, STAGES: tl.constexpr, TO_A: tl.constexpr, TO_B: tl.constexpr,
    LOG2: tl.constexpr, CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One part of one row in one stage: a sweep, or behind the sweeps the gradient."""
    slot = item // (parts * STAGES)
    stage = item % (parts * STAGES) // parts
    row = slot - stage * lag
    part = item % parts
    if (row >= 0) & (row < n_rows):
        counts = True
        if HAS_ROWS:
            counts = tl.load(rows_ptr + row) != 0
        first = part * part_columns
        last = tl.minimum(first + part_columns, V)
        a_row = row_start(a_ptr, row, n_inner, a_outer, a_inner)
        b_row = row_start(b_ptr, row, n_inner, b_outer, b_inner)
        grad_a = row_start(grad_a_ptr, row, n_inner, ga_outer, ga_inner)
        grad_b = row_start(grad_b_ptr, row, n_inner, gb_outer, gb_inner)
        value_out = value_ptr + row
        stats = stats_ptr + row.to(tl.int64) * _STATS
        states = states_ptr + row.to(tl.int64) * (_STATE * PARTS)
        a_scale = wide(a_scale_high, a_scale_low)
        b_scale = wide(b_scale_high, b_scale_low)
        k_a = (a_scale * LOG2E).to(CT)
        k_b = (b_scale * LOG2E).to(CT)
        scale = a_scale.to(CT)
        beta = wide(beta_high, beta_low)
        rest = (1.0 - beta).to(CT)
        beta = beta.to(CT)
        if not counts:
            if SWEEPS > 0:
                if (stage == 0) & (part == 0):
                    tl.store(value_out, 0.0)
            if stage == STAGES - 1:
                if TO_A:
                    write_zeros(grad_a, first, last, R, VEC, OUT_LAYOUT)
                if TO_B:
                    write_zeros(grad_b, first, last, R, VEC, OUT_LAYOUT)
        elif stage < SWEEPS:
            if SWEEPS > 0:
                if stage == 0:
                    _first_sweep(
                        value_out, stats, states, a_row, b_row, V, part, parts, first, last,
                        k_a, k_b, scale, a_scale, b_scale,
                        SAME_SCALE, EXACT, CT, R, VEC, LAYOUT, PARTS,
                    )  # fmt: skip
                elif SWEEPS > 1:
                    _second_sweep(
                        value_out, stats, states, a_row, b_row, part, parts, first, last, beta, rest, near,
                        k_a, k_b, scale, a_scale, b_scale, SAME_SCALE, EXACT, FAMILY, LOG2, CT,
                        R, VEC, LAYOUT, PARTS,
                    )  # fmt: skip
        elif TO_A or TO_B:
            if SWEEPS > 0:
                _wait(stats, SWEEPS)
            upstream = tl.load(row_scale_ptr + row).to(CT) * incoming
            _gradient(
                stats, upstream, a_row, b_row, grad_a, grad_b, first, last, V, beta, rest,
                k_a, k_b, scale, a_scale, b_scale,
                SAME_SCALE, EXACT, FAMILY, LOG2, CT, TO_A, TO_B, R, VEC, OUT_LAYOUT,
            )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "n_inner", "parts", "lag"])
def rows_kernel(
    a_ptr, b_ptr, rows_ptr, value_ptr, stats_ptr, states_ptr, queue_ptr,
    row_scale_ptr, incoming_ptr, grad_a_ptr, grad_b_ptr,
    n_rows, n_inner, a_outer, a_inner, b_outer, b_inner, V,
    a_scale_high, a_scale_low, b_scale_high, b_scale_low, beta_high, beta_low,
    near_0, near_1, near_2, near_3, near_4, near_5, near_6, near_7,
    ga_outer, ga_inner, gb_outer, gb_inner, parts, part_columns, lag,
    HAS_ROWS: tl.constexpr, HAS_INCOMING: tl.constexpr, SAME_SCALE: tl.constexpr, EXACT: tl.constexpr,
    FAMILY: tl.constexpr, VALUE: tl.constexpr, TO_A: tl.constexpr, TO_B: tl.constexpr, LOG2: tl.constexpr,
    CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """VALUE: sweep for the value (families other than KL twice). TO_A, TO_B: write gradients."""
    SWEEPS: tl.constexpr = (1 if FAMILY == "kl" else 2) if VALUE else 0
    STAGES: tl.constexpr = SWEEPS + (1 if TO_A or TO_B else 0)
    near = (near_0, near_1, near_2, near_3, near_4, near_5, near_6, near_7)
    begin = tl.program_id(0)
    incoming = tl.full([], 1.0, CT)
    if STAGES > 1:
        # Not the program's number: only a number that was taken says that its predecessors run.
        begin = tl.atomic_add(queue_ptr, 1)
    if HAS_INCOMING:
        incoming = tl.load(incoming_ptr).to(CT)
        # For an incoming 1 the gradient is there already.
        end = tl.where(incoming == 1.0, 0, n_rows * parts)
        for item in range(begin, end, tl.num_programs(0)):
            _item(
                item, incoming, a_ptr, b_ptr, rows_ptr, value_ptr, stats_ptr, states_ptr, row_scale_ptr,
                grad_a_ptr, grad_b_ptr, n_rows, n_inner, a_outer, a_inner, b_outer, b_inner, V,
                a_scale_high, a_scale_low, b_scale_high, b_scale_low, beta_high, beta_low, near,
                ga_outer, ga_inner, gb_outer, gb_inner, parts, part_columns, lag,
                HAS_ROWS, SAME_SCALE, EXACT, FAMILY, SWEEPS, STAGES, TO_A, TO_B, LOG2, CT,
                R, VEC, LAYOUT, OUT_LAYOUT, PARTS,
            )  # fmt: skip
    else:
        _item(
            begin, incoming, a_ptr, b_ptr, rows_ptr, value_ptr, stats_ptr, states_ptr, row_scale_ptr,
            grad_a_ptr, grad_b_ptr, n_rows, n_inner, a_outer, a_inner, b_outer, b_inner, V,
            a_scale_high, a_scale_low, b_scale_high, b_scale_low, beta_high, beta_low, near,
            ga_outer, ga_inner, gb_outer, gb_inner, parts, part_columns, lag,
            HAS_ROWS, SAME_SCALE, EXACT, FAMILY, SWEEPS, STAGES, TO_A, TO_B, LOG2, CT,
            R, VEC, LAYOUT, OUT_LAYOUT, PARTS,
        )  # fmt: skip


# By the wider logit's bytes. At 16 columns the kernel spills on sm_80; at 8 columns and 128 registers four
# programs of four warps share an SM and cover one another's barriers. Left alone, ptxas holds the float32
# form to 96 registers and spills.
SHAPES = {2: ProgramShape(8, 128), 4: ProgramShape(8, 128), 8: ProgramShape(4)}
# Bound by arithmetic, and in need of more registers than four programs leave them.
FORMULA_SHAPES = {2: ProgramShape(8, 168), 4: ProgramShape(8, 168), 8: ProgramShape(4)}


def _launch(
    p: RowPair,
    value: Tensor | None,
    stats: Tensor,
    row_scale: Tensor | None,
    grad_a: Tensor | None,
    grad_b: Tensor | None,
    incoming: Tensor | None = None,
) -> None:
    config = configuration(p, SHAPES if p.formula == "kl" else FORMULA_SHAPES)
    parts = parts_of(p.a.shape[2], step_of(p, config))
    width = triton.next_power_of_2(parts.number)
    has_gradient = grad_a is not None or grad_b is not None
    stages = (0 if value is None else 1 if p.formula == "kl" else 2) + has_gradient
    shared = value is not None and parts.number > 1
    states = stats.new_empty((p.n_rows, STATE, width)) if shared else stats
    queue = stats.new_zeros(1, dtype=torch.int32) if stages > 1 else stats
    resident = resident_programs(p.a.device)
    lag = min(p.n_rows, triton.cdiv(5 * resident, 4 * parts.number * stages)) if stages > 1 else 0
    programs = (p.n_rows + (stages - 1) * lag) * parts.number * stages
    if incoming is not None:
        # Most often there is nothing to do, which a few programs find out sooner than many.
        programs = min(programs, 2 * resident)
    # What has no tensor passes one that is never read or written through.
    out_a, out_b = p.a if grad_a is None else grad_a, p.b if grad_b is None else grad_b
    rows_kernel[(programs,)](
        p.a, p.b, p.valid, stats if value is None else value, stats, states, queue,
        stats if row_scale is None else row_scale, stats if incoming is None else incoming, out_a, out_b,
        p.n_rows, *geometry(p), *high_low(p.beta), *near_coefficients(p.formula, p.beta),
        out_a.stride(0), out_a.stride(1), out_b.stride(0), out_b.stride(1), parts.number, parts.columns, lag,
        HAS_ROWS=p.valid is not None, HAS_INCOMING=incoming is not None, FAMILY=p.formula,
        VALUE=value is not None, TO_A=grad_a is not None, TO_B=grad_b is not None, PARTS=width,
        OUT_LAYOUT=gradient_layout(config["LAYOUT"], p.a, p.b, grad_a, grad_b),
        LOG2=logarithm(p.formula, p.dtype, p.a.device.type == "cuda" and not torch.version.hip), **config,
    )  # fmt: skip


def _outputs(p: RowPair) -> tuple[Tensor, Tensor]:
    value = torch.empty(p.n_rows, dtype=p.dtype, device=p.a.device)
    return value, torch.zeros((p.n_rows, STATS), dtype=p.dtype, device=p.a.device)


def value(p: RowPair) -> tuple[Tensor, Tensor]:
    """Per-row divergence `[A*B]` and the row statistics `[A*B, STATS]` that `gradient` needs.

    KL moves 2 U; the other families sweep the row a second time: 4 U, 2 U of them from an L2 that holds it.
    """
    value, stats = _outputs(p)
    _launch(p, value, stats, None, None, None)
    return value, stats


def divergence(p: RowPair) -> Tensor:
    """`value` without the statistics, which the kernel passes from stage to stage all the same."""
    return value(p)[0]


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
    return value, stats

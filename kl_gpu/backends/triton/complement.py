"""Log-sum-exp and entropy of the columns of a row that are not picked, and the gradient of both.

The picked columns are left out of the sums, not taken off them again: where they hold nearly all the mass the
difference would be rounding. Each program owns a bit per column, sets the bits of its row's ids, sweeps the
row with −inf in their places, and clears them: V/8 bytes a program that runs, whatever the number of rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import COMPLEMENT_STATS, ComplementArgs, RowPair
from .device_math import (
    LOG2E,
    NO_REFERENCE,
    add_products,
    exp2_offset,
    exponent,
    fma,
    from_high_low,
    load_one,
    load_ragged,
    load_tile,
    mul_add,
    narrow,
    normalised,
    own_columns,
    probability,
    row_start,
    store_one,
    store_ragged,
    store_tile,
    stored_scale,
    sub_mul,
    tile_ahead,
    tile_position,
    unpacked,
    write_zeros,
)
from .launch import (
    LANES,
    ProgramShape,
    cdiv,
    configuration,
    gradient_layout,
    high_low,
    kernel,
    power_of_2,
    resident_programs,
    splits_of,
    steps,
)
from .prepared import PreparedLaunch, place, plan

# Row statistics, in float64: n and 1/Z, so that π_j = 2^(k·logit − n)/Z, rest_entropy in nats, and rest_lse.
# Where n is out of range 1/Z is negative, and n belongs to the largest logit itself.
_STATS = tl.constexpr(COMPLEMENT_STATS)
# From here on float32 does not hold n to a power of 2.
_OUT_OF_RANGE = tl.constexpr(16777216.0)
# The sums' n lies this much above the `exp2_offset` that the gradient starts from.
_RAISED = tl.constexpr(7.0)


@triton.jit
def _mark(
    words, ids, n_ids, V, ON: tl.constexpr, IDS: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Set the bits of a row's ids, or clear the words they lie in; a thread's bits of a tile lie together."""
    for start in range(0, n_ids, IDS):
        which = start + tl.arange(0, IDS)
        column = tl.load(ids + which, mask=which < n_ids, other=-1)
        inside = (column >= 0) & (column < V)
        # An id outside must not become an address, not even a masked one.
        bit = tile_position(tl.where(inside, column, 0).to(tl.int32), R, VEC, LAYOUT)
        if ON:
            tl.atomic_or(words + (bit >> 5), tl.full([IDS], 1, tl.int32) << (bit & 31), mask=inside)
        else:
            tl.store(words + (bit >> 5), 0, mask=inside)


@triton.jit
def _is_picked(marks, start, R: tl.constexpr, VEC: tl.constexpr):
    """Which columns of the tile at `start` are picked; `marks` are the words' bytes."""
    # Past the L1, which knows nothing of the atomics.
    bit = tl.arange(0, R) * VEC
    eight = tl.load(marks + start // 8 + bit // 8, cache_modifier=".cg").to(tl.int32)
    return (eight[:, None] >> ((bit % 8)[:, None] + tl.arange(0, VEC)[None, :])) & 1 != 0


@triton.jit
def _accumulate(x, picked, n, z, t, k, ENTROPY: tl.constexpr):
    x = tl.where(picked, -float("inf"), x)
    # Exponents are near 0 where the weight lies: about `exp2_offset` itself t would be off by 3e-6.
    n_tile = exp2_offset(tl.max(x), k) + _RAISED
    if n_tile > n:
        h = n - n_tile
        s = tl.exp2(h)
        if ENTROPY:
            t = s * mul_add(h, z, t)
        z = s * z
        n = n_tile
    y = exponent(x, k, n)
    w = tl.exp2(y)
    z += tl.sum(w, axis=1)
    if ENTROPY:
        t = add_products(t, w, tl.maximum(y, -10000.0))  # 0 · −inf has no place in the sum
    return n, z, t


@triton.jit
def _sweep(
    row, marks, V, k, CT: tl.constexpr, ENTROPY: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = R * VEC
    n = tl.full([], NO_REFERENCE, CT)
    z = tl.zeros([R], CT)
    t = tl.zeros([R], CT)
    full = V - V % BLOCK
    if full > 0:
        ahead = load_tile(row, 0, R, VEC, LAYOUT)
        for start in range(0, full, BLOCK):
            x = unpacked(ahead, row, CT, R, VEC)
            ahead = load_tile(row, tile_ahead(start, full, BLOCK), R, VEC, LAYOUT)
            n, z, t = _accumulate(x, _is_picked(marks, start, R, VEC), n, z, t, k, ENTROPY)
    if full < V:
        x = load_ragged(row, full, V, -float("inf"), CT, R, VEC, LAYOUT)
        n, z, t = _accumulate(x, _is_picked(marks, full, R, VEC), n, z, t, k, ENTROPY)
    return n, tl.sum(z), tl.sum(t)


@triton.jit
def _shifted_weights(x, top, k, k_rest):
    """2^((k + k_rest) (x − top)) and its exponent: the difference is exact where the products are not."""
    d = tl.maximum(x - top, -1e30)  # the lowest number less a large one is −inf, and −inf − top too
    y = d * k
    missing = mul_add(d, k_rest, fma(d, k, -y)) * 0.6931471805599453
    return tl.exp2(y) * (1.0 + missing), tl.maximum(y, -10000.0)


@triton.jit
def _shifted_sweep(
    row, marks, V, k, k_rest, CT: tl.constexpr, ENTROPY: tl.constexpr,
    R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """The largest logit of the columns that are not picked, and the sums about it. Two sweeps."""
    top = tl.full([R, VEC], -float("inf"), CT)
    for start in range(0, V, R * VEC):
        x = load_ragged(row, start, V, -float("inf"), CT, R, VEC, LAYOUT)
        x = tl.where(_is_picked(marks, start, R, VEC), -float("inf"), x)
        top = tl.maximum(top, x)
    top = tl.max(top)
    top = tl.where(top == -float("inf"), 0.0, top)  # no column: weights of 0, not of NaN
    z = tl.zeros([R], CT)
    t = tl.zeros([R], CT)
    for start in range(0, V, R * VEC):
        x = load_ragged(row, start, V, -float("inf"), CT, R, VEC, LAYOUT)
        x = tl.where(_is_picked(marks, start, R, VEC), -float("inf"), x)
        w, y = _shifted_weights(x, top, k, k_rest)
        w = tl.where(x == -float("inf"), 0.0, tl.where(x == x, w, x))
        z += tl.sum(w, axis=1)
        if ENTROPY:
            t = add_products(t, w, y)
    return top, tl.sum(z), tl.sum(t)


@kernel
def complement_kernel(
    x_ptr,  # [A, B, V] fp16, bf16, fp32 or fp64
    ids_ptr,  # [A*B, n_ids] int64
    valid_ptr,  # [A*B] bool, or None
    scales_ptr,  # [A*B] fp64, or None
    stats_ptr,  # [A*B, COMPLEMENT_STATS] fp64, zeroed
    words_ptr,  # [programs, words] int32, zeroed
    marks_ptr,  # [programs, 4 * words] uint8, the bytes of these words
    n_rows, n_inner, x_outer, x_inner, V, n_ids, words, scale_high, scale_low,
    HAS_VALID: tl.constexpr, HAS_SCALES: tl.constexpr, ENTROPY: tl.constexpr, IDS: tl.constexpr,
    CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Statistics of every row; a program takes rows in strides of the number of programs."""
    own = tl.program_id(0).to(tl.int64) * words
    exact = from_high_low(scale_high, scale_low) * LOG2E
    k = exact.to(CT)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        valid = True
        if HAS_VALID:
            valid = tl.load(valid_ptr + row) != 0
        if valid:
            if HAS_SCALES:
                exact = stored_scale(scales_ptr + row) * LOG2E
                k = exact.to(CT)
            ids = ids_ptr + tl.full([], row, tl.int64) * n_ids
            _mark(words_ptr + own, ids, n_ids, V, True, IDS, R, VEC, LAYOUT)
            tl.debug_barrier()
            x_row = row_start(tl.full([], row, tl.int64), n_inner, x_ptr, x_outer, x_inner)
            n, z, t = _sweep(x_row, marks_ptr + own * 4, V, k, CT, ENTROPY, R, VEC, LAYOUT)
            n = n.to(tl.float64)
            scale_correction = exact / k.to(tl.float64) - 1.0
            out_of_range = False
            if tl.float32 == CT:
                out_of_range = tl.abs(n) > _OUT_OF_RANGE
                if out_of_range:
                    k_rest = (exact - k.to(tl.float64)).to(CT)
                    marks = marks_ptr + own * 4
                    top, z, t = _shifted_sweep(x_row, marks, V, k, k_rest, CT, ENTROPY, R, VEC, LAYOUT)
                    n = top.to(tl.float64) * exact
                    scale_correction = 0.0 * scale_correction
            tl.debug_barrier()  # no thread may still read the bits
            _mark(words_ptr + own, ids, n_ids, V, False, IDS, R, VEC, LAYOUT)
            tl.debug_barrier()
            z = z.to(tl.float64)
            t = tl.where(z == 0, 0.0, t.to(tl.float64) / z)
            log_z = tl.log(z)
            # The sums were taken with the scale rounded to CT, which shows where all logits are large.
            rest_lse = n / LOG2E + log_z + scale_correction * (n + t) / LOG2E
            stats = stats_ptr + tl.full([], row, tl.int64) * _STATS
            tl.store(stats, tl.where(out_of_range, n, n - _RAISED))
            tl.store(stats + 1, tl.where(out_of_range, -1.0, 0.0078125) / z)
            tl.store(stats + 2, tl.where(z == 0, 0.0, log_z - t / LOG2E) if ENTROPY else z * 0.0)
            rest_lse = tl.where(z == 0, -float("inf"), rest_lse)
            if tl.float64 == CT:
                # Past 1e15 the rounding of n is an exponent: NaN rather than noise.
                unknown = (n > 0.5 * NO_REFERENCE) & (tl.abs(n) > 1e15)
                rest_lse = tl.where(unknown, float("nan"), rest_lse)
            tl.store(stats + 3, rest_lse)


@triton.jit
def _gradient_tile(x, side, n, grad_rest, grad_entropy, log_z, k, ENTROPY: tl.constexpr):
    """π (grad_rest − grad_entropy · log2 π); log_z is log2 Z."""
    share = probability(x, side)
    if ENTROPY:
        grad_rest = sub_mul(grad_rest, grad_entropy, tl.maximum(exponent(x, k, n), -10000.0) - log_z)
    return share * grad_rest


@triton.jit
def _shifted_gradient_tile(x, top, inv, grad_rest, grad_entropy, log_z, k, k_rest, ENTROPY: tl.constexpr):
    w, y = _shifted_weights(x, top, k, k_rest)
    if ENTROPY:
        grad_rest = sub_mul(grad_rest, grad_entropy, y - log_z)
    return w * inv * grad_rest


@kernel
def complement_gradient_kernel(
    x_ptr,  # [A, B, V] fp16, bf16, fp32 or fp64
    ids_ptr,  # [A*B, n_ids] int64
    valid_ptr,  # [A*B] bool, or None
    scales_ptr,  # [A*B] fp64, or None
    stats_ptr,  # [A*B, COMPLEMENT_STATS] fp64
    grad_picked_ptr,  # [A*B, n_ids] fp64
    grad_rest_ptr,  # [A*B] fp64
    grad_entropy_ptr,  # [A*B] fp64, where ENTROPY
    grad_ptr,  # [A, B, V] x's dtype
    n_rows, n_inner, x_outer, x_inner, grad_outer, grad_inner, V, n_ids, num_splits, split_columns,
    scale_high, scale_low,
    HAS_VALID: tl.constexpr, HAS_SCALES: tl.constexpr, ENTROPY: tl.constexpr, IDS: tl.constexpr,
    CT: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Write one split of a row: first as if no column were picked, then what flows to those that are."""
    BLOCK: tl.constexpr = R * VEC
    row = tl.program_id(0).to(tl.int64) // num_splits
    first = (tl.program_id(0) % num_splits) * split_columns
    last = tl.minimum(first + split_columns, V)
    x_row = row_start(row, n_inner, x_ptr, x_outer, x_inner)
    grad = row_start(row, n_inner, grad_ptr, grad_outer, grad_inner)
    scale = stored_scale(scales_ptr + row) if HAS_SCALES else from_high_low(scale_high, scale_low)
    k = (scale * LOG2E).to(CT)
    valid = True
    if HAS_VALID:
        valid = tl.load(valid_ptr + row) != 0
    stats = stats_ptr + row * _STATS
    n = tl.load(stats)
    inv = tl.load(stats + 1)
    out_of_range = inv < 0
    inv = tl.abs(inv)
    top = (n / (scale * LOG2E)).to(CT)
    n = n.to(CT)
    grad_rest = tl.load(grad_rest_ptr + row) * scale
    grad_entropy = tl.zeros([], tl.float64)
    if ENTROPY:
        grad_entropy = tl.load(grad_entropy_ptr + row) * scale
    grad_rest = grad_rest - grad_entropy * tl.load(stats + 2)
    has_gradient = valid & ((grad_rest != 0) | (grad_entropy != 0)) & (inv != float("inf"))
    log_z = (-tl.log(inv) * LOG2E).to(CT)
    side = normalised(0.0, n, inv.to(CT), k, (1.0 - scale * LOG2E / k).to(CT), 15)
    to_rest = grad_rest.to(CT)
    to_log = (grad_entropy / LOG2E).to(CT)
    begin, start, end = own_columns(grad, first, last, V, LAYOUT)
    if has_gradient & out_of_range:
        k_rest = (scale * LOG2E - k.to(tl.float64)).to(CT)
        factor = inv.to(CT)
        if start < begin:
            x = load_one(x_row + start, CT)
            out = _shifted_gradient_tile(x, top, factor, to_rest, to_log, log_z, k, k_rest, ENTROPY)
            store_one(grad + start, out)
        for at in range(begin, end, BLOCK):
            x = load_ragged(x_row, at, end, -float("inf"), CT, R, VEC, LAYOUT)
            out = _shifted_gradient_tile(x, top, factor, to_rest, to_log, log_z, k, k_rest, ENTROPY)
            store_ragged(grad, at, end, out, R, VEC, LAYOUT)
    elif has_gradient:
        if start < begin:
            out = _gradient_tile(load_one(x_row + start, CT), side, n, to_rest, to_log, log_z, k, ENTROPY)
            store_one(grad + start, out)
        full = end - (end - begin) % BLOCK
        for at in range(begin, full, BLOCK):
            x = unpacked(load_tile(x_row, at, R, VEC, LAYOUT), x_row, CT, R, VEC)
            out = _gradient_tile(x, side, n, to_rest, to_log, log_z, k, ENTROPY)
            store_tile(grad, at, out, R, VEC, LAYOUT)
        if full < end:
            x = load_ragged(x_row, full, end, -float("inf"), CT, R, VEC, LAYOUT)
            out = _gradient_tile(x, side, n, to_rest, to_log, log_z, k, ENTROPY)
            store_ragged(grad, full, end, out, R, VEC, LAYOUT)
    else:
        write_zeros(grad, start, end, R, VEC, LAYOUT)
    tl.debug_barrier()  # the picked columns are written over what other threads have just stored
    if valid:
        for at in range(0, n_ids, IDS):
            which = at + tl.arange(0, IDS)
            here = which < n_ids
            column = tl.load(ids_ptr + row * n_ids + which, mask=here, other=-1)
            value = tl.load(grad_picked_ptr + row * n_ids + which, mask=here, other=0.0) * scale
            inside = (column >= start) & (column < end)
            column = tl.where(inside, column, 0)
            tl.store(grad + column, narrow(value.to(CT), grad.dtype.element_ty), mask=inside)


# By the logit's bytes: 8 columns are one access of 16 bytes in 16 bits, two in float32. Left alone, ptxas
# holds the form for odd V to 128 registers on sm_80 and spills.
_WARPS = 4  # a row has one program
SHAPES = {
    2: ProgramShape(16, 160, _WARPS),
    4: ProgramShape(8, None, _WARPS),
    8: ProgramShape(4, None, _WARPS),
}
_FROM_CONFIGURATION = ("CT", "R", "VEC", "LAYOUT", "num_warps", "maxnreg")


def program(logits: Tensor, n_ids: int, lanes: int = LANES) -> dict[str, Any]:
    """What both kernels are compiled for: dtype and V, never the number of rows, and ids by powers of two."""
    config = configuration(RowPair.of(logits, logits, None, "forward_kl", 0.0, 1.0, 1.0), SHAPES, lanes)
    # Fewer than a warp of ids is more programs to compile for nothing.
    ids = min(max(power_of_2(n_ids), 32), 1024)
    return {name: config[name] for name in _FROM_CONFIGURATION if name in config} | {"IDS": ids}


class _Plan(NamedTuple):
    launch: PreparedLaunch
    bits: tuple[int, int]  # words of each program


@plan
def _plan(
    logits: Tensor, n_ids: int, has_valid: bool, has_scales: bool, scale: float, entropy: bool, resident: int
) -> _Plan:
    """Of a place."""
    config = program(logits, n_ids)
    n_rows = logits.shape[0] * logits.shape[1]
    programs = min(n_rows, resident)
    block = config["R"] * config["VEC"]
    words = cdiv(logits.shape[-1], block) * block // 32
    numbers = n_rows, logits.shape[1], *steps(logits), logits.shape[2], n_ids, words, *high_low(scale)
    launch = PreparedLaunch(
        complement_kernel, programs, logits.device, numbers,
        HAS_VALID=has_valid, HAS_SCALES=has_scales, ENTROPY=entropy, **config,
    )  # fmt: skip
    return _Plan(launch, (programs, words))


def complement(args: ComplementArgs, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `Backend.complement` has it."""
    x, ids, valid, scale, scales = args
    resident = max(resident_programs(x.device) // _WARPS, 1)
    launch, shape = _plan(
        place(x), ids.shape[1], valid is not None, scales is not None, scale, entropy, resident
    )
    stats = torch.zeros((args.n_rows, COMPLEMENT_STATS), dtype=torch.float64, device=x.device)
    bits = torch.zeros(shape, dtype=torch.int32, device=x.device)
    launch(x, ids, valid, scales, stats, bits, bits.view(torch.uint8))
    return stats[:, 3].clone(), stats[:, 2].clone(), stats


@plan
def _gradient_plan(
    logits: Tensor, n_ids: int, has_valid: bool, has_scales: bool, scale: float, entropy: bool, grad: Tensor
) -> PreparedLaunch:
    """Of places."""
    config = program(logits, n_ids)
    config["LAYOUT"] = gradient_layout(config["LAYOUT"], logits, grad)
    splits = splits_of(logits.shape[-1], config["R"] * config["VEC"], _WARPS)
    n_rows = logits.shape[0] * logits.shape[1]
    numbers = (
        n_rows, logits.shape[1], *steps(logits), *steps(grad), logits.shape[2], n_ids, *splits,
        *high_low(scale),
    )  # fmt: skip
    return PreparedLaunch(
        complement_gradient_kernel, n_rows * splits.number, logits.device, numbers,
        HAS_VALID=has_valid, HAS_SCALES=has_scales, ENTROPY=entropy, **config,
    )  # fmt: skip


def complement_gradient(
    args: ComplementArgs,
    stats: Tensor,
    grad_picked: Tensor,
    grad_rest: Tensor,
    grad_entropy: Tensor | None,
    grad: Tensor,
) -> None:
    """As `Backend.complement_gradient` has it."""
    x, ids, valid, scale, scales = args
    launch = _gradient_plan(
        place(x), ids.shape[1], valid is not None, scales is not None, scale, grad_entropy is not None,
        place(grad),
    )  # fmt: skip
    turn = grad_rest if grad_entropy is None else grad_entropy
    launch(x, ids, valid, scales, stats, grad_picked, grad_rest, turn, grad)

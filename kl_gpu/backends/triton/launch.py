"""What the launcher needs: program shapes, compile-time configuration, arguments of both sides."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import IntEnum
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import RowPair

_TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}

# Whether the compiler may make one fma of a multiplication and an addition. LLVM decides that by how far the
# two lie apart, so that rows would have other bits in other layouts: kernels say themselves what is fused.
FP_FUSION = False
LANES = 64 if torch.version.hip else 32  # threads of a warp
# Columns that a warp of a program sweeps; a longer row is shared. At 4096 one row of 128256 keeps 32 warps
# busy, and the 1056 of them that sweep at once on 132 SMs have 17 MB of bfloat16 in flight, which an L2 holds
# until the gradient reads them again.
SPLIT_COLUMNS = 4096
_ROOM = 64
LOG2E = 1.4426950408889634


@lru_cache(maxsize=1024)
def high_low(x: float) -> tuple[float, float]:
    """x as a sum of two float32: Triton passes Python floats as float32."""
    high = float(np.float32(x))
    return high, float(np.float32(x - high))


@lru_cache(maxsize=1024)
def scale_parts(a: float, b: float) -> tuple[float, ...]:
    """Both sides' 1/T as pairs of float32, and what `device_math.scales_of` would make of them in float32."""
    parts = *high_low(a), *high_low(b)
    a, b = parts[0] + parts[1], parts[2] + parts[3]
    log2_a, log2_b = a * LOG2E, b * LOG2E
    k_a, k_b = float(np.float32(log2_a)), float(np.float32(log2_b))
    return *parts, k_a, k_b, (k_a - log2_a) / k_a, (k_b - log2_b) / k_b, (a - parts[0]) / a


class ProgramShape(NamedTuple):
    """Columns a thread holds, the registers ptxas may use for it (None: its own choice), warps of a program,
    and the registers where rows start anywhere in runs, or a pair of columns lies in two words, if others.

    One warp reduces without barriers, and meets no other's new maximum.
    """

    columns: int
    registers: int | None = None
    warps: int = 1
    of_runs: int | None = None
    of_pairs: int | None = None


def warps_of(shape: ProgramShape) -> int:
    """By itself for tests, whose interpreter takes as long for a narrow tile as for a wide one."""
    return shape.warps


# Plain integers: `triton.cdiv` and its like take a microsecond a call, as much as all else here together.
def cdiv(n: int, size: int) -> int:
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The next one, from n on."""
    return 1 << (n - 1).bit_length()


def divisor(d: int) -> tuple[int, int]:
    """The magic and the shift with which `device_math.quotient` divides numbers below 2^31 by d, exactly.

    As Granlund and Montgomery have it: with s = ⌈log2 d⌉ and m = ⌈2^(31 + s)/d⌉, n // d is n·m >> (31 + s).
    m needs all of 32 bits, and is passed as the int32 of the same bits.
    """
    shift = (d - 1).bit_length()
    return cdiv(1 << (31 + shift), d) - (1 << 32), shift


class Splits(NamedTuple):
    """How a row is shared: by V alone, so that no bit of it depends on how many rows there are."""

    number: int
    columns: int


def splits_of(columns: int, step: int, warps: int = 1) -> Splits:
    """Splits of nearly equal width, whole steps each but for the row's last."""
    width = cdiv(cdiv(columns, cdiv(columns, warps * SPLIT_COLUMNS)), step) * step
    return Splits(cdiv(columns, width), width)


def room_for(splits: int) -> int:
    """How many splits of a row the compiled kernel has room for: one number serves up to 262144 columns.

    The next power of two would have every vocabulary compile kernels of its own.
    """
    return 1 if splits == 1 else max(power_of_2(splits), _ROOM)


def kernel(function: Callable[..., None]) -> Any:
    """`triton.jit` of a kernel that is compiled for its dtypes and constexprs alone, for no argument's value.

    Left alone, Triton compiles one form more for addresses and strides that 16 divides, in which threads own
    other columns: a view would not have the bits of its copy. `Layout` says what is known of addresses.
    """
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.annotation != "tl.constexpr"]
    pointers = [name for name in names if name.endswith("_ptr")]
    return triton.jit(
        do_not_specialize=[name for name in names if name not in pointers],
        do_not_specialize_on_alignment=pointers,
    )(function)


class Layout(IntEnum):
    """Which columns of a tile a thread owns, by V and the dtypes alone, and how logits are loaded.

    Who owns a column must not depend on where a row starts, or its bits would.
    """

    SINGLES = 0  # neighbouring threads own neighbouring columns
    RUNS = 1  # a thread owns neighbouring columns, 16 bytes of the wider side's; rows may start anywhere
    ALIGNED_RUNS = 2  # the same where all runs are aligned: each is one access
    PAIRS_IN_WORDS = 3  # neighbouring threads own neighbouring pairs, each a 32-bit word
    PAIRS = 4  # the same where a pair may lie in two words


def steps(logits: Tensor) -> tuple[int, int]:
    """From one row to the next in each leading dimension; of a dimension of size 1 any stride may be told."""
    strides, sizes = logits.stride(), logits.shape
    inner = strides[-2] if sizes[-2] > 1 else 0
    return strides[0] if len(sizes) == 3 and sizes[0] > 1 else 0, inner


def _aligned(logits: Tensor, columns: int) -> bool:
    """Whether every row starts at a multiple of so many columns' bytes."""
    itemsize = logits.element_size()
    outer, inner = steps(logits)
    # What divides all of them, for a power of two.
    return (logits.data_ptr() | outer * itemsize | inner * itemsize) % (columns * itemsize) == 0


def layout(a: Tensor, b: Tensor) -> Layout:
    """Where V is not a multiple of 16 bytes, runs would be accesses that take many cache lines each."""
    sizes = {a.element_size(), b.element_size()}
    run = 16 // max(sizes)
    if a.shape[-1] % run == 0:
        return Layout.ALIGNED_RUNS if _aligned(a, run) and _aligned(b, run) else Layout.RUNS
    if sizes != {2}:
        return Layout.SINGLES
    return Layout.PAIRS_IN_WORDS if _aligned(a, 2) and _aligned(b, 2) else Layout.PAIRS


def gradient_layout(layout: int, *tensors: Tensor | None) -> int:
    """How gradients are written: nothing is summed there, so it may depend on where rows start.

    Pairs are words of the gradient, and of the logits, where all rows start at the same half of a word.
    """
    given = [x for x in tensors if x is not None]
    if layout in (Layout.RUNS, Layout.ALIGNED_RUNS):
        run = 16 // max(x.element_size() for x in given)
        return int(Layout.ALIGNED_RUNS if all(_aligned(x, run) for x in given) else Layout.SINGLES)
    if layout == Layout.SINGLES:
        return layout
    starts = {(x.element_size(), *_halves(x)) for x in given}
    return int(Layout.PAIRS_IN_WORDS if len(starts) == 1 else Layout.SINGLES)


def _halves(logits: Tensor) -> tuple[int, ...]:
    """At which half of a 32-bit word the first row starts, in 16 bits, and the next in each dimension."""
    return tuple(at % 2 for at in (logits.data_ptr() // 2, *steps(logits)))


def configuration(p: RowPair, shapes: dict[int, ProgramShape], lanes: int = LANES) -> dict[str, Any]:
    """What the compiled kernel depends on: dtypes and the size of V, never N or any float."""
    a, b = p.a, p.b
    itemsize = max(a.element_size(), b.element_size())
    shape = shapes[itemsize]
    vec = 16 // itemsize
    per_warp = lanes * shape.columns
    block = min(max(power_of_2(a.shape[-1]), per_warp), warps_of(shape) * per_warp)
    found = {
        "HAS_SCALES": p.scales is not None,
        "SAME_SCALE": p.same_scale,
        "EXACT": a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16),
        "CT": _TRITON_DTYPE[p.dtype],
        "R": block // vec,
        "VEC": vec,
        "LAYOUT": int(layout(a, b)),
        "num_warps": block // per_warp,
    }
    of_layout = {Layout.RUNS: shape.of_runs, Layout.PAIRS: shape.of_pairs}
    registers = of_layout.get(found["LAYOUT"]) or shape.registers
    # Only NVIDIA's compiler knows the option.
    if registers is not None and a.device.type != "xpu" and not torch.version.hip:
        found["maxnreg"] = registers
    return found


def step_of(p: RowPair, configuration: dict[str, Any]) -> int:
    """Columns that a pass of the first sweep takes: two tiles where `kl_pass.sweep` does."""
    sizes = {p.a.element_size(), p.b.element_size()}
    tiles = 2 if sizes == {2} else 1
    return int(tiles * configuration["R"] * configuration["VEC"])


def geometry(p: RowPair) -> tuple[Any, ...]:
    """Sizes, strides and temperatures of both sides, as the kernel takes them."""
    return p.a.shape[-2], *steps(p.a), *steps(p.b), p.a.shape[-1], *scale_parts(p.a_scale, p.b_scale)


@cache
def resident_programs(device: torch.device) -> int:
    """About how many programs of one warp run at a time; a wrong guess costs waiting, not correctness."""
    if device.type != "cuda":
        return 8
    return 16 * torch.cuda.get_device_properties(device).multi_processor_count

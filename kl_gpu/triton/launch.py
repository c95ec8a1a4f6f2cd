"""What the launcher needs: program shapes, compile-time configuration, arguments of both sides."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from ..problem import Problem

_TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}

WARPS = 4
# Columns that one program sweeps; a longer row is shared. At 16384 one row of 128256 keeps 8 programs busy,
# and the 264 of them that sweep at once on 132 SMs have 17 MB of bfloat16 in flight, which an L2 holds until
# the gradient reads them again.
PART = 16384


def high_low(x: float) -> tuple[float, float]:
    """x as a sum of two float32: Triton passes Python floats as float32."""
    high = float(np.float32(x))
    return high, float(np.float32(x - high))


class ProgramShape(NamedTuple):
    """Columns a thread holds, and the registers ptxas may use for it (None: its own choice)."""

    columns: int
    registers: int | None = None


class Parts(NamedTuple):
    """How a row is shared: by V alone, so that no bit of it depends on how many rows there are."""

    number: int
    columns: int


def parts_of(columns: int, block: int) -> Parts:
    """Parts of nearly equal width, whole tiles each but for the row's last."""
    count = triton.cdiv(columns, PART)
    width = triton.cdiv(triton.cdiv(columns, count), block) * block
    return Parts(triton.cdiv(columns, width), width)


def configuration(p: Problem, shapes: dict[int, ProgramShape]) -> dict[str, Any]:
    """What the compiled kernel depends on: dtypes and the size of V, never N or any float."""
    a, b = p.a, p.b
    itemsize = max(a.element_size(), b.element_size())
    shape = shapes[itemsize]
    vec = 16 // itemsize
    per_warp = 32 * shape.columns
    block = min(max(triton.next_power_of_2(a.shape[-1]), per_warp), WARPS * per_warp)
    # Only NVIDIA's compiler knows the option.
    limit = shape.registers is not None and a.device.type != "xpu" and not torch.version.hip
    return {
        **({"maxnreg": shape.registers} if limit else {}),
        "SAME_SCALE": p.a_scale == p.b_scale,
        "EXACT": a.dtype == b.dtype == torch.bfloat16,
        "CT": _TRITON_DTYPE[p.dtype],
        "R": block // vec,
        "VEC": vec,
        "WIDE": a.shape[-1] % vec == 0,
        "num_warps": block // per_warp,
    }


def geometry(p: Problem) -> tuple[Any, ...]:
    """Sizes, strides and temperatures of both sides, as the kernel takes them."""
    strides = (p.a.stride(0), p.a.stride(1), p.b.stride(0), p.b.stride(1))
    return p.a.shape[1], *strides, p.a.shape[2], *high_low(p.a_scale), *high_low(p.b_scale)


@cache
def resident_programs(device: torch.device) -> int:
    """About how many programs of four warps run at a time; a wrong guess costs waiting, not correctness."""
    if device.type != "cuda":
        return 8
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count

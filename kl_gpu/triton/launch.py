"""What every launcher needs: program shapes, compile-time configuration, arguments of both sides."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from ..problem import Problem

_TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def high_low(x: float) -> tuple[float, float]:
    """x as a sum of two float32: Triton passes Python floats as float32."""
    high = float(np.float32(x))
    return high, float(np.float32(x - high))


class ProgramShape(NamedTuple):
    """Columns a thread holds, and the registers ptxas may use for it (None: its own choice)."""

    columns: int
    registers: int | None = None


WARPS = 4


def configuration(p: Problem, shapes: dict[int, ProgramShape]) -> dict[str, Any]:
    """What the compiled kernels depend on: dtypes and the size of V, never N or any float."""
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
        "num_warps": block // per_warp,
    }


def geometry(p: Problem) -> tuple[Any, ...]:
    """Sizes, strides and temperatures of both sides, as every kernel takes them."""
    strides = (p.a.stride(0), p.a.stride(1), p.b.stride(0), p.b.stride(1))
    return p.a.shape[1], *strides, p.a.shape[2], *high_low(p.a_scale), *high_low(p.b_scale)

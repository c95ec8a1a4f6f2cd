"""The compiled CPU kernels of `kernels/`, where they are installed, and how tensors are handed to them.

The extension gets raw addresses. Whoever makes a copy for it keeps a reference until the call returns: a
temporary would be freed during the call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..interface import RowPair

try:
    import kl_gpu._native as _native
except ImportError:  # installed where no compiler was at hand
    _native = None  # type: ignore[assignment]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_NO_TARGET = (0, 0, 0, 0)
ALL_VALID = (0, 0, 0)
_ONE_SCALE = (0, 0)


def available() -> bool:
    """Whether the kernels were compiled when this package was installed."""
    return _native is not None


def isa() -> str:
    """The set in use: v4 (AVX-512), v3 (AVX2), v2 (SSE4.2) of x86-64, neon of AArch64, baseline elsewhere."""
    return _native.isa()


def supported_isas() -> list[str]:
    """Every instruction set this processor runs, best first; KL_GPU_ISA forces one."""
    return _native.supported_isas().split(", ")


# Named at every new tensor: torch.set_default_device must not choose memory whose address the kernels get.
CPU = torch.device("cpu")

Side = tuple[int, int, int, int, float]
Valid = tuple[int, int, int]
Sizes = tuple[int, int, int, int]
Scales = tuple[int, int]
Pair = tuple[Side, Side, Valid, Sizes, str, float, bool, Scales]


def leading(strides: tuple[int, ...]) -> tuple[int, int]:
    """The first two of `[A, B, V]`; of `[B, V]`, whose A is 1, one that nothing steps by."""
    return (strides[0], strides[1]) if len(strides) == 3 else (0, strides[0])


def side(logits: Tensor, scale: float) -> tuple[int, int, int, int, float]:
    return logits.data_ptr(), *leading(logits.stride()), _DTYPES[logits.dtype], scale


def target(grad: Tensor | None) -> tuple[int, int, int, int]:
    if grad is None:
        return _NO_TARGET
    return grad.data_ptr(), *leading(grad.stride()), _DTYPES[grad.dtype]


def row_scales(scales: Tensor | None) -> tuple[int, int]:
    """1/temperature of each row, contiguous `[rows, columns]`."""
    return _ONE_SCALE if scales is None else (scales.data_ptr(), scales.shape[1])


def pair_arguments(p: RowPair) -> Pair:
    """What every entry of the extension begins with."""
    valid = ALL_VALID if p.valid is None else (p.valid.data_ptr(), *leading((*p.valid.stride(), 1)))
    *size_a, size_b, columns = p.a.shape
    sizes = (*(size_a or (1,)), size_b, columns, torch.get_num_threads())
    a, b = side(p.a, p.a_scale), side(p.b, p.b_scale)
    return a, b, valid, sizes, p.formula, p.beta, p.dtype == torch.float64, row_scales(p.scales)

"""Backend "native": the compiled CPU kernels of `kernels/`.

Tensors in, tensors out; what they must look like has been checked before anything gets here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .kinds import STATS
from .problem import TOKEN_STATS, Problem

try:
    import kl_gpu._native as _native
except ImportError:  # installed where no compiler was at hand
    _native = None  # type: ignore[assignment]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_NOWHERE = (0, 0, 0, 0)
_ALL_ROWS = (0, 0, 0)


def available() -> bool:
    """Whether the kernels were compiled when this package was installed."""
    return _native is not None


def isa() -> str:
    """The instruction set in use: v4 (AVX-512), v3 (AVX2), v2 (SSE4.2) of x86-64, or baseline elsewhere."""
    return _native.isa()


def supported_isas() -> list[str]:
    """Every instruction set this processor runs, best first; KL_GPU_ISA forces one."""
    return _native.supported_isas().split(", ")


# Named at every new tensor: torch.set_default_device must not choose memory whose address the kernels get.
_CPU = torch.device("cpu")
_LARGE = 1 << 22


def on_large_pages(new: Tensor) -> Tensor:
    """`new`, contiguous and not yet written, whose memory the system is asked to hold in large pages.

    In pages of 4 KiB the first write to each costs a fault, several times the write itself, and a matrix
    product spends a third of its time looking addresses up. Elsewhere than on the CPU, and without the
    compiled kernels, it is returned as it is.
    """
    size = new.numel() * new.element_size()
    if _native is not None and new.device.type == "cpu" and size >= _LARGE:
        _native.prefer_huge_pages(new.data_ptr(), size)
    return new


def _leading(strides: tuple[int, ...]) -> tuple[int, int]:
    """The first two of `[A, B, V]`; of `[B, V]`, whose A is 1, one that nothing steps by."""
    return (strides[0], strides[1]) if len(strides) == 3 else (0, strides[0])


def _side(logits: Tensor, scale: float) -> tuple[int, int, int, int, float]:
    return logits.data_ptr(), *_leading(logits.stride()), _DTYPES[logits.dtype], scale


def _target(grad: Tensor | None) -> tuple[int, int, int, int]:
    if grad is None:
        return _NOWHERE
    return grad.data_ptr(), *_leading(grad.stride()), _DTYPES[grad.dtype]


_Side = tuple[int, int, int, int, float]
_Rows = tuple[int, int, int]
_Sizes = tuple[int, int, int, int]
_Pair = tuple[_Side, _Side, _Rows, _Sizes, str, float, bool]


def _arguments(p: Problem) -> _Pair:
    """What every entry of the extension begins with."""
    rows = _ALL_ROWS if p.rows is None else (p.rows.data_ptr(), *_leading((*p.rows.stride(), 1)))
    *size_a, size_b, columns = p.a.shape
    sizes = (*(size_a or (1,)), size_b, columns, torch.get_num_threads())
    a, b = _side(p.a, p.a_scale), _side(p.b, p.b_scale)
    return a, b, rows, sizes, p.family, p.beta, p.dtype == torch.float64


def _outputs(p: Problem) -> tuple[Tensor, Tensor]:
    n_rows, dtype = p.n_rows, p.dtype
    return (
        torch.empty(n_rows, dtype=dtype, device=_CPU),
        torch.empty(n_rows, STATS, dtype=dtype, device=_CPU),
    )


def value(p: Problem) -> tuple[Tensor, Tensor]:
    """Per-row divergence `[A*B]` and the row statistics `[A*B, STATS]` that `gradient` needs."""
    value, stats = _outputs(p)
    _native.value(_arguments(p), value.data_ptr(), stats.data_ptr())
    return value, stats


def divergence(p: Problem) -> Tensor:
    """`value` without the statistics."""
    value = torch.empty(p.n_rows, dtype=p.dtype, device=_CPU)
    _native.value(_arguments(p), value.data_ptr(), 0)
    return value


def _unit(dtype: torch.dtype, a_scale: float, b_scale: float) -> float:
    """The nats in a unit of the statistics' exponents: ln 2, but for how the kernels round log2(e)/T."""
    k = a_scale * math.log2(math.e)
    rounds = dtype == torch.float32 and a_scale == b_scale  # as Row::fits_fp32
    return math.log(2) * (k / float(np.float32(k)) if rounds else 1.0)


def shard_states(
    stats: Tensor, inside: Sequence[Tensor], a_scale: float, b_scale: float
) -> tuple[Tensor, bool]:
    """As `kl_gpu.distributed.states.packed` at its first look, and whether all normalisers are finite."""
    # By name: copies must outlive the call.
    inside = [value.to(stats.dtype).contiguous() for value in inside]
    out = torch.empty((2 + len(inside), *stats.shape[:-1]), dtype=torch.float64, device=_CPU)
    finite = _native.shard_states(
        stats.data_ptr(), stats.dtype == torch.float64, _unit(stats.dtype, a_scale, b_scale), out[0].numel(),
        [value.data_ptr() for value in inside], out.data_ptr(),
    )  # fmt: skip
    return out, finite


def merge_ranks(found: Tensor) -> tuple[Tensor, bool]:
    """As `kl_gpu.distributed.states.merged`."""
    out = torch.empty(found.shape[1:], dtype=torch.float64, device=_CPU)
    ranks, numbers = found.shape[:2]
    fit = _native.merge_shards(found.data_ptr(), ranks, out[0].numel(), numbers - 2, out.data_ptr())
    return out, fit


def statistics(
    local: Tensor, a_scale: float, b_scale: float, family: str, log_a: Tensor, ratio: Tensor, sums: Tensor
) -> Tensor:
    """As `kl_gpu.eager.statistics`, in the order of kernels/api.h."""
    out = torch.empty_like(local)
    # By name: copies must outlive the call.
    log_a, ratio, sums = log_a.contiguous(), ratio.contiguous(), sums.contiguous()
    _native.whole_row_stats(
        local.data_ptr(), local.dtype == torch.float64, _unit(local.dtype, a_scale, b_scale), log_a.numel(),
        family, log_a.data_ptr(), ratio.data_ptr(), sums.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


def formula_sums(p: Problem, stats: Tensor) -> Tensor:
    """The formula's terms and its two flows, summed over the columns: float64 `[A*B, 3]`."""
    out = torch.empty(p.n_rows, 3, dtype=torch.float64, device=_CPU)
    _native.formula_sums(_arguments(p), stats.contiguous().data_ptr(), out.data_ptr())
    return out


def gradient(
    p: Problem,
    stats: Tensor,
    row_scale: Tensor,
    grad_a: Tensor | None,
    grad_b: Tensor | None,
    incoming: Tensor | None = None,
) -> None:
    """Write incoming · row_scale · ∂value/∂logits. A gradient may lie over the very logits it belongs to.

    With an incoming gradient (0-d) of 1 the buffers stay as they are: `value_and_gradient` filled them.
    """
    if incoming is not None:
        if incoming.item() == 1:
            return
        row_scale = row_scale * incoming
    _native.gradient(_arguments(p), stats.data_ptr(), row_scale.data_ptr(), _target(grad_a), _target(grad_b))


def value_and_gradient(
    p: Problem, row_scale: Tensor, grad_a: Tensor | None, grad_b: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`value` and `gradient` in one visit of each row, for callers who know row_scale beforehand.

    3 U of memory traffic where the two calls take 5 U; the bits are those of the two calls.
    """
    value, stats = _outputs(p)
    _native.value_and_gradient(
        _arguments(p), row_scale.data_ptr(), value.data_ptr(), stats.data_ptr(), _target(grad_a),
        _target(grad_b),
    )  # fmt: skip
    return value, stats


def token_stats(p: Problem, tokens: Tensor | None) -> Tensor:
    """`[TOKEN_STATS, A*B]`, in the order of `kl_gpu.problem`; tokens int64 `[A, B]` where there are any."""
    out = torch.empty(TOKEN_STATS, p.n_rows, dtype=p.dtype, device=_CPU)
    # By name: a copy must outlive the call.
    tokens = None if tokens is None else tokens.contiguous()
    _native.token_stats(_arguments(p), 0 if tokens is None else tokens.data_ptr(), out.data_ptr())
    return out

"""Backend "native": the compiled CPU kernels of `kernels/`.

Tensors in, tensors out; what they must look like has been checked before anything gets here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .kinds import STATS
from .problem import TOKEN_STATS, Problem

try:
    import kl_gpu._native as _native
except ImportError:  # installed where no compiler was at hand
    _native = None  # type: ignore[assignment]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
# As kernels/contract.h numbers them.
_FAMILIES = {"kl": 0, "jeffreys": 1, "js": 2, "skew": 3, "tv": 4}
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


_LARGE = 1 << 22


def on_large_pages(new: Tensor) -> Tensor:
    """`new`, contiguous and not yet written, whose memory the system is asked to hold in large pages.

    In pages of 4 KiB the first write to each costs a fault, several times the write itself, and a matrix
    product spends a third of its time looking addresses up. Elsewhere than on the CPU, and without the
    compiled kernels, it is returned as it is.
    """
    size = new.numel() * new.element_size()
    if _native is not None and new.device.type == "cpu" and size >= _LARGE:
        _native.prefer_large_pages(new.data_ptr(), size)
    return new


def _side(logits: Tensor, scale: float) -> tuple[int, int, int, int, float]:
    stride_a, stride_b, _ = logits.stride()
    return logits.data_ptr(), stride_a, stride_b, _DTYPES[logits.dtype], scale


def _target(grad: Tensor | None) -> tuple[int, int, int, int]:
    if grad is None:
        return _NOWHERE
    stride_a, stride_b, _ = grad.stride()
    return grad.data_ptr(), stride_a, stride_b, _DTYPES[grad.dtype]


_Side = tuple[int, int, int, int, float]
_Rows = tuple[int, int, int]
_Sizes = tuple[int, int, int, int]


def _arguments(p: Problem) -> tuple[_Side, _Side, _Rows, _Sizes, int, float, bool]:
    """What every entry of the extension begins with."""
    rows = _ALL_ROWS if p.rows is None else (p.rows.data_ptr(), p.rows.stride(0), p.rows.stride(1))
    size_a, size_b, columns = p.a.shape
    sizes = (size_a, size_b, columns, torch.get_num_threads())
    sides = _side(p.a, p.a_scale), _side(p.b, p.b_scale)
    a, b = sides
    return a, b, rows, sizes, _FAMILIES[p.family], p.beta, p.dtype == torch.float64


def _outputs(p: Problem) -> tuple[Tensor, Tensor]:
    # zeros: what the kernels leave unused must be the same on every run too.
    return torch.empty(p.n_rows, dtype=p.dtype), torch.zeros(p.n_rows, STATS, dtype=p.dtype)


def value(p: Problem) -> tuple[Tensor, Tensor]:
    """Per-row divergence `[A*B]` and the row statistics `[A*B, STATS]` that `gradient` needs."""
    value, stats = _outputs(p)
    _native.value(*_arguments(p), value.data_ptr(), stats.data_ptr())
    return value, stats


# Of the row statistics, as kernels/contract.h has them, and where rows become vast to kernels/rows.cpp.
_VERDICT, _TOP_R = 5, 6
_PLAIN, _HOLES, _INFINITE, _NAN = 0.0, 1.0, 2.0, 3.0
_VAST = 2.0**20


def _unit(dtype: torch.dtype, a_scale: float, b_scale: float) -> float:
    """The nats in a unit of the statistics' exponents: ln 2, but for how the kernels round log2(e)/T."""
    k = a_scale * math.log2(math.e)
    rounds = dtype == torch.float32 and a_scale == b_scale  # as Row::fits_fp32
    return math.log(2) * (k / torch.tensor(k, dtype=dtype).item() if rounds else 1.0)


def normalisers(stats: Tensor, a_scale: float, b_scale: float) -> tuple[Tensor, Tensor]:
    """Of rows whose statistics these are, in float64 nats: log Σ e^a, and log Σ e^b less that."""
    of, unit = stats.double(), _unit(stats.dtype, a_scale, b_scale)
    return (of[..., 0] + of[..., 1]) * unit, (of[..., 2] + of[..., 3]) * unit


def statistics(
    local: Tensor, a_scale: float, b_scale: float, family: str, log_a: Tensor, ratio: Tensor, sums: Tensor
) -> Tensor:
    """As `kl_gpu.eager.statistics`, in the order of kernels/contract.h."""
    own_shift = local[..., 2].double() + local[..., 3]
    unit, value = _unit(local.dtype, a_scale, b_scale), sums[..., 0]
    shift = ratio / unit
    verdict = torch.where(local[..., _VERDICT] == _PLAIN, _PLAIN, _HOLES)
    if family == "kl":
        verdict = torch.where(value.isposinf(), _INFINITE, verdict)
    verdict = torch.where((value + ratio).isnan(), _NAN, verdict)
    # No ratio is known of a part that has mass on one side only.
    top = local[..., _TOP_R] + own_shift - shift
    top = torch.where(local[..., _VERDICT] == _NAN, torch.inf, top.nan_to_num(nan=torch.inf))
    numbers = [*_high_low(log_a / unit, local.dtype), *_high_low(shift, local.dtype)]
    divergence = value if family == "kl" else torch.zeros_like(value)
    numbers += [divergence, verdict, top, *sums.unbind(-1)]
    numbers += [torch.zeros_like(value)] * (STATS - len(numbers))
    return torch.stack([x.to(local.dtype) for x in numbers], -1)


def _high_low(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    high = x.to(dtype)
    return high, (x - high).to(dtype)


def holds(log_a: Tensor, ratio: Tensor) -> bool:
    """Whether statistics can say where normalisers lie; past that the kernels look at a row again."""
    # A NaN row is none of those: its comparison is false.
    return not bool((torch.stack((log_a, log_a + ratio)).abs() >= _VAST * math.log(2)).any())


def formula_sums(p: Problem, stats: Tensor) -> Tensor:
    """The formula's terms and its two flows, summed over the columns: float64 `[A*B, 3]`."""
    out = torch.empty(p.n_rows, 3, dtype=torch.float64)
    _native.formula_sums(*_arguments(p), stats.contiguous().data_ptr(), out.data_ptr())
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
    _native.gradient(*_arguments(p), stats.data_ptr(), row_scale.data_ptr(), _target(grad_a), _target(grad_b))


def value_and_gradient(
    p: Problem, row_scale: Tensor, grad_a: Tensor | None, grad_b: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`value` and `gradient` in one visit of each row, for callers who know row_scale beforehand.

    3 U of memory traffic where the two calls take 5 U; the bits are those of the two calls.
    """
    value, stats = _outputs(p)
    _native.value_and_gradient(
        *_arguments(p), row_scale.data_ptr(), value.data_ptr(), stats.data_ptr(), _target(grad_a),
        _target(grad_b),
    )  # fmt: skip
    return value, stats


def token_stats(p: Problem, tokens: Tensor | None) -> Tensor:
    """`[TOKEN_STATS, A*B]`, in the order of `kl_gpu.problem`; tokens int64 `[A, B]` where there are any."""
    out = torch.empty(TOKEN_STATS, p.n_rows, dtype=p.dtype)
    # By name: a copy must outlive the call.
    tokens = None if tokens is None else tokens.contiguous()
    _native.token_stats(*_arguments(p), 0 if tokens is None else tokens.data_ptr(), out.data_ptr())
    return out

"""Backend "native": the compiled CPU kernels of `kernels/`.

Tensors in, tensors out; what they must look like has been checked before anything gets here.
Everything is written for KL(a‖b): a weighs the terms, b is the other side.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from kl_gpu import _native
except ImportError:  # installed where no compiler was at hand
    _native = None  # type: ignore[assignment]

STATS = 7

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_Side = tuple[int, int, int, int, float]
_Rows = tuple[int, int, int]
_Sizes = tuple[int, int, int, int]
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


def _side(logits: Tensor, scale: float) -> tuple[int, int, int, int, float]:
    stride_a, stride_b, _ = logits.stride()
    return logits.data_ptr(), stride_a, stride_b, _DTYPES[logits.dtype], scale


def _target(grad: Tensor | None) -> tuple[int, int, int, int]:
    if grad is None:
        return _NOWHERE
    stride_a, stride_b, _ = grad.stride()
    return grad.data_ptr(), stride_a, stride_b, _DTYPES[grad.dtype]


def _rows(rows: Tensor | None) -> tuple[int, int, int]:
    if rows is None:
        return _ALL_ROWS
    stride_a, stride_b = rows.stride()
    return rows.data_ptr(), stride_a, stride_b


def _problem(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    kind: str,
    student_scale: float,
    teacher_scale: float,
) -> tuple[bool, tuple[_Side, _Side, _Rows, _Sizes, bool]]:
    """Whether the student is the weights' side, and what every entry of the extension begins with."""
    student_side, teacher_side = _side(student, student_scale), _side(teacher, teacher_scale)
    student_weighs = kind == "reverse_kl"
    a, b = (student_side, teacher_side) if student_weighs else (teacher_side, student_side)
    wide = a[3] == 3 or b[3] == 3
    size_a, size_b, columns = student.shape
    return student_weighs, (a, b, _rows(rows), (size_a, size_b, columns, torch.get_num_threads()), wide)


def _empty(student: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    n = student.shape[0] * student.shape[1]
    dtype = torch.float64 if wide else torch.float32
    return torch.empty(n, dtype=dtype), torch.empty(n, STATS, dtype=dtype)


def value(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    kind: str,
    student_scale: float,
    teacher_scale: float,
) -> tuple[Tensor, Tensor]:
    """Per-row divergence `[A*B]` and the numbers `[A*B, STATS]` that `gradient` needs.

    student, teacher: [A, B, V], last stride 1, the others anything. rows: bool [A, B] or None;
    a row that is False is not read and has value 0.
    """
    _, problem = _problem(student, teacher, rows, kind, student_scale, teacher_scale)
    value, stats = _empty(student, problem[-1])
    _native.value(*problem, value.data_ptr(), stats.data_ptr())
    return value, stats


def gradient(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    stats: Tensor,
    row_scale: Tensor,
    kind: str,
    student_scale: float,
    teacher_scale: float,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
) -> None:
    """Writes row_scale · ∂value/∂logits. A gradient may lie over the very logits it belongs to."""
    student_weighs, problem = _problem(student, teacher, rows, kind, student_scale, teacher_scale)
    to_student, to_teacher = _target(grad_student), _target(grad_teacher)
    to_a, to_b = (to_student, to_teacher) if student_weighs else (to_teacher, to_student)
    _native.gradient(*problem, stats.data_ptr(), row_scale.data_ptr(), to_a, to_b)


def value_and_gradient(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    row_scale: Tensor,
    kind: str,
    student_scale: float,
    teacher_scale: float,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`value` and `gradient` in one visit of each row: 3 U of memory traffic where the two calls take 5 U.

    For callers who know row_scale beforehand. The bits are those of the two calls.
    """
    student_weighs, problem = _problem(student, teacher, rows, kind, student_scale, teacher_scale)
    value, stats = _empty(student, problem[-1])
    to_student, to_teacher = _target(grad_student), _target(grad_teacher)
    to_a, to_b = (to_student, to_teacher) if student_weighs else (to_teacher, to_student)
    _native.value_and_gradient(*problem, row_scale.data_ptr(), value.data_ptr(), stats.data_ptr(), to_a, to_b)
    return value, stats

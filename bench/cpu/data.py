"""Logits whose kind the CPU kernels must not feel: near, far, offset, cut, peaked, and a model's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from tests.realistic_rows import Trained, train

Pair = tuple[Tensor, Tensor]
_PADDING = 256


def near(rows: int, columns: int, generator: torch.Generator) -> Pair:
    """A student at 0.1 of its teacher, D about 0.005; what the others are compared with."""
    teacher = 2 * torch.randn(rows, columns, generator=generator)
    return teacher + 0.1 * torch.randn(rows, columns, generator=generator), teacher


def _with(change: Callable[[Tensor, Tensor, torch.Generator], None]) -> Callable[..., Pair]:
    def pair(rows: int, columns: int, generator: torch.Generator) -> Pair:
        student, teacher = near(rows, columns, generator)
        change(student, teacher, generator)
        return student, teacher

    return pair


def _far(student: Tensor, teacher: Tensor, generator: torch.Generator) -> None:
    student.normal_(0, 2, generator=generator)


def _offset(student: Tensor, teacher: Tensor, generator: torch.Generator) -> None:
    student += 10


def _cut(low: float, columns: slice, *which: int) -> Callable[[Tensor, Tensor, torch.Generator], None]:
    def change(student: Tensor, teacher: Tensor, generator: torch.Generator) -> None:
        for side in which:
            (student, teacher)[side][:, columns] = low

    return change


def _half(student: Tensor, teacher: Tensor, generator: torch.Generator) -> None:
    nothing = torch.rand(teacher.shape, generator=generator) < 0.5
    for side in (student, teacher):
        side.masked_fill_(nothing, -math.inf)


def _tops(student: Tensor, teacher: Tensor, generator: torch.Generator) -> None:
    for _ in range(6):
        column = torch.randint(teacher.shape[-1], (len(teacher), 1), generator=generator)
        top = 15 + 12 * torch.rand(column.shape, generator=generator)
        teacher.scatter_(1, column, top)
        student.scatter_(1, column, top + torch.randn(column.shape, generator=generator))


def _tops_apart(student: Tensor, teacher: Tensor, generator: torch.Generator) -> None:
    for side in (student, teacher) * 6:
        column = torch.randint(side.shape[-1], (len(side), 1), generator=generator)
        side.scatter_(1, column, 15 + 12 * torch.rand(column.shape, generator=generator))


@cache
def _model() -> Trained:
    return train()


def _of_a_model(rows: int, columns: int, generator: torch.Generator) -> Pair:
    """A small trained model's and its 4-bit copy's, repeated to fill the columns."""
    student, teacher = _model().pair("4 bits", rows, generator)
    times = -(-columns // teacher.shape[-1])
    return student.repeat(1, times)[:, :columns], teacher.repeat(1, times)[:, :columns]


_END, _EVERY, _LOWEST = slice(-_PADDING, None), slice(5, None, 300), -3.3e38

KINDS: dict[str, Callable[[int, int, torch.Generator], Pair]] = {
    "near": near,
    "far": _with(_far),
    "offset by 10": _with(_offset),
    "padded": _with(_cut(-math.inf, _END, 0, 1)),
    "half masked": _with(_half),
    "teacher cut": _with(_cut(-math.inf, _EVERY, 1)),
    "student cut": _with(_cut(-math.inf, _EVERY, 0)),
    "teacher at the lowest": _with(_cut(_LOWEST, _EVERY, 1)),
    "student at the lowest": _with(_cut(_LOWEST, _EVERY, 0)),
    "first tile at -1e4": _with(_cut(-1e4, slice(0, 2048), 1)),
    "tops": _with(_tops),
    "tops apart": _with(_tops_apart),
    "a model's": _of_a_model,
}

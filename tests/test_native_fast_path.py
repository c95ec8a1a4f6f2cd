"""Ordinary rows take the fast path of the compiled CPU kernels: padded or masked vocabularies, an offset."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kl_gpu import KINDS, divergence, token_stats
from kl_gpu.backends import native
from kl_gpu.backends.native import extension

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without its kernels")

ROWS, V = 1000, 8192
INF = math.inf


def rows(dtype: torch.dtype, offset: float = 0) -> tuple[Tensor, Tensor]:
    """A student that is near its teacher: D of 0.005."""
    g = torch.Generator().manual_seed(1)
    teacher = 2 * torch.randn(ROWS, V, generator=g)
    student = teacher + 0.1 * torch.randn(ROWS, V, generator=g) + offset
    return student.to(dtype), teacher.to(dtype)


def mask(columns: slice, *sides: Tensor) -> None:
    for side in sides:
        side[:, columns] = -INF


def padded(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    student, teacher = rows(dtype)
    mask(slice(V - 256, V), student, teacher)
    return student, teacher


def scattered(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    student, teacher = rows(dtype)
    mask(slice(7, V, 100), student, teacher)
    return student, teacher


def cut_teacher(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    student, teacher = rows(dtype)
    mask(slice(V - 256, V), teacher)
    return student, teacher


def offset(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return rows(dtype, 10)


def slow_rows(run: Callable[[], object]) -> int:
    before = extension._native.slow_rows()
    run()
    return extension._native.slow_rows() - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [padded, scattered, cut_teacher, offset])
def test_no_row_of_a_thousand_leaves_it(
    case: Callable[[torch.dtype], tuple[Tensor, Tensor]], dtype: torch.dtype
) -> None:
    student, teacher = case(dtype)
    for name, kind in KINDS.items():
        # A side that lacks what its weights ask for makes the divergence infinite: such rows may be slow.
        if case is cut_teacher and kind.expectation_under == "student":
            continue
        assert slow_rows(lambda kind=name: divergence(student, teacher, kind, backend="native")) == 0, name
    assert slow_rows(lambda: token_stats(student, teacher, backend="native")) == 0


def test_a_slow_row_is_counted() -> None:
    student, teacher = rows(torch.float32)
    student[:10, 5] = -1e30
    assert slow_rows(lambda: divergence(student, teacher, "forward_kl", backend="native")) == 10
    assert slow_rows(lambda: token_stats(student, teacher, backend="native")) >= 10

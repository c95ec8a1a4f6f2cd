"""Ordinary rows take the fast path of the compiled CPU kernels: padded or masked vocabularies, an offset."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from kl_gpu import KINDS, divergence, token_stats
from kl_gpu.backends import native
from kl_gpu.backends.interface import RowPair
from kl_gpu.backends.native import extension
from support import check_gradients, check_value, expected, to_numpy

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without its kernels")

Case = Callable[[torch.dtype], tuple[Tensor, Tensor]]

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


def cut_student(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    student, teacher = rows(dtype)
    mask(slice(3, V, 100), student)
    return student, teacher


def with_lowest(low: float | None, columns: slice, *which: int) -> Case:
    """`rows` with `low`, or the lowest finite number, in `columns` of the student (0) or the teacher (1)."""

    def case(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        sides = rows(dtype)
        for side in which:
            sides[side][:, columns] = torch.finfo(dtype).min if low is None else low
        return sides

    return case


def offset(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return rows(dtype, 10)


def far(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sides that have nothing to do with each other."""
    student, teacher = rows(dtype)
    return student.roll(1, 0), teacher


def tops(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Four tokens of each side that outweigh all others, half of them on both."""
    student, teacher = rows(dtype)
    for column, s, t in ((700, 25.0, 24.0), (4100, 22.0, 22.5), (5000, 27.0, -3.0), (7000, 1.0, 23.0)):
        student[:, column], teacher[:, column] = s, t
    return student, teacher


def first_tile(*which: int) -> Case:
    """`rows` with a moderate number in all of the first columns."""
    return with_lowest(-1e4, slice(0, 2048), *which)


def slow_rows(run: Callable[[], object]) -> int:
    before = extension._native.slow_rows()
    run()
    return extension._native.slow_rows() - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [padded, scattered, offset, far, tops])
def test_no_row_of_a_thousand_leaves_it(case: Case, dtype: torch.dtype) -> None:
    student, teacher = case(dtype)
    for kind in KINDS:
        assert slow_rows(lambda kind=kind: divergence(student, teacher, kind, backend="native")) == 0, kind
    if case is not tops:  # whose statistics fp32 takes one divergence at a time
        assert slow_rows(lambda: token_stats(student, teacher, backend="native")) == 0


ONE_SIDED = {
    "the teacher cut": cut_teacher,
    "the student cut": cut_student,
    "the student at the lowest number": with_lowest(None, slice(V - 256, V), 0),
    "the teacher at the lowest number": with_lowest(None, slice(5, V, 300), 1),
    "the student at the lowest number in the first columns": with_lowest(None, slice(0, 60), 0),
    "both at the lowest number": with_lowest(None, slice(5, V, 300), 0, 1),
    "the student at -1e9 here and there": with_lowest(-1e9, slice(5, V, 300), 0),
    "the teacher at -1e4": with_lowest(-1e4, slice(V - 256, V), 1),
    "the first columns of the teacher at -1e4": first_tile(1),
    "the first columns of the student at -1e4": first_tile(0),
    "the student at -100": with_lowest(-100, slice(V - 256, V), 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ONE_SIDED)
def test_masks_on_one_side_take_it(case: str, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and "-1e9" in case:
        pytest.skip("float16 has no such number")
    student, teacher = (side[:20].clone().requires_grad_() for side in ONE_SIDED[case](dtype))
    for kind in KINDS:
        found: list[Tensor] = []
        run = partial(divergence, student, teacher, kind, reduction="none", backend="native")
        slow = slow_rows(lambda run=run, found=found: found.append(run()))
        # Other kinds want lse(q) - lse(p) better than fp32 leaves it where KL(p‖q) or KL(q‖p) is infinite.
        assert slow == 0 or (kind not in ("forward_kl", "reverse_kl") and "cut" in case), kind
        where = f"{case} {kind} {dtype}"
        check_value(found[0], student, teacher, kind, "native", where)
        want = expected(student, teacher, kind)
        assert np.allclose(to_numpy(found[0]), want, rtol=5e-6 if kind != "tv" else 1e-5, atol=0), where
        # Past its promised range lk keeps too little of its divergence for the gradient.
        if np.isfinite(want).all() and (kind != "lk" or want.max() < 1e2):
            grads = torch.autograd.grad(found[0].sum(), (student, teacher))
            check_gradients(student, teacher, grads, kind, "native", where)


def test_a_slow_row_is_counted() -> None:
    student, teacher = rows(torch.float32)
    student[:10, 5] = 1e30
    assert slow_rows(lambda: divergence(student, teacher, "forward_kl", backend="native")) == 10
    assert slow_rows(lambda: token_stats(student, teacher, backend="native")) >= 10


@pytest.mark.parametrize("which", [0, 1])
def test_a_top_of_one_side_past_two_to_the_20(which: int) -> None:
    """One token has nearly all of both sides' mass; its logit is huge on one side, ordinary on the other."""
    generator = torch.Generator().manual_seed(3)
    sides = [torch.randn(4, 300, generator=generator) for _ in range(2)]
    sides[1 - which][:, 7] = torch.tensor([25.0, 25.0, 26.0, 24.0])
    sides[which][:, 7] = torch.tensor([1e6, 3e9, 7.6e32, 1e7])
    for kind in KINDS:
        found = to_numpy(divergence(*sides, kind, reduction="none", backend="native"))
        assert np.allclose(found, expected(*sides, kind), rtol=5e-6, atol=0), kind


@pytest.mark.parametrize("kind", ["jeffreys", "lk"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_cut_side_is_not_taken_for_a_far_one(which: int, kind: str) -> None:
    """What a side lacks has no log-ratio: float64 is for rows in which a finite logit is far."""
    student, teacher = (side[:2].clone() for side in (cut_student, cut_teacher)[which](torch.float32))
    teacher[1, 77] = -1e9
    pair = RowPair.of(student[None], teacher[None], None, *KINDS[kind].at(None), 1.0, 1.0)
    top_r = native.value(pair)[1].reshape(2, -1)[:, 6]
    assert (top_r < 2**20).tolist() == [True, False]


@pytest.mark.parametrize("kind", ["skew_reverse_kl", "js", "tv"])
def test_a_side_whose_mass_lies_far_below_the_others_top(kind: str) -> None:
    """Its weights, measured from there, are below the normal numbers of float32."""
    student = torch.tensor([[97.75, 0.0, -1e30], [98.5, 0.25, 0.5], [0.0, -94.5, -1.8e37]])
    teacher = torch.tensor([[-5e20, 0.0, 0.0], [-1e9, 0.0, 1.0], [-9.6e34, 0.0, -1.8e37]])
    for sides in ((student, teacher), (teacher, student)):
        found = to_numpy(divergence(*sides, kind, reduction="none", backend="native"))
        assert np.allclose(found, expected(*sides, kind), rtol=5e-6, atol=0), sides

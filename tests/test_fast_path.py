"""Ordinary rows do without Triton's fallback: padded vocabularies, masked tokens, an offset student."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import kl_gpu
from kl_gpu import reference
from kl_gpu.backends.interface import ComplementArgs, RowPair
from kl_gpu.kinds import KINDS
from support import DEVICE, check_gradients, check_value, expected, normalisers, to_numpy

pytest.importorskip("triton")

VOCAB = 4096
PADDING = 256
ROWS = 3 if DEVICE.type == "cpu" else 1000
CASES = ("padded", "offset", "masked here and there")
DTYPES = (torch.float32, torch.bfloat16)
# The statistic that says which path a row's later sweeps take, and the one for the fallback.
PATH, FALLBACK = 9, 0


def rows(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(student, teacher), half of the mass on one token, 0.005 or so apart."""
    teacher = 2.5 * torch.randn(ROWS, VOCAB, device=DEVICE)
    top = torch.randint(VOCAB - PADDING, (ROWS, 1), device=DEVICE)
    teacher.scatter_(-1, top, teacher.logsumexp(-1, keepdim=True))
    student = teacher + 0.1 * torch.randn_like(teacher)
    if case == "offset":
        student += 10
    masked = torch.zeros(ROWS, VOCAB, dtype=torch.bool, device=DEVICE)
    if case == "padded":
        masked[:, -PADDING:] = True
    elif case == "masked here and there":
        masked = (torch.rand(ROWS, VOCAB, device=DEVICE) < 0.1).scatter(-1, top, False)
    return tuple(side.masked_fill(masked, -math.inf).to(dtype) for side in (student, teacher))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_divergences(kind: str, case: str, dtype: torch.dtype) -> None:
    from kl_gpu.backends import triton

    student, teacher = rows(case, dtype)
    p = RowPair.of(student[None], teacher[None], None, *KINDS[kind].at(None), 1.0, 1.0)
    value, stats = triton.value(p)
    assert (stats[:, PATH] == FALLBACK).sum() == 0
    check_value(value, student, teacher, kind, "triton", case)
    scale = torch.rand(ROWS, device=DEVICE) + 0.5
    grads = torch.empty_like(p.a), torch.empty_like(p.b)
    at_once, stats = triton.value_and_gradient(p, scale, *grads)
    assert (stats[:, PATH] == FALLBACK).sum() == 0
    assert torch.equal(at_once, value)
    to_student, to_teacher = (grad[0] for grad in KINDS[kind].as_ab(*grads))
    existing = (student > -math.inf).sum(-1).min()
    if existing == VOCAB:
        check_gradients(
            student, teacher, (to_student, to_teacher), kind, "triton", case, scale=to_numpy(scale)
        )
    for row in range(min(ROWS, 3)):
        keep = student[row] > -math.inf
        check_gradients(
            student[row : row + 1, keep], teacher[row : row + 1, keep],
            (to_student[row : row + 1, keep], to_teacher[row : row + 1, keep]),
            kind, "triton", case, scale=to_numpy(scale[row]),
        )  # fmt: skip
        assert (to_student[row, ~keep] == 0).all()
        assert (to_teacher[row, ~keep] == 0).all()


@pytest.mark.parametrize("temperatures", [(0.5, 0.5), (2.0, 1.9)])
@pytest.mark.parametrize("kind", ["forward_kl", "jeffreys"])
def test_masked_columns_over_temperatures(kind: str, temperatures: tuple[float, float]) -> None:
    from kl_gpu.backends import triton

    student, teacher = rows("masked here and there", torch.bfloat16)
    p = RowPair.of(student[None], teacher[None], None, *KINDS[kind].at(None), *(1 / t for t in temperatures))
    value, stats = triton.value(p)
    assert (stats[:, PATH] == FALLBACK).sum() == 0
    options = dict(zip(("temperature", "teacher_temperature"), temperatures, strict=True))
    check_value(value, student, teacher, kind, "triton", f"masked T={temperatures}", **options)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts calls in Triton's interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_token_stats(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("kl_gpu.backends.triton.token_stats")
    fallback, calls = kernels.fallback_row, []

    def counted(*arguments: object) -> object:
        calls.append(arguments)
        return fallback(*arguments)

    monkeypatch.setattr(kernels, "fallback_row", counted)
    student, teacher = rows(case, dtype)
    found = kl_gpu.token_stats(student, teacher, backend="triton")
    assert not calls
    check_value(found.forward_kl, student, teacher, "forward_kl", "triton", case)
    check_value(found.reverse_kl, student, teacher, "reverse_kl", "triton", case)
    # And the count counts: a column that the student alone lacks.
    student[0, 5] = -math.inf
    teacher[0, 5] = 1.0
    assert kl_gpu.token_stats(student, teacher, backend="triton").forward_kl[0] == math.inf
    assert calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_token_logprobs(case: str, dtype: torch.dtype) -> None:
    from kl_gpu.backends import triton

    student, _ = rows(case, dtype)
    ids = student.argmax(-1, keepdim=True)
    _, _, stats = triton.complement(ComplementArgs(student[None], ids, None, 1.0), True)
    assert (stats[:, 1] < 0).sum() == 0  # a row taken about its largest logit itself, in sweeps of its own


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("kind", ["forward_kl", "js", "skew_reverse_kl", "tv"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_support_that_one_side_lacks(
    kind: str, side: str, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher known by some of its tokens, a student that may not say some: a side has tiles of −inf."""
    from kl_gpu.backends import triton
    from kl_gpu.backends.triton import launch

    monkeypatch.setattr(launch, "SPLIT_COLUMNS", VOCAB // splits)
    student, teacher = rows("offset", torch.bfloat16)
    column = torch.arange(VOCAB, device=DEVICE)
    top = teacher.argmax(-1, keepdim=True)
    if side == "student":
        student.masked_fill_((column % 7 == 3) & (column != top), -math.inf)
    else:
        teacher.masked_fill_(column // 1024 != top // 1024, -math.inf)
    p = RowPair.of(student[None], teacher[None], None, *KINDS[kind].at(None), 1.0, 1.0)
    scale = torch.ones(ROWS, device=DEVICE)
    grads = torch.empty_like(p.a), torch.empty_like(p.b)
    value, stats = triton.value_and_gradient(p, scale, *grads)
    assert (stats[:, PATH] == FALLBACK).sum() == 0
    if kind == "forward_kl" and side == "student":
        assert (value == math.inf).all()
        to_teacher, to_student = grads
        assert to_teacher.isnan().all()
        p, q = (x.double().softmax(-1) for x in (teacher, student))
        np.testing.assert_allclose(to_numpy(to_student[0]), to_numpy(q - p), rtol=2**-8, atol=2e-9)
        return
    assert (expected(student, teacher, kind) > 0.01).all()
    check_value(value, student, teacher, kind, "triton", f"cut {side}")
    found = tuple(grad[0] for grad in KINDS[kind].as_ab(*grads))
    want = reference.gradients(to_numpy(student), to_numpy(teacher), kind)
    log_q, log_p = normalisers(student, teacher)
    largest = np.exp(np.maximum(log_p, log_q))
    ratio = np.maximum(1, np.nan_to_num(np.abs(log_p - log_q), nan=0.0, posinf=1.0))
    for grad, exact in zip(found, want, strict=True):
        bound = 2e-6 * largest * ratio + 2**-8 * np.abs(exact)
        assert (np.abs(to_numpy(grad) - exact) <= bound).all()


@pytest.mark.parametrize("top", [1e-5, 0.25], ids=["rounded difference", "exact differences"])
def test_an_offset_student_that_differs_in_its_top_alone(top: float) -> None:
    # KL is 2e-11 or so, c is 20, so that nothing but the differences themselves tells whether they are exact:
    # the top's is, at 0.25, and at 1e-5 its rounding is a tenth of the KL.
    teacher = -1 - torch.arange(600, device=DEVICE).remainder(40)[None] / 8
    teacher = teacher.to(torch.bfloat16)
    student = teacher + 20
    teacher[0, 333] = top
    student[0, 333] = 20 if top < 1e-3 else 20.25
    if top > 1e-3:
        student[0, 17] += 0.125
    value = kl_gpu.kl_div(student, teacher, reduction="none", backend="triton")
    check_value(value, student, teacher, "forward_kl", "triton", "an offset student's top")
    student[0, 18] += 40  # far above what the teacher has of it: by the student's own exponents
    value = kl_gpu.kl_div(student, teacher, reduction="none", backend="triton")
    check_value(value, student, teacher, "forward_kl", "triton", "a token of the student's alone")

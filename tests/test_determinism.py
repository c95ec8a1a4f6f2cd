"""The same call gives the same bits, and a row's bits do not depend on its neighbours."""

from __future__ import annotations

import pytest
import torch

import kl_gpu
from support import is_slow, pair


def _all(student, teacher, kind, backend):
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    value = kl_gpu.divergence(student, teacher, kind, reduction="none", backend=backend)
    return value.detach(), *torch.autograd.grad(value.sum(), (student, teacher))


def test_repeats(backend: str, kind: str) -> None:
    # The interpreter runs one program at a time, in order: five repeats show there as much as fifty.
    shape, repeats = ((1, 1100), 5) if is_slow(backend) else ((5, 3001), 50)
    student, teacher = pair(*shape)
    first = _all(student, teacher, kind, backend)
    for _ in range(repeats):
        assert all(
            torch.equal(x, y) for x, y in zip(first, _all(student, teacher, kind, backend), strict=True)
        )


def test_a_row_alone_and_among_others(backend: str, kind: str) -> None:
    # 2100 columns: a whole tile and a tail. The interpreter runs the programs one after the other, so there
    # ten neighbours show as much as three hundred.
    n = 11 if is_slow(backend) else 301
    middle = n // 2
    student, teacher = pair(n, 2100)
    alone = _all(student[middle : middle + 1], teacher[middle : middle + 1], kind, backend)
    for start, stop in ((middle - 3, middle + 4), (0, n), (middle, n)):
        among = _all(student[start:stop], teacher[start:stop], kind, backend)
        for x, y in zip(alone, among, strict=True):
            assert torch.equal(x[0], y[middle - start])


@pytest.mark.parametrize("vocab", [40001, 128256])
@pytest.mark.usefixtures("wide_programs")
def test_a_long_row_alone_and_among_others(backend: str, kind: str, vocab: int) -> None:
    student, teacher = pair(3, vocab)
    alone = _all(student[1:2], teacher[1:2], kind, backend)
    among = _all(student, teacher, kind, backend)
    assert all(torch.equal(x[0], y[1]) for x, y in zip(alone, among, strict=True))

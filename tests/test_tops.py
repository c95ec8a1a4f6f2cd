"""Rows whose mass lies on two or three tokens in different tiles: what one loses, all columns inherit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import kl_gpu
from kl_gpu.kinds import KINDS
from support import DEVICE, check_gradients, check_value, expected, to_numpy

V = 2048  # two tiles of Triton's in float32
FIRST, SECOND, THIRD = 5, 1536, 1800
# (a's logits, b's logits) of those columns, a being the side that weighs. Triton's gradients to b were up to
# 2.5 times their bound: the centre moved by some 30 nats, which float32 held to 1e-6; what then was left of
# cancelled sums; and an exponent of b's top above 64.
TOPS = (
    ((8.96875, 11.46875, -21.0), (13.1875, -16.71875, -21.0)),
    ((8.8125, 11.5, -21.0), (12.15625, -19.84375, -21.0)),
    ((8.765625, 11.515625, -21.0), (12.34375, -17.1875, -21.0)),
    ((8.890625, 11.765625, -21.0), (13.625, -14.0625, -21.0)),
    # The second top moves nothing, and what its x cancels in b's sum is multiplied by the third's move.
    ((14.2687, 15.1950, 16.3760), (11.2952, -8.1570, -5.3730)),
)


def rows_on_a_floor(kind: str) -> tuple[Tensor, Tensor]:
    """(student, teacher) with TOPS on floors around −21."""
    column = torch.arange(V, device=DEVICE)
    sides = [
        (wave(column * step) - 21).repeat(len(TOPS), 1) for wave, step in ((torch.cos, 2.3), (torch.sin, 1.7))
    ]
    for row, tops in enumerate(TOPS):
        for side, logits in zip(sides, tops, strict=True):
            side[row, [FIRST, SECOND, THIRD]] = torch.tensor(logits, device=DEVICE)
    a, b = sides
    return (b, a) if KINDS[kind].expectation_under == "teacher" else (a, b)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "tv", "js", "skew_reverse_kl"])
def test_a_few_tops_that_the_other_side_lacks(backend: str, kind: str) -> None:
    student, teacher = (side.requires_grad_() for side in rows_on_a_floor(kind))
    value = kl_gpu.divergence(student, teacher, kind, reduction="none", backend=backend)
    grads = torch.autograd.grad(value.sum(), (student, teacher))
    sides = student.detach(), teacher.detach()
    check_value(value, *sides, kind, backend, "tops")
    check_gradients(*sides, grads, kind, backend, "tops")


def test_a_support_that_lacks_next_to_nothing(backend: str) -> None:
    """tv of rows that differ little, the student without a token of no weight.

    It is of first order in log(Z_b/Z_a), which Triton took from two sums of one column each: off by 2e-7.
    """
    tops = torch.linspace(10, 20, 24, device=DEVICE)
    teacher = torch.sin(torch.arange(16, device=DEVICE) * 1.7).repeat(24, 1) * 2 - 8
    student = teacher + 0.1 * torch.cos(torch.arange(16, device=DEVICE) * 2.3)
    teacher[:, 3] = tops
    student[:, 3] = tops + 1e-3 * torch.sin(tops * 40)
    student[:, 7] = -math.inf
    got = kl_gpu.divergence(student, teacher, "tv", reduction="none", backend=backend)
    want = expected(student, teacher, "tv")
    assert (abs(to_numpy(got) - want) <= 5e-6 * want + 3e-8).all()

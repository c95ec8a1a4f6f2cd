"""Shards of a row merged by the chain rule, without processes: any cut, any size of the divergence."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("torch.distributed")

from kl_gpu import ops
from kl_gpu.distributed import states
from support import DEVICE, RELATIVE, expected, is_slow, pair, to_numpy


def merged(student: torch.Tensor, teacher: torch.Tensor, cuts: list[int], backend: str) -> np.ndarray:
    """KL(teacher‖student) from shards cut at these columns."""
    found = []
    for first, last in pairwise(cuts):
        s, t = student[:, first:last].contiguous(), teacher[:, first:last].contiguous()
        value, stats = ops.value(s, t, None, "forward_kl", 0.0, 1.0, 1.0, backend)
        log_a, ratio, _ = states.normalisers(t, s, None, stats, (1.0, 1.0), backend)
        found.append(torch.stack((log_a, ratio, value.double())))
    log_a, ratio, inside = torch.stack(found).unbind(1)
    return to_numpy(states.kl(states.shared(log_a, ratio), inside))


@pytest.mark.parametrize("shift", [0.0, 1000.0])
@pytest.mark.parametrize("spread", [3.0, 1e-2, 1e-4, 3e-6])
def test_any_cut_keeps_the_relative_bound(backend: str, spread: float, shift: float) -> None:
    columns = 300 if is_slow(backend) else 20000
    student, teacher = pair(6, columns, spread=spread, dtype=torch.float32)
    if shift and spread < 1e-3:
        pytest.skip("float32 logits near 1000 hold no such difference")
    student, teacher = student + shift, teacher + 0.5 * shift
    want = expected(student, teacher, "forward_kl")
    assert want.max() > 1e-12
    for cuts in (
        [0, columns],
        [0, 2, columns],
        [0, columns // 2, columns - 2, columns],
        [0, 100, 200, columns],
    ):
        got = merged(student, teacher, cuts, backend)
        assert (np.abs(got - want) <= RELATIVE * want).all(), f"{cuts}: {(np.abs(got / want - 1)).max()}"
    assert (merged(teacher, teacher, [0, 100, columns], backend) == 0).all()


def test_the_part_between_the_shards_counts(backend: str) -> None:
    # Equal inside each shard, unequal between them: all of the divergence is KL(P‖Q).
    teacher = torch.zeros(1, 8, device=DEVICE)
    student = teacher + 1e-5 * (torch.arange(8, device=DEVICE) > 3)
    want = expected(student, teacher, "forward_kl")
    assert want > 1e-12
    np.testing.assert_allclose(merged(student, teacher, [0, 4, 8], backend), want, rtol=RELATIVE)

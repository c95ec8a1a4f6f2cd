"""Shards of a row merged by the chain rule, without processes: any cut, any size of the divergence."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("torch.distributed")

from kl_gpu.backends import native
from kl_gpu.distributed import states
from kl_gpu.ops import pair as ops
from support import DEVICE, RELATIVE, expected, is_slow, pair, to_numpy

compiled = pytest.mark.skipif(not native.available(), reason="installed without its kernels")


def merged(
    student: torch.Tensor, teacher: torch.Tensor, cuts: list[int], backend: str, scale: float = 1.0
) -> np.ndarray:
    """KL(teacher‖student) from shards cut at these columns."""
    found = []
    for first, last in pairwise(cuts):
        s, t = student[:, first:last].contiguous(), teacher[:, first:last].contiguous()
        value, stats = ops.value(s, t, None, "forward_kl", 0.0, scale, scale, backend)
        found.append(states.packed(t, s, None, stats, [value], (scale, scale), backend)[0])
    return to_numpy(states.merged(torch.stack(found), backend)[0][2])


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


def test_columns_at_the_lowest_number_below_temperature_1(backend: str) -> None:
    """The teacher's scaled logits are −inf there in float32, and the student's mass still counts."""
    student, teacher = pair(3, 300)
    teacher[:, 100:200] = torch.finfo(torch.float32).min
    want = expected(student, teacher, "forward_kl", temperature=0.5)
    got = merged(student, teacher, [0, 150, 300], backend, 2.0)
    assert (np.abs(got - want) <= RELATIVE * want).all()


def states_of_ranks(ranks: int, kls: int) -> torch.Tensor:
    """`[ranks, 2 + kls, N]`, shards without mass on a side or on both, infinite values and NaN among them."""
    generator = torch.Generator().manual_seed(ranks)

    def draw(scale: float) -> torch.Tensor:
        return scale * torch.randn(ranks, 600, generator=generator, dtype=torch.float64)

    log_a, ratio = 10 + draw(3.0), draw(1.0) * 10.0 ** -(torch.arange(600) % 12)
    inside = [draw(1.0).square() for _ in range(kls)]
    of_rank = torch.arange(ranks)[:, None] == torch.arange(600) % ranks
    case = torch.arange(600) // 40
    log_a = torch.where(of_rank & ((case == 1) | (case == 2)), -torch.inf, log_a)  # case 1: b has mass there
    ratio = torch.where(of_rank & ((case == 2) | (case == 3)), -torch.inf, ratio)
    log_a = torch.where(of_rank & (case == 4), torch.nan, log_a)
    ratio = torch.where(of_rank & (case == 5), torch.nan, ratio)
    log_a = torch.where(case == 6, -torch.inf, log_a)
    ratio = torch.where(case == 7, -torch.inf, ratio)
    log_a = log_a + 1e5 * (case == 8) - 700 * (of_rank & (case == 9))
    inside = [
        torch.where(of_rank & (case == 10), torch.inf, torch.where(of_rank & (case == 2), torch.nan, x))
        for x in inside
    ]
    return torch.stack([log_a, ratio, *inside], 1)


@compiled
@pytest.mark.parametrize("kls", [0, 1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_the_compiled_merge_is_the_same(ranks: int, kls: int) -> None:
    found = states_of_ranks(ranks, kls)
    want, _ = states.merged(found, "eager")
    got, fit = states.merged(found, "native")
    assert fit
    for k in range(2 + kls):
        # Rows of one rank have no divergence between ranks, so 0 may be asked for; the sums are of numbers
        # near 10.
        np.testing.assert_allclose(got[k], want[k], rtol=1e-13, atol=1e-15 if k != 1 else 1e-14)
    assert want[2:].numel() == 0 or want[2:, :40].min() > 1e-9


@compiled
@pytest.mark.parametrize("far", [0, 1])
def test_the_merge_says_where_statistics_cannot_hold_a_row(far: int) -> None:
    found = states_of_ranks(2, 1)
    found[:, far, 5] += 8e5
    assert not states.merged(found, "native")[1]

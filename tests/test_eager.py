"""The eager backend's own promises: bounded extra memory, and rows longer than a chunk."""

from __future__ import annotations

import pytest
import torch

import kl_gpu
from kl_gpu.backends.eager import pair as eager
from support import DEVICE, check_value, pair


def peak_extra_bytes(call) -> int:
    """Most bytes the allocator held during the call beyond what it held before, results included."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, record_shapes=False
    ) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_the_meter_sees_an_allocation() -> None:
    assert peak_extra_bytes(lambda: torch.empty(3_000_000).sum()) >= 12_000_000


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts the CPU allocator")
@pytest.mark.parametrize("shape", [(64, 128256), (2, 3_000_000), (50_000, 100)])
def test_extra_memory_is_bounded(kind: str, shape: tuple[int, int]) -> None:
    student, teacher = pair(*shape)
    student.requires_grad_()
    gradient_bytes = student.numel() * 4

    def call() -> None:
        kl_gpu.divergence(student, teacher, kind, backend="eager").backward()

    # N row statistics and values belong to the answer; 64 MiB is the promise for the rest.
    peak = peak_extra_bytes(call) - gradient_bytes
    assert peak < 64 * 2**20, f"{peak / 2**20:.1f} MiB"


def test_a_vocabulary_wider_than_a_column_block(kind: str) -> None:
    student, teacher = pair(2, 2 * eager.CHUNK + 77, spread=0.1)
    got = kl_gpu.divergence(student, teacher, kind, reduction="none", backend="eager")
    check_value(got, student, teacher, kind, "eager", "wide")

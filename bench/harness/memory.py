"""The peak of memory that a call takes beyond what was there before it."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

# Else the profiler announces its start and stop on stderr, amid the tables.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The result counts too: a gradient is memory that must be found.

    On CUDA it is the caching allocator's own figure. On the CPU it is replayed from every allocation and
    release of PyTorch's allocator, from which all tensors come; scratch that a kernel takes from elsewhere
    is not seen.
    """
    return _cuda_peak(call, device) if device.type == "cuda" else _cpu_peak(call)


def _cuda_peak(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(call: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = profiled.profiler.kineto_results.events()
    held = peak = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += change
        peak = max(peak, held)
    return peak

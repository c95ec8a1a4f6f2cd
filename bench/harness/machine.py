"""The machine a figure was measured on."""

from __future__ import annotations

import gc
import os
import platform
from pathlib import Path

import torch
from torch.utils import collect_env

_UNKNOWN_CACHE = 64 << 20


def name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_model()}, {threads} thread{'s'[: threads > 1]}"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def is_busy() -> bool:
    """Whether others take a core: one thread that waits for it holds up the parallel loop of all."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > 1 + torch.get_num_threads() / 4


def cache_bytes(device: torch.device) -> int:
    """The last-level cache, which must not hold a previous run's logits."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=_UNKNOWN_CACHE)


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def driver_version(device: torch.device) -> str | None:
    """The GPU driver's own number, which PyTorch does not tell. None on the CPU alone: no GPU, no driver."""
    if device.type != "cuda":
        return None
    return collect_env.get_nvidia_driver_version(collect_env.run) or "unknown"


def rows_that_fit(wanted: int, vocab: int, itemsize: int, device: torch.device, plain: int = 5) -> int:
    """`wanted` rows, or as many as let every system find its memory.

    `plain` is how many fp32 tensors of logits' size a system without kernels holds at its peak; 0 where none
    of them takes part.
    """
    gc.collect()
    torch.cuda.empty_cache()  # else what the allocator keeps of an earlier case would count as taken
    free, _ = torch.cuda.mem_get_info(device)
    buffers = 5 * itemsize  # two sets of student and teacher, one target of the copy
    own = plain * 4 + itemsize  # temporaries, gradient
    rows = min(wanted, int(0.9 * free) // (vocab * (buffers + own)))
    return max(1, rows if rows < 64 else rows // 64 * 64)

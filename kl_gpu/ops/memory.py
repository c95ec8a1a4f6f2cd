"""Where gradients go: memory of earlier ones, where they lie on the CPU and are large."""

from __future__ import annotations

import torch
from torch import Tensor

from .direct import nobody_listens

_CPU = torch.device("cpu")
# Bytes below which PyTorch's own allocator keeps memory as well.
_LARGE = 1 << 22


def gradient_buffer(
    like: Tensor, dtype: torch.dtype | None = None, memory_format: torch.memory_format = torch.preserve_format
) -> Tensor:
    """`torch.empty_like`, for a gradient.

    The system takes freed memory of this size back and clears it before it gives it out again, which takes
    longer than a gradient. So large ones on the CPU come from blocks that are kept when their last view goes
    (`kernels/runtime/kept_memory.h`). Compiled programs, and whoever watches or replaces operators, among
    them the profiler with its account of memory, get what PyTorch's own allocator gives.
    """
    if not torch.compiler.is_compiling() and _is_large_and_plain(like, dtype or like.dtype):
        from ..backends.native import memory

        if memory.keeps(dtype or like.dtype):
            # The meta device tells shape, strides and dtype.
            return memory.kept(
                torch.empty_like(like, dtype=dtype, memory_format=memory_format, device="meta")
            )
    return torch.empty_like(like, dtype=dtype, memory_format=memory_format)


def _is_large_and_plain(like: Tensor, dtype: torch.dtype) -> bool:
    return (
        like.device == _CPU
        and like.numel() * dtype.itemsize >= _LARGE
        and like.layout == torch.strided
        and nobody_listens((like,))
    )


def empty_cache() -> None:
    """Give the memory that is kept on the CPU for the next gradients back to the system.

    Gradients that are alive keep theirs. `KL_GPU_CACHE_MB` in the environment says how many MiB may be kept.
    """
    from ..backends.native import memory

    memory.release()

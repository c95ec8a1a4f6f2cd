"""Where gradients go: memory of earlier ones, where they lie on the CPU and are large."""

from __future__ import annotations

import torch
from torch import Tensor

from .direct import nobody_listens

_CPU = torch.device("cpu")
_PLAIN = (Tensor, torch.nn.Parameter)
# Bytes below which PyTorch's own allocator keeps memory as well.
_LARGE = 1 << 22


def gradient_buffer(like: Tensor) -> Tensor:
    """`torch.empty_like`, for the gradient of logits.

    The system takes freed memory of this size back and clears it before it gives it out again, which takes
    longer than a gradient. So large ones on the CPU come from blocks that are kept when their last view goes
    (`kernels/runtime/kept_memory.h`). Compiled programs, and whoever watches or replaces operators, among
    them the profiler with its account of memory, get what PyTorch's own allocator gives.
    """
    if torch.compiler.is_compiling() or not (_is_large(like) and nobody_listens((like,))):
        return torch.empty_like(like)
    from ..backends.native import memory

    if not memory.keeps(like.dtype):
        return torch.empty_like(like)
    # The meta device tells shape and strides.
    return memory.kept(torch.empty_like(like, device="meta"))


def _is_large(like: Tensor) -> bool:
    # Others' sizes are not asked for: a traced one would become a condition of the trace.
    return type(like) in _PLAIN and like.nbytes >= _LARGE and like.device == _CPU


def empty_cache() -> None:
    """Return the memory that is kept on the CPU for the next gradients to the system.

    Gradients that are alive keep theirs. The environment variable KL_GPU_CACHE_MB limits how many MiB are
    kept.

    Example:
        >>> import kl_gpu
        >>> kl_gpu.empty_cache()
    """
    from ..backends.native import memory

    memory.release()

"""Huge pages for large new tensors, and memory of gradients that is kept for the next ones."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from . import extension

# Bytes below which nothing is gained.
_LARGE = 1 << 22
ENVIRONMENT = "KL_GPU_CACHE_MB"
# What the environment said when it was first asked; -1: nothing.
_limit: int | None = None


def on_huge_pages(new: Tensor) -> Tensor:
    """`new`, contiguous and not yet written, whose memory the system is asked to hold in huge pages.

    In pages of 4 KiB the first write to each costs a fault, several times the write itself, and a matrix
    product spends a third of its time looking addresses up. Elsewhere than on the CPU, and without the
    compiled kernels, it is returned as it is.
    """
    size = new.numel() * new.element_size()
    if extension.available() and new.device.type == "cpu" and size >= _LARGE:
        extension._native.prefer_huge_pages(new.data_ptr(), size)
    return new


def keeps(dtype: torch.dtype) -> bool:
    """Whether `kept` can make a tensor of this dtype, and the environment does not forbid it."""
    return extension.available() and dtype in extension._DTYPES and limit_mib() != 0


def limit_mib() -> int:
    """How many MiB may lie idle, as the environment has it; -1 where it says nothing.

    Raises:
        ValueError: the environment's KL_GPU_CACHE_MB is no whole number.
    """
    global _limit
    if _limit is None:
        text = os.environ.get(ENVIRONMENT)
        if text is not None and not (text.isascii() and text.isdecimal() and len(text) <= 12):
            raise ValueError(
                f"the environment's {ENVIRONMENT} must be a whole number of MiB, 0 to keep none, got {text!r}"
            )
        limit = -1 if text is None else int(text)
        if extension.available():
            extension._native.limit_idle_bytes(limit if limit < 0 else limit << 20)
        _limit = limit
    return _limit


def kept(like: Tensor) -> Tensor:
    """A new tensor on the CPU of `like`'s shape, strides and dtype, whose memory is kept when its last view
    goes. `keeps` must hold."""
    dtype = extension._DTYPES[like.dtype]
    return from_dlpack(extension._native.kept_tensor(like.shape, like.stride(), dtype))


def release() -> None:
    """Give all that is kept and not in use back to the system."""
    if extension.available():
        extension._native.release_idle_blocks()

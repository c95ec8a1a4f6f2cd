"""Huge pages for large new tensors."""

from __future__ import annotations

from torch import Tensor

from . import extension

# Bytes below which nothing is gained.
_LARGE = 1 << 22


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

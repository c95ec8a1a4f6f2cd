"""Gradients that are summed over chunks of rows: of a head's weight and of its bias."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

# Elements of a temporary where 16-bit numbers are summed in float32.
_SUMMED = 1 << 23


@cache
def _multiplies_into_float32(device_type: str) -> bool:
    """Whether 16-bit products can be added to a float32 matrix without being rounded."""
    if device_type != "cuda" or not hasattr(torch.ops.aten.addmm, "dtype_out"):
        return False
    with torch.inference_mode(False):
        some = torch.zeros((16, 16), device=device_type, dtype=torch.bfloat16)
        total = torch.zeros((16, 16), device=device_type)
        try:
            torch.ops.aten.addmm.dtype_out(total, some, some, torch.float32, out=total)
        except (RuntimeError, NotImplementedError):
            return False
    return True


def product_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Rows of a `[V, H]` product that are computed at once where it is rounded before it is added."""
    step = max(1, _SUMMED // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class WeightGradient:
    """Σ over chunks of gradientᵀ·states, in float32 where the weight has 16 bits; `[V, H]`."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, columns: int, chunks: int) -> None:
        self.grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
        self.grad[columns:].zero_()
        counted = self.grad[:columns]
        # One chunk needs no sum: the product itself rounds once.
        wide = torch.promote_types(dtype, torch.float32 if chunks > 1 else weight.dtype)
        self.total = counted if counted.dtype == wide else torch.empty_like(counted, dtype=wide)
        self.dtype, self.empty = dtype, True
        self.parts: list[Tensor] = []

    def add(self, gradient: Tensor, states: Tensor) -> None:
        left, total, held = gradient.t(), self.total, 0.0 if self.empty else 1.0
        # With a factor of 0 what the memory held before is not looked at.
        if total.dtype == self.dtype:
            torch.addmm(total, left, states, beta=held, out=total)
        elif _multiplies_into_float32(total.device.type):
            torch.ops.aten.addmm.dtype_out(total, left, states, total.dtype, beta=held, out=total)
        else:
            self._add_rounded(left, states)
        self.empty = False

    def _add_rounded(self, left: Tensor, states: Tensor) -> None:
        """Rounded to 16 bits once per chunk, added up in float32."""
        blocks = list(product_blocks(*self.total.shape))
        if not self.parts:
            # Made once: a new block's pages cost as much as its product.
            self.parts = [self.total.new_empty(self.total[blocks[0]].shape, dtype=d) for d in self._dtypes]
        for block in blocks:
            total = self.total[block]
            product, wide = (part[: len(total)] for part in self.parts)
            torch.mm(left[block], states, out=product)
            if self.empty:
                total.copy_(product)
            else:
                total.add_(wide.copy_(product))

    @property
    def _dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        return self.dtype, self.total.dtype

    def result(self) -> Tensor:
        if self.empty:
            self.total.zero_()
        if self.total.data_ptr() != self.grad.data_ptr():
            self.grad[: len(self.total)].copy_(self.total)
        return self.grad


class BiasGradient:
    """Σ over rows of the gradient, `[V]`, in float32 at least."""

    def __init__(self, bias: Tensor, dtype: torch.dtype, columns: int) -> None:
        self.bias = bias
        self.total = bias.new_zeros(columns, dtype=torch.promote_types(dtype, torch.float32))

    def add(self, gradient: Tensor) -> None:
        for part in gradient.split(max(1, _SUMMED // gradient.shape[1])):
            self.total += part.sum(0, dtype=self.total.dtype)

    def result(self) -> Tensor:
        grad = torch.zeros_like(self.bias, memory_format=torch.contiguous_format)
        grad[: len(self.total)] = self.total
        return grad

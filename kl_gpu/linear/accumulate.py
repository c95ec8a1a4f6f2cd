"""From the gradients of a head's logits, chunk by chunk, to those of what they are made of."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from ..backends.native.memory import on_huge_pages
from .chunks import Chunk, memory_of_rows
from .heads import Head

# Elements of a temporary where 16-bit numbers are summed in float32; on the CPU they and their sum stay in a
# last cache.
_SUMMED = {"cpu": 1 << 20}
_SUMMED_ON_A_GPU = 1 << 23


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


def product_blocks(rows: int, columns: int, device_type: str) -> Iterator[slice]:
    """Rows of a `[V, H]` product that are computed at once where it is rounded before it is added."""
    step = max(1, _SUMMED.get(device_type, _SUMMED_ON_A_GPU) // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class WeightGradient:
    """Σ over chunks of gradientᵀ·states, in float32 where the weight has 16 bits; `[V, H]`.

    `chunks` says how many will be added.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, columns: int, chunks: int) -> None:
        self.grad = on_huge_pages(torch.empty_like(weight, memory_format=torch.contiguous_format))
        self.grad[columns:].zero_()
        counted = self.grad[:columns]
        # One chunk needs no sum: the product itself rounds once.
        wide = torch.promote_types(dtype, torch.float32 if chunks > 1 else weight.dtype)
        self.sum: _GradAccumulator | _RoundedGradAccumulator
        if wide == dtype or _multiplies_into_float32(weight.device.type):
            self.sum = _GradAccumulator(counted, dtype, wide)
        else:
            self.sum = _RoundedGradAccumulator(counted, dtype, wide, chunks)

    def add(self, gradient: Tensor, states: Tensor) -> None:
        self.sum.add(gradient.t(), states)

    def result(self) -> Tensor:
        self.sum.finish()
        return self.grad


class _GradAccumulator:
    """Σ of products that the library adds to a matrix of the sum's own dtype; put into `into` by `finish`."""

    def __init__(self, into: Tensor, dtype: torch.dtype, wide: torch.dtype) -> None:
        self.into, self.dtype, self.empty = into, dtype, True
        self.total = into if into.dtype == wide else on_huge_pages(torch.empty_like(into, dtype=wide))

    def add(self, left: Tensor, right: Tensor) -> None:
        # With a factor of 0 what the memory held before is not looked at.
        total, held = self.total, 0.0 if self.empty else 1.0
        if total.dtype == self.dtype:
            torch.addmm(total, left, right, beta=held, out=total)
        else:
            torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, beta=held, out=total)
        self.empty = False

    def finish(self) -> None:
        if self.empty:
            self.total.zero_()
        if self.total is not self.into:
            self.into.copy_(self.total)


class _RoundedGradAccumulator:
    """Σ of products that the library rounds to 16 bits, added up in float32; in `into` after the last.

    Where `into` has 16 bits too, it holds the first product as it is, and the last sum is rounded into it:
    only between them, from three products on, is there a float32 matrix.
    """

    def __init__(self, into: Tensor, dtype: torch.dtype, wide: torch.dtype, chunks: int) -> None:
        self.into, self.dtype, self.wide, self.chunks, self.added = into, dtype, wide, chunks, 0
        self.narrow = into.dtype != wide
        self.total: Tensor | None = None if self.narrow else into
        self.blocks = list(product_blocks(len(into), into.shape[1], into.device.type))
        # Made once: a new block's pages cost as much as its product.
        self.parts: list[Tensor] = []

    def add(self, left: Tensor, right: Tensor) -> None:
        self.added += 1
        if not self.blocks:
            return
        if self.added == 1 and self.narrow:
            torch.mm(left, right, out=self.into)
            return
        if not self.parts:
            shape = self.into[self.blocks[0]].shape
            self.parts = [self.into.new_empty(shape, dtype=dtype) for dtype in (self.dtype, self.wide)]
        last = self.added == self.chunks
        if self.total is None and not last:
            self.total = on_huge_pages(torch.empty_like(self.into, dtype=self.wide)).copy_(self.into)
        for block in self.blocks:
            product, wide = (part[: block.stop - block.start] for part in self.parts)
            torch.mm(left[block], right, out=product)
            # PyTorch adds two dtypes an element at a time: they are made one first, in the cache.
            wide.copy_(product)
            if self.total is None:
                wide.add_(self.into[block].to(self.wide))
            elif self.added == 1:
                self.total[block].copy_(wide)
            elif last and self.narrow:
                wide.add_(self.total[block])
            else:
                self.total[block].add_(wide)
            if last and self.narrow:
                self.into[block].copy_(wide)

    def finish(self) -> None:
        if self.added == 0:
            self.into.zero_()


class BiasGradient:
    """Σ over rows of the gradient, `[V]`, in float32 at least."""

    def __init__(self, bias: Tensor, dtype: torch.dtype, columns: int) -> None:
        self.bias = bias
        self.total = bias.new_zeros(columns, dtype=torch.promote_types(dtype, torch.float32))

    def add(self, gradient: Tensor) -> None:
        for part in gradient.split(max(1, _SUMMED_ON_A_GPU // max(1, gradient.shape[1]))):
            self.total += part.sum(0, dtype=self.total.dtype)

    def result(self) -> Tensor:
        grad = torch.zeros_like(self.bias, memory_format=torch.contiguous_format)
        grad[: len(self.total)] = self.total
        return grad


class HeadGradients:
    """The gradients of hidden states, weight and bias that are asked for; the others have no elements."""

    def __init__(self, head: Head, needs: list[bool], chunks: list[Chunk]) -> None:
        hidden, weight, bias = head.side
        columns = len(head.weight)
        self.head = head
        self.to_hidden = memory_of_rows(chunks, hidden, hidden.shape, hidden.dtype) if needs[0] else None
        self.to_weight = WeightGradient(weight, head.dtype, columns, len(chunks)) if needs[1] else None
        self.to_bias = BiasGradient(bias, head.dtype, columns) if needs[2] and bias is not None else None

    def add(self, chunk: Chunk, gradient: Tensor, states: Tensor) -> None:
        """What a chunk's `states` `[n, H]` and the gradient of its logits `[n, V]` give."""
        if self.to_hidden is not None:
            chunk.put(self.to_hidden, torch.mm(gradient, self.head.weight))
        if self.to_weight is not None:
            self.to_weight.add(gradient, states)
        if self.to_bias is not None:
            self.to_bias.add(gradient)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        found = self.to_hidden, *(None if x is None else x.result() for x in (self.to_weight, self.to_bias))
        # Each a tensor of its own: an operator's outputs must not share memory.
        none = self.head.hidden.new_empty
        return tuple(none(0) if x is None else x for x in found)  # type: ignore[return-value]


def gradient_outputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes of `HeadGradients.results`, for torch.compile."""
    return tuple(
        x.new_empty(x.shape) if need and x is not None else hidden.new_empty(0)
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    )  # type: ignore[return-value]

"""Tensors of any leading shape as the `[A, B, ...]` views that backends take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def views(lead: torch.Size, tensors: list[Tensor | None]) -> Iterator[list[Any]]:
    """The tensors `[*lead, ...]` as `[A, B, ...]` views, several times where one pair (A, B) cannot do it.

    Two leading strides cover every slice of a `[batch, time, V]` tensor. More are walked in Python rather
    than copied.
    """
    for split in range(len(lead) + 1):
        shape = (math.prod(lead[:split]), math.prod(lead[split:]))
        try:
            yield [None if t is None else t.view(*shape, *t.shape[len(lead) :]) for t in tensors]
        except RuntimeError:  # not a view with these two strides
            continue
        return
    for i in range(lead[0]):
        yield from views(lead[1:], [None if t is None else t[i] for t in tensors])


def blocks(
    lead: torch.Size, strided: list[Tensor | None], flat: Sequence[Tensor | None] = ()
) -> Iterator[tuple[list[Any], list[Any]]]:
    """Each block of rows that two strides reach: its views, as `views` has it, and its part of the `flat`."""
    start = 0
    for block in views(lead, strided):
        part = slice(start, start + math.prod(block[0].shape[:2]))
        start = part.stop
        yield block, [x if x is None or part.stop - part.start == x.shape[0] else x[part] for x in flat]


def flat_rows(per_row: Tensor | None, lead: torch.Size) -> Tensor | None:
    """`[*lead, ...]` as `[rows, ...]`, for kernels that step through it without strides."""
    if per_row is None:
        return None
    per_row = per_row.contiguous()
    return per_row if len(lead) == 1 else per_row.view(-1, *per_row.shape[len(lead) :])


def each_whole(found: Sequence[tuple[Tensor, ...]], lead: torch.Size) -> tuple[Tensor, ...]:
    """`whole` of each of the tensors that a block answers with."""
    if len(found) == 1 and len(lead) == 1:
        return found[0]
    return tuple(whole(parts, lead) for parts in zip(*found, strict=True))


def whole(parts: Sequence[Tensor], lead: torch.Size, dim: int = 0) -> Tensor:
    """What the blocks have per row, along `dim`, as one tensor with the leading shape in its place."""
    joined = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
    if len(lead) == 1:  # as it is: on a small problem a view takes as long as the kernel
        return joined
    return joined.view((*joined.shape[:dim], *lead, *joined.shape[dim + 1 :]))


def two_at_least(logits: Tensor) -> Tensor:
    """Fewer columns filled up with columns of −inf, which do not exist.

    A backend calls a row of one column certain and gives it no gradient, and cannot take a row of none.
    """
    columns = logits.shape[-1]
    return logits if columns >= 2 else F.pad(logits, (0, 2 - columns), value=-torch.inf)

"""Tensors of any leading shape as the `[A, B, ...]` views that backends take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
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


def flat_rows(per_row: Tensor, lead: torch.Size) -> Tensor:
    """`[*lead, ...]` as `[rows, ...]`, for kernels that step through it without strides."""
    per_row = per_row.contiguous()
    return per_row if len(lead) == 1 else per_row.view(-1, *per_row.shape[len(lead) :])


def cut(flat: Tensor, part: slice) -> Tensor:
    return flat if part.stop - part.start == len(flat) else flat[part]

"""Which rows count, what each weighs, and what a reduction divides by: the options all entries share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def that_count(
    mask: Tensor | None, labels: Tensor | None, ignore_index: int, weight: Tensor | None, shift: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Which rows count (None: all), and the rows' weights, both as the result has them."""
    if shift:
        mask, labels, weight = (None if x is None else x[:, 1:] for x in (mask, labels, weight))
    counts = mask
    if labels is not None:
        counts = labels != ignore_index if mask is None else mask & (labels != ignore_index)
    if weight is not None and counts is not None:
        # A row that does not count contributes 0 whatever its weight holds.
        weight = torch.where(counts, weight, 0)
    return counts, weight


def last_contiguous(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def denominator(
    lead: torch.Size, counts: Tensor | None, reduction: str, normalizer: float | Tensor | None
) -> float | Tensor:
    if reduction in ("none", "sum"):
        return 1
    if normalizer is not None:
        return normalizer
    if reduction == "batchmean":
        return max(lead[0], 1) if lead else 1
    if counts is None:
        return max(math.prod(lead), 1)
    # clamp: where no row counts the result is 0, attached to the graph, and nothing waits for the device.
    return counts.sum().clamp_min(1)

"""Which columns and rows count, what a row weighs, what a reduction divides by: what all entries share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """The part of a whole tensor of logits that counts: columns below vocab_size, and with shift all times
    but the last."""

    vocab_size: int
    shift: bool

    def of(self, logits: Tensor) -> Tensor:
        """That part, as a view."""
        if self.shift:
            logits = logits[:, :-1]
        return logits if logits.shape[-1] == self.vocab_size else logits[..., : self.vocab_size]

    def zero_rest(self, grad: Tensor) -> None:
        """Zero what `of` leaves out."""
        if grad.shape[-1] != self.vocab_size:
            grad[..., self.vocab_size :].zero_()
        if self.shift:
            grad[:, -1:].zero_()


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


def scale(lead: torch.Size, dtype: torch.dtype, device: torch.device, weight: Tensor | None) -> Tensor:
    """What each row's value is multiplied by, where weights are constants, `[*lead]`."""
    if weight is None:
        return torch.ones(lead, dtype=dtype, device=device)
    return weight.detach().to(dtype)


def reduced(
    value: Tensor, factor: float, weight: Tensor | None, reduction: str, denominator: float | Tensor
) -> Tensor:
    """The result from the rows' divergences `[N]`, differentiable in all of them."""
    if factor != 1:
        value = value * factor
    if weight is not None:
        value = value * weight.to(value.dtype)
    return value if reduction == "none" else value.sum() / denominator

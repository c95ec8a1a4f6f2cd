"""Which columns and rows count, what a row weighs, what a reduction divides by: what all entries share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling


class Window(NamedTuple):
    """The part of a whole tensor of logits that counts: columns below vocab_size, and with shift all times
    but the last."""

    vocab_size: int
    shift: bool

    def of(self, logits: Tensor) -> Tensor:
        """That part, as a view."""
        if self.shift:
            logits = logits[..., :-1, :]
        return logits if logits.shape[-1] == self.vocab_size else logits[..., : self.vocab_size]

    def zero_rest(self, grad: Tensor) -> None:
        """Zero what `of` leaves out."""
        if grad.shape[-1] != self.vocab_size:
            grad[..., self.vocab_size :].zero_()
        if self.shift:
            grad[..., -1:, :].zero_()


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


class Rows(NamedTuple):
    """What becomes of the rows' divergences.

    Attributes:
        counts: which rows count, as the result has them; None: all.
        weight: what each is multiplied by, 0 where a row does not count; None: 1.
        factor: what all are multiplied by; None: 1.
    """

    counts: Tensor | None
    weight: Tensor | None
    factor: float | None
    reduction: str
    normalizer: float | Tensor | None

    @property
    def has_scale(self) -> bool:
        """Whether the result is a sum of the rows' divergences, each times a constant."""
        constants = not any(isinstance(x, Tensor) and x.requires_grad for x in (self.weight, self.normalizer))
        return constants and self.reduction != "none"

    def scale(self, lead: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """These constants, `[*lead]`."""
        factor, denominator = self.factor, self._denominator(lead)
        factor = 1.0 if factor is None else factor
        if self.weight is None and not isinstance(denominator, Tensor):
            share = factor / denominator
            if is_dynamo_compiling():  # `full` would make a constant of a normalizer that changes
                return torch.ones(lead, dtype=dtype, device=device) * share
            return torch.full(lead, share, dtype=dtype, device=device)
        if self.weight is None:
            weight = torch.ones(lead, dtype=dtype, device=device)
        else:
            weight = self.weight.detach().to(dtype)
        return weight * factor / denominator

    def reduced(self, value: Tensor) -> Tensor:
        """The result from the rows' divergences `[N]`, differentiable in all of them."""
        # torch.compile is not asked, here and below: where the answer is 1, it would make a constant of it.
        if self.factor is not None and (is_dynamo_compiling() or self.factor != 1):
            value = value * self.factor
        if self.weight is not None:
            value = value * self.weight.to(value.dtype)
        if self.reduction == "none":
            return value
        total, denominator = value.sum(), self._denominator(value.shape)
        if type(denominator) is int and denominator == 1:
            return total  # dividing takes longer than the sum of a small problem
        return total / denominator

    def _denominator(self, lead: torch.Size) -> float | Tensor:
        if self.reduction == "sum":
            return 1
        if self.normalizer is not None:
            return self.normalizer
        if self.reduction == "batchmean":
            return max(lead[0], 1) if lead else 1
        if self.counts is None:
            return max(math.prod(lead), 1)
        # clamp: where no row counts the result is 0, attached to the graph, and nothing waits for the device.
        return self.counts.sum().clamp_min(1)

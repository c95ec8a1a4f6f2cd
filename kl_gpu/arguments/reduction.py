"""Which columns and rows count, what a row weighs, what a reduction divides by: what all entries share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling


def compute_dtype(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """What rows are computed in: float64 if either side's logits are, else float32."""
    return torch.float64 if torch.float64 in (a, b) else torch.float32


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64: Apple's do not, nor do some of Intel's."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def wide_dtype(device: torch.device) -> torch.dtype:
    """What is computed per row or picked column: float64 wherever the device has it."""
    return torch.float64 if has_float64(device) else torch.float32


class LogitsWindow(NamedTuple):
    """The part of a whole tensor of logits that counts: columns below vocab_size, and with shift all times
    but the last."""

    vocab_size: int
    shift: bool

    def of(self, logits: Tensor) -> Tensor:
        """That part, as a view."""
        if self.shift:
            logits = logits[..., :-1, :]
        return logits if logits.shape[-1] == self.vocab_size else logits[..., : self.vocab_size]

    def of_each(self, *tensors: Tensor | None) -> list[Any]:
        """That part of every tensor that there is."""
        of, columns = self.of, self.vocab_size
        if self.shift:
            return [None if x is None else of(x) for x in tensors]
        return [x if x is None or x.shape[-1] == columns else of(x) for x in tensors]

    def zero_rest(self, *grads: Tensor | None) -> None:
        """Zero what `of` leaves out."""
        for grad in grads:
            if grad is not None and grad.shape[-1] != self.vocab_size:
                grad[..., self.vocab_size :].zero_()
            if grad is not None and self.shift:
                grad[..., -1:, :].zero_()


def as_bool(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask.long() != 0


def valid_rows(
    mask: Tensor | None, labels: Tensor | None, ignore_index: int, weight: Tensor | None, shift: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Which rows count (None: all), and the rows' weights, both as the result has them."""
    if shift:
        mask, labels, weight = (None if x is None else x[:, 1:] for x in (mask, labels, weight))
    valid = mask = None if mask is None else as_bool(mask)
    if labels is not None:
        labels = labels.long()  # in uint8 an ignore_index of −100 would be token 156
        valid = labels != ignore_index if mask is None else mask & (labels != ignore_index)
    if weight is not None and valid is not None:
        # A row that does not count contributes 0 whatever its weight holds.
        weight = torch.where(valid, weight, 0)
    return valid, weight


def last_contiguous(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


class Reduction(NamedTuple):
    """What becomes of the rows' divergences.

    Attributes:
        valid: which rows count, as the result has them, for a mean to divide by; None: all.
        weight: what each is multiplied by, 0 where a row does not count; None: 1.
        factor: what all are multiplied by, or each; None: 1.
    """

    valid: Tensor | None
    weight: Tensor | None
    factor: float | Tensor | None
    reduction: str
    normalizer: float | Tensor | None

    @property
    def computed(self) -> Tensor | None:
        """Which rows are computed: not those of weight 0, whose value may be infinite, and 0 · inf NaN."""
        return self.valid if self.weight is None else self.weight.detach() != 0

    def completed(self, value: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        """The divergences of `computed`, with those of weight 0 where a weight asks for its derivative.

        It is the row's divergence, which `of` finds for the rows it is given; nothing flows to their logits.
        One that is not finite is taken as 0.
        """
        if self.weight is None or not (self.weight.requires_grad and torch.is_grad_enabled()):
            return value
        with torch.no_grad():
            without = self.weight == 0
            others = of(without if self.valid is None else without & self.valid)
        return value + torch.where(torch.isfinite(others), others, 0.0)

    @property
    def has_scale(self) -> bool:
        """Whether the result is a sum of the rows' divergences, each times a constant."""
        if self.reduction == "none" or (self.weight is not None and self.weight.requires_grad):
            return False
        return not (isinstance(self.normalizer, Tensor) and self.normalizer.requires_grad)

    def scale(self, lead: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """These constants, `[*lead]`."""
        factor = 1.0 if self.factor is None else self.factor
        denominator = self._denominator(lead, dtype)
        if isinstance(factor, Tensor):
            if self.weight is None and not isinstance(denominator, Tensor):
                return (factor / denominator).to(dtype)
            factor = factor.to(dtype)
        elif self.weight is None and not isinstance(denominator, Tensor):
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
        if isinstance(self.factor, Tensor):
            value = value * self.factor.to(value.dtype)
        elif self.factor is not None and (is_dynamo_compiling() or self.factor != 1):
            value = value * self.factor
        if self.weight is not None:
            value = value * self.weight.to(value.dtype)
        if self.reduction == "none":
            return value
        total, denominator = value.sum(), self._denominator(value.shape, value.dtype)
        if type(denominator) is int and denominator == 1:
            return total  # dividing takes longer than the sum of a small problem
        return total / denominator

    def _denominator(self, lead: torch.Size, dtype: torch.dtype) -> float | Tensor:
        if self.reduction == "sum":
            return 1
        if isinstance(self.normalizer, Tensor):
            return self._given(self.normalizer, lead, dtype)
        if self.normalizer is not None:
            return self.normalizer
        if self.reduction == "batchmean":
            return max(lead[0], 1) if lead else 1
        if self.valid is None:
            return max(math.prod(lead), 1)
        # clamp: where no row counts the result is 0, attached to the graph, and nothing waits for the device.
        return self.valid.sum().clamp_min(1)

    def _given(self, normalizer: Tensor, lead: torch.Size, dtype: torch.dtype) -> float | Tensor:
        """The normalizer; 1 where no row counts, and NaN where it is no denominator: a negative one would
        turn the loss around. Nothing waits for a device."""
        known = normalizer if normalizer.is_floating_point() else normalizer.long()
        n = torch.where((known > 0) & (known < math.inf), known.to(dtype), math.nan)
        if self.valid is None:
            return n if math.prod(lead) else 1
        nothing = self.valid.sum() == 0
        # The product first: of numbers on two devices, the CPU one of them, it is what copies neither.
        return (n * ~nothing).masked_fill(nothing, 1.0)

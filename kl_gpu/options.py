"""The options that the entries share: their names, their defaults, and what they come to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, transforms
from .autograd import ordinary_rows
from .kinds import KINDS
from .rows import Rows, that_count

REDUCTIONS = ("none", "sum", "mean", "batchmean")


class Options(NamedTuple):
    """Those of :func:`kl_gpu.divergence`, as given. What an entry does not take keeps its default."""

    beta: float | None = None
    temperature: float = 1.0
    teacher_temperature: float | None = None
    t_squared: bool = False
    mask: Tensor | None = None
    labels: Tensor | None = None
    ignore_index: int = -100
    shift: bool = False
    weight: Tensor | None = None
    reduction: str = "mean"
    normalizer: float | Tensor | None = None
    vocab_size: int | None = None
    inplace: bool = False
    backend: str | None = None

    def check(self, kind: str) -> float:
        """Check what needs no tensor, of two sides compared by `kind`; returns the teacher's temperature."""
        checks.name("kind", kind, KINDS)
        checks.name("reduction", self.reduction, REDUCTIONS)
        checks.beta(self.beta, kind)
        checks.booleans(shift=self.shift, inplace=self.inplace, t_squared=self.t_squared)
        return checks.temperatures(self.temperature, self.teacher_temperature, self.t_squared)

    def rows(self, logits: Tensor) -> Rows:
        """Check what is given per row against the logits; returns what becomes of their rows."""
        checks.rows(logits, self.mask, self.labels, self.ignore_index, self.weight)
        checks.normalizer(self.normalizer, self.reduction, logits.device)
        mask, weight, normalizer = self.mask, self.weight, self.normalizer
        if weight is not None:
            weight = ordinary_rows(weight)
        if isinstance(normalizer, Tensor):
            normalizer = ordinary_rows(normalizer)
        if mask is not None and self.shift:  # what a mask is cut from may be saved in its place
            mask = ordinary_rows(mask)
        counts, weight = that_count(mask, self.labels, self.ignore_index, weight, self.shift)
        factor = float(self.temperature) ** 2 if self.t_squared else None
        return Rows(counts, weight, factor, self.reduction, normalizer)

    def overwrites(self, argument: str, logits: Tensor, *also_needed: Any) -> bool:
        """Whether the gradient goes over the logits' memory; `also_needed`: as `checks.inplace` has it."""
        # Under torch.compile and torch.func the permission goes unused: whose memory it is, they know.
        if not self.inplace or torch.compiler.is_compiling() or transforms.are_active():
            return False
        checks.inplace(argument, logits, *also_needed)
        return True

"""The options that the entries share: their names, their defaults, and what they come to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import transforms
from ..inference_tensors import ordinary_rows
from ..kinds import KINDS
from . import temperatures, validation
from .reduction import Reduction, valid_rows
from .temperatures import Scales, Temperature

REDUCTIONS = ("none", "sum", "mean", "batchmean")


class Options(NamedTuple):
    """Those of :func:`kl_gpu.divergence`, as given. What an entry does not take keeps its default."""

    beta: float | None = None
    temperature: Temperature = 1.0
    teacher_temperature: Temperature | None = None
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
    support: Tensor | None = None
    student_columns: Tensor | None = None
    teacher_columns: Tensor | None = None
    return_entropy: bool = False
    hard_weight: float = 0.0

    @property
    def selects(self) -> bool:
        """Whether only some columns count, and not the first ones."""
        return not (self.support is None and self.student_columns is None and self.teacher_columns is None)

    def check(self, kind: str) -> None:
        """Check what needs no logits, of two sides compared by `kind`."""
        validation.name("kind", kind, KINDS)
        validation.name("reduction", self.reduction, REDUCTIONS)
        validation.beta(self.beta, kind)
        validation.booleans(shift=self.shift, inplace=self.inplace, t_squared=self.t_squared)
        validation.booleans(return_entropy=self.return_entropy)
        validation.hard_weight(self.hard_weight, self.labels, self.support)
        validation.temperatures(self.temperature, self.teacher_temperature, self.t_squared)

    def scales(
        self, rows: Tensor, valid: Tensor | None, factors: tuple[float, float] = (1.0, 1.0), over: float = 1.0
    ) -> Scales:
        """What multiplies both sides' logits, as `temperatures.scales` has it."""
        both = self.temperature, self.teacher_temperature
        return temperatures.scales(*both, rows, valid, self.shift, factors, over)

    def reduction_of(self, logits: Tensor) -> Reduction:
        """Check what is given per row against the logits; returns what becomes of their divergences."""
        validation.rows(logits, self.mask, self.labels, self.ignore_index, self.weight)
        if self.mask is None and self.labels is None and self.weight is None and self.normalizer is None:
            return Reduction(None, None, self._factor(logits, None), self.reduction, None)
        validation.normalizer(self.normalizer, self.reduction, logits.device)
        weight, normalizer = ordinary_rows(self.weight), self.normalizer
        if isinstance(normalizer, Tensor):
            normalizer = ordinary_rows(normalizer).reshape(())
        # What a mask is cut from may be saved in its place.
        mask = ordinary_rows(self.mask) if self.shift else self.mask
        valid, weight = valid_rows(mask, self.labels, self.ignore_index, weight, self.shift)
        validation.divides(normalizer, valid, logits.shape[:-1], self.shift)
        return Reduction(valid, weight, self._factor(logits, valid), self.reduction, normalizer)

    def _factor(self, logits: Tensor, valid: Tensor | None) -> float | Tensor | None:
        """T² where it is asked for, of all rows or of each."""
        if not self.t_squared:
            return None
        if isinstance(self.temperature, Tensor):
            own = temperatures.of_rows("temperature", self.temperature, logits, valid, self.shift)
            return own.square()
        return float(self.temperature) ** 2

    def hard_labels(self, valid: Tensor | None, columns: int) -> Tensor:
        """The labels, int64, as the result has its rows; those of rows that count are checked."""
        labels: Any = ordinary_rows(self.labels)
        labels = (labels[:, 1:] if self.shift else labels).long()
        if valid is not None:
            validation.labels_are_columns(labels, valid, columns)
        return labels

    def overwrites(self, argument: str, logits: Tensor, *also_needed: Any) -> bool:
        """Whether the gradient goes over the logits' memory; `also_needed` as in `validation.inplace`."""
        # The labels' term wants the logits, too, and nobody knows which is differentiated first.
        # Under torch.compile and torch.func the permission goes unused: whose memory it is, they know.
        if (
            not self.inplace
            or self.hard_weight > 0
            or torch.compiler.is_compiling()
            or transforms.are_active()
        ):
            return False
        validation.inplace(argument, logits, *also_needed)
        return True

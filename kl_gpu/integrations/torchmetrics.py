"""A torchmetrics `Metric` for divergences over tokens.

    from kl_gpu.integrations.torchmetrics import TokenDivergence

    metric = TokenDivergence("js", beta=0.5, shift=True)
    metric.update(student_logits, teacher_logits, labels=labels)
    metric.compute()

The result is the mean over all tokens that counted, on all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import divergence
from ..kinds import KINDS
from ._packages import base_class

# What torchmetrics.Metric takes itself.
_METRICS = (
    "compute_on_cpu", "dist_sync_on_step", "process_group", "dist_sync_fn", "distributed_available_fn",
    "sync_on_compute", "compute_with_cache",
)  # fmt: skip
_Metric: Any = base_class("torchmetrics", "Metric")


class TokenDivergence(_Metric):
    """The mean over tokens of a divergence between student and teacher, straight from logits, in nats.

    Batches add up in float64, each token with the same weight whatever its batch, and over ranks by a sum.

    Args:
        kind: a name in `kl_gpu.KINDS`.
        **options: those of :func:`kl_gpu.divergence` that are the same for every batch: beta, temperature,
            teacher_temperature, t_squared, shift, ignore_index, vocab_size, student_columns, …; and those of
            `torchmetrics.Metric`.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: `kind` is unknown, or `reduction` or `normalizer` is among the options.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    def __init__(self, kind: str = "forward_kl", **options: Any) -> None:
        super().__init__(**{name: options.pop(name) for name in _METRICS if name in options})
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if unfit := {"reduction", "normalizer", "return_entropy", "inplace"} & set(options):
            raise ValueError(
                f"TokenDivergence takes no {', '.join(sorted(unfit))}: it is the mean over tokens"
            )
        self.kind, self.options = kind, options
        self.add_state("total", torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")

    def update(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Add a batch: logits `[N, V]`, labels and mask `[N]` as in :func:`kl_gpu.divergence`."""
        with torch.no_grad():
            values = divergence(
                student_logits, teacher_logits, self.kind, labels=labels, mask=mask, reduction="none",
                **self.options,
            )  # fmt: skip
            counted = torch.ones(student_logits.shape[:-1], dtype=torch.bool, device=student_logits.device)
            if mask is not None:
                counted &= mask != 0
            if labels is not None:
                counted &= labels != self.options.get("ignore_index", -100)
            counted = counted[:, 1:] if self.options.get("shift") else counted
            self.total += values.sum(dtype=torch.float64)
            self.count += counted.sum()

    def compute(self) -> Tensor:
        """0-d, float64; NaN before any token counted."""
        return self.total / self.count

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """As every metric of torchmetrics is plotted: `(figure, axes)`."""
        return self._plot(val, ax)

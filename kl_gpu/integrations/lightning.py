"""Lightning: KL, entropy and acceptance of every step, through the module's own logger.

    from kl_gpu.integrations.lightning import TokenStatsCallback

    Trainer(callbacks=[TokenStatsCallback()])  # training_step returns logits and labels beside the loss

or, in a module that has the logits at hand, `class Student(TokenStatsMixin, LightningModule)` and
`self.log_token_stats(student_logits, teacher_logits, labels)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..stats import TokenStats, token_stats
from ._packages import base_class

NAMES = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "acceptance", "top1_agree")


def _log(
    module: Any, stats: TokenStats, prefix: str, names: tuple[str, ...], **how: Any
) -> dict[str, Tensor]:  # fmt: skip
    """Means over the tokens that count; Lightning weighs a step by how many they are."""
    means = stats.mean()._asdict()
    found = {f"{prefix}{name}": means[name] for name in names}
    # int() waits for the device, once in a step that is logged
    if count := int(stats.count):
        module.log_dict(found, batch_size=count, **how)
    return found


class TokenStatsMixin:
    """`log_token_stats` for a LightningModule."""

    def log_token_stats(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *,
        prefix: str = "", names: tuple[str, ...] = NAMES, log: dict[str, Any] | None = None, **options: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Log means over the tokens that count: KLs and entropies in nats, shares in [0, 1].

        Args:
            student_logits, teacher_logits, labels, **options: those of :func:`kl_gpu.token_stats`, logits
                `[N, V]`.
            prefix: stands before each name in the log.
            names: fields of `kl_gpu.TokenStats`.
            log: keywords of Lightning's `log_dict`: on_step, on_epoch, sync_dist, …

        Returns:
            The means, 0-d tensors without gradients, by their names in the log.
        """
        with torch.no_grad():
            stats = token_stats(student_logits, teacher_logits, labels, **options)
        return _log(self, stats, prefix, names, **log or {})


class TokenStatsCallback(base_class("lightning.pytorch", "Callback")):  # type: ignore[misc]
    """Logs the same of what `training_step` and `validation_step` return, a dict with both sides' logits.

    Args:
        every_n_steps: how often; validation is logged in every batch, averaged over the epoch.
        student, teacher, labels: the keys of the dict. Labels may be absent; without the logits nothing is
            logged.
        names: fields of `kl_gpu.TokenStats`.
        **options: those of :func:`kl_gpu.token_stats`.

    Raises:
        ImportError: Lightning is not installed.
    """

    def __init__(
        self, every_n_steps: int = 1, *, student: str = "student_logits", teacher: str = "teacher_logits",
        labels: str = "labels", names: tuple[str, ...] = NAMES, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.every_n_steps, self.names, self.options = every_n_steps, names, options
        self.keys = student, teacher, labels

    def _log(self, module: Any, outputs: Any, prefix: str, **how: Any) -> None:
        student, teacher, labels = self.keys
        if isinstance(outputs, dict) and student in outputs and teacher in outputs:
            with torch.no_grad():
                stats = token_stats(outputs[student], outputs[teacher], outputs.get(labels), **self.options)
            _log(module, stats, prefix, self.names, **how)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the batch's means under "train/"."""
        if batch_idx % self.every_n_steps == 0:
            self._log(pl_module, outputs, "train/")

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log the epoch's means under "val/", over ranks too."""
        self._log(pl_module, outputs, "val/", on_epoch=True, sync_dist=True)

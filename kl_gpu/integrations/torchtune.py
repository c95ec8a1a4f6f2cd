"""torchtune's distillation losses by their names, arguments and reductions, computed by kl_gpu.

    kd_loss:  # in the recipe's YAML
      _component_: kl_gpu.integrations.torchtune.ForwardKLWithChunkedOutputLoss

torchtune itself is not needed. Its forward KL is the cross-entropy −Σ p log q, larger by the teacher's
entropy, which no student changes; here it is KL(p‖q), with the same gradient, and 0 where the models agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..functional import divergence


class KDLoss(nn.Module):
    """The mean divergence over the tokens whose label is not `ignore_index`; any kind of `kl_gpu.KINDS`.

    Args:
        kind: which divergence.
        ignore_index: the label of tokens that do not count.
        num_output_chunks: None for losses called with tensors; else into how many parts, along time, the
            recipe cuts the logits, which come as a list of that length.
        **options: those of :func:`kl_gpu.divergence`: beta, temperature, t_squared, vocab_size, …
    """

    def __init__(
        self, kind: str = "forward_kl", ignore_index: int = -100, num_output_chunks: int | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kind, self.ignore_index, self.options = kind, ignore_index, options
        if num_output_chunks is not None:
            self.num_output_chunks = num_output_chunks

    def forward(
        self, student_logits: Tensor | Sequence[Tensor], teacher_logits: Tensor | Sequence[Tensor],
        labels: Tensor, normalize: bool = True,
    ) -> Tensor:  # fmt: skip
        """Logits `[N, V]` or lists of `[batch, time / chunks, V]`, labels `[N]` or `[batch, time]`.

        `normalize=False` gives the sum. Errors are those of :func:`kl_gpu.divergence`.
        """
        if isinstance(student_logits, Tensor):
            pairs: Any = [(student_logits, teacher_logits, labels.view(student_logits.shape[:-1]))]
        else:
            lengths = [chunk.shape[1] for chunk in student_logits]
            pairs = list(zip(student_logits, teacher_logits, labels.split(lengths, 1), strict=True))
        how: Any = {"ignore_index": self.ignore_index, "reduction": "sum", **self.options}
        total: Any = 0.0
        for student, teacher, part in pairs:
            total = total + divergence(student, teacher, self.kind, labels=part, **how)
        return total / (labels != self.ignore_index).sum().clamp(min=1) if normalize else total


class ForwardKLLoss(KDLoss):
    """KL(p‖q), called `(student_logits, teacher_logits, labels, normalize=True)`."""

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__("forward_kl", ignore_index)


class ReverseKLLoss(KDLoss):
    """KL(q‖p)."""

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__("reverse_kl", ignore_index)


class SymmetricKLLoss(KDLoss):
    """sym_kd_ratio · KL(p‖q) + (1 − sym_kd_ratio) · KL(q‖p)."""

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__("jeffreys", ignore_index, beta=1.0 - sym_kd_ratio)
        self.sym_kd_ratio = sym_kd_ratio


class ForwardKLWithChunkedOutputLoss(KDLoss):
    """KL(p‖q) of logits that come in parts."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__("forward_kl", ignore_index, num_output_chunks)


class ReverseKLWithChunkedOutputLoss(KDLoss):
    """KL(q‖p) of logits that come in parts."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__("reverse_kl", ignore_index, num_output_chunks)


class SymmetricKLWithChunkedOutputLoss(KDLoss):
    """The symmetric divergence of logits that come in parts."""

    def __init__(
        self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = -100
    ) -> None:  # fmt: skip
        super().__init__("jeffreys", ignore_index, num_output_chunks, beta=1.0 - sym_kd_ratio)
        self.sym_kd_ratio = sym_kd_ratio

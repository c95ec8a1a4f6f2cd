"""Module faces of the functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .arguments import validation
from .functional import divergence
from .kinds import KINDS

_PER_CALL = ("mask", "labels", "weight", "normalizer", "support")
# Options that are tensors: buffers, so that they go where the module goes, but no part of a checkpoint.
_MAPS = ("student_columns", "teacher_columns")
_OPTIONS = tuple(name for name in validation.options_of(divergence) if name not in _PER_CALL)


class DivergenceLoss(nn.Module):
    """`kl_gpu.divergence` as a module: fixed options at construction, what differs per batch in forward.

    Args:
        kind: A name in `kl_gpu.KINDS`.
        **options: The options of :func:`kl_gpu.divergence`, except mask, labels, weight, normalizer and
            support, which belong to `forward`. `student_columns` and `teacher_columns` become buffers that
            move with the module and are not part of its state dict.

    Raises:
        TypeError: An option is unknown or belongs to `forward`.
        ValueError: `kind` is unknown.

    Example:
        >>> import torch, kl_gpu
        >>> criterion = kl_gpu.DivergenceLoss("js", beta=0.1, temperature=2.0, shift=True)
        >>> student = torch.randn(2, 8, 100, requires_grad=True)
        >>> labels = torch.randint(100, (2, 8))
        >>> loss = criterion(student, torch.randn(2, 8, 100), labels=labels)
        >>> loss.backward()
        >>> student.grad.shape
        torch.Size([2, 8, 100])
    """

    student_columns: Tensor | None
    teacher_columns: Tensor | None

    def __init__(self, kind: str = "forward_kl", **options: Any) -> None:
        super().__init__()
        validation.name("kind", kind, KINDS)
        validation.known("DivergenceLoss", options, _OPTIONS)
        self.kind = kind
        for name in _MAPS:
            self.register_buffer(name, options.pop(name, None), persistent=False)
        self.options = options

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        support: Tensor | None = None,
        temperature: float | Tensor | None = None,
        teacher_temperature: float | Tensor | None = None,
    ) -> Any:
        """The loss of a batch of logits; arguments, result and errors as in :func:`kl_gpu.divergence`.

        Temperatures given here, such as those of each row, replace those given at construction.
        """
        return divergence(
            student_logits, teacher_logits, self.kind, mask=mask, labels=labels, weight=weight,
            normalizer=normalizer, support=support, student_columns=self.student_columns,
            teacher_columns=self.teacher_columns, **self._options(temperature, teacher_temperature),
        )  # fmt: skip

    def linear(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        *,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        temperature: float | Tensor | None = None,
        teacher_temperature: float | Tensor | None = None,
        **heads: Any,
    ) -> Any:
        """The same loss from hidden states and LM heads, as in :func:`kl_gpu.linear_div`.

        `heads` are its arguments that describe the models: student_bias, softcap, logit_scale, their
        counterparts of the teacher, and chunk_rows. The option `inplace` is ignored, because no caller
        owns these logits.
        """
        from .linear.api import linear_div  # later: a fifth of the package's import time

        options = self._options(temperature, teacher_temperature)
        options.pop("inplace", None)
        return linear_div(
            student_hidden, student_weight, teacher_hidden, teacher_weight, self.kind, mask=mask,
            labels=labels, weight=weight, normalizer=normalizer, student_columns=self.student_columns,
            teacher_columns=self.teacher_columns, **heads, **options,
        )  # fmt: skip

    def _options(self, temperature: Any, teacher_temperature: Any) -> dict[str, Any]:
        given = {"temperature": temperature, "teacher_temperature": teacher_temperature}
        return self.options | {name: value for name, value in given.items() if value is not None}

    def extra_repr(self) -> str:
        return ", ".join([repr(self.kind), *(f"{name}={value!r}" for name, value in self.options.items())])

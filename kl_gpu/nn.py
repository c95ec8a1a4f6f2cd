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
    """`kl_gpu.divergence` as a module: options at construction, what differs per batch in forward.

    Args:
        kind: a name in `kl_gpu.KINDS`.
        **options: the options of :func:`kl_gpu.divergence` but mask, labels, weight, normalizer and support.

    Raises:
        TypeError: an option is unknown or belongs to forward.
        ValueError: `kind` is unknown.
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
        """Arguments, result and errors as :func:`kl_gpu.divergence`.

        Temperatures given here, such as those of each row, take the place of those given at construction.
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
        """The same loss from hidden states and LM heads, as :func:`kl_gpu.linear_div`.

        `heads` are its arguments that describe the models: student_bias, softcap, logit_scale, their
        counterparts of the teacher, and chunk_rows. The option `inplace` has no meaning here and is ignored:
        the logits are nobody's.
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

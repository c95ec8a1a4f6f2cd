"""What an operation is asked for besides its tensors: one object each, from public function to backend.

Each is also the tail of its operator's arguments, in the order of the schema (`kl_gpu.ops`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .reduction import LogitsWindow


class DivergenceParams(NamedTuple):
    """What a divergence of two sides of logits depends on.

    Attributes:
        kind: a name in `KINDS`, β's limits already resolved (`Kind.at`).
        beta: the kind's parameter, strictly between its limits; 0 where it has none.
        student_scale, teacher_scale: 1/temperature of each side.
        backend: a name in `BACKENDS`.
    """

    kind: str
    beta: float
    student_scale: float
    teacher_scale: float
    backend: str


class DivergenceCall(NamedTuple):
    """A divergence as autograd sees it: what is computed, on which part of the tensors it is given.

    Attributes:
        window: the part of the whole tensors that counts.
        inplace: whether the student's gradient is written over its logits.
    """

    params: DivergenceParams
    window: LogitsWindow
    inplace: bool


class ComplementParams(NamedTuple):
    """How a row is split into picked columns and their complement.

    Attributes:
        scale: 1/temperature.
        sweeps: whether the complement counts; without it only the picked columns are read.
        entropy: whether the complement's entropy is asked for.
        validate: whether ids that are out of range or given twice are refused, in the name of `argument`.
        backend: a name in `BACKENDS`.
        window: the part of the whole tensor that counts.
        inplace: whether the gradient is written over the logits.
    """

    scale: float
    sweeps: bool
    entropy: bool
    validate: bool
    argument: str
    backend: str
    window: LogitsWindow
    inplace: bool = False


class TopkParams(NamedTuple):
    """What a divergence from a teacher known by K tokens depends on.

    Attributes:
        kind, beta: as in `DivergenceParams`.
        tail: what stands for the tokens that are not known.
        scale: 1/temperature, for "renormalize".
        resolution: half an ulp of the teacher's log-probabilities at 1.
    """

    kind: str
    beta: float
    tail: str
    scale: float
    resolution: float


class LinearParams(NamedTuple):
    """What a divergence from hidden states and LM heads depends on.

    Attributes:
        student_dtype, teacher_dtype: of the products and the logits.
        student_inner, teacher_inner: what multiplies logits before their cap; without one it is in the scale.
        student_cap, teacher_cap: 0 where there is none.
        vocab_size: rows of the weights past it do not count.
        chunk_rows: 0 leaves it to the size and the device.
        divergence: of the logits, or of the capped logits.
    """

    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    student_inner: float
    teacher_inner: float
    student_cap: float
    teacher_cap: float
    vocab_size: int
    chunk_rows: int
    divergence: DivergenceParams

    def as_arguments(self) -> tuple[Any, ...]:
        """The operator's arguments behind its tensors: schemas know no nesting."""
        *products, divergence = self
        return *products, *divergence

    @classmethod
    def from_arguments(cls, *arguments: Any) -> LinearParams:
        products = len(cls._fields) - 1
        return cls._make((*arguments[:products], DivergenceParams(*arguments[products:])))

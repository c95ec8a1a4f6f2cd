"""What an operation is asked for besides its tensors: one object each, from public function to backend.

Each is also the tail of its operator's arguments, in the order of the schema (`kl_gpu.ops`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reduction import LogitsWindow
from .temperatures import Scales


class DivergenceParams(NamedTuple):
    """What a divergence of two sides of logits depends on.

    Attributes:
        kind: a name in `KINDS`, β's limits already resolved (`Kind.at`).
        beta: the kind's parameter, strictly between its limits; 0 where it has none.
        student_scale, teacher_scale: 1/temperature of each side, where rows do not have their own.
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
        scale: 1/temperature, where rows do not have their own.
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
        scale: 1/temperature, for "renormalize"; the teacher comes with it where rows have their own.
        resolution: half an ulp of the teacher's log-probabilities at 1.
    """

    kind: str
    beta: float
    tail: str
    scale: float
    resolution: float


class HeadParams(NamedTuple):
    """What makes a model's logits of the products of its hidden states and its LM head.

    Attributes:
        dtype: of the products and the logits.
        inner: what multiplies logits before their cap; 1 without one, when the factor is part of the scale.
        cap: 0 where there is none.
    """

    dtype: torch.dtype
    inner: float
    cap: float


class LinearParams(NamedTuple):
    """What a comparison of two models known by hidden states and LM heads depends on.

    Attributes:
        student, teacher: of each side's products.
        vocab_size: rows of the weights past it do not count.
        chunk_rows: 0 leaves it to the size and the device.
        divergence: of the logits, or of the capped logits.
    """

    student: HeadParams
    teacher: HeadParams
    vocab_size: int
    chunk_rows: int
    divergence: DivergenceParams

    @property
    def row_bytes(self) -> int:
        """Of the logits of one row, both sides."""
        return self.vocab_size * (self.student.dtype.itemsize + self.teacher.dtype.itemsize)

    def scaled(self, scales: Scales) -> LinearParams:
        """With what multiplies the logits."""
        student, teacher, _ = scales
        divergence = self.divergence._replace(student_scale=student, teacher_scale=teacher)
        return self._replace(divergence=divergence)

    def as_arguments(self) -> tuple[Any, ...]:
        """The operator's arguments behind its tensors: schemas know no nesting."""
        student, teacher, *sizes, divergence = self
        return *student, *teacher, *sizes, *divergence

    @classmethod
    def from_arguments(cls, *arguments: Any) -> tuple[LinearParams, LinearExtras]:
        """The parameters, and what else the operator's arguments end with."""
        student, teacher = HeadParams(*arguments[:3]), HeadParams(*arguments[3:6])
        vocab_size, chunk_rows = arguments[6:8]
        params = cls(student, teacher, vocab_size, chunk_rows, DivergenceParams(*arguments[8:13]))
        return params, LinearExtras(*arguments[13:])


class LinearExtras(NamedTuple):
    """What a comparison of two models known by hidden states and LM heads may also have.

    Attributes:
        scales: 1/temperature of each row, `[N, 1]` or `[N, 2]`.
        entropy: whether the student's entropies are asked for.
        labels: int64 `[N]`; their −log q at temperature 1 is asked for where they are given.
        label_scale: `[N, 1]`, what multiplies the student's logits at temperature 1, where there are labels.
        label_row_scale: `[N]`, what multiplies the gradient of −log q, where one is asked for.
    """

    scales: Tensor | None = None
    entropy: bool = False
    labels: Tensor | None = None
    label_scale: Tensor | None = None
    label_row_scale: Tensor | None = None

    @property
    def fields(self) -> tuple[int, ...]:
        """The shape of what a row comes to: its divergence, alone or with entropy and −log q behind it."""
        n = 1 + self.entropy + (self.labels is not None)
        return (n,) if n > 1 else ()


class LinearSplitParams(NamedTuple):
    """How rows known by hidden states and an LM head are split into picked columns and their complement.

    Attributes:
        head: of the products.
        vocab_size, chunk_rows: as in `LinearParams`.
        scale, sweeps, entropy, validate, argument, backend: as in `ComplementParams`.
    """

    head: HeadParams
    vocab_size: int
    chunk_rows: int
    scale: float
    sweeps: bool
    entropy: bool
    validate: bool
    argument: str
    backend: str

    @property
    def row_bytes(self) -> int:
        """Of the logits of one row."""
        return self.vocab_size * self.head.dtype.itemsize

    def as_arguments(self) -> tuple[Any, ...]:
        head, *others = self
        return *head, *others

    @classmethod
    def from_arguments(cls, *arguments: Any) -> tuple[LinearSplitParams, Tensor | None]:
        """As `LinearParams.from_arguments`."""
        n = 2 + len(cls._fields)
        params = cls(HeadParams(*arguments[:3]), *arguments[3:n])
        return params, arguments[n] if len(arguments) > n else None

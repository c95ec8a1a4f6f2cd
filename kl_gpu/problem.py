"""What a backend is asked to compute, already turned to the two roles of the kind's family."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .kinds import KINDS

# Numbers per row that a backend's `token_stats` gives, a being the teacher. In this order: KL(a‖b), KL(b‖a),
# the entropies of b and of a, the log-probabilities of the row's token under b and under a (NaN where there
# is no such token), and whether the first largest logit of both is in one column.
TOKEN_STATS = 7


def arithmetic(a: Tensor, b: Tensor) -> torch.dtype:
    """What rows are computed in: float64 if either side is, else float32."""
    return torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32


class Problem(NamedTuple):
    """One family of divergences between a and b, row by row.

    Attributes:
        a, b: logits `[A, B, V]`, last stride 1, the other two anything; for native also `[B, V]`.
        rows: bool `[A, B]` or `[B]`, or None where every row counts. A row that is False has value and
            gradient 0.
        family: the formula, as `kl_gpu.kinds` names it.
        beta: its parameter, strictly between 0 and 1; 0 where it has none.
        a_scale, b_scale: 1/temperature of each side.
        dtype: what its rows are computed in, as `arithmetic` has it.
    """

    a: Tensor
    b: Tensor
    rows: Tensor | None
    family: str
    beta: float
    a_scale: float
    b_scale: float
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        student: Tensor,
        teacher: Tensor,
        rows: Tensor | None,
        kind: str,
        beta: float,
        student_scale: float,
        teacher_scale: float,
    ) -> Problem:
        """From the caller's two sides; `kind` is a name in `KINDS`."""
        of, dtype = KINDS[kind], arithmetic(student, teacher)
        if of.weights == "teacher":
            return cls(teacher, student, rows, of.family, beta, teacher_scale, student_scale, dtype)
        return cls(student, teacher, rows, of.family, beta, student_scale, teacher_scale, dtype)

    @property
    def n_rows(self) -> int:
        return math.prod(self.a.shape[:-1])

"""What a backend is asked to compute, and what it must offer: all that `ops` and `distributed` know of one.

A backend is a module with these functions. It knows tensors and numbers; masks, labels, weights and
reductions have become `valid` rows and row factors before anything gets here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..arguments.reduction import compute_dtype
from ..kinds import KINDS

# Numbers kept per row between value and gradient, of a pair of sides and of a complement. What they mean is
# each backend's own affair.
STATS = 12
COMPLEMENT_STATS = 4
# Numbers per row that a backend's `token_stats` gives, a being the teacher. In this order: KL(a‖b), KL(b‖a),
# the entropies of b and of a, the log-probabilities of the row's token under b and under a (NaN where there
# is no such token), and whether the first largest logit of both is in one column.
TOKEN_STATS = 7
# What `ops.pair.comparison` gives: js at 1/2, tv, and α = Σ min(a, b).
COMPARISON = 3


# What multiplies logits, of all rows or `[N]` of each.
Scale = float | Tensor


class RowPair(NamedTuple):
    """The two sides of a divergence, row by row, already turned to the roles a and b of its formula.

    Attributes:
        a, b: logits `[A, B, V]`, last stride 1, the other two anything; for a viewless backend also `[B, V]`.
        valid: bool `[A, B]` or `[B]`, or None where every row counts. A row that is False has value and
            gradient 0.
        formula: its name, as `kl_gpu.kinds` has it.
        beta: its parameter, strictly between 0 and 1; 0 where it has none.
        a_scale, b_scale: 1/temperature of each side, but for `scales`.
        dtype: what its rows are computed in, as `compute_dtype` has it.
        scales: 1/temperature of each row in `wide_dtype`, contiguous: `[A*B, 1]` of both sides, or
            `[A*B, 2]`, a's and b's; None where all rows share `a_scale` and `b_scale`.
    """

    a: Tensor
    b: Tensor
    valid: Tensor | None
    formula: str
    beta: float
    a_scale: float
    b_scale: float
    dtype: torch.dtype
    scales: Tensor | None = None

    @classmethod
    def of(
        cls,
        student: Tensor,
        teacher: Tensor,
        valid: Tensor | None,
        *params: Any,
        scales: Tensor | None = None,
    ) -> RowPair:
        """From the caller's two sides, and what `DivergenceParams` begins with.

        The `scales` `[A*B, 1]` or `[A*B, 2]` are of the student and the teacher.
        """
        kind, beta, student_scale, teacher_scale, *_ = params
        of, dtype = KINDS[kind], compute_dtype(student.dtype, teacher.dtype)
        (a, a_scale), (b, b_scale) = of.as_ab((student, student_scale), (teacher, teacher_scale))
        if scales is not None and of.as_ab(True, False)[1]:  # a is the teacher
            scales = scales.flip(-1)
        return cls(a, b, valid, of.formula, beta, a_scale, b_scale, dtype, scales)

    @property
    def same_scale(self) -> bool:
        """Whether both sides are known to have one temperature."""
        return self.a_scale == self.b_scale if self.scales is None else self.scales.shape[-1] == 1

    def scales_at(self, rows: slice, like: Tensor) -> tuple[Any, Any]:
        """What multiplies both sides in some of the flat rows: numbers, or `[R, 1]` as `like`."""
        if self.scales is None:
            return self.a_scale, self.b_scale
        own = self.scales[rows].to(like)
        return own[:, :1], own[:, -1:]

    @property
    def n_rows(self) -> int:
        return math.prod(self.a.shape[:-1])


class Beside(NamedTuple):
    """What is asked of the student's side beside its divergence.

    Attributes:
        of_a: whether the student is a, of the roles a and b.
        entropy: whether −Σ q log q is asked for.
        labels: int64 `[A*B]`, contiguous, whose −log q is asked for; None for none.
        label_scales: 1/temperature of that q, in `wide_dtype`, contiguous `[A*B]`; None: 1.
    """

    of_a: bool
    entropy: bool
    labels: Tensor | None
    label_scales: Tensor | None


# What is found beside a divergence, float64 `[A*B]` each: the entropies, and −log q of the labels. None where
# it was not asked for; 0 in rows that do not count, NaN for a label that is no column.
Found = tuple[Tensor | None, Tensor | None]


class ComplementArgs(NamedTuple):
    """Rows whose complement is asked for: log Σ exp(scale · logit) over the columns not in `ids`.

    Attributes:
        logits: `[A, B, V]`, last stride 1, the other two anything.
        ids: int64 `[A*B, K]`, contiguous; what lies outside [0, V) names no column.
        valid: bool `[A, B]`, or None where every row counts. A row that is False has gradient 0.
        scale: 1/temperature, but for `scales`.
        scales: 1/temperature of each row in `wide_dtype`, contiguous `[A*B, 1]`; None where all share
            `scale`.
    """

    logits: Tensor
    ids: Tensor
    valid: Tensor | None
    scale: float
    scales: Tensor | None = None

    @property
    def n_rows(self) -> int:
        return self.ids.shape[0]


class Backend(Protocol):
    """The functions and attributes of a backend; `registry.load` checks every module against this list."""

    @property
    def fuses(self) -> bool:
        """Whether `value_and_gradient` moves less memory than `value` and `gradient` one after the other."""

    @property
    def viewless(self) -> bool:
        """Whether a `RowPair` may be `[N, V]`, too: on a small problem a view takes as long as the kernel."""

    def value(self, p: RowPair) -> tuple[Tensor, Tensor]:
        """Per-row divergence `[A*B]` and the row statistics `[A*B, STATS]` that `gradient` needs."""

    def divergence(self, p: RowPair) -> Tensor:
        """`value` without the statistics."""

    def gradient(
        self, p: RowPair, stats: Tensor, row_scale: Tensor, grad_a: Tensor | None, grad_b: Tensor | None,
        incoming: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Write incoming · row_scale · ∂value/∂logits. A gradient may lie over the very logits it belongs to.

        With an incoming gradient (0-d) of 1 the buffers stay as they are: `value_and_gradient` filled them.
        """

    def value_and_gradient(
        self, p: RowPair, row_scale: Tensor, grad_a: Tensor | None, grad_b: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`value` and `gradient` for callers who know row_scale beforehand; the same bits."""

    def token_stats(self, p: RowPair, tokens: Tensor | None) -> Tensor:
        """`[TOKEN_STATS, A*B]`; tokens int64 `[A, B]` where there are any."""

    def complement(self, args: ComplementArgs, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The complement's log-sum-exp and entropy `[A*B]`, and row statistics `[A*B, COMPLEMENT_STATS]`."""

    def complement_gradient(
        self, args: ComplementArgs, stats: Tensor, grad_picked: Tensor, grad_rest: Tensor,
        grad_entropy: Tensor | None, grad: Tensor,
    ) -> None:  # fmt: skip
        """Write scale · (what flows to each logit) into the `[A, B, V]` buffer."""

    def formula_sums(self, p: RowPair, stats: Tensor) -> Tensor:
        """The formula's terms and its two flows, summed over the columns: float64 `[A*B, 3]`."""

    def statistics(
        self, local: Tensor, a_scale: Scale, b_scale: Scale, formula: str, log_a: Tensor, ratio: Tensor,
        sums: Tensor,
    ) -> Tensor:  # fmt: skip
        """Row statistics of whole rows from a shard's own and the whole rows' normalisers and formula sums.

        Args:
            local: `[N, STATS]`, those of the shard.
            a_scale, b_scale: 1/temperature; tensors `[N]` where rows have their own. One tensor for both says
                that both sides have one temperature.
            log_a, ratio: `[N]`, log Σ e^a of the whole row, and log Σ e^b less that.
            sums: float64 `[N, 4]`, what `formulas.finish` gives.
        """

    def shard_states(
        self, stats: Tensor, inside: Sequence[Tensor], a_scale: Scale, b_scale: Scale
    ) -> tuple[Tensor, bool]:
        """A shard's state, float64 `[2 + len(inside), N]`: log Σ e^a, log Σ e^b less that, and `inside`.

        And whether all normalisers are known to be finite; False where asking would wait for the device.
        """

    def merge_shards(self, found: Tensor) -> tuple[Tensor, bool]:
        """The states `[2 + n, N]` of whole rows from those of all shards, `[shards, 2 + n, N]`.

        n = 1 has KL(a‖b) behind the normalisers, n = 2 also KL(b‖a). And whether `statistics` can say where
        the normalisers lie.
        """


class Joining(Protocol):
    """What a backend may have besides: two of its functions in one visit of each row.

    `registry.joining` says which backends do. Of the others the two are called one after the other.
    """

    def value_and_beside(self, p: RowPair, beside: Beside) -> tuple[Tensor, Tensor, Found]:
        """`value`, and what is asked for beside it."""

    def value_and_gradient_and_beside(
        self, p: RowPair, beside: Beside, row_scale: Tensor, label_row_scale: Tensor | None,
        grad_a: Tensor | None, grad_b: Tensor | None,
    ) -> tuple[Tensor, Tensor, Found]:  # fmt: skip
        """`value_and_gradient` likewise; the gradient is `gradient_with_labels`' where there are labels."""

    def gradient_with_labels(
        self, p: RowPair, beside: Beside, stats: Tensor, surprises: Tensor, row_scale: Tensor,
        label_row_scale: Tensor, grad_a: Tensor | None, grad_b: Tensor | None,
    ) -> None:  # fmt: skip
        """Write row_scale · ∂value/∂logits + label_row_scale · ∂(−log q(label))/∂logits.

        Args:
            surprises: float64 `[A*B]`, −log q as `value_and_beside` found them.
            label_row_scale: float64 `[A*B]`.
        """

    def token_stats_and_comparison(self, p: RowPair, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        """`token_stats`, and `formula_sums` of the comparison, `[3, A*B]`; NaN in rows of no distribution."""

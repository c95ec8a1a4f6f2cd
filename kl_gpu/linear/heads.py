"""From a chunk's hidden states to its logits, their caps, and the sweeps that write gradients over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ..arguments.params import HeadParams, LinearParams
from ..arguments.reduction import LogitsWindow, compute_dtype
from ..arguments.temperatures import Scales
from ..backends import registry
from ..backends.native.memory import on_huge_pages
from ..complement import SplitRows, entropies
from ..ops import beside
from ..ops import complement as ops_of_rows
from ..ops import pair as ops
from ..ops.complement import present
from ..ops.views import two_at_least
from ..topk.token_formulas import token
from .chunks import Chunk

# Elements of what passes through a soft cap at once: three such buffers, in float32, stay in a last cache.
_CAPPED = {"cpu": 1 << 20}
_CAPPED_ON_A_GPU = 1 << 23


class Head:
    """One side: its products in their dtype, and the memory of a chunk's logits."""

    def __init__(self, side: Any, dtype: torch.dtype, columns: int, chunks: list[Chunk]) -> None:
        hidden, weight, bias = side
        self.side, self.hidden, self.dtype = side, hidden, dtype
        rows = max((c.rows.stop - c.rows.start for c in chunks), default=0)
        self.weight = weight[:columns].to(dtype)
        self.bias = None if bias is None else bias[:columns].to(dtype)
        self.buffer = on_huge_pages(hidden.new_empty((rows, columns), dtype=dtype))

    def states(self, chunk: Chunk) -> Tensor:
        """The chunk's hidden states, those of rows that do not count replaced by 0: they may hold NaN."""
        hidden = chunk.take(self.hidden)
        if chunk.keep is not None:
            hidden = hidden.masked_fill(~chunk.keep[:, None], 0)
        return hidden.to(self.dtype)

    def logits(self, states: Tensor) -> Tensor:
        out = self.buffer[: states.shape[0]]
        if self.bias is None:
            return torch.mm(states, self.weight.t(), out=out)
        return torch.addmm(self.bias, states, self.weight.t(), out=out)


class Cap:
    """cap·tanh(inner·z/cap) of some rows, in the dtype that rows are computed in; a cap of 0 is none."""

    def __init__(self, of: HeadParams, like: Tensor, dtype: torch.dtype, rows: int) -> None:
        self.inner, self.cap = of.inner, of.cap
        rows = rows if self.cap else 0
        self.tanh, self.out = (like.new_empty((rows, like.shape[1]), dtype=dtype) for _ in range(2))

    def of(self, logits: Tensor) -> Tensor:
        if not self.cap:
            return logits
        n = len(logits)
        tanh = self.tanh[:n].copy_(logits).mul_(self.inner / self.cap).tanh_()
        return torch.mul(tanh, self.cap, out=self.out[:n])

    def pull_back(self, gradient: Tensor, logits: Tensor) -> None:
        """Write the gradient to z over `logits`, from that to the result of the last call."""
        if self.cap:
            factor = self.tanh[: len(gradient)].square_().neg_().add_(1)
            logits.copy_(gradient.mul_(factor).mul_(self.inner))


def capped_at_once(logits: Tensor, widest: int = 0) -> int:
    """How many rows pass through their caps together; `widest` is the number of columns to go by, where
    ranks with fewer must go along."""
    elements = _CAPPED.get(logits.device.type, _CAPPED_ON_A_GPU)
    return max(1, elements // max(widest, logits.shape[1], 1))


def blocks_of(rows: int, at_once: int) -> Iterator[slice]:
    for start in range(0, rows, at_once):
        yield slice(start, min(start + at_once, rows))


# What rows of logits `[n, V]` come to, of which a bool `[n]` says which count, and `[n, 1]` or `[n, 2]` what
# each one's 1/temperature is, where they have their own. Either divergences `[n]`, and with factors `[n]` of
# the rows their gradient in place of the student's logits; or statistics `[n, ...]`, some of them of the
# rows' labels `[n]`.
SweepRows = Callable[..., Tensor]


def sweep_rows(
    params: LinearParams, student: Tensor, teacher: Tensor, keep: Tensor | None, scales: Tensor | None,
    row_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """`SweepRows` of rows that are all here."""
    of = params.divergence
    if row_scale is None:
        return ops.divergence(student, teacher, keep, *of, scales)
    if registry.load(of.backend).fuses:
        return ops.value_and_gradient(student, teacher, keep, row_scale, *of, student, None, scales)[0]
    value, stats = ops.value(student, teacher, keep, *of, scales)
    ops.gradient(student, teacher, keep, stats, row_scale, None, *of, student, None, scales)
    return value


class SharedRows(Protocol):
    """Rows whose columns are shared among ranks: what the labels' term asks of the other ranks."""

    @property
    def columns(self) -> int:
        """The size of the whole vocabulary."""

    def own(self, labels: Tensor) -> Tensor:
        """The labels as this rank counts its columns, −1 where another rank holds them."""

    def merged(self, picked: Tensor, rest_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The whole row's picked logits `[n, 1]` and log-sum-exp of the others `[n]` from those of this
        rank's columns, and this rank's share of the others' mass."""


def with_extras(
    rows: SweepRows, split_rows: SplitRows, entropy: bool, shared: SharedRows | None = None
) -> SweepRows:
    """`SweepRows` of divergences, with the student's entropies and the labels' −log q behind them.

    What is given of each row goes on with the labels, as `LinearExtras` has it. `shared` as in `label_term`.
    """

    def run(
        params: LinearParams, student: Tensor, teacher: Tensor, keep: Tensor | None, scales: Tensor | None,
        row_scale: Tensor | None, labels: Tensor | None = None, label_scale: Tensor | None = None,
        label_row_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        of, found, to_student = params.divergence, [], None
        if rows is sweep_rows and registry.joins(of.backend):
            per_row = scales, row_scale, labels, label_scale, label_row_scale
            return rows_and_extras(params, entropy, student, teacher, keep, *per_row)
        # Both before the gradient comes in the logits' place.
        x = two_at_least(student)
        if entropy:
            both = Scales(of.student_scale, of.teacher_scale, scales)
            window = LogitsWindow(x.shape[-1], shift=False)
            found.append(entropies(split_rows, x, keep, both, window, of.backend))
        if labels is not None:
            own, to_student = label_term(x, labels, keep, label_scale, label_row_scale, of.backend, shared)
            found.append(own)
        value = rows(params, student, teacher, keep, scales, row_scale)
        if to_student is not None:
            student += to_student[:, : student.shape[1]]
        return torch.stack((value, *(y.to(value.dtype) for y in found)), -1)

    return run


def rows_and_extras(
    params: LinearParams, entropy: bool, student: Tensor, teacher: Tensor, keep: Tensor | None,
    scales: Tensor | None, row_scale: Tensor | None, labels: Tensor | None, label_scale: Tensor | None,
    label_row_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """What `with_extras` makes of `sweep_rows`, where the backend finds it all in one visit of a row."""
    asked, of = (student, teacher, keep, labels, label_scale, entropy), params.divergence
    if row_scale is None:
        found = beside.value_and_beside(*asked, *of, scales)
    else:
        factors = row_scale, None if label_row_scale is None else label_row_scale.double()
        found = beside.value_and_gradient_and_beside(*asked, *factors, *of, student, None, scales)
    value, _, entropies, surprises = found
    each = [value, *[entropies] * entropy, *[surprises] * (labels is not None)]
    return torch.stack([x.to(value.dtype) for x in each], -1)


def label_term(
    logits: Tensor, labels: Tensor, keep: Tensor | None, scale: Tensor | None, row_scale: Tensor | None,
    backend: str, shared: SharedRows | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """−log q of the labels `[n]`, and with factors `[n]` of the rows its gradient to the logits.

    `shared` merges the ranks' parts where the logits are a shard of the columns; labels count those of all.
    """
    ids, columns = labels[:, None], logits.shape[-1]
    known = present(ids, columns if shared is None else shared.columns)
    if shared is not None:
        ids = shared.own(ids)
    picked = ops_of_rows.picked_logits(logits, ids, keep, False, "")
    picked = picked if scale is None else picked * scale
    rest_lse, rest_entropy, stats = ops_of_rows.complement(logits, ids, keep, 1.0, False, backend, scale)
    share = None
    if shared is not None:
        picked, rest_lse, share = shared.merged(picked, rest_lse)
    s = torch.where(known, picked, torch.nan)[:, 0]
    logprob, _, to_s, to_rest, *_ = token(s, rest_lse, rest_entropy)
    value = -logprob if keep is None else torch.where(keep, -logprob, 0.0)
    if row_scale is None:
        return value, None
    flow = -row_scale.to(to_s.dtype)
    flow = flow if keep is None else torch.where(keep, flow, 0.0)
    gradient = torch.empty_like(logits)
    to_rest = to_rest if share is None else to_rest * share
    grads = (flow * to_s)[:, None], flow * to_rest
    ops_of_rows.complement_gradient(logits, ids, keep, stats, *grads, None, 1.0, backend, gradient, scale)
    return value, gradient


class Sweep:
    """What a chunk's logits come to, and where `writes` says so the gradient in place of the student's.

    `widest` is the number of columns that the rows of a soft cap are chosen by.
    """

    def __init__(
        self,
        params: LinearParams,
        student: Tensor,
        teacher: Tensor,
        writes: bool,
        rows: SweepRows,
        widest: int,
    ) -> None:
        self.params, self.rows, self.writes = params, rows, writes
        dtype = compute_dtype(student.dtype, teacher.dtype)
        self.at_once = capped_at_once(student, widest)
        at_once = min(len(student), self.at_once)
        self.cap = Cap(params.student, student, dtype, at_once)
        self.teacher_cap = Cap(params.teacher, teacher, dtype, at_once)

    def __call__(
        self, student: Tensor, teacher: Tensor, keep: Tensor | None, *per_row: Tensor | None
    ) -> Tensor:
        if not (self.cap.cap or self.teacher_cap.cap):
            return self.rows(self.params, student, teacher, keep, *per_row)
        # A few rows at a time: what the caps make of them stays in a cache.
        found = []
        for part in blocks_of(len(student), self.at_once):
            some = (None if x is None else x[part] for x in (keep, *per_row))
            found.append(self._capped(student[part], teacher[part], *some))
        return torch.cat(found)

    def _capped(
        self, student: Tensor, teacher: Tensor, keep: Tensor | None, *per_row: Tensor | None
    ) -> Tensor:
        s, t = self.cap.of(student), self.teacher_cap.of(teacher)
        value = self.rows(self.params, s, t, keep, *per_row)
        if self.writes:
            self.cap.pull_back(s, student)
        return value

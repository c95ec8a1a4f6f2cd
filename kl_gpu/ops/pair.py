"""The operators of two sides of logits, registered with torch.library.

Schemas and fakes let `torch.compile` treat each call as one node. An operator sees logits, the rows that
count and numbers; masks by label, weights and reductions stay with the public functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..arguments.params import DivergenceParams
from ..arguments.reduction import compute_dtype
from ..backends import registry
from ..backends.interface import COMPARISON, STATS, TOKEN_STATS, RowPair
from ..kinds import KINDS
from .register import no_output, operator
from .views import blocks, each_whole, flat_rows, whole

INPUTS = "Tensor student, Tensor teacher, Tensor? rows"
_SCALES = "float student_scale, float teacher_scale, str backend"
PARAMS = f"str kind, float beta, {_SCALES}"  # DivergenceParams
GRADS = "Tensor(a!)? grad_student, Tensor(b!)? grad_teacher"
# 1/temperature of each row, `[N, 1]` or `[N, 2]`, as `arguments.temperatures.Scales` has it.
ROW_SCALES = "Tensor? scales=None"

_operator = partial(operator, of_rows=True)


def ask(
    member: str | Callable[..., Any], student: Tensor, teacher: Tensor, valid: Tensor | None,
    params: DivergenceParams, scales: Tensor | None, per_row: Sequence[Tensor | None] = (),
    strided: Sequence[Tensor | None] = (), last: tuple[Any, ...] = (), formula: str | None = None,
) -> list[Any]:  # fmt: skip
    """What the backend's `member(row_pair, *per_row, *strided, *last)` answers for each block of rows, or
    what a function in its place does.

    A block has its own rows of what is given `per_row`, flat, and of the `strided` tensors as views. A
    `formula` takes the place of the kind's.
    """
    backend, lead = registry.load(params.backend), student.shape[:-1]
    run: Any = getattr(backend, member) if isinstance(member, str) else member
    flat = [flat_rows(x, lead) for x in (scales, *per_row)]
    valid = None if valid is None else valid.contiguous()
    if backend.viewless and 1 <= len(lead) <= 2:
        scales, *flat = flat
        pair = RowPair.of(student, teacher, valid, *params, scales=scales)
        return [run(pair if formula is None else pair._replace(formula=formula), *flat, *strided, *last)]
    found = []
    for (s, t, keep, *others), (own, *rows) in blocks(lead, [student, teacher, valid, *strided], flat):
        pair = RowPair.of(s, t, keep, *params, scales=own)
        pair = pair if formula is None else pair._replace(formula=formula)
        found.append(run(pair, *rows, *others, *last))
    return found


def _params(arguments: tuple[Any, ...]) -> tuple[DivergenceParams, Tensor | None]:
    """What an operator's arguments end with: its parameters, and the scales of rows where they are given."""
    params, scales = arguments[: len(DivergenceParams._fields)], arguments[len(DivergenceParams._fields) :]
    return DivergenceParams(*params), scales[0] if scales else None


def value_outputs(student: Tensor, teacher: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    value = _divergence_output(student, teacher)
    return value, value.new_empty((*value.shape, STATS))


@_operator(f"value({INPUTS}, {PARAMS}, {ROW_SCALES}) -> (Tensor, Tensor)", value_outputs)
def value(student: Tensor, teacher: Tensor, rows: Tensor | None, *params: Any) -> tuple[Tensor, Tensor]:
    """Values `[N]`, and the statistics `[N, STATS]` that `gradient` needs."""
    found = ask("value", student, teacher, rows, *_params(params))
    values, stats = each_whole(found, student.shape[:-1])
    return values, stats


def split_arguments(
    arguments: tuple[Any, ...],
) -> tuple[DivergenceParams, Tensor | None, tuple[Tensor | None, Tensor | None]]:
    """`_params`, with the gradients' buffers, a's and b's, that stand between the two."""
    n = len(DivergenceParams._fields)
    of, scales = _params((*arguments[:n], *arguments[n + 2 :]))
    return of, scales, KINDS[of.kind].as_ab(*arguments[n : n + 2])


def _divergence_output(student: Tensor, teacher: Tensor, *_: object) -> Tensor:
    return student.new_empty(student.shape[:-1], dtype=compute_dtype(student.dtype, teacher.dtype))


@_operator(f"divergence({INPUTS}, {PARAMS}, {ROW_SCALES}) -> Tensor", _divergence_output)
def divergence(student: Tensor, teacher: Tensor, rows: Tensor | None, *params: Any) -> Tensor:
    """`value` for callers who will ask for no gradient."""
    found = ask("divergence", student, teacher, rows, *_params(params))
    return whole(found, student.shape[:-1])


@_operator(
    f"gradient({INPUTS}, Tensor stats, Tensor row_scale, Tensor? incoming, {PARAMS}, {GRADS}, "
    f"{ROW_SCALES}) -> ()",
    no_output,
)
def gradient(
    student: Tensor, teacher: Tensor, rows: Tensor | None, stats: Tensor, row_scale: Tensor,
    incoming: Tensor | None, *params_and_grads: Any,
) -> None:  # fmt: skip
    """As `Backend.gradient` has it."""
    of, scales, grads = split_arguments(params_and_grads)
    ask("gradient", student, teacher, rows, of, scales, (stats, row_scale), grads, (incoming,))


@_operator(
    f"value_and_gradient({INPUTS}, Tensor row_scale, {PARAMS}, {GRADS}, {ROW_SCALES}) -> (Tensor, Tensor)",
    value_outputs,
)
def value_and_gradient(
    student: Tensor, teacher: Tensor, rows: Tensor | None, row_scale: Tensor, *params_and_grads: Any
) -> tuple[Tensor, Tensor]:
    """As `Backend.value_and_gradient` has it."""
    of, scales, grads = split_arguments(params_and_grads)
    found = ask("value_and_gradient", student, teacher, rows, of, scales, (row_scale,), grads)
    values, stats = each_whole(found, student.shape[:-1])
    return values, stats


def _formula_sums_output(student: Tensor, *_: object) -> Tensor:
    return student.new_empty((*student.shape[:-1], 3), dtype=torch.float64)


@_operator(f"formula_sums({INPUTS}, Tensor stats, {PARAMS}, {ROW_SCALES}) -> Tensor", _formula_sums_output)
def formula_sums(
    student: Tensor, teacher: Tensor, rows: Tensor | None, stats: Tensor, *params: Any
) -> Tensor:
    """What a formula adds up to over these columns, for rows whose normalisers lie elsewhere."""
    found = ask("formula_sums", student, teacher, rows, *_params(params), (stats,))
    return whole(found, student.shape[:-1])


def _token_stats_output(student: Tensor, teacher: Tensor, *_: object) -> Tensor:
    dtype = compute_dtype(student.dtype, teacher.dtype)
    return student.new_empty((TOKEN_STATS, *student.shape[:-1]), dtype=dtype)


@_operator(f"token_stats({INPUTS}, Tensor? labels, {_SCALES}, {ROW_SCALES}) -> Tensor", _token_stats_output)
def token_stats(
    student: Tensor, teacher: Tensor, rows: Tensor | None, labels: Tensor | None, *scales_and_backend: Any
) -> Tensor:
    """`[TOKEN_STATS, N]`, in the order of `backends.interface`."""
    tokens = None if labels is None else labels.contiguous()
    of = _params(("forward_kl", 0.0, *scales_and_backend))
    found = ask("token_stats", student, teacher, rows, *of, strided=(tokens,))
    return whole(found, student.shape[:-1], dim=1)


def _comparison_output(student: Tensor, *_: object) -> Tensor:
    return student.new_empty((COMPARISON, *student.shape[:-1]), dtype=torch.float64)


@_operator(f"comparison({INPUTS}, Tensor? stats, {_SCALES}, {ROW_SCALES}) -> Tensor", _comparison_output)
def comparison(
    student: Tensor, teacher: Tensor, rows: Tensor | None, stats: Tensor | None, *scales_and_backend: Any
) -> Tensor:
    """The sums of js at 1/2, of tv and of min(p, q) over these columns, float64 `[COMPARISON, N]`.

    `stats` are those of the rows that these columns belong to, or None where they are all there is.
    """
    of, scales = _params(("forward_kl", 0.0, *scales_and_backend))
    kl = None
    if stats is None:
        kl, stats = value(student, teacher, rows, *of, scales)
    found = ask("formula_sums", student, teacher, rows, of, scales, (stats,), formula="comparison")
    sums = whole(found, student.shape[:-1]).movedim(-1, 0)
    return sums.contiguous() if kl is None else torch.where(kl.isnan(), torch.nan, sums)


def _both_outputs(student: Tensor, teacher: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _token_stats_output(student, teacher), _comparison_output(student)


@_operator(
    f"token_stats_and_comparison({INPUTS}, Tensor? labels, {_SCALES}, {ROW_SCALES}) -> (Tensor, Tensor)",
    _both_outputs,
)
def token_stats_and_comparison(
    student: Tensor, teacher: Tensor, rows: Tensor | None, labels: Tensor | None, *scales_and_backend: Any
) -> tuple[Tensor, Tensor]:
    """`token_stats`, and `comparison` of rows that are all here; from one read where a backend joins them."""
    of = _params(("forward_kl", 0.0, *scales_and_backend))
    if registry.joining(of[0].backend) is None:
        fields: Tensor = token_stats(student, teacher, rows, labels, *scales_and_backend)
        return fields, comparison(student, teacher, rows, None, *scales_and_backend)
    tokens = None if labels is None else labels.contiguous()
    found = ask("token_stats_and_comparison", student, teacher, rows, *of, strided=(tokens,))
    fields, sums = (whole(parts, student.shape[:-1], dim=1) for parts in zip(*found, strict=True))
    return fields, sums


def overlap(sums: Tensor, rows: Tensor | None, columns: int) -> Tensor:
    """js, tv and α of whole rows from the sums of `comparison`, 0 in rows that do not count."""
    js, tv, alpha = sums.unbind(0)
    if columns == 1:
        js, tv = js * 0, tv * 0
    # α by whichever is the better: of 1 − tv nothing is left where it is small.
    alpha = torch.where(tv <= 0.5, 1 - tv, alpha)
    found = torch.stack((js.clamp(0, math.log(2)), tv.clamp_max(1.0), alpha))
    return found if rows is None else torch.where(rows, found, 0.0)

"""The operators of two sides of logits, registered with torch.library.

Schemas and fakes let `torch.compile` treat each call as one node. An operator sees logits, the rows that
count and numbers; masks by label, weights and reductions stay with the public functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments.params import DivergenceParams
from ..arguments.reduction import compute_dtype
from ..backends import registry
from ..backends.interface import STATS, TOKEN_STATS, Backend, RowPair
from ..kinds import KINDS
from . import symbols
from .register import Implementations, no_output, register
from .views import cut, flat_rows, views

_library = torch.library.Library("kl_gpu", "FRAGMENT")
_INPUTS = "Tensor student, Tensor teacher, Tensor? rows"
_PARAMS = "str kind, float beta, float student_scale, float teacher_scale, str backend"  # DivergenceParams
_GRADS = "Tensor(a!)? grad_student, Tensor(b!)? grad_teacher"
_library.define(f"value({_INPUTS}, {_PARAMS}) -> (Tensor, Tensor)")
_library.define(f"divergence({_INPUTS}, {_PARAMS}) -> Tensor")
_library.define(
    f"gradient({_INPUTS}, Tensor stats, Tensor row_scale, Tensor? incoming, {_PARAMS}, {_GRADS}) -> ()"
)
_library.define(f"value_and_gradient({_INPUTS}, Tensor row_scale, {_PARAMS}, {_GRADS}) -> (Tensor, Tensor)")
_library.define(f"formula_sums({_INPUTS}, Tensor stats, {_PARAMS}) -> Tensor")
_SCALES = "float student_scale, float teacher_scale, str backend"
_library.define(f"token_stats({_INPUTS}, Tensor? labels, {_SCALES}) -> Tensor")


def _over_blocks(
    ask: Callable[..., Any], student: Tensor, teacher: Tensor, valid: Tensor | None, params: DivergenceParams,
    per_row: Sequence[Tensor] = (), strided: Sequence[Tensor | None] = (),
) -> list[Any]:  # fmt: skip
    """What `ask(backend, row_pair, *per_row, *strided)` answers for each block of rows of two strides.

    A block has its own rows of what is given `per_row`, flat, and of the `strided` tensors as views.
    """
    kind, beta, student_scale, teacher_scale, name = params
    backend, lead = registry.load(name), student.shape[:-1]
    flat = [flat_rows(x, lead) for x in per_row]
    valid = None if valid is None else valid.contiguous()
    if backend.viewless and 1 <= len(lead) <= 2:
        p = RowPair.of(student, teacher, valid, kind, beta, student_scale, teacher_scale)
        return [ask(backend, p, *flat, *strided)]
    found, start = [], 0
    for s, t, keep, *others in views(lead, [student, teacher, valid, *strided]):
        p = RowPair.of(s, t, keep, kind, beta, student_scale, teacher_scale)
        part = slice(start, start + p.n_rows)
        start = part.stop
        found.append(ask(backend, p, *(cut(x, part) for x in flat), *others))
    return found


def _joined(parts: list[tuple[Tensor, Tensor]], lead: torch.Size) -> tuple[Tensor, Tensor]:
    value, stats = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    if len(lead) == 1:  # as they are
        return value, stats
    return value.view(lead), stats.view(*lead, STATS)


def _value_outputs(student: Tensor, teacher: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lead = student.shape[:-1]
    dtype = compute_dtype(student.dtype, teacher.dtype)
    return student.new_empty(lead, dtype=dtype), student.new_empty((*lead, STATS), dtype=dtype)


def _value(student: Tensor, teacher: Tensor, rows: Tensor | None, *params: Any) -> tuple[Tensor, Tensor]:
    if student.numel() == 0:
        return _value_outputs(student, teacher)
    found = _over_blocks(lambda b, p: b.value(p), student, teacher, rows, DivergenceParams(*params))
    return _joined(found, student.shape[:-1])


def _divergence_output(student: Tensor, teacher: Tensor, *_: object) -> Tensor:
    return student.new_empty(student.shape[:-1], dtype=compute_dtype(student.dtype, teacher.dtype))


def _divergence(student: Tensor, teacher: Tensor, rows: Tensor | None, *params: Any) -> Tensor:
    """`value` for callers who will ask for no gradient."""
    if student.numel() == 0:
        return _divergence_output(student, teacher)
    found = _over_blocks(lambda b, p: b.divergence(p), student, teacher, rows, DivergenceParams(*params))
    value: Tensor = found[0] if len(found) == 1 else torch.cat(found)
    return value if student.dim() == 2 else value.view(student.shape[:-1])


def _gradient(
    student: Tensor, teacher: Tensor, rows: Tensor | None, stats: Tensor, row_scale: Tensor,
    incoming: Tensor | None, *params_and_grads: Any,
) -> None:  # fmt: skip
    if student.numel() == 0:
        return
    *params, to_student, to_teacher = params_and_grads
    of = DivergenceParams(*params)

    def ask(backend: Backend, p: RowPair, stats: Tensor, scale: Tensor, to_a: Any, to_b: Any) -> None:
        backend.gradient(p, stats, scale, to_a, to_b, incoming)

    grads = KINDS[of.kind].as_ab(to_student, to_teacher)
    _over_blocks(ask, student, teacher, rows, of, per_row=(stats, row_scale), strided=grads)


def _value_and_gradient(
    student: Tensor, teacher: Tensor, rows: Tensor | None, row_scale: Tensor, *params_and_grads: Any
) -> tuple[Tensor, Tensor]:
    if student.numel() == 0:
        return _value_outputs(student, teacher)
    *params, to_student, to_teacher = params_and_grads
    of = DivergenceParams(*params)

    def ask(backend: Backend, p: RowPair, *scale_and_grads: Any) -> tuple[Tensor, Tensor]:
        return backend.value_and_gradient(p, *scale_and_grads)

    grads = KINDS[of.kind].as_ab(to_student, to_teacher)
    found = _over_blocks(ask, student, teacher, rows, of, per_row=(row_scale,), strided=grads)
    return _joined(found, student.shape[:-1])


def _formula_sums_output(student: Tensor, *_: object) -> Tensor:
    return student.new_empty((*student.shape[:-1], 3), dtype=torch.float64)


def _formula_sums(
    student: Tensor, teacher: Tensor, rows: Tensor | None, stats: Tensor, *params: Any
) -> Tensor:
    """What a formula adds up to over these columns, for rows whose normalisers lie elsewhere."""
    if student.numel() == 0:
        return _formula_sums_output(student)
    of = DivergenceParams(*params)
    found = _over_blocks(
        lambda b, p, stats: b.formula_sums(p, stats), student, teacher, rows, of, per_row=(stats,)
    )
    return torch.cat(found).view(*student.shape[:-1], 3)


def _token_stats_output(student: Tensor, teacher: Tensor, *_: object) -> Tensor:
    dtype = compute_dtype(student.dtype, teacher.dtype)
    return student.new_empty((TOKEN_STATS, *student.shape[:-1]), dtype=dtype)


def _token_stats(
    student: Tensor, teacher: Tensor, rows: Tensor | None, labels: Tensor | None, *scales_and_backend: Any
) -> Tensor:
    if student.numel() == 0:
        return _token_stats_output(student, teacher)
    tokens = None if labels is None else labels.contiguous()
    of = DivergenceParams("forward_kl", 0.0, *scales_and_backend)
    found = _over_blocks(
        lambda b, p, tokens: b.token_stats(p, tokens), student, teacher, rows, of, strided=(tokens,)
    )
    return (found[0] if len(found) == 1 else torch.cat(found, 1)).view(TOKEN_STATS, *student.shape[:-1])


_IMPLEMENTATIONS: Implementations = {
    "value": (_value, _value_outputs),
    "divergence": (_divergence, _divergence_output),
    "gradient": (_gradient, no_output),
    "value_and_gradient": (_value_and_gradient, _value_outputs),
    "formula_sums": (_formula_sums, _formula_sums_output),
    "token_stats": (_token_stats, _token_stats_output),
}
register(_library, _IMPLEMENTATIONS)

value = symbols.operator("value")
divergence = symbols.operator("divergence")
gradient = symbols.operator("gradient")
value_and_gradient = symbols.operator("value_and_gradient")
formula_sums = symbols.operator("formula_sums")
token_stats = symbols.operator("token_stats")

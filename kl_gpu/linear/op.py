"""From hidden states and two LM heads to divergences and gradients, some rows of logits at a time.

One operator, a single node under torch.compile. A chunk is two products, the fused sweep that writes the
gradient over the student's logits, and the products that carry it on. All products are the vendor's.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..arguments.params import LinearParams
from ..arguments.reduction import compute_dtype
from ..arguments.validation import autocasts
from ..complement import SplitRows, split
from ..ops.register import operator
from .accumulate import HeadGradients, gradient_outputs
from .chunks import chunks_of, memory_of_rows
from .heads import Head, SharedRows, Sweep, SweepRows, sweep_rows, with_extras


def settled(device: torch.device) -> AbstractContextManager[object]:
    """The dtypes are settled: autocast must not choose others for the products in here."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def over_chunks(
    *arguments: Any, sweep_rows: SweepRows = sweep_rows, split_rows: SplitRows = split, widest: int = 0,
    fields: tuple[int, ...] = (), shared: SharedRows | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator `linear`, whose schema names the arguments, whatever sweeps the rows.

    `widest` as in `Sweep`; `fields` is the shape of what `sweep_rows` finds for a row. Where the student's
    entropies are asked for, `split_rows` finds them. They and the labels' −log q stand behind the
    divergences; `shared` as in `heads.label_term`.
    """
    student_side, teacher_side, (valid, per_row, needs) = arguments[:3], arguments[3:6], arguments[6:9]
    params, extras = LinearParams.from_arguments(*arguments[9:])
    hidden, n = student_side[0], len(student_side[0])
    if extras.fields:
        sweep_rows, fields = with_extras(sweep_rows, split_rows, extras.entropy, shared), extras.fields
    of_rows = [extras.scales, per_row]
    if extras.labels is not None:
        of_rows += extras[2:]
    with torch.no_grad(), settled(hidden.device):
        sizes = params.row_bytes, params.student.dtype.itemsize, params.chunk_rows
        chunks = list(chunks_of(valid, n, *sizes, hidden.device))
        value = memory_of_rows(chunks, hidden, (n, *fields), value_dtype(params))
        student = Head(student_side, params.student.dtype, params.vocab_size, chunks)
        teacher = Head(teacher_side, params.teacher.dtype, params.vocab_size, chunks)
        sweep = Sweep(params, student.buffer, teacher.buffer, any(needs), sweep_rows, widest)
        grads = HeadGradients(student, needs, chunks)
        for chunk in chunks:
            states = student.states(chunk)
            s, t = student.logits(states), teacher.logits(teacher.states(chunk))
            own = (None if x is None else chunk.take(x) for x in of_rows)
            chunk.put(value, sweep(s, t, chunk.keep, *own))
            grads.add(chunk, s, states)
        return value, *grads.results()


def value_dtype(params: LinearParams) -> torch.dtype:
    return compute_dtype(params.student.dtype, params.teacher.dtype)


def _linear_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (params, extras), hidden = LinearParams.from_arguments(*arguments[9:]), arguments[0]
    value = hidden.new_empty((len(hidden), *extras.fields), dtype=value_dtype(params))
    weight, bias, needs = arguments[1], arguments[2], arguments[8]
    return value, *gradient_outputs(hidden, weight, bias, needs)


HEADS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor teacher_hidden, "
    "Tensor teacher_weight, Tensor? teacher_bias, Tensor? rows"
)
PARAMS = (
    "ScalarType student_dtype, float student_inner, float student_cap, ScalarType teacher_dtype, "
    "float teacher_inner, float teacher_cap, SymInt vocab_size, SymInt chunk_rows, str kind, float beta, "
    "float student_scale, float teacher_scale, str backend, Tensor? scales=None"
)

linear = operator(
    f"linear({HEADS}, Tensor? row_scale, bool[] needs, {PARAMS}, bool entropy=False, "
    "Tensor? labels=None, Tensor? label_scale=None, Tensor? label_row_scale=None) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _linear_fake,
)(over_chunks)

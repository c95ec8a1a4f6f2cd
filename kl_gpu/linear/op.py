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
from ..ops.register import operator
from .accumulate import BiasGradient, WeightGradient
from .chunks import chunks_of
from .heads import Head, Sweep, SweepRows, sweep_rows


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """The dtypes are settled: autocast must not choose others for the products in here."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def over_chunks(
    *arguments: Any, sweep_rows: SweepRows = sweep_rows, widest: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator `linear`, whose schema names the arguments, whatever sweeps the rows.

    `widest` as in `Sweep`.
    """
    student_side, teacher_side, (valid, row_scale, needs) = arguments[:3], arguments[3:6], arguments[6:9]
    params = LinearParams.from_arguments(*arguments[9:])
    hidden, weight, bias = student_side
    device, n, columns = hidden.device, len(hidden), params.vocab_size
    with torch.no_grad(), _without_autocast(device):
        value, to_hidden, *_ = _outputs(*student_side, needs=[needs[0], False, False], params=params)
        chunks = list(chunks_of(valid, n, params, device))
        if not chunks or chunks[0].places is not None:
            value.zero_()
            to_hidden.zero_()
        longest = max((c.rows.stop - c.rows.start for c in chunks), default=0)
        student = Head(student_side, params.student_dtype, columns, longest)
        teacher = Head(teacher_side, params.teacher_dtype, columns, longest)
        sweep = Sweep(params, student.buffer, teacher.buffer, sweep_rows, widest)
        to_weight = WeightGradient(weight, student.dtype, columns, len(chunks)) if needs[1] else None
        to_bias = BiasGradient(bias, student.dtype, columns) if needs[2] and bias is not None else None
        for chunk in chunks:
            states = student.states(chunk)
            s, t = student.logits(states), teacher.logits(teacher.states(chunk))
            scale = None
            if row_scale is not None:
                scale = row_scale[chunk.rows] if chunk.places is None else row_scale[chunk.places]
            chunk.put(value, sweep(s, t, chunk.keep, scale))
            if needs[0]:
                chunk.put(to_hidden, torch.mm(s, student.weight))
            if to_weight is not None:
                to_weight.add(s, states)
            if to_bias is not None:
                to_bias.add(s)
        others = (hidden.new_empty(0) if x is None else x.result() for x in (to_weight, to_bias))
        return value, to_hidden, *others  # type: ignore[return-value]


def _outputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, needs: list[bool], params: LinearParams
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows' values, and the gradients that are asked for; the others have no elements."""
    dtype = compute_dtype(params.student_dtype, params.teacher_dtype)
    grads = (
        x.new_empty(x.shape) if need and x is not None else hidden.new_empty(0)
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    )
    return hidden.new_empty(len(hidden), dtype=dtype), *grads  # type: ignore[return-value]


def _linear_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    params = LinearParams.from_arguments(*arguments[9:])
    return _outputs(*arguments[:3], needs=arguments[8], params=params)


linear = operator(
    "linear(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor teacher_hidden, "
    "Tensor teacher_weight, Tensor? teacher_bias, Tensor? rows, Tensor? row_scale, bool[] needs, "
    "ScalarType student_dtype, ScalarType teacher_dtype, float student_inner, float teacher_inner, "
    "float student_cap, float teacher_cap, SymInt vocab_size, SymInt chunk_rows, str kind, float beta, "
    "float student_scale, float teacher_scale, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _linear_fake,
)(over_chunks)

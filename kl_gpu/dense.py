"""What `kl_div`, `js_div` and `divergence` run: checks, the choice of autograd function, the reduction."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import beside, transforms
from .arguments import validation
from .arguments.options import Options
from .arguments.params import DivergenceCall, DivergenceParams
from .arguments.reduction import LogitsWindow, Reduction, compute_dtype, last_contiguous
from .autograd import WeightedSum, per_row
from .backends import registry
from .beside import BesideCall
from .columns import selected
from .complement import SplitRows, entropies, split
from .kinds import KINDS
from .topk.tokens import surprises

# What turns logits `[N, V]`, the rows that count, their scales and the call into values `[N]`.
PerRow = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None", DivergenceCall], Tensor]


def run_divergence(
    student_logits: Tensor, teacher_logits: Tensor, kind: str, options: Options,
    rows_of: PerRow | None = None, split: SplitRows = split, columns: int = 0,
) -> Any:  # fmt: skip
    """`divergence`, with the rows' values from `rows_of` where it is given, and entropies and labels'
    log-probabilities from `split`; `columns` are those of the whole vocabulary."""
    validation.hard_weight(options.hard_weight, options.labels, options.support)
    if options.selects:
        student_logits, teacher_logits, options = selected(student_logits, teacher_logits, options)
    options.check(kind)
    vocab_size = validation.logits(student_logits, teacher_logits, options.vocab_size, options.shift)
    reduction = options.reduction_of(student_logits)
    scales = options.scales(student_logits, reduction.valid)
    chosen = registry.resolve(options.backend, student_logits.device)
    inplace = options.overwrites("student_logits", student_logits, "teacher_logits", teacher_logits)

    student, teacher = last_contiguous(student_logits), last_contiguous(teacher_logits)
    window = LogitsWindow(vocab_size, options.shift)
    params = DivergenceParams(*KINDS[kind].at(options.beta), scales.student, scales.teacher, chosen)
    call = DivergenceCall(params, window, inplace)
    # float64 with a narrower side: computed in float64, returned in float32.
    mixed = student.dtype != teacher.dtype

    labels = None
    if options.hard_weight > 0:
        labels = options.hard_labels(reduction.computed, columns or vocab_size)

    at_once = rows_of is None and _gradient_at_once(student, teacher, reduction, call)
    of_rows = student, teacher, reduction, scales.rows, labels
    if rows_of is None and (labels is not None or options.return_entropy) and registry.joins(chosen):
        of_call = BesideCall(call, options.return_entropy)
        result, found = _with_beside(*of_rows, options.hard_weight, of_call, at_once=at_once)
        result = result.float() if mixed else result
        return (result, found.to(result.dtype)) if options.return_entropy else result

    def completed(result: Tensor) -> Any:
        if labels is not None:
            result = result + options.hard_weight * hard_term(labels).to(result.dtype)
        if not options.return_entropy:
            return result
        found = entropies(split, student, reduction.computed, scales, window, chosen)
        return result, found.to(result.dtype)

    def hard_term(labels: Tensor) -> Tensor:
        """What the labels add: the same reduction, but for T²."""
        of = partial(
            surprises, split, student, labels, window=window, columns=columns or vocab_size, backend=chosen
        )
        hard = reduction._replace(factor=None)
        dtype = compute_dtype(student.dtype, teacher.dtype)
        values = hard.completed(of(hard.computed).to(dtype), lambda others: of(others).to(dtype))
        return hard.reduced(values)

    if at_once:
        row_scale = reduction.scale(
            window.of(student).shape[:-1], compute_dtype(student.dtype, teacher.dtype), student.device
        )
        total = WeightedSum.apply(student, teacher, reduction.computed, scales.rows, row_scale, call)
        return completed(total.float() if mixed else total)

    of = rows_of or per_row
    value = of(student, teacher, reduction.computed, scales.rows, call)
    value = reduction.completed(value, lambda others: of(student, teacher, others, scales.rows, call))
    return completed(reduction.reduced(value.float() if mixed else value))


def _with_beside(
    student: Tensor, teacher: Tensor, reduction: Reduction, scales: Tensor | None, labels: Tensor | None,
    hard_weight: float, of: BesideCall, *, at_once: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result and the entropies `[N]`, where the backend finds them and the labels' term as it goes."""
    hard, lead = reduction._replace(factor=None), of.call.window.of(student).shape[:-1]
    dtype, device = compute_dtype(student.dtype, teacher.dtype), student.device
    if at_once:
        row_scale, label_row_scale = reduction.scale(lead, dtype, device), None
        if labels is not None:
            label_row_scale = hard_weight * hard.scale(lead, torch.float64, device)
        result, entropies = beside.WeightedSum.apply(
            student, teacher, reduction.computed, scales, labels, row_scale, label_row_scale, of
        )
        return result, entropies

    def rows_of(valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return beside.per_row(student, teacher, valid, scales, labels, of)

    value, surprises, entropies = rows_of(reduction.computed)
    result = reduction.reduced(reduction.completed(value, lambda others: rows_of(others)[0]))
    if labels is not None:
        surprises = hard.completed(surprises.to(dtype), lambda others: rows_of(others)[1].to(dtype))
        result = result + hard_weight * hard.reduced(surprises)
    return result, entropies


def _gradient_at_once(student: Tensor, teacher: Tensor, reduction: Reduction, call: DivergenceCall) -> bool:
    """Whether forward can write the gradient: it knows each row's factor, and it pays."""
    return (
        torch.is_grad_enabled()
        and (student.requires_grad or teacher.requires_grad)
        # In place the logits would be gone before an incoming gradient other than 1 needs them.
        and not call.inplace
        # A compiled backward cannot decide on the incoming gradient's value.
        and not torch.compiler.is_compiling()
        # Behind the question above: Dynamo cannot trace the import of a backend.
        and registry.load(call.params.backend).fuses
        # Of a Function's own two derivatives torch.func takes none.
        and not transforms.are_active()
        and reduction.has_scale
    )

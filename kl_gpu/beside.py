"""Divergences whose backend finds the student's entropies, and −log q of labels, in one visit of a row."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autograd, transforms
from .arguments.params import DivergenceCall
from .arguments.validation import readable
from .inference_tensors import keep, kept
from .ops import beside as ops
from .ops import pair as plain
from .transforms import forbid_double_backward


class BesideCall(NamedTuple):
    """A divergence, and whether the student's entropies are asked for beside it."""

    call: DivergenceCall
    entropy: bool


def _values(
    of: BesideCall, student: Tensor, teacher: Tensor, valid: Tensor | None, scales: Tensor | None,
    labels: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Values, surprises −log q of the labels and entropies `[N]`, and what the gradient needs."""
    call = of.call
    value, stats, entropies, surprises = ops.value_and_beside(
        *call.window.of_each(student, teacher), valid, labels, None, of.entropy, *call.params, scales
    )
    return value, surprises, entropies, stats, surprises.clone()


def _gradients(of: BesideCall, needs: Any, incoming: Any, tensors: Any, others: Any) -> Any:
    """row_scale · ∂value/∂logits + label_row_scale · ∂surprise/∂logits of whole tensors."""
    student, teacher, valid, scales, labels = tensors
    (row_scale, label_row_scale, *_), (stats, surprises), call = incoming, others, of.call
    with torch.no_grad():
        grads = autograd.buffers(student, teacher, call, needs[:2])
        sides, narrow = call.window.of_each(student, teacher), call.window.of_each(*grads)
        row_scale = row_scale.to(stats.dtype)
        if labels is None:
            plain.gradient(*sides, valid, stats, row_scale, None, *call.params, *narrow, scales)
        else:
            ops.gradient_with_labels(
                *sides, valid, labels, None, stats, surprises, row_scale, label_row_scale.double(),
                *call.params, *narrow, scales,
            )  # fmt: skip
        call.window.zero_rest(*grads)
        if needs[0] and call.inplace:
            # A second backward would read gradients as logits: the version counter makes it raise.
            torch.autograd.graph.increment_version(student)
    return *grads, None, None, None


# Logits, the rows that count, their scales and labels to the values, the labels' −log q and the entropies.
ROW_DIVERGENCE = transforms.Step(_values, _gradients, values=3)


def per_row(
    student: Tensor, teacher: Tensor, valid: Tensor | None, scales: Tensor | None, labels: Tensor | None,
    of: BesideCall,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Per-row divergences, −log q of the labels at temperature 1, 0 without labels, both differentiable, and
    entropies, 0 where they are not asked for; `[N]` each, the last two in float64."""
    if autograd.is_differentiated(student, teacher):
        value, surprises, entropies = transforms.apply(
            ROW_DIVERGENCE, of, student, teacher, valid, scales, labels
        )
        return value, surprises, entropies.detach()
    sides = of.call.window.of_each(student, teacher)
    value, _, entropies, surprises = ops.value_and_beside(
        *sides, valid, labels, None, of.entropy, *of.call.params, scales
    )
    return value, surprises, entropies


class WeightedSum(torch.autograd.Function):
    """Σ row_scale · divergence + Σ label_row_scale · surprise, 0-d, and the entropies.

    As `autograd.WeightedSum`, which see.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, valid: Tensor | None, scales: Tensor | None,
        labels: Tensor | None, row_scale: Tensor, label_row_scale: Tensor | None, of: BesideCall,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        call, grads = of.call, None
        if autograd.are_saved_tensors_managed():
            value, surprises, entropies, stats, _ = _values(of, student, teacher, valid, scales, labels)
        else:
            grads = autograd.buffers(student, teacher, call, ctx.needs_input_grad[:2])
            sides, narrow = call.window.of_each(student, teacher), call.window.of_each(*grads)
            value, stats, entropies, surprises = ops.value_and_gradient_and_beside(
                *sides, valid, labels, None, of.entropy, row_scale, label_row_scale, *call.params, *narrow,
                scales,
            )  # fmt: skip
            call.window.zero_rest(*grads)
        keep(ctx, student, teacher, valid, scales, labels, row_scale, label_row_scale, stats, surprises)
        ctx.of, ctx.grads = of, grads
        ctx.mark_non_differentiable(entropies)
        total = (value * row_scale).sum()
        if label_row_scale is not None:
            total = total + (surprises * label_row_scale).sum().to(total.dtype)
        return total, entropies

    @staticmethod
    def backward(ctx: Any, incoming: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        *tensors, row_scale, label_row_scale, stats, surprises = kept(ctx)
        # Given away once: a second backward must not write over what the first one returned.
        grads, ctx.grads = ctx.grads, None
        if grads is None or not (readable(incoming) and incoming.item() == 1):
            each = [None if x is None else incoming * x for x in (row_scale, label_row_scale)]
            grads = _gradients(ctx.of, ctx.needs_input_grad, each, tensors, (stats, surprises))[:2]
        return (*forbid_double_backward(grads, incoming, *tensors[:2]), *(None,) * 6)

"""The torch.autograd.Function: value now, gradient later from saved row statistics (5 U of traffic)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops


def _columns(logits: Tensor, vocab_size: int, shift: bool) -> Tensor:
    """The part of the logits that counts, as a view."""
    if shift:
        logits = logits[:, :-1]
    return logits if logits.shape[-1] == vocab_size else logits[..., :vocab_size]


def _zero_rest(grad: Tensor, vocab_size: int, shift: bool) -> None:
    """Zero what `_columns` leaves out."""
    if grad.shape[-1] != vocab_size:
        grad[..., vocab_size:].zero_()
    if shift:
        grad[:, -1:].zero_()


class _FirstDerivative(torch.autograd.Function):
    """Passes a gradient on, tied to what it was computed from, so that differentiating it raises.

    Without it `create_graph=True` would return a constant, and its share of a second derivative would
    silently be missing.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("kl_gpu has no second derivatives: its gradients are not differentiable")


class RowDivergence(torch.autograd.Function):
    """Per-row divergence `[N]` of logits `[N, V]`.

    Takes the whole tensors and narrows them inside, so that the gradient of a shifted or padded tensor is
    written once, where autograd's own slicing would fill a second tensor with zeros and copy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        rows: Tensor | None,
        kind: str,
        student_scale: float,
        teacher_scale: float,
        vocab_size: int,
        shift: bool,
        inplace: bool,
        backend: str,
    ) -> Tensor:
        s, t = _columns(student, vocab_size, shift), _columns(teacher, vocab_size, shift)
        value, stats = ops.value(s, t, rows, kind, student_scale, teacher_scale, backend)
        ctx.save_for_backward(student, teacher, rows, stats)
        ctx.call = (kind, student_scale, teacher_scale, backend)
        ctx.narrow = (vocab_size, shift)
        ctx.inplace = inplace
        return value

    @staticmethod
    def backward(ctx: Any, row_gradient: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, rows, stats = ctx.saved_tensors
        needs_student, needs_teacher = ctx.needs_input_grad[:2]
        grads: list[Tensor | None] = [None, None]
        with torch.no_grad():
            if needs_student:
                grads[0] = student.detach() if ctx.inplace else torch.empty_like(student)
            if needs_teacher:
                grads[1] = torch.empty_like(teacher)
            narrow = [None if grad is None else _columns(grad, *ctx.narrow) for grad in grads]
            s, t = _columns(student, *ctx.narrow), _columns(teacher, *ctx.narrow)
            ops.gradient(s, t, rows, stats, row_gradient.to(stats.dtype), *ctx.call, *narrow)
            for grad in grads:
                if grad is not None:
                    _zero_rest(grad, *ctx.narrow)
            if needs_student and ctx.inplace:
                # A second backward would read gradients as logits: the version counter makes it raise.
                torch.autograd.graph.increment_version(student)
        if torch.is_grad_enabled():
            sources = (row_gradient, student, teacher)
            grads = [None if grad is None else _FirstDerivative.apply(grad, *sources) for grad in grads]
        return (*grads, *(None,) * 8)

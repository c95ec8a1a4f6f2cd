"""The torch.autograd.Functions: per row, gradient later (5 U of traffic); reduced, gradient at once (3 U)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from . import ops
from .rows import Window


class Call(NamedTuple):
    """What stays the same between forward and backward, tensors apart."""

    kind: str
    beta: float
    student_scale: float
    teacher_scale: float
    backend: str
    window: Window
    inplace: bool

    @property
    def numbers(self) -> tuple[str, float, float, float, str]:
        return self[:5]


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


Grads = tuple[Tensor | None, Tensor | None]


def _buffers(student: Tensor, teacher: Tensor, call: Call, needs: tuple[bool, bool]) -> Grads:
    """Where the gradients go, with what does not count already 0."""
    to_student = (student.detach() if call.inplace else torch.empty_like(student)) if needs[0] else None
    return to_student, torch.empty_like(teacher) if needs[1] else None


def _gradients(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    stats: Tensor,
    row_scale: Tensor,
    call: Call,
    needs: tuple[bool, bool],
) -> Grads:
    """row_scale · ∂value/∂logits of whole tensors, from the saved row statistics."""
    with torch.no_grad():
        grads = _buffers(student, teacher, call, needs)
        narrow = [None if grad is None else call.window.of(grad) for grad in grads]
        sides = call.window.of(student), call.window.of(teacher)
        ops.gradient(*sides, rows, stats, row_scale.to(stats.dtype), None, *call.numbers, *narrow)
        for grad in grads:
            if grad is not None:
                call.window.zero_rest(grad)
        if needs[0] and call.inplace:
            # A second backward would read gradients as logits: the version counter makes it raise.
            torch.autograd.graph.increment_version(student)
    return grads


def once_differentiable(grads: tuple[Tensor | None, ...], *sources: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients, such that differentiating them raises."""
    if not torch.is_grad_enabled():
        return grads
    return tuple(None if grad is None else _FirstDerivative.apply(grad, *sources) for grad in grads)


# Function.apply itself asks this. Should PyTorch no longer answer it, every call takes the Function.
_are_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def _may_be_differentiated(student: Tensor, teacher: Tensor) -> bool:
    """Whether only the Function will do: it records, and refuses what it cannot differentiate.

    Forward mode and torch.func need no requires_grad to differentiate. Called past the Function, the operator
    would answer them with a derivative of 0.
    """
    return (
        (torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad))
        or _are_transforms_active()
        or fwAD.unpack_dual(student).tangent is not None
        or fwAD.unpack_dual(teacher).tangent is not None
    )


def per_row(student: Tensor, teacher: Tensor, rows: Tensor | None, call: Call) -> Tensor:
    """`RowDivergence`, or its value alone where nobody will ask for a derivative: a Function costs 10 µs."""
    if _may_be_differentiated(student, teacher):
        value: Tensor = RowDivergence.apply(student, teacher, rows, call)
        return value
    return ops.divergence(call.window.of(student), call.window.of(teacher), rows, *call.numbers)


class RowDivergence(torch.autograd.Function):
    """Per-row divergence `[N]` of logits `[N, V]`.

    Takes the whole tensors and narrows them inside, so that the gradient of a shifted or padded tensor is
    written once, where autograd's own slicing would fill a second tensor with zeros and copy.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, rows: Tensor | None, call: Call) -> Tensor:
        value, stats = ops.value(call.window.of(student), call.window.of(teacher), rows, *call.numbers)
        ctx.save_for_backward(student, teacher, rows, stats)
        ctx.call = call
        return value

    @staticmethod
    def backward(ctx: Any, row_gradient: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, rows, stats = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        grads = _gradients(student, teacher, rows, stats, row_gradient, ctx.call, needs)
        return (*once_differentiable(grads, row_gradient, student, teacher), None, None)


class WeightedSum(torch.autograd.Function):
    """Σ row_scale · divergence, 0-d, for row factors `[N]` that are known beforehand.

    The gradient is written in forward, while the rows are in cache, for the incoming gradient of 1 that
    `loss.backward()` brings. Any other one gets it computed again from the logits: scaling what was rounded
    to 16 bits would round it twice. Which of the two it is, the backend finds out where the number lies.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, rows: Tensor | None, row_scale: Tensor, call: Call
    ) -> Tensor:
        grads = _buffers(student, teacher, call, ctx.needs_input_grad[:2])
        narrow = [None if grad is None else call.window.of(grad) for grad in grads]
        sides = call.window.of(student), call.window.of(teacher)
        value, stats = ops.value_and_gradient(*sides, rows, row_scale, *call.numbers, *narrow)
        for grad in grads:
            if grad is not None:
                call.window.zero_rest(grad)
        # The logits too: modifying them before backward must raise, as it does everywhere else.
        ctx.save_for_backward(student, teacher, rows, row_scale, stats)
        ctx.call, ctx.grads = call, grads
        return (value * row_scale).sum()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, rows, row_scale, stats = ctx.saved_tensors
        call = ctx.call
        # Given away once: a second backward must not write over what the first one returned.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            needs = ctx.needs_input_grad[:2]
            grads = _gradients(student, teacher, rows, stats, incoming * row_scale, call, needs)
        else:
            with torch.no_grad():
                narrow = [None if grad is None else call.window.of(grad) for grad in grads]
                sides = call.window.of(student), call.window.of(teacher)
                ops.gradient(*sides, rows, stats, row_scale, incoming, *call.numbers, *narrow)
        return (*once_differentiable(grads, incoming, student, teacher), None, None, None)

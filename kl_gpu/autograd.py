"""The torch.autograd.Functions: per row, gradient later (5 U of traffic); reduced, gradient at once (3 U)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, transforms
from .rows import Window
from .transforms import ordinary


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


def ordinary_rows(tensor: Tensor) -> Tensor:
    """`ordinary` for what has a number or K per row, and is saved by other operators than ours.

    torch.compile cannot ask how a tensor was made. There it is copied by an operator of ours, which the
    compiler neither removes nor repeats in backward from the original: so the copy is saved, not the
    inference tensor.
    """
    if torch.compiler.is_compiling():
        copied: Tensor = tensor if tensor.requires_grad else ops.copy(tensor)
        return copied
    return tensor if tensor.requires_grad else ordinary(tensor)  # type: ignore[return-value]


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for backward. `kept` gives them back.

    A traced graph does not know which of its inputs were made under inference_mode, and fails where one of
    them is saved. There all that is not differentiated is kept beside the saved tensors, without a check of
    its version.
    """
    if not torch.compiler.is_compiling():
        ctx.beside = None
        ctx.save_for_backward(*map(ordinary, tensors))
        return
    ctx.beside = [None if x is None or x.requires_grad else x for x in tensors]
    ctx.save_for_backward(*(x if x is not None and x.requires_grad else None for x in tensors))


def kept(ctx: Any) -> tuple[Any, ...]:
    saved: tuple[Any, ...] = ctx.saved_tensors
    if ctx.beside is None:
        return saved
    return tuple(x if y is None else y for x, y in zip(saved, ctx.beside, strict=True))


# Since PyTorch 2.8.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def are_saved_tensors_managed() -> bool:
    """Whether somebody takes charge of what forward saves: `torch.utils.checkpoint`, which drops it and runs
    forward again, `save_on_cpu`, or other `saved_tensors_hooks`.

    A gradient written in forward would lie out of their reach until backward, or would be carried off and
    back at the price of the logits. It is computed in backward then, from the logits they bring back.
    """
    if _top_hooks is not None:
        return _top_hooks(True) is not None
    with torch.enable_grad():
        node: Any = torch.zeros((), device="cpu", requires_grad=True).exp().grad_fn
        saved = node._raw_saved_result
    try:
        saved.register_hooks(lambda x: x, lambda x: x)
    except RuntimeError:  # it has hooks already
        return True
    return False


def _row_values(call: Call, student: Tensor, teacher: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values `[N]`, and the statistics that their gradient needs."""
    found: tuple[Tensor, Tensor] = ops.value(
        call.window.of(student), call.window.of(teacher), rows, *call.numbers
    )
    return found


def _row_gradients(call: Call, needs: Any, incoming: Any, tensors: Any, kept: Any) -> Any:
    student, teacher, rows = tensors
    return *_gradients(student, teacher, rows, kept[0], incoming[0], call, needs[:2]), None


_STEP = transforms.Step(_row_values, _row_gradients)


def per_row(student: Tensor, teacher: Tensor, rows: Tensor | None, call: Call) -> Tensor:
    """Per-row divergence `[N]`, differentiable; its value alone where nobody will ask for a derivative, for
    a Function costs 10 µs.

    Forward mode and torch.func need no requires_grad to differentiate. Called past a Function, the operator
    would answer them with a derivative of 0.
    """
    if transforms.are_active():
        return transforms.run(_STEP, call, student, teacher, rows)[0]
    if torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
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
        value, stats = _row_values(call, student, teacher, rows)
        keep(ctx, student, teacher, rows, stats)
        ctx.call = call
        return value

    @staticmethod
    def backward(ctx: Any, row_gradient: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, rows, stats = kept(ctx)
        needs = ctx.needs_input_grad[:2]
        grads = _gradients(student, teacher, rows, stats, row_gradient, ctx.call, needs)
        return (*once_differentiable(grads, row_gradient, student, teacher), None, None)


class WeightedSum(torch.autograd.Function):
    """Σ row_scale · divergence, 0-d, for row factors `[N]` that are known beforehand.

    The gradient is written in forward, while the rows are in cache, for the incoming gradient of 1 that
    `loss.backward()` brings, unless what forward saves is managed by others. Any other one gets it computed
    again from the logits: scaling what was rounded to 16 bits would round it twice. Which of the two it is,
    the backend finds out where the number lies.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, rows: Tensor | None, row_scale: Tensor, call: Call
    ) -> Tensor:
        grads: Grads | None = None
        if are_saved_tensors_managed():
            value, stats = _row_values(call, student, teacher, rows)
        else:
            grads = _buffers(student, teacher, call, ctx.needs_input_grad[:2])
            narrow = [None if grad is None else call.window.of(grad) for grad in grads]
            sides = call.window.of(student), call.window.of(teacher)
            value, stats = ops.value_and_gradient(*sides, rows, row_scale, *call.numbers, *narrow)
            for grad in grads:
                if grad is not None:
                    call.window.zero_rest(grad)
        # The logits too: modifying them before backward must raise, as it does everywhere else.
        keep(ctx, student, teacher, rows, row_scale, stats)
        ctx.call, ctx.grads = call, grads
        return (value * row_scale).sum()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, rows, row_scale, stats = kept(ctx)
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

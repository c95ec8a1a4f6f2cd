"""The torch.autograd.Functions: per row, gradient later (5 U of traffic); reduced, gradient at once (3 U)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from . import transforms
from .arguments.params import DivergenceCall
from .arguments.validation import readable
from .inference_tensors import keep, kept
from .ops import pair as ops
from .ops.memory import gradient_buffer
from .transforms import forbid_double_backward

Grads = tuple[Tensor | None, Tensor | None]
_NO_CHANGE = nullcontext()


def buffers(student: Tensor, teacher: Tensor, call: DivergenceCall, needs: tuple[bool, bool]) -> Grads:
    """Where the gradients go, with what does not count already 0."""
    to_student = (student.detach() if call.inplace else gradient_buffer(student)) if needs[0] else None
    return to_student, gradient_buffer(teacher) if needs[1] else None


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


def _row_values(
    call: DivergenceCall, student: Tensor, teacher: Tensor, valid: Tensor | None, scales: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Values `[N]`, and the statistics that their gradient needs."""
    found: tuple[Tensor, Tensor] = ops.value(
        *call.window.of_each(student, teacher), valid, *call.params, scales
    )
    return found


def _row_gradients(call: DivergenceCall, needs: Any, incoming: Any, tensors: Any, kept: Any) -> Any:
    """row_scale · ∂value/∂logits of whole tensors, from the saved row statistics."""
    student, teacher, valid, scales = tensors
    (row_scale,), (stats,) = incoming, kept
    with torch.no_grad():
        grads = buffers(student, teacher, call, needs[:2])
        sides, narrow = call.window.of_each(student, teacher), call.window.of_each(*grads)
        ops.gradient(*sides, valid, stats, row_scale.to(stats.dtype), None, *call.params, *narrow, scales)
        call.window.zero_rest(*grads)
        if needs[0] and call.inplace:
            # A second backward would read gradients as logits: the version counter makes it raise.
            torch.autograd.graph.increment_version(student)
    return *grads, None, None


# Per-row divergence `[N]` of logits `[N, V]`. It takes the whole tensors and narrows them inside, so that the
# gradient of a shifted or padded tensor is written once, where autograd's own slicing would fill a second
# tensor with zeros and copy.
ROW_DIVERGENCE = transforms.Step(_row_values, _row_gradients)


def is_differentiated(student: Tensor, teacher: Tensor) -> bool:
    """Whether somebody may ask for a derivative.

    Forward mode and torch.func need no requires_grad to differentiate. Called past a Function, an operator
    would answer them with a derivative of 0.
    """
    return transforms.are_active() or (
        torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad)
    )


def per_row(
    student: Tensor, teacher: Tensor, valid: Tensor | None, scales: Tensor | None, call: DivergenceCall
) -> Tensor:
    """Per-row divergence `[N]`, differentiable; its value alone where nobody will ask for a derivative, for
    a Function costs 10 µs. `scales` as `Scales.rows` has them.
    """
    value: Tensor
    if is_differentiated(student, teacher):
        (value,) = transforms.apply(ROW_DIVERGENCE, call, student, teacher, valid, scales)
    else:
        value = ops.divergence(*call.window.of_each(student, teacher), valid, *call.params, scales)
    return value


class WeightedSum(torch.autograd.Function):
    """Σ row_scale · divergence, 0-d, for row factors `[N]` that are known beforehand.

    The gradient is written in forward, while the rows are in cache, for the incoming gradient of 1 that
    `loss.backward()` brings, unless what forward saves is managed by others. Any other one gets it computed
    again from the logits: scaling what was rounded to 16 bits would round it twice. Which of the two it is,
    the backend finds out where the number lies, unless it can be looked at here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        valid: Tensor | None,
        scales: Tensor | None,
        row_scale: Tensor,
        call: DivergenceCall,
    ) -> Tensor:
        grads: Grads | None = None
        if are_saved_tensors_managed():
            value, stats = _row_values(call, student, teacher, valid, scales)
        else:
            grads = buffers(student, teacher, call, ctx.needs_input_grad[:2])
            sides, narrow = call.window.of_each(student, teacher), call.window.of_each(*grads)
            value, stats = ops.value_and_gradient(*sides, valid, row_scale, *call.params, *narrow, scales)
            call.window.zero_rest(*grads)
        # The logits too: modifying them before backward must raise, as it does everywhere else.
        keep(ctx, student, teacher, valid, scales, row_scale, stats)
        ctx.call, ctx.grads = call, grads
        return (value * row_scale).sum()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, valid, scales, row_scale, stats = kept(ctx)
        call = ctx.call
        # Given away once: a second backward must not write over what the first one returned.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            needs, tensors = ctx.needs_input_grad, (student, teacher, valid, scales)
            *grads, _, _ = _row_gradients(call, needs, (incoming * row_scale,), tensors, (stats,))
        elif not (readable(incoming) and incoming.item() == 1):
            # A backward runs without gradients as it is, but under `create_graph`.
            with torch.no_grad() if torch.is_grad_enabled() else _NO_CHANGE:
                sides, narrow = call.window.of_each(student, teacher), call.window.of_each(*grads)
                ops.gradient(*sides, valid, stats, row_scale, incoming, *call.params, *narrow, scales)
        return (*forbid_double_backward(grads, incoming, student, teacher), None, None, None, None)

"""Differentiable steps as autograd.Functions: a plain form, and what torch.func and forward-mode AD ask for.

These want `setup_context`, a vmap rule and a refusal. A Function with `setup_context` takes longer to call,
and torch.compile refuses one with a `jvp`. So a `Step` has a plain Function for `backward()`, and two others
for everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from .inference_tensors import keep, kept, ordinary

# Function.apply itself asks this. Should PyTorch no longer answer it, every call takes the Function.
_are_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def are_active() -> bool:
    """Whether a transform of torch.func is at work, or forward-mode AD: tensors may carry derivatives that
    `requires_grad` does not tell of."""
    return _are_transforms_active() or getattr(fwAD, "_current_level", 0) >= 0


def refuse(entry: str) -> None:
    """Raise where a transform is active, in the name of an entry that has no rule for them."""
    if are_active():
        raise NotImplementedError(
            f"kl_gpu.{entry} has no rule for torch.func's transforms or forward-mode AD (vmap, grad, jvp): "
            "differentiate it by backward()"
        )


@dataclass(frozen=True)
class Step:
    """One differentiable step, in functions of whole tensors.

    Attributes:
        run: (call, tensors...) to a tuple of tensors.
        pull: (call, needs, incoming, tensors, kept) to the gradients of the tensors, None for those that
            `needs` does not ask for; `incoming` belong to the first `values` outputs, `kept` are the others.
        values: how many outputs are differentiable.
        rowwise: whether all tensors have the same leading shape, so that a mapped dimension is one more of
            it. Otherwise the samples run one after another.
        saves_inputs: whether `pull` reads the tensors. Otherwise the plain Function does not hold on to them.
    """

    run: Callable[..., tuple[Tensor, ...]]
    pull: Callable[..., tuple[Tensor | None, ...]]
    values: int = 1
    rowwise: bool = True
    saves_inputs: bool = True


def apply(step: Step, call: Any, *tensors: Tensor | None) -> Any:
    """The step's differentiable outputs, or all where none of them is, also under torch.func."""
    if are_active():
        return run(step, call, *tensors)[: step.values or None]
    return Plain.apply(step, call, *tensors) if step.values else step.run(call, *tensors)


def run(step: Step, call: Any, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """All outputs of the step, differentiable once in reverse, under any nesting of vmap."""
    outputs: tuple[Tensor, ...] = _Forward.apply(step, call, *tensors)
    return outputs


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


def forbid_double_backward(
    grads: tuple[Tensor | None, ...], *sources: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients, such that differentiating them raises."""
    if not torch.is_grad_enabled():
        return grads
    return tuple(None if grad is None else _FirstDerivative.apply(grad, *sources) for grad in grads)


class Plain(torch.autograd.Function):
    """A step's differentiable outputs, for `backward()`; torch.func has no rule for it."""

    @staticmethod
    def forward(ctx: Any, step: Step, call: Any, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        outputs = step.run(call, *tensors)
        ctx.step, ctx.call = step, call
        keep(ctx, *(tensors if step.saves_inputs else ()), *outputs[step.values :])
        return outputs[: step.values]

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        needs, saved = ctx.needs_input_grad[2:], kept(ctx)
        inputs = len(needs) if ctx.step.saves_inputs else 0
        tensors, others = saved[:inputs], saved[inputs:]
        grads = ctx.step.pull(ctx.call, needs, incoming, tensors, others)
        return None, None, *forbid_double_backward(grads, *incoming, *tensors)


def _in_front(info: Any, dims: tuple[Any, ...], tensors: tuple[Any, ...]) -> list[Any]:
    """The mapped dimension first in every tensor; one that is not mapped is repeated without a copy."""
    return [
        x
        if not isinstance(x, Tensor)
        else x.expand(info.batch_size, *x.shape)
        if dim is None
        else x.movedim(dim, 0)
        for dim, x in zip(dims, tensors, strict=True)
    ]


def _one_by_one(
    function: Any, constants: tuple[Any, ...], info: Any, dims: tuple[Any, ...], tensors: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    samples = (
        function.apply(
            *constants,
            *(x if dim is None else x.select(dim, i) for dim, x in zip(dims, tensors, strict=True)),
        )
        for i in range(info.batch_size)
    )
    return tuple(map(torch.stack, zip(*samples, strict=True)))


def _mapped(function: Any, info: Any, dims: tuple[Any, ...], *arguments: Any) -> Any:
    """The vmap rule of both Functions, whose first two or three arguments are constants."""
    n = function.CONSTANTS
    constants, tensors, dims = arguments[:n], arguments[n:], dims[n:]
    if constants[0].rowwise:
        outputs = function.apply(*constants, *_in_front(info, dims, tensors))
    else:
        outputs = _one_by_one(function, constants, info, dims, tensors)
    return outputs, (0,) * len(outputs)


def _refuse_forward_mode(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError(
        "kl_gpu has no forward-mode derivatives (jvp, jacfwd, hessian): differentiate in reverse, by "
        "backward(), torch.func.grad, vjp or jacrev"
    )


class _Forward(torch.autograd.Function):
    """A step's outputs."""

    CONSTANTS = 2

    @staticmethod
    def forward(step: Step, call: Any, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return step.run(call, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        step, call, *tensors = inputs
        kept = output[step.values :]
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*map(ordinary, tensors), *kept)
        ctx.step, ctx.call = step, call

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2:]
        found = iter(
            _Backward.apply(ctx.step, ctx.call, needs, *incoming[: ctx.step.values], *ctx.saved_tensors)
        )
        return None, None, *(next(found) if need else None for need in needs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return _mapped(_Forward, info, in_dims, *arguments)

    jvp = staticmethod(_refuse_forward_mode)


class _Backward(torch.autograd.Function):
    """The gradients that are asked for. A Function: vmap has a rule then, and a second derivative raises."""

    CONSTANTS = 3

    @staticmethod
    def forward(step: Step, call: Any, needs: tuple[bool, ...], *tensors: Tensor | None) -> Any:
        incoming, others = tensors[: step.values], tensors[step.values :]
        inputs, kept = others[: len(needs)], others[len(needs) :]
        grads = step.pull(call, needs, incoming, inputs, kept)
        return tuple(grad for grad, need in zip(grads, needs, strict=True) if need)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("kl_gpu has no second derivatives: its gradients are not differentiable")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return _mapped(_Backward, info, in_dims, *arguments)

    jvp = staticmethod(_refuse_forward_mode)

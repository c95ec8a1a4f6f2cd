"""Divergences from hidden states and LM heads: the logits of all tokens never exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import transforms
from ..arguments import validation
from ..arguments.options import Options
from ..arguments.params import LinearParams
from ..arguments.reduction import compute_dtype
from ..autograd import are_saved_tensors_managed
from ..inference_tensors import keep, kept
from ..kinds import KINDS
from ..transforms import forbid_double_backward
from . import op
from .rows import flat_scales, rows_of_heads, two_heads, without_last_time

_NO_GRADIENTS = [False, False, False]


def _asked_for(grads: Sequence[Tensor], needs: list[bool]) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


# The operator `linear.op.linear`, or what takes its place.
Linear = Callable[..., "tuple[Tensor, Tensor, Tensor, Tensor]"]


class _How(NamedTuple):
    """What is computed, by which operator, and whether the student's entropies are asked for."""

    params: LinearParams
    linear: Linear
    entropy: bool


def _values(how: _How, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Divergences `[N]`, and entropies where they are asked for."""
    *heads, scales = tensors
    found = how.linear(*heads, None, _NO_GRADIENTS, *how.params.as_arguments(), scales, how.entropy)[0]
    return tuple(x.clone() for x in found.unbind(-1)) if how.entropy else (found,)


def _gradients(how: _How, tensors: Any, row_scale: Tensor, needs: list[bool]) -> list[Tensor | None]:
    """Of the student's three tensors; from the logits, computed again."""
    *heads, scales = tensors
    found = how.linear(*heads, row_scale.contiguous(), needs, *how.params.as_arguments(), scales, False)
    return _asked_for(found[1:], needs)


def _pull(how: _How, needs: Any, incoming: Any, tensors: Any, kept: Any) -> Any:
    return *_gradients(how, tensors, incoming[0], list(needs[:3])), *(None,) * 5


# Per-row divergence `[N]`, alone and with the entropies, to which nothing flows. Backward computes the logits
# again, chunk by chunk. Weights have no rows: the samples of a vmap run one after another.
_STEP = transforms.Step(_values, _pull, rowwise=False)
_WITH_ENTROPIES = transforms.Step(_values, _pull, values=2, rowwise=False)


def _total(value: Tensor, row_scale: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
    """Σ row_scale · divergence, and the entropies; of none, a tensor without elements."""
    values = value[:, 0] if entropy else value
    return (values * row_scale).sum(), value[:, 1].clone() if entropy else value.new_empty(0)


class _Sum(torch.autograd.Function):
    """Σ row_scale · divergence, 0-d, for row factors `[N]` known beforehand, and the entropies.

    Gradients come in forward, unless what forward saves is managed by others.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, how, needs = arguments
        *heads, scales, row_scale = tensors
        managed = are_saved_tensors_managed()
        asked = (None, _NO_GRADIENTS) if managed else (row_scale, needs)
        value, *found = how.linear(*heads, *asked, *how.params.as_arguments(), scales, how.entropy)
        # The inputs too: modifying them before backward must raise, as it does everywhere else.
        keep(ctx, *tensors)
        ctx.how, ctx.needs, ctx.grads = how, needs, None if managed else _asked_for(found, needs)
        total, entropy = _total(value, row_scale, how.entropy)
        ctx.mark_non_differentiable(entropy)
        return total, entropy

    @staticmethod
    def backward(ctx: Any, incoming: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, row_scale = kept(ctx)
        # Given away once: a second backward must not find them scaled, and .grad takes them without a copy.
        grads, ctx.grads = ctx.grads, None
        with torch.no_grad():
            if grads is None:
                grads = _gradients(ctx.how, tensors, incoming * row_scale, ctx.needs)
            elif not validation.readable(incoming) or incoming.item() != 1:
                grads = [None if grad is None else grad.mul_(incoming) for grad in grads]
        return (*forbid_double_backward(tuple(grads), incoming, *tensors), *(None,) * 8)


class _CompiledSum(torch.autograd.Function):
    """`_Sum` for torch.compile, which keeps what is saved by its own rules."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, how, needs = arguments
        *heads, scales, row_scale = tensors
        value, *grads = how.linear(*heads, row_scale, needs, *how.params.as_arguments(), scales, how.entropy)
        ctx.save_for_backward(*grads)
        ctx.needs = needs
        total, entropy = _total(value, row_scale, how.entropy)
        ctx.mark_non_differentiable(entropy)
        return total, entropy

    @staticmethod
    def backward(ctx: Any, incoming: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = [
            (grad * incoming).to(grad.dtype) if need else None
            for grad, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
        ]
        return (*grads, *(None,) * 8)


def linear_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    kind: str = "forward_kl",
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    beta: float | None = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    t_squared: bool = False,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
    student_columns: Tensor | None = None,
    teacher_columns: Tensor | None = None,
    return_entropy: bool = False,
) -> Any:
    """Divergence of `kind` between two models known by their hidden states and LM heads, per token, in nats.

    That of :func:`kl_gpu.divergence` for the logits

        z = hidden · weightᵀ + bias,    logits = softcap · tanh(logit_scale · z / softcap)

    (logit_scale · z without a soft cap), of which only `chunk_rows` rows exist at a time. With a reduction
    the gradients are computed in forward; with "none" and in float16, where a loss scale must come first, in
    backward, from the products again. The cap is computed in float32 at least. The student's hidden states,
    weight and bias are differentiable, the teacher is a constant.

    Rows that do not count cost nothing on the CPU; elsewhere they are computed with the others, since finding
    them would wait for the device. How the products round is the vendor library's affair: a row's last bits
    may depend on the size of its chunk, so on N. A NaN in a row that counts stays in that row of the values
    and of the hidden states' gradient, but reaches all of the weight's and the bias's.

    Args:
        student_hidden: `[N, H_s]`, N any leading shape; float16, bfloat16, float32 or float64.
        student_weight: `[V_s, H_s]`, of the same dtype. Under autocast both are cast as `F.linear` would; a
            gradient has its input's dtype. The weight's is summed over chunks in float32 at least.
        teacher_hidden, teacher_weight: `[N, H_t]` and `[V_t, H_t]`; H and dtype may differ from the
            student's. Nothing of the teacher may require a gradient.
        kind: a name in `kl_gpu.KINDS`.
        student_bias, teacher_bias: `[V]`, of the weight's dtype.
        softcap, teacher_softcap: each model's cap, a float > 0; None or 0 for none.
        logit_scale, teacher_logit_scale: each model's factor, a float > 0; the temperature over it must be
            within [1e-6, 1e9].
        chunk_rows: rows of logits held at once; None chooses by V, dtype and device, and takes fewer where a
            GPU is short of memory.
        beta, temperature, teacher_temperature, t_squared, mask, labels, ignore_index, weight, reduction,
            normalizer, backend: as in :func:`kl_gpu.divergence`.
        shift: hidden states at t go with entry t+1 of labels, mask and weight; needs `[batch, time, H]` and
            gives `[batch, time − 1]`.
        vocab_size: rows of the weights at and past it are ignored on both sides; required where the two V
            differ.
        student_columns, teacher_columns: as in :func:`kl_gpu.divergence`, of rows of the weights and numbers
            of the biases, which are copied.
        return_entropy: also return the student's entropies, as :func:`kl_gpu.divergence` does, chunk by chunk
            from the logits that are there: no product is taken for them.

    Returns:
        float32 (float64 where both sides' logits are); `[N]` for reduction="none", else 0-d. Never negative.
        With `return_entropy` a pair of that and the entropies `[N]`, detached.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, range, name or combination is wrong, or the teacher requires a gradient; the
            message names the argument.
        RuntimeError: from backward, when a second derivative is asked for, or when a tensor was modified
            since the call.
    """
    validation.of_one_rank("linear_div", student_hidden, student_weight, teacher_hidden, teacher_weight)
    heads = student_weight, student_bias, teacher_weight, teacher_bias
    if not (student_columns is None and teacher_columns is None):
        heads = rows_of_heads(heads, student_columns, teacher_columns, vocab_size)
    sides = student_hidden, *heads[:2], teacher_hidden, *heads[2:]
    options = Options(
        beta=beta, temperature=temperature, teacher_temperature=teacher_temperature, t_squared=t_squared,
        mask=mask, labels=labels, ignore_index=ignore_index, shift=shift, weight=weight, reduction=reduction,
        normalizer=normalizer, vocab_size=vocab_size, backend=backend, return_entropy=return_entropy,
    )  # fmt: skip
    return run_linear(
        sides, kind, options, op.linear, softcap=softcap, teacher_softcap=teacher_softcap,
        logit_scale=logit_scale, teacher_logit_scale=teacher_logit_scale, chunk_rows=chunk_rows,
    )  # fmt: skip


def run_linear(
    sides: tuple[Any, ...], kind: str, options: Options, linear: Linear, columns: int | None = None,
    **products: Any,
) -> Any:  # fmt: skip
    """`linear_div`, whatever computes it.

    Args:
        sides: hidden states, weight and bias, of the student and then of the teacher.
        columns: how many rows of the weights count, where they are a shard's.
        products: what makes the logits, as `rows.two_heads` has it.
    """
    options.check(kind)
    heads, params, factors = two_heads(sides, KINDS[kind].at(options.beta), options, columns, **products)
    student_hidden, student_weight = sides[:2]
    reduction, device = options.reduction_of(student_hidden), student_hidden.device
    scales = options.scales(student_hidden, reduction.valid, factors)
    params, row_scales = params.scaled(scales), flat_scales(scales)
    lead = without_last_time(student_hidden, options.shift).shape[:-1]
    dtypes = params.student.dtype, params.teacher.dtype
    if torch.compiler.is_compiling():
        # Two models may share a head, and Dynamo takes no Function that gets one tensor twice.
        heads[3:] = (None if x is None else x.detach() for x in heads[3:])
    needs = [x is not None and x.requires_grad for x in heads[:3]]
    # float64 with a narrower side: computed in float64, returned in float32.
    mixed = dtypes[0] != dtypes[1]

    # In float16 a gradient divided by N vanishes unless a loss scale comes first, and that comes in backward.
    in_range = torch.float16 not in (dtypes[0], student_hidden.dtype, student_weight.dtype)
    differentiated = torch.is_grad_enabled() and any(needs) and not transforms.are_active()
    if reduction.has_scale and in_range and differentiated:
        row_scale = reduction.scale(lead, compute_dtype(*dtypes), device)
        valid = _flat(reduction.computed)
        function = _CompiledSum if torch.compiler.is_compiling() else _Sum
        how = _How(params, linear, options.return_entropy)
        total, entropy = function.apply(*heads, valid, row_scales, row_scale.reshape(-1), how, needs)
        total = total.float() if mixed else total
        return (total, entropy.view(lead).to(total.dtype)) if options.return_entropy else total

    def of(some: Tensor | None, entropy: bool = False) -> tuple[Tensor, ...]:
        step, how = _WITH_ENTROPIES if entropy else _STEP, _How(params, linear, entropy)
        found = transforms.apply(step, how, *heads, _flat(some), row_scales)
        return tuple(x.view(lead) for x in found)

    value, *entropies = of(reduction.computed, options.return_entropy)
    value = reduction.completed(value, lambda others: of(others)[0])
    result = reduction.reduced(value.float() if mixed else value)
    return (result, entropies[0].detach().to(result.dtype)) if entropies else result


def _flat(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid.reshape(-1)

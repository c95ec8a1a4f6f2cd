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
from ..arguments.reduction import compute_dtype, wide_dtype
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


# Behind the six tensors of the heads: which rows count, their scales, labels, and what multiplies the logits
# of those, as `LinearExtras` has it.
_PER_ROW = 4


def _run(
    how: _How, tensors: Any, row_scales: tuple[Tensor | None, Tensor | None], needs: list[bool], entropy: bool
) -> Any:
    """The operator, for the factors of the rows' divergences and of the labels' −log q."""
    *heads, scales, labels, label_scale = tensors
    row_scale, label_row_scale = (None if x is None else x.contiguous() for x in row_scales)
    return how.linear(
        *heads, row_scale, needs, *how.params.as_arguments(), scales, entropy, labels, label_scale,
        label_row_scale,
    )  # fmt: skip


def _values(how: _How, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Divergences `[N]`, and what is asked for besides."""
    found = _run(how, tensors, (None, None), _NO_GRADIENTS, how.entropy)[0]
    return tuple(x.clone() for x in found.unbind(-1)) if found.dim() > 1 else (found,)


def _gradients(how: _How, tensors: Any, row_scales: Any, needs: list[bool]) -> list[Tensor | None]:
    """Of the student's three tensors; from the logits, computed again."""
    return _asked_for(_run(how, tensors, row_scales, needs, False)[1:], needs)


def _pull(how: _How, needs: Any, incoming: Any, tensors: Any, kept: Any) -> Any:
    # Nothing flows to entropies.
    row_scales = incoming[0], None if tensors[-2] is None else incoming[-1]
    return *_gradients(how, tensors, row_scales, list(needs[:3])), *(None,) * (3 + _PER_ROW)


# Per-row divergence `[N]`, alone and with others behind it. Backward computes the logits again, chunk by
# chunk. Weights have no rows: the samples of a vmap run one after another.
_STEPS = [transforms.Step(_values, _pull, values=n, rowwise=False) for n in (1, 2, 3)]


def _total(value: Tensor, how: _How, row_scales: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    """Σ row_scale · divergence, with the labels' share of it, and the entropies; of none, a tensor without
    elements."""
    row_scale, label_row_scale = row_scales
    total = ((value if value.dim() == 1 else value[:, 0]) * row_scale).sum()
    if label_row_scale is not None:
        total = total + (value[:, -1] * label_row_scale).sum()
    return total, value[:, 1].clone() if how.entropy else value.new_empty(0)


class _Sum(torch.autograd.Function):
    """Σ row_scale · divergence, 0-d, for row factors `[N]` known beforehand, with the labels' −log q times
    theirs; and the entropies.

    Gradients come in forward, unless what forward saves is managed by others.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, how, needs = arguments
        *of_values, row_scale, label_row_scale = tensors
        row_scales, managed = (row_scale, label_row_scale), are_saved_tensors_managed()
        asked = _NO_GRADIENTS if managed else needs
        value, *found = _run(how, of_values, (None, None) if managed else row_scales, asked, how.entropy)
        # The inputs too: modifying them before backward must raise, as it does everywhere else.
        keep(ctx, *tensors)
        ctx.how, ctx.needs, ctx.grads = how, needs, None if managed else _asked_for(found, needs)
        total, entropy = _total(value, how, row_scales)
        ctx.mark_non_differentiable(entropy)
        return total, entropy

    @staticmethod
    def backward(ctx: Any, incoming: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, row_scale, label_row_scale = kept(ctx)
        # Given away once: a second backward must not find them scaled, and .grad takes them without a copy.
        grads, ctx.grads = ctx.grads, None
        with torch.no_grad():
            if grads is None:
                scaled = tuple(None if x is None else incoming * x for x in (row_scale, label_row_scale))
                grads = _gradients(ctx.how, tensors, scaled, ctx.needs)
            elif not validation.readable(incoming) or incoming.item() != 1:
                grads = [None if grad is None else grad.mul_(incoming) for grad in grads]
        return (*forbid_double_backward(tuple(grads), incoming, *tensors), *(None,) * (7 + _PER_ROW))


class _CompiledSum(torch.autograd.Function):
    """`_Sum` for torch.compile, which keeps what is saved by its own rules."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, how, needs = arguments
        *of_values, row_scale, label_row_scale = tensors
        row_scales = row_scale, label_row_scale
        value, *grads = _run(how, of_values, row_scales, needs, how.entropy)
        ctx.save_for_backward(*grads)
        ctx.needs = needs
        total, entropy = _total(value, how, row_scales)
        ctx.mark_non_differentiable(entropy)
        return total, entropy

    @staticmethod
    def backward(ctx: Any, incoming: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = [
            (grad * incoming).to(grad.dtype) if need else None
            for grad, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
        ]
        return (*grads, *(None,) * (7 + _PER_ROW))


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
    hard_weight: float = 0.0,
) -> Any:
    """Divergence of `kind` between two models known by their hidden states and LM heads, per token, in nats.

    The divergence that :func:`kl_gpu.divergence` gives for the logits

        z = hidden · weightᵀ + bias,    logits = softcap · tanh(logit_scale · z / softcap)

    (logit_scale · z without a soft cap), of which only `chunk_rows` rows exist at a time. With a reduction,
    the gradients are computed in forward; with "none", and in float16, where a loss scale must be applied
    first, they are computed in backward from a second set of products. The cap is computed in float32 at
    least. The student's hidden states, weight and bias are differentiable; the teacher is a constant.

    Rows that do not count cost nothing on the CPU. On a GPU they are computed with the others, because
    finding them would wait for the device. Matrix products are the vendor library's: a row's last bits may
    depend on the size of its chunk, and so on N. A NaN in a row that counts stays in that row of the values
    and of the hidden states' gradient, but reaches all of the weight's and the bias's.

    Args:
        student_hidden: `[N, H_s]`, where N is any leading shape; float16, bfloat16, float32 or float64.
        student_weight: `[V_s, H_s]`, of the same dtype. Under autocast both are cast as `F.linear` would; a
            gradient has its input's dtype. The weight's gradient is summed over chunks in float32 at least.
        teacher_hidden: `[N, H_t]`; H and dtype may differ from the student's. Nothing of the teacher may
            require a gradient.
        teacher_weight: `[V_t, H_t]`.
        kind: A name in `kl_gpu.KINDS`.
        student_bias, teacher_bias: `[V]`, of the weight's dtype.
        softcap, teacher_softcap: Each model's soft cap, a float > 0; None or 0 for none.
        logit_scale, teacher_logit_scale: Each model's factor, a float > 0. The temperature over it must be
            within [1e-6, 1e9].
        chunk_rows: How many rows of logits exist at once. None decides by V, dtype and device, and takes
            fewer where a GPU is short of memory.
        beta, temperature, teacher_temperature, t_squared, backend: As in :func:`kl_gpu.divergence`.
        mask, labels, ignore_index, weight, reduction, normalizer: Likewise.
        shift: Hidden states at t go with entry t + 1 of labels, mask and weight. Needs `[batch, time, H]` and
            returns `[batch, time − 1]`.
        vocab_size: The softmax is over the first `vocab_size` rows of the weights on both sides. Required
            where the two V differ.
        student_columns, teacher_columns: As in :func:`kl_gpu.divergence`, of rows of the weights and entries
            of the biases, which are copied.
        hard_weight: As in :func:`kl_gpu.divergence`, from the logits of each chunk.
        return_entropy: Also return the student's entropies, from the logits of each chunk; no product is
            taken for them.

    Returns:
        float32 (float64 where both sides' logits are float64); `[N]` for `reduction="none"`, otherwise 0-d.
        Never negative. With `return_entropy`, a pair of this and the entropies `[N]`, detached.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, range, name or combination is wrong, or the teacher requires a gradient; the
            message names the argument.
        RuntimeError: From backward, when a second derivative is asked for, or when a tensor was modified
            since the call.

    Example:
        >>> import torch, kl_gpu
        >>> hidden = torch.randn(2, 8, 16, requires_grad=True)
        >>> head = torch.randn(100, 16, requires_grad=True)
        >>> loss = kl_gpu.linear_div(hidden, head, torch.randn(2, 8, 24), torch.randn(100, 24))
        >>> loss.backward()
        >>> hidden.grad.shape, head.grad.shape
        (torch.Size([2, 8, 16]), torch.Size([100, 16]))
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
        hard_weight=hard_weight,
    )  # fmt: skip
    return run_linear(
        sides, kind, options, op.linear, softcap=softcap, teacher_softcap=teacher_softcap,
        logit_scale=logit_scale, teacher_logit_scale=teacher_logit_scale, chunk_rows=chunk_rows,
    )  # fmt: skip


def run_linear(
    sides: tuple[Any, ...], kind: str, options: Options, linear: Linear, columns: int | None = None,
    vocabulary: int = 0, **products: Any,
) -> Any:  # fmt: skip
    """`linear_div`, whatever computes it.

    Args:
        sides: hidden states, weight and bias, of the student and then of the teacher.
        columns: how many rows of the weights count, where they are a shard's.
        vocabulary: how many count on all ranks, where they are a shard's and there is a `hard_weight`.
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
    dtype, labels, label_scale = compute_dtype(*dtypes), None, None
    hard = reduction._replace(factor=None)
    if options.hard_weight > 0:
        labels = options.hard_labels(reduction.computed, vocabulary or params.vocab_size).reshape(-1)
        ones = torch.ones((len(labels), 1), dtype=wide_dtype(device), device=device)
        label_scale = ones * factors[0]
    of_rows = row_scales, labels, label_scale
    if reduction.has_scale and in_range and differentiated:
        row_scale, label_row_scale = reduction.scale(lead, dtype, device).reshape(-1), None
        if labels is not None:
            label_row_scale = options.hard_weight * hard.scale(lead, dtype, device).reshape(-1)
        function = _CompiledSum if torch.compiler.is_compiling() else _Sum
        how = _How(params, linear, options.return_entropy)
        tensors = *heads, _flat(reduction.computed), *of_rows, row_scale, label_row_scale
        total, entropy = function.apply(*tensors, how, needs)
        total = total.float() if mixed else total
        return (total, entropy.view(lead).to(total.dtype)) if options.return_entropy else total

    def of(some: Tensor | None, entropy: bool = False) -> tuple[Tensor, ...]:
        step = _STEPS[entropy + (labels is not None)]
        found = transforms.apply(step, _How(params, linear, entropy), *heads, _flat(some), *of_rows)
        return tuple(x.view(lead) for x in found)

    value, *others = of(reduction.computed, options.return_entropy)
    value = reduction.completed(value, lambda some: of(some)[0])
    result = reduction.reduced(value.float() if mixed else value)
    if labels is not None:
        own = hard.completed(others[-1], lambda some: of(some)[-1])
        result = result + options.hard_weight * hard.reduced(own).to(result.dtype)
    return (result, others[0].detach().to(result.dtype)) if options.return_entropy else result


def _flat(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid.reshape(-1)

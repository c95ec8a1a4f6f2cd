"""Divergences of a student known by hidden states and LM head from a teacher known by its K best tokens."""

from __future__ import annotations

from torch import Tensor

from ..arguments import validation
from ..topk.api import run_topk
from .rows import one_head


def linear_topk_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    kind: str = "forward_kl",
    *,
    tail: str = "bucket",
    teacher_tail_logprob: Tensor | None = None,
    student_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    beta: float | None = None,
    temperature: float | Tensor = 1.0,
    t_squared: bool = False,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    vocab_size: int | None = None,
    validate: bool = False,
    return_mass: bool = False,
    outside_logprob: float | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Divergence between a student's hidden states and the K tokens known of a teacher, per token, in nats.

    :func:`kl_gpu.topk_div` of the student's logits that :func:`kl_gpu.linear_div` describes. Only
    `chunk_rows` rows of them exist at a time. Forward takes one matrix product; backward takes it again, and
    one product for each of hidden states and weight that require a gradient. Beside that, O(N·K) numbers are
    held.

    Args:
        student_hidden: `[N, H]`, where N is any leading shape; float16, bfloat16, float32 or float64.
        student_weight: `[V, H]`, of the same dtype; under autocast as in :func:`kl_gpu.linear_div`.
        teacher_logprobs, teacher_ids, kind, tail, teacher_tail_logprob: As in :func:`kl_gpu.topk_div`.
        student_bias: `[V]`, of the weight's dtype.
        softcap: A float > 0; None or 0 for none.
        logit_scale: A float > 0. The temperature over it must be within [1e-6, 1e9].
        chunk_rows: As in :func:`kl_gpu.linear_div`.
        beta, temperature, t_squared, validate, return_mass: As in :func:`kl_gpu.topk_div`.
        outside_logprob, backend: Likewise.
        mask, labels, ignore_index, weight, reduction, normalizer: As in :func:`kl_gpu.divergence`.
        shift: Hidden states and the teacher's entries at t go with entry t + 1 of labels, mask and weight.
            Needs `[batch, time, H]` and returns `[batch, time − 1]`.
        vocab_size: The softmax is over the first `vocab_size` rows of the student's weight.

    Returns:
        As :func:`kl_gpu.topk_div`, differentiable in the student's hidden states, weight and bias.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, range, name or combination is wrong; the message names the argument.
        RuntimeError: From backward, when a second derivative is asked for, or when a tensor was modified
            since the call.

    Example:
        >>> import torch, kl_gpu
        >>> known = kl_gpu.topk_logprobs(torch.randn(4, 100), 8)
        >>> hidden, head = torch.randn(4, 16), torch.randn(100, 16, requires_grad=True)
        >>> loss = kl_gpu.linear_topk_div(hidden, head, known.logprobs, known.ids)
        >>> loss.backward()
        >>> head.grad.shape
        torch.Size([100, 16])
    """
    validation.of_one_rank("linear_topk_div", student_hidden, student_weight)
    rows = one_head(
        "student_", student_hidden, student_weight, student_bias, softcap=softcap, logit_scale=logit_scale,
        temperature=temperature, chunk_rows=chunk_rows, vocab_size=vocab_size, shift=shift,
    )  # fmt: skip
    return run_topk(
        rows, teacher_logprobs, teacher_ids, kind, tail=tail, teacher_tail_logprob=teacher_tail_logprob,
        beta=beta, temperature=temperature, t_squared=t_squared, mask=mask, labels=labels,
        ignore_index=ignore_index, shift=shift, weight=weight, reduction=reduction, normalizer=normalizer,
        validate=validate, return_mass=return_mass, outside_logprob=outside_logprob, backend=backend,
    )  # fmt: skip

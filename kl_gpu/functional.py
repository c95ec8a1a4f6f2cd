"""The public functions of two sides of logits: signatures, documentation, and the hand-off of DTensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .arguments import validation
from .arguments.options import Options
from .dense import run_divergence

_DIRECTIONS = {"forward": "forward_kl", "reverse": "reverse_kl"}


def kl_div(student_logits: Tensor, teacher_logits: Tensor, direction: str = "forward", **options: Any) -> Any:
    """KL divergence between two categorical distributions given by logits, per token, in nats.

    With p = softmax(teacher / T) and q = softmax(student / T), "forward" is KL(p‖q) = Σ p (log p − log q) and
    "reverse" is KL(q‖p). Definition: Kullback and Leibler (1951), equation 2.4; distillation: Hinton et al.
    (2015), section 2.

    Args:
        student_logits: `[N, V]`, where N is any leading shape; float16, bfloat16, float32 or float64.
        teacher_logits: `[N, V]`, on the same device; the dtype may differ.
        direction: "forward" or "reverse".
        **options: The options of :func:`divergence`, except `beta`.

    Returns:
        float32 (float64 where both inputs are float64); `[N]` for `reduction="none"`, otherwise 0-d. Never
        negative.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, range, name or combination is wrong; the message names the argument.

    Example:
        >>> import torch, kl_gpu
        >>> teacher = torch.tensor([[0.5, 0.5]]).log()  # log-probabilities are logits
        >>> student = torch.tensor([[0.7, 0.3]]).log().requires_grad_()
        >>> loss = kl_gpu.kl_div(student, teacher)
        >>> print(f"{loss.item():.4f}")
        0.0872
        >>> loss.backward()  # q − p
        >>> [round(x, 4) for x in student.grad[0].tolist()]
        [0.2, -0.2]
    """
    validation.name("direction", direction, _DIRECTIONS)
    return divergence(student_logits, teacher_logits, _DIRECTIONS[direction], **options)


def js_div(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5, **options: Any) -> Any:
    """Generalised Jensen-Shannon divergence of two distributions given by logits, per token, in nats.

    β KL(p‖m) + (1−β) KL(q‖m) with m = βp + (1−β)q, p the teacher and q the student. β = 0 gives KL(p‖q) and β
    = 1 gives KL(q‖p), as in Agarwal et al. (2024), "On-Policy Distillation of Language Models", equation 1
    and section 3, and in TRL.

    Args:
        student_logits: `[N, V]`, where N is any leading shape; float16, bfloat16, float32 or float64.
        teacher_logits: `[N, V]`, on the same device; the dtype may differ.
        beta: The weight of the teacher in the mixture, in [0, 1]. A new value compiles nothing.
        **options: The options of :func:`divergence`.

    Returns:
        float32 (float64 where both inputs are float64); `[N]` for `reduction="none"`, otherwise 0-d. Never
        negative.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, range, name or combination is wrong; the message names the argument.

    Example:
        >>> import torch, kl_gpu
        >>> teacher, student = torch.tensor([[[0.5, 0.5]], [[0.7, 0.3]]]).log()
        >>> print(f"{kl_gpu.js_div(student, teacher).item():.4f}")
        0.0210
    """
    return divergence(student_logits, teacher_logits, "js", beta=beta, **options)


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: str = "forward_kl",
    *,
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
    inplace: bool = False,
    backend: str | None = None,
    support: Tensor | None = None,
    student_columns: Tensor | None = None,
    teacher_columns: Tensor | None = None,
    return_entropy: bool = False,
    hard_weight: float = 0.0,
) -> Any:
    """Divergence of `kind` between softmax(teacher / T_t) and softmax(student / T_s), per token, in nats.

    Both sides are differentiable. Any view whose last dimension is contiguous is read without a copy. The
    kinds are defined in `kl_gpu.KINDS` and in "Distil two models"; p is the teacher and q the student.

    Args:
        student_logits: `[N, V]`, where N is any leading shape; float16, bfloat16, float32 or float64.
        teacher_logits: `[N, V]`, on the same device; the dtype may differ.
        kind: A name in `kl_gpu.KINDS`.
        beta: The parameter of the kinds that have one. `jeffreys` and `js` take [0, 1], 0.5 by default; the
            skew divergences take [0, 1), 0.1 by default; `lk` takes the η of its weight exp(−η α), in [0,
            1e6], 3 by default (Samarin et al. 2026, arXiv 2602.23881). Either 0 or at least 1e-30. A new
            value compiles nothing.
        temperature: Divides both logits: a float within [1e-6, 1e9], or a floating-point tensor `[N]` with
            one temperature per row, which gets no gradient. With `shift`, an entry belongs to the logits at
            t. In rows that count, a tensor's value out of range is refused on the CPU; on a GPU, where
            looking would wait for the device, and under torch.compile or torch.func, that row is NaN.
        teacher_temperature: Replaces `temperature` on the teacher's side; a float or `[N]`.
        t_squared: Multiply value and gradient by T² (Hinton et al. 2015, section 2.1), each row by its own.
            Needs one temperature for both sides.
        mask: bool, or integers 0 and 1, `[N]`. True or 1 counts. A row that does not count has value 0 and
            gradient 0, whatever its logits hold.
        labels: int `[N]`, any integer dtype. A row counts where `labels != ignore_index`; combined with
            `mask` by *and*.
        ignore_index: The label of rows that do not count.
        shift: Pair logits at t with entry t + 1 of labels, mask and weight. Needs `[batch, time, V]` and
            returns `[batch, time − 1]`.
        weight: float `[N]`, multiplies each row's value and gradient. A row of weight 0 contributes exactly
            0, even where its divergence is infinite or NaN, but "mean" still divides by it; `mask` removes a
            row from both. A weight that requires a gradient gets the row's divergence (0 where the weight is
            0 and the divergence is not finite).
        reduction: "none" (`[N]`), "sum", "mean" (sum / rows that count) or "batchmean" (sum / first
            dimension).
        normalizer: Replaces the denominator of "mean": a float ≥ 1e-20, or a tensor of one element. A tensor
            of 0 gives 0 where no row counts. A tensor that is negative, or 0 where rows count, is refused on
            the CPU; on a GPU, and under torch.compile or torch.func, the result is NaN.
        vocab_size: The softmax is over the first `vocab_size` columns on both sides. Required where the two
            widths differ.
        inplace: Permit writing the gradient over the memory of `student_logits` in backward.
        backend: One of `kl_gpu.BACKENDS`, or None for the fastest on this device.
        support: The columns that both softmaxes run over, per row: bool `[N, V]`, or int ids `[N, K]` with −1
            for an absent entry, such as a sampler's top-k or top-p set. Outside it both probabilities are 0.
            Given ids, only those columns are read; given a mask, the size of the largest set is needed, which
            waits for the device. With `shift`, a set belongs to the logits at t. A row without any column is
            NaN. On the CPU, ids out of range or given twice raise.
        student_columns: int `[V']`: column j of the comparison is this column of the student's logits. The
            distributions are over these V' columns alone, such as the vocabulary of a draft model. Each
            column at most once; the first use of a map waits for the device. `labels` and `support` then
            count the columns of the comparison, and `vocab_size` must be None.
        teacher_columns: The same on the teacher's side.
        return_entropy: Also return the student's entropies −Σ q log q, at the cost of one more read of its
            logits, except in the "native" backend, which computes them while a row is in cache.
        hard_weight: Adds hard_weight · (−log q(label)) to each row's value and gradient, with q at
            temperature 1 and without T² (Hinton et al. 2015, section 2), and with the same mask, weight and
            reduction. Needs `labels`, which must be valid columns in rows that count; excludes `support`;
            `inplace` is not used.

    Returns:
        float32 (float64 where both inputs are float64); `[N]` for `reduction="none"`, otherwise 0-d. Never
        negative. With `return_entropy`, a pair of this and the entropies `[N]`: detached, accurate to about
        1e-6 of max(1, H), and 0 in rows that do not count or have weight 0.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, range, name or combination is wrong; the message names the argument.
        RuntimeError: From backward, when a second derivative is asked for, or when logits were modified since
            the call.

    Example:
        >>> import torch, kl_gpu
        >>> teacher, student = torch.tensor([[[0.5, 0.5]], [[0.7, 0.3]]]).log()
        >>> for kind in ("forward_kl", "tv", "nla"):
        ...     print(kind, f"{kl_gpu.divergence(student, teacher, kind).item():.4f}")
        forward_kl 0.0872
        tv 0.2000
        nla 0.2231
    """
    options = Options(
        beta=beta, temperature=temperature, teacher_temperature=teacher_temperature, t_squared=t_squared,
        mask=mask, labels=labels, ignore_index=ignore_index, shift=shift, weight=weight, reduction=reduction,
        normalizer=normalizer, vocab_size=vocab_size, inplace=inplace, backend=backend, support=support,
        student_columns=student_columns, teacher_columns=teacher_columns,
        return_entropy=return_entropy, hard_weight=hard_weight,
    )  # fmt: skip
    if validation.is_shared(student_logits) or validation.is_shared(teacher_logits):
        # DTensor takes a second to import, so only who has one pays for it.
        from .distributed import dtensors

        return dtensors.divergence(student_logits, teacher_logits, kind, **options._asdict())
    return run_divergence(student_logits, teacher_logits, kind, options)

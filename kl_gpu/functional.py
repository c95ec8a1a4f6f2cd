"""The public functions of two sides of logits: signatures, documentation, and the hand-off of DTensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .arguments import validation
from .arguments.options import Options
from .dense import run_divergence

_DIRECTIONS = {"forward": "forward_kl", "reverse": "reverse_kl"}


def kl_div(
    student_logits: Tensor, teacher_logits: Tensor, *, direction: str = "forward", **options: Any
) -> Any:
    """KL divergence between two categorical distributions given by logits, per token, in nats.

    With p = softmax(teacher/T), q = softmax(student/T): "forward" is KL(p‖q) = Σ p (log p − log q),
    "reverse" is KL(q‖p). Kullback and Leibler (1951), eq. 2.4; distillation: Hinton et al. (2015), section 2.

    Args:
        student_logits: `[N, V]`, N any leading shape; float16, bfloat16, float32 or float64.
        teacher_logits: `[N, V]`, on the same device; the dtype may differ.
        direction: "forward" or "reverse".
        **options: those of :func:`divergence`, `beta` excepted.

    Returns:
        float32 (float64 where both inputs are); `[N]` for reduction="none", else 0-d. Never negative.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, range, name or combination is wrong; the message names the argument.
    """
    validation.name("direction", direction, _DIRECTIONS)
    return divergence(student_logits, teacher_logits, _DIRECTIONS[direction], **options)


def js_div(student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 0.5, **options: Any) -> Any:
    """Generalised Jensen-Shannon divergence of two categorical distributions given by logits, in nats.

    β KL(p‖m) + (1−β) KL(q‖m) with m = βp + (1−β)q; β = 0 gives KL(p‖q) and β = 1 gives KL(q‖p), as in
    Agarwal et al. (2024), "On-Policy Distillation of Language Models", eq. 1 and section 3.

    Args:
        student_logits: `[N, V]`, N any leading shape; float16, bfloat16, float32 or float64.
        teacher_logits: `[N, V]`, on the same device; the dtype may differ.
        beta: the weight of the teacher in the mixture, in [0, 1]; a new value compiles no kernel.
        **options: those of :func:`divergence`.

    Returns:
        float32 (float64 where both inputs are); `[N]` for reduction="none", else 0-d. Never negative.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, range, name or combination is wrong; the message names the argument.
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
    """Divergence of `kind` between softmax(teacher/T_t) and softmax(student/T_s), per token, in nats.

    Both sides are differentiable. Any view whose last dimension is contiguous is read without a copy.

    Args:
        student_logits: `[N, V]`, N any leading shape; float16, bfloat16, float32 or float64.
        teacher_logits: `[N, V]`, on the same device; the dtype may differ.
        kind: a name in `kl_gpu.KINDS`.
        beta: the parameter of the kinds that have one: `jeffreys` and `js` take [0, 1], 0.5 by default, the
            skew divergences [0, 1), 0.1 by default; `lk` takes the η of its weight exp(−η α), [0, 1e6], 3 by
            default (Samarin et al. 2026, arXiv 2602.23881; 3 is the best setting there). 0 or at least
            1e-30. A number at run time: a new value compiles no kernel.
        temperature: divides both logits; a float within [1e-6, 1e9], or a floating tensor `[N]` of each
            row's, which gets no gradient. A new value compiles nothing. Where one tensor serves both sides, a
            row has the bits that it has with its temperature as a float. With `shift` an entry belongs to
            the logits at t. One out of range in a row that counts is refused on the CPU; on a device, where
            asking would wait, and under torch.compile or torch.func that row is NaN.
        teacher_temperature: overrides `temperature` on the teacher's side; a float or `[N]` likewise.
        t_squared: multiply value and gradient by T² (Hinton et al. 2015, section 2.1), each row by its own;
            one temperature for both sides.
        mask: bool or integers 0 and 1, `[N]`; True or 1 counts. A row that does not count has value 0 and
            gradient 0, whatever it holds.
        labels: int `[N]`, signed or unsigned, compared as int64; a row counts where labels != ignore_index.
            Combines with `mask` by and.
        ignore_index: the label of rows that do not count.
        shift: logits at t go with entry t+1 of labels, mask and weight; needs `[batch, time, V]` and gives
            `[batch, time − 1]`.
        weight: float `[N]`, multiplies each row's value and gradient. A row of weight 0 is not computed: its
            value and gradient are 0, also where its divergence is infinite or NaN, but it stays among the
            rows that "mean" divides by, as any weight does; `mask` takes it out of both. Where weight
            requires a gradient, that is the row's divergence, and 0 at a weight of 0 where it is not finite.
        reduction: "none" (`[N]`), "sum", "mean" (sum / rows that count), "batchmean" (sum / first dimension).
        normalizer: float ≥ 1e-20 or tensor of one element that replaces the denominator of "mean". A tensor
            of 0 is fine where no row counts: the result is 0 then. A tensor that is negative, or 0 where rows
            count, is refused on the CPU; on a device, where asking would wait, and under torch.compile or
            torch.func the result is NaN.
        vocab_size: columns at and past it are ignored on both sides; required where the two V differ.
        inplace: allow the gradient to be written over the memory of `student_logits` in backward.
        backend: one of `kl_gpu.BACKENDS`, or None for the fastest on this device.
        support: the columns that the softmax of both sides runs over, each row's own: bool `[N, V]`, or int
            ids `[N, K]` with −1 for an absent entry: a sampler's top-k or top-p. Outside it both
            probabilities are 0. Ids are read alone, whatever V is; of a mask the largest set's size is asked,
            which waits for the device. With `shift` a set belongs to the logits at t. A row without any
            column is NaN. On the CPU ids out of range or given twice raise.
        student_columns, teacher_columns: int `[V']`; column j of the comparison is that column of the
            tensor, and the distributions are over these V' alone: a draft model's vocabulary against its
            target's. Each within its side's V, and named once, or it raises: looking at a map waits for the
            device the first time. `labels` and `support` count the columns of the comparison; `vocab_size`
            must be None.
        hard_weight: ≥ 0; adds hard_weight · (−log q(label)) to each row's value and gradient, q at
            temperature 1 whatever the temperature is (Hinton et al. 2015, section 2), without T², with the
            same mask, weight and reduction. It needs `labels`, which on the CPU must be columns in rows that
            count (elsewhere another is NaN), and goes without `support`; `inplace` is not used. It takes one
            more read of the student's logits, and for the gradient a read, a write and a sum of two tensors.
        return_entropy: also return the student's entropies −Σ q log q, in nats: an exact bonus or monitor.

    Returns:
        float32 (float64 where both inputs are); `[N]` for reduction="none", else 0-d. Never negative. With
        `return_entropy` a pair of that and the entropies `[N]`, detached, good to about 1e-6 of max(1, H), 0
        in rows that do not count or have weight 0. They take one more read of the student's logits.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, range, name or combination is wrong; the message names the argument.
        RuntimeError: from backward, when a second derivative is asked for, or when logits were modified
            since the call.
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

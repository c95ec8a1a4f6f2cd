"""Divergences from a teacher of whom only the K best tokens are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import complement, transforms
from ..arguments import validation
from ..arguments.options import REDUCTIONS, Options
from ..arguments.params import ComplementParams, TopkParams
from ..arguments.reduction import wide_dtype
from ..backends import registry
from ..complement import Rows, logits_rows
from ..inference_tensors import ordinary_rows
from ..kinds import KINDS
from ..ops.complement import present
from . import formulas, outside

TAILS = tuple(formulas.TAIL_KINDS)
# What trainers pad labels with, and their ids too.
_PADDING = -100


def _values(
    params: TopkParams, picked: Tensor, rest_lse: Tensor, log_p: Tensor, rest_log_p: Tensor | None,
    has_rest: Tensor, valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The divergence, and its derivatives to `picked` and `rest_lse`."""
    value, grad_picked, grad_rest = formulas.topk(picked, rest_lse, log_p, rest_log_p, has_rest, *params)
    if valid is not None:
        value, grad_rest = torch.where(valid, value, 0.0), torch.where(valid, grad_rest, 0.0)
        grad_picked = torch.where(valid[..., None], grad_picked, 0.0)
    return value, grad_picked, grad_rest


def _pull(params: TopkParams, needs: Any, incoming: Any, tensors: Any, kept: Any) -> Any:
    grad_picked, grad_rest = kept
    scale = incoming[0].to(grad_rest.dtype)
    return scale[..., None] * grad_picked, scale * grad_rest, None, None, None, None


# From a row's split (`complement.split`) to the divergence `[*]`.
_STEP = transforms.Step(_values, _pull, saves_inputs=False)


def topk_values(params: TopkParams, *tensors: Tensor | None) -> Tensor:
    """The divergence `[*]`; `tensors` are those of `formulas.topk`, and which rows count."""
    found: Tensor = transforms.apply(_STEP, params, *tensors)[0]
    return found


def topk_div(
    student_logits: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    kind: str = "forward_kl",
    *,
    tail: str = "bucket",
    teacher_tail_logprob: Tensor | None = None,
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
    inplace: bool = False,
    validate: bool = False,
    return_mass: bool = False,
    outside_logprob: float | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Divergence between a student's logits and the K tokens known of a teacher, per token, in nats.

    With p the teacher, q = softmax(student), sums Σ over the ids, and P, Q what each side has outside them:

    - "bucket": the divergence of K + 1 outcomes, the rest of each side being one. Never more than that of the
      full distributions (data processing inequality; Cover and Thomas, section 2.8), and equal for K = V.
    - "renormalize": both sides conditioned on the ids, p̂ ∝ p^(1/T) and q̂ ∝ e^(s/T). The only rule for a
      temperature other than 1, and the only one that tells the student nothing about the other tokens.
    - "student_full": KL(p̂‖q) with p̂ = p/Σ p and q over the whole vocabulary. Forward KL only, unless
      `outside_logprob` is given.
    - "truncate": Σ p (log p − log q), not renormalised. May be negative. Forward KL only, unless
      `outside_logprob` is given.
    - "generalized": Σ [p log(p/q) − p + q], the KL of two measures, and its reverse; jeffreys and js are made
      of these. Never negative.

    One read of the student's logits for the value ("renormalize" reads only the ids), one more read and a
    write for the gradient. The extra memory is O(N·K).

    Args:
        student_logits: `[N, V]`, where N is any leading shape; float16, bfloat16, float32 or float64.
        teacher_logprobs: `[N, K]`, K ≥ 1, log-probabilities under the teacher's full softmax at temperature
            1; the same dtypes. They get no gradient, and are refused if they require one.
        teacher_ids: int `[N, K]`, the columns they belong to, in any order. −1 or −100 marks an absent entry,
            whose log-probability is ignored. An entry with log-probability −inf whose id occurs elsewhere in
            its row is absent too: padding with (0, −inf). Rows without any entry are NaN under "renormalize"
            and "student_full".
        kind: "forward_kl", "reverse_kl", "jeffreys" or "js".
        tail: The rule for tokens outside the ids, see above.
        teacher_tail_logprob: `[N]`, log P for "bucket", as :func:`kl_gpu.topk_logprobs` gives it. Without it,
            P is 1 − Σ p, but never less than what the rounding of teacher_logprobs may hide, lest KL(q‖p) be
            infinite. (Where the student has no mass outside the ids, such a P is 0.) Where the ids are the
            whole vocabulary, P is 0 whatever is given.
        beta: As in :func:`kl_gpu.divergence`.
        temperature: Divides the student's logits and the teacher's log-probabilities. A temperature other
            than 1 needs `tail="renormalize"`, which also accepts `[N]` with one per row.
        t_squared: Multiply value and gradient by T².
        mask, labels, ignore_index, weight, reduction, normalizer: As in :func:`kl_gpu.divergence`.
        shift: Likewise. The teacher's entries at t belong to the student's logits at t.
        vocab_size: The student's softmax is over its first `vocab_size` columns.
        inplace: Permit writing the gradient over the memory of `student_logits` in backward.
        validate: Refuse ids outside [0, V) that mark no absent entry, ids given twice in a row that counts,
            and, for tails other than "renormalize", probabilities that sum to more than 1.05 (with P where it
            is given) and a P of NaN beside log-probabilities that are not. Always done on the CPU; on a GPU
            it waits for the device. Without it, an id outside counts as absent and is never read, and one
            given twice counts twice.
        return_mass: Also return Σ p and Σ q at temperature 1, `[N]` each, not differentiable; 0 in rows that
            do not count.
        outside_logprob: For "truncate" and "student_full": the log-probability that the teacher is taken to
            give every token outside the ids. Permits "reverse_kl" and "jeffreys", whose KL(q‖p) is then Σ q
            (log q − log p) over the whole vocabulary, with p̂ in place of p for "student_full"; the forward
            KL does not change. NeMo-RL uses −100. Such a p need not sum to 1, so a value may be negative.
        backend: One of `kl_gpu.BACKENDS`, or None for the fastest on this device.

    Returns:
        float32 (float64 where logits and log-probabilities are float64); `[N]` for `reduction="none"`,
        otherwise 0-d. With `return_mass`, a triple of this, the teacher's mass and the student's mass.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, range, name or combination is wrong; the message names the argument.
        RuntimeError: From backward, when a second derivative is asked for, or when logits were modified since
            the call.

    Example:
        >>> import torch, kl_gpu
        >>> teacher = torch.tensor([[0.6, 0.2, 0.1, 0.1]]).log()
        >>> student = torch.tensor([[0.4, 0.4, 0.1, 0.1]]).log().requires_grad_()
        >>> logprobs, ids, rest = kl_gpu.topk_logprobs(teacher, 2)
        >>> loss = kl_gpu.topk_div(student, logprobs, ids, teacher_tail_logprob=rest)
        >>> print(f"{loss.item():.4f}")
        0.1046
    """
    validation.of_one_rank("topk_div", student_logits)
    rows = logits_rows("student_logits", student_logits, vocab_size, shift)
    return run_topk(
        rows, teacher_logprobs, teacher_ids, kind, tail=tail, teacher_tail_logprob=teacher_tail_logprob,
        beta=beta, temperature=temperature, t_squared=t_squared, mask=mask, labels=labels,
        ignore_index=ignore_index, shift=shift, weight=weight, reduction=reduction, normalizer=normalizer,
        inplace=inplace, validate=validate, return_mass=return_mass, outside_logprob=outside_logprob,
        backend=backend,
    )  # fmt: skip


def run_topk(
    rows: Rows, teacher_logprobs: Tensor, teacher_ids: Tensor, kind: str, *, tail: str,
    teacher_tail_logprob: Tensor | None, validate: bool, return_mass: bool,
    outside_logprob: float | None = None, **shared: Any,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`topk_div` of a student's rows that are checked, whatever they are made of."""
    options = Options(**shared)
    validation.name("tail", tail, TAILS)
    validation.name("kind", kind, KINDS)
    if outside_logprob is not None:
        validation.outside_logprob(outside_logprob, tail)
    allowed = formulas.TAIL_KINDS[tail] if outside_logprob is None else outside.KINDS
    formulas.refuse_kind(kind, tail, allowed)
    validation.name("reduction", options.reduction, REDUCTIONS)
    validation.beta(options.beta, kind)
    temperature, shift = options.temperature, options.shift
    validation.booleans(
        t_squared=options.t_squared, inplace=options.inplace, validate=validate,
        return_mass=return_mass,
    )  # fmt: skip
    validation.temperature("temperature", temperature)
    if tail != "renormalize" and (isinstance(temperature, Tensor) or temperature != 1):
        raise ValueError(
            "temperature != 1 needs tail='renormalize': p^(1/T) cannot be normalised without the rest of p; "
            f"got {validation.shown_temperature(temperature)} with tail={tail!r}"
        )
    student, device, columns = rows.tensor, rows.tensor.device, rows.columns
    validation.topk(student, teacher_logprobs, teacher_ids, teacher_tail_logprob, tail)
    reduction = options.reduction_of(student)
    chosen = registry.resolve(options.backend, device)
    inplace = options.overwrites(rows.argument, student, "teacher_logprobs", teacher_logprobs)

    valid = reduction.computed
    if shift:
        teacher_logprobs, teacher_ids = teacher_logprobs[:, :-1], ordinary_rows(teacher_ids)[:, :-1]
        teacher_tail_logprob = None if teacher_tail_logprob is None else teacher_tail_logprob[:, :-1]
    wide = wide_dtype(device)
    ids = teacher_ids.long()
    ids = torch.where(ids == _PADDING, -1, ids)
    ids = complement.unpadded(ids, teacher_logprobs, constants=(columns,))
    here = present(ids, columns)
    has_rest = here.sum(-1) < columns
    log_p = torch.where(here, teacher_logprobs.to(wide), -torch.inf)
    rest_log_p = None
    if teacher_tail_logprob is not None:
        # A rest without a column has no mass, whatever was given.
        rest_log_p = torch.where(has_rest, teacher_tail_logprob.to(wide), -torch.inf)
    validate = validate or device.type == "cpu"
    if validate and tail != "renormalize":
        log_p = complement.checked_mass(log_p, valid, constants=("teacher",))
        if rest_log_p is not None:
            rest_log_p = complement.checked_tail(rest_log_p, log_p, valid)

    scale, _, scales = options.scales(student, reduction.valid, over=rows.factor)
    sweeps = tail != "renormalize"
    entropy = outside_logprob is not None
    params = ComplementParams(scale, sweeps, entropy, validate, "teacher_ids", chosen, rows.window, inplace)
    parts = rows.split(student, ids, valid, scales, params)
    both_wide = rows.dtype == teacher_logprobs.dtype == torch.float64
    dtype = torch.float64 if both_wide else torch.float32
    resolution = formulas.RESOLUTION[teacher_logprobs.dtype]
    of_tail = TopkParams(*KINDS[kind].at(options.beta), tail, scale, resolution)

    scaled = log_p if scales is None else log_p * scales

    def of(picked: Tensor, rest_lse: Tensor, rest_entropy: Tensor, some: Tensor | None) -> Tensor:
        if outside_logprob is not None and of_tail.kind != "forward_kl":
            own = log_p - formulas.log_sum(log_p) if tail == "student_full" else log_p
            how = float(outside_logprob), 1.0 if of_tail.kind == "reverse_kl" else of_tail.beta
            return outside.values(how, picked, rest_lse, rest_entropy, own, some).to(dtype)
        return topk_values(of_tail, picked, rest_lse, scaled, rest_log_p, has_rest, some).to(dtype)

    per_row = reduction.completed(
        of(*parts, valid),
        lambda others: of(*rows.split(student, ids, others, scales, params), others),
    )
    value = reduction.reduced(per_row)
    if not return_mass:
        return value
    with torch.no_grad():
        picked, rest_lse, _ = parts
        if tail == "renormalize":
            picked, rest_lse, _ = rows.split(
                student, ids, valid, None, params._replace(scale=1.0, sweeps=True)
            )
        masses = formulas.mass_of(log_p), formulas.student_mass(picked, rest_lse)
        teacher_mass, student_mass = (x if valid is None else torch.where(valid, x, 0.0) for x in masses)
    return value, teacher_mass.to(dtype), student_mass.to(dtype)

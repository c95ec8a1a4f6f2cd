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

    With p the teacher, q = softmax(student), Σ_K over the ids and P, Q what each side has outside them:

    - "bucket": the divergence of K + 1 outcomes, the rest of each side in one. Never more than that of the
      full distributions (data processing inequality; Cover and Thomas, section 2.8), and equal for K = V.
    - "renormalize": of both sides conditioned on the ids: p̂ ∝ p^(1/T), q̂ ∝ e^(s/T). The only one for
      temperature ≠ 1, and the only one that tells the student nothing about the rest of the vocabulary.
    - "student_full": KL(p̂‖q), p̂ = p/Σ_K p and q over the whole vocabulary. Forward KL only.
    - "truncate": Σ_K p (log p − log q), not renormalised. Can be negative. Forward KL only.
    - "generalized": Σ_K [p log(p/q) − p + q], the KL of two measures, and its reverse; jeffreys and js are
      made of these. Never negative.

    One read of the student's logits for the value ("renormalize" reads only the ids), one more and one write
    for the gradient. Extra memory is O(N·K).

    Args:
        student_logits: `[N, V]`, N any leading shape; float16, bfloat16, float32 or float64.
        teacher_logprobs: `[N, K]`, K ≥ 1, log-probabilities under the teacher's full softmax at temperature
            1; the same dtypes. It gets no gradient: one that requires it is refused.
        teacher_ids: int `[N, K]`, the columns they belong to, in any order; −1 or −100 marks an absent entry,
            whose log-probability is not looked at. An entry of log-probability −inf whose id stands elsewhere
            in its row is absent too: padding with (0, −inf). Rows without any entry are NaN under
            "renormalize" and "student_full".
        kind: "forward_kl", "reverse_kl", "jeffreys" or "js".
        tail: what to make of the rest of the vocabulary, see above.
        teacher_tail_logprob: `[N]`, log P for "bucket", as :func:`kl_gpu.topk_logprobs` gives it. Without it
            P = 1 − Σ_K p, but never less than what the rounding of teacher_logprobs may hide, lest KL(q‖p)
            be infinite (where the student has no mass outside the ids, such a P is 0). Where the ids are the
            whole vocabulary P is 0, whatever was given.
        beta: as in :func:`kl_gpu.divergence`.
        temperature: divides the student's logits and the teacher's log-probabilities; 1 but for
            "renormalize", which also takes `[N]` of each row's, as :func:`kl_gpu.divergence` does.
        t_squared: multiply value and gradient by T².
        mask, labels, ignore_index, shift, weight, reduction, normalizer: as in :func:`kl_gpu.divergence`;
            with `shift` the teacher's entries at t go with the student's logits at t.
        vocab_size: the student's columns at and past it are ignored.
        inplace: allow the gradient to be written over the memory of `student_logits` in backward.
        outside_logprob: for "truncate" and "student_full" alone: what the teacher's log-probability is taken
            for of every token that the ids do not name. It allows "reverse_kl" and "jeffreys", whose KL(q‖p)
            then is Σ q (log q − log p) over the whole vocabulary, p̂ in p's place for "student_full"; the
            forward KL is not changed. NeMo-RL has −100. Such a p may sum to anything, so a value may be
            below 0.
        validate: refuse ids outside [0, V) that mark no absent entry, and ids given twice in a row that
            counts, and for tails other than "renormalize" probabilities that sum to more than 1.05, with P
            where it is given, or a given P that is NaN where teacher_logprobs are not; a row with a NaN in
            those is NaN. On the CPU always; on a GPU it waits for the device. Not validated, an id outside
            counts as absent and is never read, and one given twice counts twice.
        return_mass: also return the probability of the ids, Σ_K p and Σ_K q at temperature 1, `[N]`, not
            differentiable; rows that do not count have 0.
        backend: one of `kl_gpu.BACKENDS`, or None for the fastest on this device.

    Returns:
        float32 (float64 where logits and log-probabilities are); `[N]` for reduction="none", else 0-d. With
        `return_mass` a triple: that, the teacher's mass, the student's mass.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, range, name or combination is wrong; the message names the argument.
        RuntimeError: from backward, when a second derivative is asked for, or when logits were modified
            since the call.
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
            "temperature must be 1 but for tail='renormalize': p^(1/T) cannot be normalised without the rest "
            f"of p, got {validation.shown_temperature(temperature)} with tail={tail!r}"
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

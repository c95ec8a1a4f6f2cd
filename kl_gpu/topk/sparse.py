"""Divergences of two models, each known by its K best tokens alone: two APIs compared."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import complement
from ..arguments import validation
from ..arguments.options import REDUCTIONS, Options
from ..arguments.params import TopkParams
from ..arguments.reduction import wide_dtype
from ..kinds import KINDS
from . import formulas
from .api import topk_values
from .tokens import places_among

SPARSE_TAILS = {tail: kinds for tail, kinds in formulas.TAIL_KINDS.items() if tail != "student_full"}


class _Side(NamedTuple):
    """What is known of one model.

    Attributes:
        logprobs: float64 `[*, K]`, −inf where absent.
        ids: int64 `[*, K]`, −1 where absent.
        tail: float64 `[*]`, the log of what its other tokens have; None to take what is left of 1.
        resolution: half an ulp of its log-probabilities at 1.
    """

    logprobs: Tensor
    ids: Tensor
    tail: Tensor | None
    resolution: float

    @classmethod
    def of(cls, logprobs: Tensor, ids: Tensor, tail: Tensor | None, shift: bool) -> _Side:
        if shift:
            logprobs, ids, tail = logprobs[:, :-1], ids[:, :-1], None if tail is None else tail[:, :-1]
        wide = wide_dtype(logprobs.device)
        everything = torch.iinfo(torch.int64).max
        of = complement.unpadded(ids.long(), logprobs.detach(), constants=(everything,))
        of = torch.where(of < 0, -1, of)
        known = torch.where(of >= 0, logprobs.to(wide), -torch.inf)
        resolution = formulas.RESOLUTION[logprobs.dtype]
        return cls(known, of, None if tail is None else tail.to(wide), resolution)

    def rest(self, common: Tensor) -> Tensor:
        """The log of what all tokens but the common ones have, `[*]`."""
        others = formulas.log_sum(torch.where(common, -torch.inf, self.logprobs))[..., 0]
        tail = self.tail
        if tail is None:
            any_other = torch.ones_like(self.logprobs[..., :1], dtype=torch.bool)
            tail = formulas.remaining(self.logprobs, self.resolution, any_other)[..., 0]
        return torch.logaddexp(others, tail)


def _matched(student: _Side, teacher: _Side) -> tuple[Tensor, Tensor]:
    """Where the student's list has the teacher's ids, `[*, K_t]`, −1 for nowhere; which of the student's
    entries the teacher's list has, `[*, K_s]`."""
    place = places_among(student.ids, teacher.ids)
    columns = student.ids.shape[-1]
    taken = torch.zeros((*place.shape[:-1], columns + 1), dtype=torch.bool, device=place.device)
    return place, taken.scatter_(-1, torch.where(place < 0, columns, place), True)[..., :-1]


def sparse_div(
    student_logprobs: Tensor,
    student_ids: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    kind: str = "forward_kl",
    *,
    tail: str = "bucket",
    student_tail_logprob: Tensor | None = None,
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
    return_mass: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Divergence between two models of each of which only the K best tokens are known, per token, in nats.

    A token that one side does not name has an unknown probability there, so only the common tokens are
    compared one by one. With p the teacher, q the student, and P, Q what each has outside the common tokens:

    - "bucket": the divergence of the common tokens and one more outcome, all others. Never more than that of
      the full distributions (data processing inequality; Cover and Thomas, section 2.8).
    - "renormalize": both sides conditioned on the common tokens. The only rule for a temperature other than
      1.
    - "truncate": Σ p (log p − log q) over the common tokens. May be negative. Forward KL only.
    - "generalized": Σ [p log(p/q) − p + q] over the common tokens, and its like for the other kinds.

    Plain PyTorch in float64 on O(N·K) numbers. Where no token is common, "bucket" and "generalized" are 0 and
    "renormalize" is NaN; `return_mass` tells how much was compared.

    Args:
        student_logprobs: `[N, K_s]`, where N is any leading shape: log-probabilities under the student's full
            softmax; float16, bfloat16, float32 or float64. Differentiable.
        student_ids: int `[N, K_s]`, the tokens they belong to, in any order, each once in a row. An absent
            entry is marked as in :func:`kl_gpu.topk_div`, by −1 or any id below 0.
        teacher_logprobs, teacher_ids: `[N, K_t]`, the same of the teacher, without a gradient.
        kind: "forward_kl", "reverse_kl", "jeffreys" or "js".
        tail: The rule for the other tokens, see above.
        student_tail_logprob: `[N]`, for "bucket": the log of what the student's unnamed tokens have together,
            as :func:`kl_gpu.topk_logprobs` gives it. Without it, what is left of 1, but never less than what
            the rounding of the log-probabilities may hide.
        teacher_tail_logprob: The same of the teacher.
        beta, temperature, t_squared: As in :func:`kl_gpu.topk_div`.
        mask, labels, ignore_index, weight, reduction, normalizer: As in :func:`kl_gpu.divergence`.
        shift: Both sides' entries at t go with entry t + 1 of labels, mask and weight.
        return_mass: Also return Σ p and Σ q over the common tokens, `[N]` each, not differentiable; 0 in rows
            that do not count.

    Returns:
        float32 (float64 where both sides' log-probabilities are float64); `[N]` for `reduction="none"`,
        otherwise 0-d. With `return_mass`, a triple of this, the teacher's mass and the student's mass.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, range, name or combination is wrong; on the CPU also where an id occurs twice in
            a row that counts, or probabilities sum to more than 1.05. The message names the argument.

    Example:
        >>> import torch, kl_gpu
        >>> student = kl_gpu.topk_logprobs(torch.tensor([[0.4, 0.4, 0.1, 0.1]]).log(), 2)
        >>> teacher = kl_gpu.topk_logprobs(torch.tensor([[0.6, 0.2, 0.1, 0.1]]).log(), 2)
        >>> value, teacher_mass, student_mass = kl_gpu.sparse_div(
        ...     student.logprobs, student.ids, teacher.logprobs, teacher.ids, return_mass=True
        ... )
        >>> print(f"{value.item():.4f} {teacher_mass.item():.2f} {student_mass.item():.2f}")
        0.1046 0.80 0.80
    """
    options = Options(
        beta=beta, temperature=temperature, t_squared=t_squared, mask=mask, labels=labels,
        ignore_index=ignore_index, shift=shift, weight=weight, reduction=reduction, normalizer=normalizer,
    )  # fmt: skip
    validation.name("tail", tail, SPARSE_TAILS)
    validation.name("kind", kind, KINDS)
    formulas.refuse_kind(kind, tail, SPARSE_TAILS[tail])
    validation.name("reduction", reduction, REDUCTIONS)
    validation.beta(beta, kind)
    validation.booleans(t_squared=t_squared, shift=shift, return_mass=return_mass)
    validation.temperature("temperature", temperature)
    if tail != "renormalize" and (isinstance(temperature, Tensor) or temperature != 1):
        raise ValueError(
            f"temperature != 1 needs tail='renormalize', got "
            f"{validation.shown_temperature(temperature)} with tail={tail!r}"
        )
    validation.one_side("student_logprobs", student_logprobs, columns=1)
    validation.topk(student_logprobs, student_logprobs, student_ids, student_tail_logprob, tail, "student")
    validation.topk(student_logprobs, teacher_logprobs, teacher_ids, teacher_tail_logprob, tail)
    validation.shifted("student_logprobs [batch, time, K]", student_logprobs, shift)
    reduction_ = options.reduction_of(student_logprobs)
    valid = reduction_.computed

    student = _Side.of(student_logprobs, student_ids, student_tail_logprob, shift)
    teacher = _Side.of(teacher_logprobs, teacher_ids, teacher_tail_logprob, shift)
    for side, name in ((student, "student"), (teacher, "teacher")):
        if validation.readable(side.ids):
            complement.check_ids(side.ids, valid, torch.iinfo(torch.int64).max, f"{name}_ids")
            if tail != "renormalize":
                complement.checked_mass(side.logprobs.detach(), valid, constants=(name,))
    scale, _, scales = options.scales(student_logprobs, reduction_.valid)
    place, taken = _matched(student, teacher)
    log_q = torch.where(place < 0, -torch.inf, student.logprobs.gather(-1, place.clamp_min(0)))
    log_p = torch.where(place < 0, -torch.inf, teacher.logprobs)
    rests = student.rest(taken), teacher.rest(place >= 0)
    wide = student_logprobs.dtype == teacher_logprobs.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    params = TopkParams(*KINDS[kind].at(beta), tail, scale, teacher.resolution)
    has_rest = torch.ones_like(place[..., 0], dtype=torch.bool)

    # As a student's logits would come; the parameters have what scales the teacher, but for each row's own.
    scaled_q, scaled_p = (log_q * scale, log_p) if scales is None else (log_q * scales, log_p * scales)

    def of(some: Tensor | None) -> Tensor:
        return topk_values(params, scaled_q, rests[0], scaled_p, rests[1], has_rest, some).to(dtype)

    value = reduction_.reduced(reduction_.completed(of(valid), of))
    if not return_mass:
        return value
    masses = (formulas.mass_of(x.detach()) for x in (log_p, log_q))
    teacher_mass, student_mass = (x if valid is None else torch.where(valid, x, 0.0) for x in masses)
    return value, teacher_mass.to(dtype), student_mass.to(dtype)

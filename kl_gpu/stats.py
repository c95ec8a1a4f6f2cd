"""Two models compared token by token: both KLs, entropies, the labels' log-probabilities, equal top-1."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import summary, transforms
from .arguments import validation
from .arguments.options import Options
from .arguments.reduction import LogitsWindow, compute_dtype, last_contiguous, valid_rows
from .backends import registry
from .backends.interface import COMPARISON
from .columns import selected
from .ops import pair as ops


class TokenStats(NamedTuple):
    """Per-token numbers of a student q against a teacher p, `[N]` each; in nats up to `teacher_logprob`.

    A row that does not count holds 0 in every field, so `field.mean()` is too small: use :meth:`mean`,
    :meth:`summary`, or select `field[counts > 0]`.

    Attributes:
        forward_kl: KL(p‖q).
        reverse_kl: KL(q‖p).
        student_entropy: H(q).
        teacher_entropy: H(p).
        student_logprob: log q(label); NaN in rows that count where no labels were given.
        teacher_logprob: log p(label), and NaN likewise.
        top1_agree: 1.0 where both sides' largest logit is in the same column, otherwise 0.0. Of equal logits
            the first counts, as in torch.argmax; logits that only dividing by a temperature would make equal
            do not count as equal. NaN where a side has no distribution.
        counts: 1.0 in rows that `mask` and `labels` let count; `summary` averages over those.
        js: ½ KL(p‖m) + ½ KL(q‖m), m = (p + q)/2. In nats.
        tv: ½ Σ abs(p − q).
        acceptance: α = Σ min(p, q) = 1 − tv, the share of q's tokens that speculative sampling accepts
            (Leviathan et al. 2023, theorem 3.5), accurate relative to itself. NaN, as js and tv are, where
            `overlap` is off.

    Example:
        >>> import torch, kl_gpu
        >>> base = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> model = torch.tensor([[0.7, 0.3], [0.9, 0.1]]).log()
        >>> batches = [kl_gpu.token_stats(model, base), kl_gpu.token_stats(base, base)]
        >>> report = kl_gpu.TokenStats.cat(batches).summary()
        >>> report["count"], round(report["forward_kl_mean"], 4), report["top1_agree"]
        (4.0, 0.0218, 1.0)
    """

    forward_kl: Tensor
    reverse_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_logprob: Tensor
    teacher_logprob: Tensor
    top1_agree: Tensor
    counts: Tensor
    js: Tensor
    tv: Tensor
    acceptance: Tensor

    @classmethod
    def cat(cls, parts: Iterable[TokenStats]) -> TokenStats:
        """The rows that count of several batches, one after the other, on the CPU: `[rows]` each.

        `parts` may be a generator: of each batch only its per-row numbers are kept, so a text of any length
        can be compared one batch at a time. Waits for the device.
        """
        found = []
        for part in parts:
            keep = part.counts.reshape(-1) > 0
            found.append(torch.stack([x.reshape(-1) for x in part])[:, keep].cpu())
        if not found:
            raise ValueError("parts must hold at least one TokenStats, got none")
        return cls(*torch.cat(found, 1))

    @property
    def count(self) -> Tensor:  # type: ignore[override]
        """How many rows count, 0-d. It takes the place of the tuple's own `count`, which compares entries."""
        return self.counts.sum()

    def mean(self) -> TokenStats:
        """The mean of every field over the rows that count, 0-d each, without waiting for the device.

        `field.mean()` would include the zeros of the other rows. Where no row counts, the means are NaN.
        """
        return TokenStats(*(x.sum() / self.count for x in self))

    def summary(self) -> dict[str, float]:
        """Statistics over the rows that count, as floats for a logger. Waits for the device.

        A name ending in `_se` is the standard error of the name before it, NaN for a single row. A perplexity
        is exp of the mean −log-probability, Δp is q(label) − p(label), percentiles interpolate linearly, and
        the errors of functions of a mean are of first order. All 34 figures that llama.cpp's
        `llama-perplexity --kl-divergence` prints are included and defined as there; its base model is the
        teacher here.

        Returns:
            Always: count; forward_kl_mean, _mean_se, _min, _median, _max, _p1, _p5, _p10, _p90, _p95, _p99,
            _p99.9; reverse_kl_mean, _mean_se; student_entropy_mean, teacher_entropy_mean; top1_agree, _se;
            js_mean, tv_mean and acceptance_mean, each with _se. With labels also, each with _se: student_ppl,
            teacher_ppl, ppl_ratio (student over teacher), ppl_difference (student less teacher),
            log_ppl_ratio, delta_p_mean, delta_p_rms; and log_ppl_correlation, delta_p_min, _median, _max and
            _p0.1, _p1, _p5, _p10, _p25, _p75, _p90, _p95, _p99, _p99.9. Where no row counts, all are NaN
            except count. A NaN or an infinity in a row that counts appears in every figure that depends on
            it.
        """
        return summary.of(self._fields, torch.stack([x.reshape(-1) for x in self]))


def all_fields(
    student: Tensor, teacher: Tensor, valid: Tensor | None, tokens: Tensor | None, scales: Tensor | None,
    call: tuple[float, float, str], overlap: bool,
) -> Tensor:  # fmt: skip
    """The ten fields `[TOKEN_STATS + COMPARISON, N]`; the last three are NaN without `overlap`."""
    if not overlap:
        fields = ops.token_stats(student, teacher, valid, tokens, *call, scales)
        nothing = torch.full_like(fields[:COMPARISON], torch.nan)
        return torch.cat((fields, nothing if valid is None else torch.where(valid, nothing, 0.0)))
    fields, sums = ops.token_stats_and_comparison(student, teacher, valid, tokens, *call, scales)
    return torch.cat((fields, ops.overlap(sums, valid, student.shape[-1]).to(fields.dtype)))


def _fields(call: tuple[float, float, str, bool], *tensors: Any) -> tuple[Tensor, ...]:
    student, teacher, valid, tokens, scales = tensors
    return all_fields(student, teacher, valid, tokens, scales, call[:3], call[3]).unbind(0)


def _no_gradient(*_: object) -> Any:
    raise RuntimeError("kl_gpu.token_stats has no gradient")


_STEP = transforms.Step(_fields, _no_gradient, values=0)


def token_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    vocab_size: int | None = None,
    backend: str | None = None,
    student_columns: Tensor | None = None,
    teacher_columns: Tensor | None = None,
    overlap: bool = True,
) -> TokenStats:
    """Compare two models' logits token by token: KLs, entropies, labels' log-probabilities, top-1 agreement.

    With p = softmax(teacher / T_t) and q = softmax(student / T_s). One read of both tensors; js, tv and the
    acceptance rate take two more, except in the "native" backend, which computes them while a row is in
    cache; `overlap=False` leaves them out. There is no gradient: logits that require one are fine, and the
    result is detached. The KLs are as accurate as those of :func:`kl_gpu.kl_div`; entropies are accurate to
    about 1e-6 of max(1, H).

    Args:
        student_logits: `[N, V]`, where N is any leading shape; float16, bfloat16, float32 or float64.
        teacher_logits: `[N, V]`, on the same device; the dtype may differ.
        labels: int `[N]`, tokens. A row counts where `labels != ignore_index`. On the CPU other labels
            outside [0, V) raise; on a GPU, and under torch.compile or torch.func, their log-probabilities are
            NaN.
        temperature: Divides both logits: a float within [1e-6, 1e9], or `[N]` with one per row, as in
            :func:`kl_gpu.divergence`.
        teacher_temperature: Replaces `temperature` on the teacher's side.
        mask: bool, or integers 0 and 1, `[N]`. True or 1 counts; combined with `labels` by *and*. The logits
            of a row that does not count do not matter.
        ignore_index: The label of rows that do not count.
        shift: Pair logits at t with entry t + 1 of labels and mask. Needs `[batch, time, V]` and returns
            `[batch, time − 1]`.
        vocab_size: The softmax is over the first `vocab_size` columns on both sides. Required where the two
            widths differ.
        backend: One of `kl_gpu.BACKENDS`, or None for the fastest on this device.
        student_columns, teacher_columns: As in :func:`kl_gpu.divergence`; `labels` are columns of the
            comparison.
        overlap: Whether to compute js, tv and acceptance.

    Returns:
        TokenStats: float32 (float64 where both inputs are float64).

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, range, name or combination is wrong; the message names the argument.

    Example:
        >>> import torch, kl_gpu
        >>> base = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> model = torch.tensor([[0.7, 0.3], [0.9, 0.1]]).log()
        >>> labels = torch.tensor([0, -100])  # the second row does not count
        >>> stats = kl_gpu.token_stats(model, base, labels)
        >>> [round(x, 4) for x in stats.forward_kl.tolist()]
        [0.0872, 0.0]
        >>> print(f"{stats.mean().forward_kl.item():.4f}")
        0.0872
    """
    validation.of_one_rank("token_stats", student_logits, teacher_logits)
    validation.booleans(shift=shift, overlap=overlap)
    validation.temperatures(temperature, teacher_temperature)
    options = Options(
        temperature=temperature, teacher_temperature=teacher_temperature, mask=mask, labels=labels,
        ignore_index=ignore_index, shift=shift, vocab_size=vocab_size,
        student_columns=student_columns, teacher_columns=teacher_columns,
    )  # fmt: skip
    if options.selects:
        sides = student_logits.detach(), teacher_logits.detach()
        student_logits, teacher_logits, options = selected(*sides, options)
    columns = validation.logits(student_logits, teacher_logits, options.vocab_size, shift)
    validation.rows(student_logits, mask, labels, ignore_index, None)
    chosen = registry.resolve(backend, student_logits.device)
    student, teacher = of_sides(student_logits, teacher_logits, columns, shift)

    def fields_of(valid: Tensor | None, tokens: Tensor | None) -> tuple[Tensor, ...]:
        *scales, of_rows = options.scales(student_logits, valid)
        tensors = student, teacher, valid, tokens, of_rows
        found: tuple[Tensor, ...] = transforms.apply(_STEP, (*scales, chosen, overlap), *tensors)
        return found

    return run_token_stats(fields_of, options, columns, student.dtype, teacher.dtype)


def of_sides(student: Tensor, teacher: Tensor, columns: int, shift: bool) -> tuple[Tensor, Tensor]:
    """The part of both sides' logits that counts, detached."""
    window = LogitsWindow(columns, shift)
    return window.of(last_contiguous(student.detach())), window.of(last_contiguous(teacher.detach()))


def run_token_stats(
    fields_of: Callable[[Tensor | None, Tensor | None], tuple[Tensor, ...]], options: Options, columns: int,
    student_dtype: torch.dtype, teacher_dtype: torch.dtype,
) -> TokenStats:  # fmt: skip
    """`token_stats` of arguments that are checked, whatever computes the fields.

    Args:
        fields_of: finds the ten fields, all but `counts`, `[N]` for the rows that count and their labels.
        columns: of the whole vocabulary.
        student_dtype, teacher_dtype: of each side's logits.
    """
    labels, shift = options.labels, options.shift
    valid, _ = valid_rows(options.mask, labels, options.ignore_index, None, shift)
    if labels is not None and valid is not None:
        labels = labels[:, 1:] if shift else labels
        validation.labels_are_columns(labels, valid, columns)
        labels = labels.long()
    fields = fields_of(valid, labels)
    # float64 with a narrower side: computed in float64, returned in float32.
    if student_dtype != teacher_dtype and compute_dtype(student_dtype, teacher_dtype) == torch.float64:
        fields = tuple(x.float() for x in fields)
    counted = torch.ones_like(fields[0]) if valid is None else valid.to(fields[0].dtype)
    return TokenStats._make((*fields[:7], counted, *fields[7:]))

"""Statistics and log-probabilities per token from logits whose columns are shared among ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import logprobs
from ..arguments import validation
from ..arguments.options import Options
from ..arguments.reduction import compute_dtype
from ..arguments.temperatures import Scales
from ..backends import registry
from ..backends.shard_merge import log_sum
from ..complement import logits_rows
from ..ops import pair as ops
from ..stats import TokenStats, of_sides, run_token_stats
from . import collectives, complement, consistency, shards, states


def vocab_parallel_token_logprobs(
    logits_shard: Tensor,
    token_ids: Tensor,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    check: str | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`kl_gpu.token_logprobs` of logits whose columns are shared among the ranks of a group.

    One collective of 16 bytes a row and rank (24 with `entropy`), none in backward. The same bits on every
    rank.

    Args:
        logits_shard: `[N, V_r]`, this rank's columns; float16, bfloat16, float32 or float64.
        token_ids: int `[N]`, columns of the whole vocabulary, the same on every rank.
        group, vocab_start, check: As in :func:`vocab_parallel_div`. Where `vocab_start` or `vocab_size` is
            not given, finding out costs a collective of 8 bytes and waits for the device.
        **options: The options of :func:`kl_gpu.token_logprobs`, the same on every rank.

    Returns:
        `[N]` in float32 (float64 for float64 logits), differentiable. With `entropy`, a pair of them.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, range, name or combination is wrong, or the ranks disagree; the message names the
            argument.
        RuntimeError: A collective failed; from backward, when a second derivative is asked for, or when a
            tensor was modified since the call.

    Example:
        >>> # on every rank of a process group
        >>> logprobs = vocab_parallel_token_logprobs(  # doctest: +SKIP
        ...     logits_shard, tokens, group=tp_group, shift=True
        ... )
    """
    validation.known("vocab_parallel_token_logprobs", options, _LOGPROB_OPTIONS)
    group = consistency.agree(
        "vocab_parallel_token_logprobs", group, check, (logits_shard,), vocab_start, token_ids=token_ids,
        **options,
    )  # fmt: skip
    validation.one_side("logits_shard", logits_shard)
    shard = shards.locate(
        {"logits_shard": logits_shard}, vocab_start, options.pop("vocab_size", None), group, whole=True
    )
    entropy, shared = options.pop("entropy", False), Options(labels=token_ids, **options)
    rows = logits_rows(
        "logits_shard", shard.of(logits_shard), None, shared.shift, shard.total,
        partial(complement.split, shard=shard, group=group),
    )  # fmt: skip
    return logprobs.run_token_logprobs(rows, shared, entropy)


def _first_largest(logits: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """A row's largest logit and the first column that holds it, as the whole vocabulary counts; NaN wins."""
    top, column = logits.max(-1)
    return top.double(), (column + start).double()


def _scaled_logit(logprob: Tensor, log_mass: Tensor, own: Tensor | None) -> Tensor:
    """A token's logit over the temperature, from its share of the shard; −inf on the ranks without it."""
    nothing = torch.full_like(log_mass, -torch.inf)
    if own is None:
        return nothing
    return torch.where((own < 0) | log_mass.isneginf(), nothing, logprob + log_mass)


def _leader(tops: Tensor, columns: Tensor) -> Tensor:
    """The first column of the whole row's largest logit, from `[ranks, N]` each."""
    return torch.where(tops == tops.amax(0), columns, torch.inf).amin(0)


def merged_fields(
    student: Tensor, teacher: Tensor, valid: Tensor | None, labels: Tensor | None, *, shard: shards.Shard,
    scales: Scales, backend: str, group: Any, overlap: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The ten fields of whole rows, in the order of `stats.all_fields`."""
    own, both = None if labels is None else shard.own(labels), states.sides_scales(scales[:2], scales.rows)
    inside = ops.token_stats(student, teacher, valid, own, *scales[:2], backend, scales.rows)
    local = ops.value(student, teacher, valid, "forward_kl", 0.0, *scales[:2], backend, scales.rows)[1]
    state, log_q = states.packed(teacher, student, valid, local, inside[:2], both[::-1], backend)
    inside = inside.double()
    tokens = [_scaled_logit(inside[4], log_q, own), _scaled_logit(inside[5], state[0], own)]
    leaders = [x for side in (student, teacher) for x in _first_largest(side, shard.start)]
    found = collectives.gather(
        torch.cat((state, torch.stack([log_q, *inside[2:4], *tokens, *leaders]))), group, "token statistics"
    )
    (whole_p, ratio, forward, reverse), fit = states.merged(found[:, :4].contiguous(), backend)
    # The CPU kernels sum a row whose KL(p‖q) is infinite in fp32, and what that leaves out of lse(q) − lse(p)
    # is of first order in the other KL, once shards are merged. All ranks see the same rows here.
    rough = backend == "native" and bool(forward.isinf().any())
    if rough or (overlap and not fit):
        # The kernels would look at such a row again, and see no more of it than this shard.
        return merged_fields(
            student, teacher, valid, labels, shard=shard, scales=scales, backend="eager", group=group
        )
    log_q, entropy_q, entropy_p, token_q, token_p = found[:, 4:9].unbind(1)
    whole_q = log_sum(log_q)
    agree = (_leader(found[:, 9], found[:, 10]) == _leader(found[:, 11], found[:, 12])).double()
    fields = [
        forward,
        reverse,
        states.entropy(log_q, entropy_q),
        states.entropy(found[:, 0], entropy_p),
        (token_q.amax(0) - whole_q).clamp_max(0.0),
        (token_p.amax(0) - whole_p).clamp_max(0.0),
        torch.where((whole_q + whole_p).isnan(), torch.nan, agree),
    ]
    if overlap:
        nothing = torch.zeros_like(ratio)
        numbers = torch.stack([nothing] * 4, -1)
        of_rows = registry.load(backend).statistics(local, *both[::-1], "js", whole_p, ratio, numbers)
        here = ops.comparison(student, teacher, valid, of_rows, *scales[:2], backend, scales.rows)
        sums = collectives.gather(here, group, "the overlap's sums").sum(0)
        sums = torch.where((whole_q + whole_p).isnan(), torch.nan, sums)
        fields += ops.overlap(sums, valid, shard.total).unbind(0)
    else:
        fields += [torch.full_like(whole_q, torch.nan)] * 3
    if labels is None:
        fields[4] = fields[5] = torch.full_like(whole_q, torch.nan)
    if valid is not None:
        fields = [torch.where(valid, x, 0.0) for x in fields]
    dtype = compute_dtype(student.dtype, teacher.dtype)
    return tuple(x.to(dtype) for x in fields)


def vocab_parallel_token_stats(
    student_shard: Tensor,
    teacher_shard: Tensor,
    labels: Tensor | None = None,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    check: str | None = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    vocab_size: int | None = None,
    backend: str | None = None,
    overlap: bool = True,
) -> TokenStats:
    """`kl_gpu.token_stats` of logits whose columns are shared among the ranks of a group.

    Four reads of both shards, and collectives of 104 and of 24 bytes a row and rank; without `overlap`, three
    reads and the first collective. Entropies follow the chain rule H = Σ P_r H_r + H(P); a label's
    log-probability comes from the rank that holds it; of equal largest logits the first column of the whole
    vocabulary counts. The same bits on every rank.

    Args:
        student_shard, teacher_shard: As in :func:`vocab_parallel_div`.
        group, vocab_start, check: As in :func:`vocab_parallel_div`. Where `vocab_start` or `vocab_size` is
            not given, finding out costs a collective of 8 bytes and waits for the device.
        labels: int `[N]`, columns of the whole vocabulary, the same on every rank.
        temperature, teacher_temperature, mask, ignore_index: As in :func:`kl_gpu.token_stats`.
        shift, vocab_size, backend, overlap: Likewise; `vocab_size` counts the whole vocabulary.

    Returns:
        TokenStats: float32 (float64 where both inputs are float64).

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, range, name or combination is wrong, or the ranks disagree; the message names the
            argument.
        RuntimeError: A collective failed.

    Example:
        >>> # on every rank of a process group
        >>> stats = vocab_parallel_token_stats(  # doctest: +SKIP
        ...     model_shard, base_shard, labels, group=tp_group, shift=True
        ... )
        >>> stats.summary()  # doctest: +SKIP
    """
    sides = {"student_shard": student_shard, "teacher_shard": teacher_shard}
    group = consistency.agree(
        "vocab_parallel_token_stats", group, check, tuple(sides.values()), vocab_start, labels=labels,
        temperature=temperature, teacher_temperature=teacher_temperature, mask=mask,
        ignore_index=ignore_index, shift=shift, vocab_size=vocab_size, backend=backend, overlap=overlap,
    )  # fmt: skip
    validation.booleans(shift=shift, overlap=overlap)
    validation.temperatures(temperature, teacher_temperature)
    validation.beside_each_other(sides, columns=0)
    validation.shifted("shards [batch, time, V]", student_shard, shift)
    validation.rows(student_shard, mask, labels, ignore_index, None)
    chosen = registry.resolve(backend, student_shard.device)
    shard = shards.locate(sides, vocab_start, vocab_size, group, whole=True)
    student, teacher = (shard.of(x.detach()) for x in sides.values())
    student, teacher = of_sides(student, teacher, student.shape[-1], shift)
    options = Options(
        temperature=temperature, teacher_temperature=teacher_temperature, mask=mask, labels=labels,
        ignore_index=ignore_index, shift=shift,
    )  # fmt: skip

    def fields_of(valid: Tensor | None, tokens: Tensor | None) -> tuple[Tensor, ...]:
        scales = options.scales(student_shard, valid)
        return merged_fields(
            student, teacher, valid, tokens, shard=shard, scales=scales, backend=chosen, group=group,
            overlap=overlap,
        )  # fmt: skip

    return run_token_stats(fields_of, options, shard.total, student.dtype, teacher.dtype)


_LOGPROB_OPTIONS = validation.options_of(logprobs.token_logprobs)

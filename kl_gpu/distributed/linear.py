"""Two models known by hidden states and LM heads, compared where both heads are shared among ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..arguments import validation
from ..arguments.options import Options
from ..arguments.params import LinearParams
from ..arguments.temperatures import Scales
from ..linear import api, chunks, op, stats
from ..ops import pair as ops
from ..ops.views import two_at_least
from ..stats import TokenStats
from . import collectives, complement, consistency, shards
from .divergence import whole_rows
from .tokens import merged_fields

# Hidden states, weight and bias, of the student and then of the teacher.
_Sides = tuple[Any, ...]


class _OfAllRanks(torch.autograd.Function):
    """All hidden states, of which every rank gives them a part of their gradient.

    Each rank has its share of the dimension `dim`; where that is None, all of them.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, dim: int | None, group: Any) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return hidden.view_as(hidden) if dim is None else _gather_rows(hidden, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # Gloo has no reduce_scatter of tensors, and what NCCL would save is small beside the products.
        total = _sum_over_ranks(gradient, ctx.group)
        if ctx.dim is not None:
            total = total.chunk(dist.get_world_size(ctx.group), ctx.dim)[dist.get_rank(ctx.group)]
        return total, None, None


def of_all_ranks(hidden: Tensor, dim: int | None, group: Any) -> Tensor:
    """The hidden states of all rows, differentiable where they are."""
    if dim is not None:
        validation.dimension("sequence_dim", dim, hidden.dim() - 1)
    found: Tensor = _OfAllRanks.apply(hidden, dim, group)
    return found


def _gather_rows(hidden: Tensor, dim: int, group: Any) -> Tensor:
    return torch.cat(list(collectives.gather(hidden, group, "the hidden states")), dim)


def _sum_over_ranks(gradient: Tensor, group: Any) -> Tensor:
    """In float32 at least: each rank's part is rounded once, and their sum."""
    total = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
    total = total.contiguous()
    if dist.get_world_size(group) > 1:
        collectives.named(
            lambda: dist.all_reduce(total, group=group), "all_reduce of the hidden states' gradient"
        )
    return total.to(gradient.dtype)


def _sweep_rows(
    params: LinearParams, student: Tensor, teacher: Tensor, keep: Tensor | None, scales: Tensor | None,
    row_scale: Tensor | None, *, group: Any,
) -> Tensor:  # fmt: skip
    """`linear.heads.SweepRows` of rows of which this rank has some columns."""
    s, t = two_at_least(student), two_at_least(teacher)
    value, stats, backend = whole_rows(s, t, keep, scales, params.divergence, group, row_scale is not None)
    if row_scale is not None:
        of = params.divergence._replace(backend=backend)
        ops.gradient(s, t, keep, stats, row_scale, None, *of, s, None, scales)
        if s is not student:
            student.copy_(s[:, : student.shape[1]])
    return value


def _fields(
    params: LinearParams, student: Tensor, teacher: Tensor, keep: Tensor | None, scales: Tensor | None,
    labels: Tensor | None, *, shard: shards.Shard, group: Any,
) -> Tensor:  # fmt: skip
    """`linear.heads.SweepRows` of statistics, of rows of which this rank has some columns."""
    of = params.divergence
    found = merged_fields(
        two_at_least(student), two_at_least(teacher), keep, labels, shard=shard,
        scales=Scales(of.student_scale, of.teacher_scale, scales), backend=of.backend, group=group,
    )  # fmt: skip
    return torch.stack(found, -1)


def _agreed(params: LinearParams, hidden: Tensor, group: Any) -> tuple[LinearParams, int]:
    """Chunks that all ranks agree on, whatever their shards and their memory; and the widest shard."""
    sizes = params.row_bytes, params.student.dtype.itemsize, params.chunk_rows
    rows = chunks.chosen_rows(len(hidden), *sizes, hidden.device)
    own = torch.tensor([params.vocab_size, rows], dtype=torch.int64, device=hidden.device)
    found = collectives.gather(own, group, "the sizes of the chunks").tolist()
    widest, rows = max(columns for columns, _ in found), min(rows for _, rows in found)
    return params._replace(chunk_rows=rows), widest


def _linear(*arguments: Any, shard: shards.Shard, group: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator `linear` of shards."""
    heads, (params, extras) = arguments[:9], LinearParams.from_arguments(*arguments[9:])
    params, widest = _agreed(params, heads[0], group)
    sweep_rows = partial(_sweep_rows, group=group)
    # Where its columns lie does not matter to an entropy.
    split_rows = partial(complement.split, shard=shards.Shard(0, params.vocab_size, 0), group=group)
    return op.over_chunks(
        *heads, *params.as_arguments(), *extras, sweep_rows=sweep_rows, split_rows=split_rows, widest=widest,
        shared=complement.SharedColumns(shard, group),
    )  # fmt: skip


def _token_stats(*arguments: Any, shard: shards.Shard, group: Any) -> Tensor:
    """The operator `linear_token_stats` of shards."""
    heads, (params, extras) = arguments[:8], LinearParams.from_arguments(*arguments[8:])
    params, widest = _agreed(params, heads[0], group)
    sweep_rows = partial(_fields, shard=shard, group=group)
    return stats.fields_over_chunks(
        *heads, *params.as_arguments(), *extras, sweep_rows=sweep_rows, widest=widest
    )


def vocab_parallel_linear_div(
    student_hidden: Tensor,
    student_weight_shard: Tensor,
    teacher_hidden: Tensor,
    teacher_weight_shard: Tensor,
    kind: str = "forward_kl",
    *,
    group: Any = None,
    vocab_start: int | None = None,
    sequence_dim: int | None = None,
    check: str | None = None,
    **options: Any,
) -> Any:
    """`kl_gpu.linear_div` where the rows of both LM heads are shared among the ranks of a group, in nats.

    Chunk by chunk, each rank makes the logits of its columns; the states of whole rows are exchanged as in
    :func:`vocab_parallel_div`, at its cost per row. A rank's weight and bias get their own gradient. That of
    the hidden states is summed over the ranks, in float32, by one all-reduce of `[N, H_s]` in backward. One
    collective of 16 bytes settles the rows of a chunk, and waits for the device. `hard_weight` takes another
    of 16 bytes a row and rank.

    Args:
        student_hidden: `[N, H_s]`, the same on every rank, or this rank's share of them, see `sequence_dim`.
        student_weight_shard: `[V_r, H_s]`, this rank's rows of the head; V_r may differ between ranks, and be
            0.
        teacher_hidden: `[N, H_t]`. Nothing of the teacher may require a gradient.
        teacher_weight_shard: `[V_r, H_t]`, the same rows of the teacher's head.
        kind: A name in `kl_gpu.KINDS`.
        group, vocab_start, check: As in :func:`vocab_parallel_div`.
        sequence_dim: The dimension of the hidden states that is split evenly over the ranks, in their order
            (Megatron's sequence parallelism). One all-gather of each side's hidden states comes first, and
            the student's gradient is that of this rank's share. None where every rank has all of them.
        **options: The options of :func:`kl_gpu.linear_div`, the same on every rank, except `student_bias` and
            `teacher_bias`: `[V_r]`, this rank's. `mask`, `labels` and `weight` are those of all rows.
            `vocab_size` counts the whole vocabulary.

    Returns:
        float32 (float64 where both sides' logits are float64); `[N]`, of all rows, for `reduction="none"`,
        otherwise 0-d. The same bits on every rank.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, range, name or combination is wrong, or the ranks disagree; the message names the
            argument.
        RuntimeError: A collective failed; from backward, when a second derivative is asked for, or when a
            tensor was modified since the call.

    Example:
        >>> # on every rank of a process group
        >>> loss = vocab_parallel_linear_div(  # doctest: +SKIP
        ...     hidden, head_shard, teacher_hidden, teacher_head_shard, group=tp_group
        ... )
        >>> loss.backward()  # doctest: +SKIP
    """
    validation.known("vocab_parallel_linear_div", options, _OPTIONS)
    options = _OPTIONS | options
    sides: _Sides = (
        student_hidden, student_weight_shard, options.pop("student_bias"),
        teacher_hidden, teacher_weight_shard, options.pop("teacher_bias"),
    )  # fmt: skip
    validation.hard_weight(options["hard_weight"], options["labels"], None)
    sides, shard, group = _located(
        "vocab_parallel_linear_div", sides, group, vocab_start, sequence_dim, check, options,
        whole=options["hard_weight"] > 0, kind=kind,
    )  # fmt: skip
    products = {name: options.pop(name) for name in _PRODUCTS}
    options["vocab_size"] = None
    linear = partial(_linear, shard=shard, group=group)
    return api.run_linear(sides, kind, Options(**options), linear, shard.columns, shard.total, **products)


def vocab_parallel_linear_token_stats(
    student_hidden: Tensor,
    student_weight_shard: Tensor,
    teacher_hidden: Tensor,
    teacher_weight_shard: Tensor,
    labels: Tensor | None = None,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    sequence_dim: int | None = None,
    check: str | None = None,
    **options: Any,
) -> TokenStats:
    """`kl_gpu.linear_token_stats` where the rows of both LM heads are shared among the ranks of a group.

    Chunk by chunk, each rank makes the logits of its columns; what whole rows need is exchanged as in
    :func:`vocab_parallel_token_stats`, at its cost per row. One collective of 16 bytes settles the rows of a
    chunk, and waits for the device. The same bits on every rank.

    Args:
        student_hidden, student_weight_shard: As in :func:`vocab_parallel_linear_div`.
        teacher_hidden, teacher_weight_shard: Likewise.
        group, vocab_start, sequence_dim, check: As in :func:`vocab_parallel_linear_div`. Where `vocab_start`
            or `vocab_size` is not given, finding out costs a collective of 8 bytes and waits for the device.
        labels: int `[N]`, columns of the whole vocabulary, of all rows, the same on every rank.
        **options: The options of :func:`kl_gpu.linear_token_stats`, the same on every rank, except
            `student_bias` and `teacher_bias`: `[V_r]`, this rank's. `mask` is that of all rows. `vocab_size`
            counts the whole vocabulary.

    Returns:
        TokenStats: Of all rows, float32 (float64 where both sides' logits are float64).

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, range, name or combination is wrong, or the ranks disagree; the message names the
            argument.
        RuntimeError: A collective failed.

    Example:
        >>> # on every rank of a process group
        >>> stats = vocab_parallel_linear_token_stats(  # doctest: +SKIP
        ...     hidden, head_shard, base_hidden, base_head_shard, labels
        ... )
        >>> stats.summary()  # doctest: +SKIP
    """
    validation.known("vocab_parallel_linear_token_stats", options, _STATS_OPTIONS)
    options = _STATS_OPTIONS | options
    sides: _Sides = (
        student_hidden, student_weight_shard, options.pop("student_bias"),
        teacher_hidden, teacher_weight_shard, options.pop("teacher_bias"),
    )  # fmt: skip
    sides = tuple(x.detach() if isinstance(x, Tensor) else x for x in sides)
    sides, shard, group = _located(
        "vocab_parallel_linear_token_stats", sides, group, vocab_start, sequence_dim, check, options,
        whole=True, labels=labels,
    )  # fmt: skip
    products = {name: options.pop(name) for name in _PRODUCTS}
    options["vocab_size"] = None
    return stats.run_linear_token_stats(
        sides, Options(labels=labels, **options), partial(_token_stats, shard=shard, group=group),
        shard.columns, shard.total, **products,
    )  # fmt: skip


# What makes the logits of products.
_PRODUCTS = ("softcap", "teacher_softcap", "logit_scale", "teacher_logit_scale", "chunk_rows")


def _located(
    entry: str, sides: _Sides, group: Any, vocab_start: Any, sequence_dim: Any, check: Any,
    options: dict[str, Any], whole: bool = False, **also_alike: Any,
) -> tuple[_Sides, shards.Shard, Any]:  # fmt: skip
    """Both sides, checked, with all rows' hidden states; the rows of the heads that are here; the group."""
    hidden, weights, biases = sides[::3], sides[1::3], sides[2::3]
    tensors = [x for x in sides if isinstance(x, Tensor)]
    group = consistency.agree(
        entry, group, check, hidden, vocab_start,
        columns=len(weights[0]) if consistency.is_plain(weights[0]) else 0,
        hidden_sizes=[x.shape[-1:] for x in hidden if consistency.is_plain(x)], sequence_dim=sequence_dim,
        gradients=[torch.is_grad_enabled(), *(x.requires_grad for x in tensors)],
        **options, **also_alike,
    )  # fmt: skip
    whole_here = bool(options["shift"]) and sequence_dim is None
    validation.heads(sides, whole_here, least=0)
    named = dict(zip(("student_weight", "teacher_weight"), (x.t() for x in weights), strict=True))
    shard = shards.locate(named, vocab_start, options["vocab_size"], group, whole)
    hidden = tuple(of_all_ranks(x, sequence_dim, group) for x in hidden)
    return (hidden[0], weights[0], biases[0], hidden[1], weights[1], biases[1]), shard, group


_OPTIONS = validation.options_of(api.linear_div)
_STATS_OPTIONS = validation.options_of(stats.linear_token_stats)

"""`linear_div` where both LM heads are shared among ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..arguments import validation
from ..arguments.params import LinearParams
from ..linear import api, chunks, op
from ..ops import pair as ops
from ..ops.views import two_at_least
from . import collectives, consistency, shards
from .divergence import whole_rows


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
    params: LinearParams, student: Tensor, teacher: Tensor, keep: Tensor | None,
    row_scale: Tensor | None, *, group: Any,
) -> Tensor:  # fmt: skip
    """`linear.heads.SweepRows` of rows of which this rank has some columns."""
    s, t = two_at_least(student), two_at_least(teacher)
    value, stats, backend = whole_rows(s, t, keep, params.divergence, group, row_scale is not None)
    if row_scale is not None:
        of = params.divergence._replace(backend=backend)
        ops.gradient(s, t, keep, stats, row_scale, None, *of, s, None)
        if s is not student:
            student.copy_(s[:, : student.shape[1]])
    return value


def _linear(*arguments: Any, group: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`linear.op.over_chunks` in chunks that all ranks agree on, whatever their shards and their memory."""
    heads, params = arguments[:9], LinearParams.from_arguments(*arguments[9:])
    hidden = heads[0]
    rows = chunks.chosen_rows(len(hidden), params.row_bytes, params.chunk_rows, hidden.device)
    own = torch.tensor([params.vocab_size, rows], dtype=torch.int64, device=hidden.device)
    found = collectives.gather(own, group, "the sizes of the chunks").tolist()
    widest, rows = max(columns for columns, _ in found), min(rows for _, rows in found)
    return op.over_chunks(
        *heads,
        *params._replace(chunk_rows=rows).as_arguments(),
        sweep_rows=partial(_sweep_rows, group=group),
        widest=widest,
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
) -> Tensor:
    """`kl_gpu.linear_div` where the rows of both LM heads are shared among the ranks of a group, in nats.

    Chunk by chunk each rank makes the logits of its columns; the states of whole rows travel as in
    :func:`vocab_parallel_div`, at its cost per row. A rank's weight and bias get their own gradient; that of
    the hidden states is summed over the ranks, in float32, by one all_reduce of `[N, H_s]` in backward. One
    collective of 16 bytes settles the rows of a chunk, and waits for the device.

    Args:
        student_hidden: `[N, H_s]`, the same on every rank, or this rank's share of them, see `sequence_dim`.
        student_weight_shard: `[V_r, H_s]`, this rank's rows of the head; V_r may differ between ranks, and
            be 0.
        teacher_hidden, teacher_weight_shard: `[N, H_t]` and `[V_r, H_t]`, the same rows of the teacher's
            head. Nothing of the teacher may require a gradient.
        kind: a name in `kl_gpu.KINDS`.
        group, vocab_start, check: as in :func:`vocab_parallel_div`.
        sequence_dim: the dimension of the hidden states that is split evenly over the ranks, in their order
            (Megatron's sequence parallelism); one all_gather of each side's hidden states comes first, and
            the student's gradient is that of this rank's share. None where every rank has all of them.
        **options: those of :func:`kl_gpu.linear_div`, given alike on every rank, but for `student_bias` and
            `teacher_bias`: `[V_r]`, this rank's. `mask`, `labels` and `weight` are those of all rows.
            `vocab_size` counts the whole vocabulary.

    Returns:
        float32 (float64 where both sides' logits are); `[N]`, of all rows, for reduction="none", else 0-d.
        The same bits on every rank.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, range, name or combination is wrong, or the ranks disagree; the message names
            the argument.
        RuntimeError: a collective failed; from backward, when a second derivative is asked for, or when a
            tensor was modified since the call.
    """
    validation.known("vocab_parallel_linear_div", options, _OPTIONS)
    weights = {"student_weight": student_weight_shard, "teacher_weight": teacher_weight_shard}
    biases = options.get("student_bias"), options.get("teacher_bias")
    hidden = student_hidden, teacher_hidden
    tensors = [x for x in (*hidden, *weights.values(), *biases) if isinstance(x, Tensor)]
    group = consistency.agree(
        "vocab_parallel_linear_div", group, check, hidden, vocab_start,
        columns=len(student_weight_shard) if consistency.is_plain(student_weight_shard) else 0, kind=kind,
        hidden_sizes=[x.shape[-1:] for x in hidden if consistency.is_plain(x)], sequence_dim=sequence_dim,
        gradients=[torch.is_grad_enabled(), *(x.requires_grad for x in tensors)],
        **{name: value for name, value in options.items() if not name.endswith("_bias")},
    )  # fmt: skip
    validation.heads(
        student_hidden, student_weight_shard, biases[0], teacher_hidden, teacher_weight_shard, biases[1],
        bool(options.get("shift")) and sequence_dim is None, least=0,
    )  # fmt: skip
    shard = shards.locate(
        {name: x.t() for name, x in weights.items()}, vocab_start, options.pop("vocab_size", None), group
    )
    if sequence_dim is not None:
        validation.dimension("sequence_dim", sequence_dim, student_hidden.dim() - 1)
        teacher_hidden = _gather_rows(teacher_hidden, sequence_dim, group)
    student_hidden = _OfAllRanks.apply(student_hidden, sequence_dim, group)
    return api.run_linear(
        student_hidden, student_weight_shard, teacher_hidden, teacher_weight_shard, kind,
        partial(_linear, group=group), shard.columns, **(_OPTIONS | options),
    )  # fmt: skip


_OPTIONS = validation.options_of(api.linear_div)

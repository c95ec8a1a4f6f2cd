"""One model known by hidden states and an LM head, whose rows are shared among ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import logprobs
from ..arguments import validation
from ..arguments.options import Options
from ..complement import Rows
from ..linear.rows import one_head
from ..linear.tokens import linear_token_logprobs
from ..linear.topk import linear_topk_div
from ..topk.api import run_topk
from . import complement, consistency, shards
from .linear import of_all_ranks


def vocab_parallel_linear_token_logprobs(
    hidden: Tensor,
    weight_shard: Tensor,
    token_ids: Tensor,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    sequence_dim: int | None = None,
    check: str | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`kl_gpu.linear_token_logprobs` where the rows of the LM head are shared among the ranks of a group.

    One collective of 16 bytes a row and rank (24 with `entropy`; for K tokens 8·(K + 1), and 8 more). In
    backward, one all-reduce of the hidden states' gradient `[N, H]` in float32, if they require one. The same
    bits on every rank.

    Args:
        hidden: `[N, H]`, the same on every rank, or this rank's share of them, see `sequence_dim`.
        weight_shard: `[V_r, H]`, this rank's rows of the head; V_r may differ between ranks, and be 0.
        token_ids: int `[N]` or `[N, K]`, columns of the whole vocabulary, of all rows, the same on every
            rank.
        group, vocab_start, sequence_dim, check: As in :func:`vocab_parallel_linear_div`. Where `vocab_start`
            or `vocab_size` is not given, finding out costs a collective of 8 bytes and waits for the device.
        **options: The options of :func:`kl_gpu.linear_token_logprobs`, the same on every rank, except `bias`:
            `[V_r]`, this rank's. `mask` is that of all rows. `vocab_size` counts the whole vocabulary.

    Returns:
        As :func:`kl_gpu.linear_token_logprobs`, of all rows.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, range, name or combination is wrong, or the ranks disagree; the message names the
            argument.
        RuntimeError: A collective failed; from backward, when a second derivative is asked for, or when a
            tensor was modified since the call.

    Example:
        >>> # on every rank of a process group
        >>> logprobs = vocab_parallel_linear_token_logprobs(  # doctest: +SKIP
        ...     hidden, head_shard, tokens, group=tp_group
        ... )
    """
    validation.known("vocab_parallel_linear_token_logprobs", options, _LOGPROB_OPTIONS)
    options = _LOGPROB_OPTIONS | options
    rows = _rows(
        "vocab_parallel_linear_token_logprobs", "", hidden, weight_shard, options, group, vocab_start,
        sequence_dim, check, token_ids=token_ids,
    )  # fmt: skip
    entropy = options.pop("entropy")
    return logprobs.run_token_logprobs(rows, Options(labels=token_ids, **options), entropy)


def vocab_parallel_linear_topk_div(
    student_hidden: Tensor,
    student_weight_shard: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    kind: str = "forward_kl",
    *,
    group: Any = None,
    vocab_start: int | None = None,
    sequence_dim: int | None = None,
    check: str | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`kl_gpu.linear_topk_div` where the rows of the student's LM head are shared among the ranks of a group.

    One collective of 8·(K + 1) bytes a row and rank. In backward, one all-reduce of the hidden states'
    gradient `[N, H]` in float32, if they require one. The same bits on every rank.

    Args:
        student_hidden: `[N, H]`, the same on every rank, or this rank's share of them, see `sequence_dim`.
        student_weight_shard: `[V_r, H]`, this rank's rows of the head; V_r may differ between ranks, and be
            0.
        teacher_logprobs, teacher_ids: `[N, K]`, of all rows, the same on every rank; ids are columns of the
            whole vocabulary.
        kind: As in :func:`kl_gpu.topk_div`.
        group, vocab_start, sequence_dim, check: As in :func:`vocab_parallel_linear_div`. Where `vocab_start`
            or `vocab_size` is not given, finding out costs a collective of 8 bytes and waits for the device.
        **options: The options of :func:`kl_gpu.linear_topk_div`, the same on every rank, except
            `student_bias`: `[V_r]`, this rank's. What is given per row is that of all rows. `vocab_size`
            counts the whole vocabulary.

    Returns:
        As :func:`kl_gpu.linear_topk_div`, of all rows.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, range, name or combination is wrong, or the ranks disagree; the message names the
            argument.
        RuntimeError: A collective failed; from backward, when a second derivative is asked for, or when a
            tensor was modified since the call.

    Example:
        >>> # on every rank of a process group
        >>> loss = vocab_parallel_linear_topk_div(  # doctest: +SKIP
        ...     hidden, head_shard, logprobs, ids, group=tp_group
        ... )
    """
    validation.known("vocab_parallel_linear_topk_div", options, _TOPK_OPTIONS)
    options = _TOPK_OPTIONS | options
    rows = _rows(
        "vocab_parallel_linear_topk_div", "student_", student_hidden, student_weight_shard, options, group,
        vocab_start, sequence_dim, check, kind=kind, teacher_logprobs=teacher_logprobs,
        teacher_ids=teacher_ids,
    )  # fmt: skip
    return run_topk(rows, teacher_logprobs, teacher_ids, kind, **options)


def _rows(
    entry: str, side: str, hidden: Tensor, weight: Tensor, options: dict[str, Any], group: Any,
    vocab_start: Any, sequence_dim: Any, check: Any, **also_alike: Any,
) -> Rows:  # fmt: skip
    """The rows of one model, checked, of which this rank has some columns.

    Takes what makes the logits out of `options`; the arguments' names begin with `side`.
    """
    bias = options.pop(f"{side}bias")
    tensors = [x for x in (hidden, weight, bias) if isinstance(x, Tensor)]
    group = consistency.agree(
        entry, group, check, (hidden,), vocab_start,
        columns=len(weight) if consistency.is_plain(weight) else 0,
        hidden_sizes=[x.shape[-1:] for x in (hidden,) if consistency.is_plain(x)], sequence_dim=sequence_dim,
        gradients=[torch.is_grad_enabled(), *(x.requires_grad for x in tensors)],
        **{name: value for name, value in options.items() if name != "validate"}, **also_alike,
    )  # fmt: skip
    validation.head(side, hidden, weight, bias, bool(options["shift"]) and sequence_dim is None, least=0)
    vocab_size = options.pop("vocab_size")
    shard = shards.locate({f"{side}weight": weight.t()}, vocab_start, vocab_size, group, whole=True)
    products = {name: options.pop(name) for name in ("softcap", "logit_scale", "chunk_rows")}
    rows = one_head(
        side, of_all_ranks(hidden, sequence_dim, group), weight, bias, shard.columns,
        temperature=options["temperature"], vocab_size=None, shift=options["shift"], **products,
    )  # fmt: skip
    split = partial(complement.split, shard=shard, group=group, own_split=rows.split)
    return rows._replace(columns=shard.total, split=split)


_LOGPROB_OPTIONS = validation.options_of(linear_token_logprobs)
_TOPK_OPTIONS = validation.options_of(linear_topk_div)

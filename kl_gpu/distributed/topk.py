"""`topk_div` where the student's columns are shared among ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ..arguments import validation
from ..complement import logits_rows
from ..topk import api
from . import complement, consistency, shards


def vocab_parallel_topk_div(
    student_shard: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    kind: str = "forward_kl",
    *,
    group: Any = None,
    vocab_start: int | None = None,
    check: str | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`kl_gpu.topk_div` where the student's columns are shared among the ranks of a group.

    One collective of 8·(K + 1) bytes a row and rank, none in backward. The same bits on every rank.

    Args:
        student_shard: `[N, V_r]`, this rank's columns; float16, bfloat16, float32 or float64.
        teacher_logprobs: `[N, K]`, as in :func:`kl_gpu.topk_div`, the same on every rank.
        teacher_ids: int `[N, K]`, columns of the whole vocabulary, the same on every rank. Each is looked up
            by the rank that holds it.
        kind: As in :func:`kl_gpu.topk_div`.
        **options: The options of :func:`kl_gpu.topk_div`, the same on every rank.
        group, vocab_start, check: As in :func:`vocab_parallel_div`. Where `vocab_start` or `vocab_size` is
            not given, finding out costs a collective of 8 bytes and waits for the device.

    Returns:
        As :func:`kl_gpu.topk_div`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, range, name or combination is wrong, or the ranks disagree; the message names the
            argument.
        RuntimeError: A collective failed; from backward, when a second derivative is asked for, or when a
            tensor was modified since the call.

    Example:
        >>> # on every rank of a process group
        >>> loss = vocab_parallel_topk_div(  # doctest: +SKIP
        ...     student_shard, logprobs, ids, group=tp_group, labels=labels, shift=True
        ... )
    """
    validation.known("vocab_parallel_topk_div", options, _OPTIONS)
    group = consistency.agree(
        "vocab_parallel_topk_div", group, check, (student_shard,), vocab_start, kind=kind,
        teacher_logprobs=teacher_logprobs, teacher_ids=teacher_ids,
        **{name: value for name, value in options.items() if name != "validate"},
    )  # fmt: skip
    validation.one_side("student_shard", student_shard)
    shard = shards.locate(
        {"student_shard": student_shard}, vocab_start, options.pop("vocab_size", None), group, whole=True
    )
    options = _OPTIONS | options
    del options["vocab_size"]
    rows = logits_rows(
        "student_shard", shard.of(student_shard), None, options["shift"], shard.total,
        partial(complement.split, shard=shard, group=group),
    )  # fmt: skip
    return api.run_topk(rows, teacher_logprobs, teacher_ids, kind, **options)


_OPTIONS = validation.options_of(api.topk_div)

"""`divergence` on logits whose vocabulary is shared among ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import transforms
from ..arguments import validation
from ..arguments.options import Options
from ..arguments.params import DivergenceCall, DivergenceParams
from ..autograd import ROW_DIVERGENCE
from ..backends import registry
from ..columns import gather, support_ids
from ..dense import run_divergence
from ..formulas import finish
from ..inference_tensors import keep
from ..kinds import KINDS
from ..ops import pair as ops
from ..ops.views import two_at_least
from . import collectives, complement, consistency, shards, states


class _Shards(transforms.Plain):
    """`ROW_DIVERGENCE` of logits of which this rank has some columns; the gradient is local."""

    @staticmethod
    def forward(ctx: Any, group: Any, call: DivergenceCall, *tensors: Any) -> tuple[Tensor]:
        *sides, valid, scales = tensors
        student, teacher = call.window.of_each(*sides)
        needs_stats = any(ctx.needs_input_grad[2:4])
        value, stats, backend = whole_rows(student, teacher, valid, scales, call.params, group, needs_stats)
        ctx.step = ROW_DIVERGENCE
        ctx.call = call._replace(params=call.params._replace(backend=backend))
        keep(ctx, *tensors, stats)
        return (value,)


def _per_row(
    student: Tensor, teacher: Tensor, valid: Tensor | None, scales: Tensor | None, call: DivergenceCall, *,
    group: Any,
) -> Tensor:  # fmt: skip
    value: Tensor = _Shards.apply(group, call, student, teacher, valid, scales)[0]
    return value


def whole_rows(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    row_scales: Tensor | None,
    params: DivergenceParams,
    group: Any,
    needs_stats: bool,
) -> tuple[Tensor, Tensor, str]:
    """Value `[N]` and statistics `[N, STATS]` of whole rows, and the backend whose statistics these are.

    The statistics are those of the shard where nobody needs others. `row_scales` as `Scales.rows` has them.
    """
    of, backend = KINDS[params.kind], params.backend
    order, scales = of.as_ab, of.as_ab(*states.sides_scales(params[2:4], row_scales))
    # The KL whose a and b are those of this kind, and the other.
    a_to_b, b_to_a = (params._replace(kind=kl, beta=0.0) for kl in of.as_ab("reverse_kl", "forward_kl"))
    inside, local = ops.value(student, teacher, valid, *a_to_b, row_scales)
    kls = [inside] if of.formula in ("kl", "jeffreys", "lk") else []
    if of.formula == "jeffreys":
        kls.append(ops.divergence(student, teacher, valid, *b_to_a, row_scales))
    own, _ = states.packed(*order(student, teacher), valid, local, kls, scales, backend)
    found = collectives.gather(own, group, f"{params.kind}'s row states")
    (log_a, ratio, *kls), fit = states.merged(found, backend)
    if not fit:
        # The kernels would look at such a row again, and see no more of it than this shard.
        eager = params._replace(backend="eager")
        return whole_rows(student, teacher, valid, row_scales, eager, group, needs_stats)

    def of_whole_rows(of_shard: Tensor, *sums: Tensor) -> Tensor:
        whole = of_shard, *scales, of.formula, log_a, ratio, torch.stack(sums, -1)
        stats: Tensor = registry.load(backend).statistics(*whole)
        return stats

    nothing = torch.zeros_like(ratio)
    if of.formula == "kl":
        value, *rest = kls[0], nothing, nothing, nothing
    elif of.formula == "jeffreys":
        # Σ −a r and Σ b r are the two KLs; Σ (b − a) is 0.
        mean_a, mean_b = kls[0] * (1 - params.beta), kls[1] * params.beta
        value, *rest = mean_a + mean_b, mean_a, mean_b, nothing
    else:
        local = of_whole_rows(local, nothing, nothing, nothing, nothing)
        here = ops.formula_sums(student, teacher, valid, local, *params, row_scales)
        sums = collectives.gather(here, group, f"{params.kind}'s row sums").sum(0)
        sums = torch.where((ratio + log_a).isnan()[..., None], torch.nan, sums)
        value, *rest = finish(of.formula, params.beta, (*kls, nothing)[0], sums.unbind(-1))
        value = value.clamp_min(0.0)
    stats = of_whole_rows(local, value, *rest) if needs_stats else local
    if valid is not None:
        value = torch.where(valid, value, 0.0)
    return value.to(inside.dtype), stats, backend


def vocab_parallel_div(
    student_shard: Tensor,
    teacher_shard: Tensor,
    kind: str = "forward_kl",
    *,
    group: Any = None,
    vocab_start: int | None = None,
    check: str | None = None,
    **options: Any,
) -> Any:
    """`kl_gpu.divergence` of logits whose columns are shared among the ranks of a group, in nats.

    Each rank passes the columns it holds and gets the divergence of the whole rows: the same bits on every
    rank, within the bounds of the dense call. Shards may differ in width, and may be empty. The KLs and
    `jeffreys` take one collective (24 and 32 bytes a row and rank), the other kinds two (16 and 24 bytes;
    `lk` 24 and 24). Backward takes none, and writes the gradient of this rank's columns. Shards are merged by
    the chain rule of relative entropy (Cover and Thomas, theorem 2.5.3; `docs/distributed.md`).

    Args:
        student_shard: `[N, V_r]`, where N is any leading shape, the same on every rank; float16, bfloat16,
            float32 or float64.
        teacher_shard: `[N, V_r]`, the same columns of the teacher, on the same device; the dtype may differ.
        kind: A name in `kl_gpu.KINDS`.
        group: The process group that shares the vocabulary; None is the default group.
        vocab_start: The number of this rank's first column. Only `vocab_size` needs it. None assumes the
            ranks' columns in the order of the ranks, and then `vocab_size` costs a collective of 8 bytes and
            waits for the device.
        check: When to compare the ranks' arguments, by a small collective that waits for the device: "first"
            (at the first call of this function in this group), "always" or "never". None takes the
            environment variable KL_GPU_DISTRIBUTED_CHECK, or "first".
        **options: The options of :func:`kl_gpu.divergence`, the same on every rank, except `student_columns`
            and `teacher_columns`, which must be None. `vocab_size` and `support` count the whole vocabulary;
            with `support` but neither `vocab_size` nor `vocab_start`, finding out where a shard lies costs a
            collective of 8 bytes and waits for the device. `return_entropy` costs one collective of 24 bytes
            a row and rank.

    Returns:
        float32 (float64 where both inputs are float64); `[N]` for `reduction="none"`, otherwise 0-d. Never
        negative. With `return_entropy`, a pair, as in :func:`kl_gpu.divergence`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, range, name or combination is wrong, or the ranks disagree; the message names the
            argument.
        RuntimeError: A collective failed; from backward, when a second derivative is asked for, or when a
            tensor was modified since the call.

    Example:
        >>> # on every rank of a process group
        >>> loss = vocab_parallel_div(  # doctest: +SKIP
        ...     student_shard, teacher_shard, group=tp_group, labels=labels, shift=True
        ... )
        >>> loss.backward()  # doctest: +SKIP
    """
    validation.known("vocab_parallel_div", options, _OPTIONS)
    sides = {"student_shard": student_shard, "teacher_shard": teacher_shard}
    group = consistency.agree(
        "vocab_parallel_div", group, check, tuple(sides.values()), vocab_start, kind=kind,
        **{name: value for name, value in options.items() if name != "inplace"},
    )  # fmt: skip
    validation.beside_each_other(sides, columns=0)
    for name in ("student_columns", "teacher_columns"):
        if options.get(name) is not None:
            raise ValueError(
                f"{name} must be None where the vocabulary is shared among ranks: a column of one side and "
                "its counterpart lie on different ranks"
            )
    support = options.pop("support", None)
    # Types are not checked yet.
    hard = options.get("hard_weight", 0.0)
    whole = support is not None or (isinstance(hard, (int, float)) and hard > 0)
    shard = shards.locate(sides, vocab_start, options.pop("vocab_size", None), group, whole)
    student, teacher = (shard.of(side) for side in sides.values())
    if support is not None:
        own = shard.own(support_ids(support, student.shape[:-1], shard.total, None))
        student, teacher = (two_at_least(gather(side, own)) for side in (student, teacher))
    # Where its columns lie does not matter to an entropy.
    of = shard if whole and support is None else shards.Shard(0, student.shape[-1], 0)
    split = partial(complement.split, shard=of, group=group)
    rows_of = partial(_per_row, group=group)
    return run_divergence(student, teacher, kind, Options(**options), rows_of, split, shard.total)


_OPTIONS = Options._fields

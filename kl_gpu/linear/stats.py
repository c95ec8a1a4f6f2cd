"""Two models compared token by token, from their hidden states and LM heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import transforms
from ..arguments import validation
from ..arguments.options import Options
from ..arguments.params import LinearParams
from ..backends.interface import COMPARISON, TOKEN_STATS
from ..ops.register import operator
from ..stats import TokenStats, all_fields, run_token_stats
from .op import HEADS, PARAMS, over_chunks, value_dtype
from .rows import flat_scales, two_heads, without_last_time

_FIELDS = TOKEN_STATS + COMPARISON
_NO_GRADIENTS = [False, False, False]


def sweep_rows(
    params: LinearParams, student: Tensor, teacher: Tensor, keep: Tensor | None, scales: Tensor | None,
    labels: Tensor | None,
) -> Tensor:  # fmt: skip
    """`heads.SweepRows` of rows that are all here: statistics `[n, _FIELDS]`."""
    scales_and_backend = params.divergence[2:5]
    return all_fields(student, teacher, keep, labels, scales, scales_and_backend, True).t()


def _fake(*arguments: Any) -> Tensor:
    dtype = value_dtype(LinearParams.from_arguments(*arguments[8:])[0])
    return arguments[0].new_empty((len(arguments[0]), _FIELDS), dtype=dtype)


@operator(f"linear_token_stats({HEADS}, Tensor? labels, {PARAMS}) -> Tensor", _fake)
def fields_of_heads(*arguments: Any) -> Tensor:
    """`[N, _FIELDS]`, in the order of `backends.interface`."""
    return fields_over_chunks(*arguments)


def fields_over_chunks(*arguments: Any, **how: Any) -> Tensor:
    """The operator, whatever sweeps the rows, as `op.over_chunks` has it."""
    how = {"sweep_rows": sweep_rows} | how
    return over_chunks(*arguments[:8], _NO_GRADIENTS, *arguments[8:], fields=(_FIELDS,), **how)[0]


def _no_gradient(*_: object) -> Any:
    raise RuntimeError("kl_gpu.linear_token_stats has no gradient")


# What computes the fields `[N, _FIELDS]`, and its parameters. Weights have no rows.
Fields = Callable[..., Tensor]
_STEP = transforms.Step(
    lambda call, *tensors: (call[0](*tensors[:-1], *call[1].as_arguments(), tensors[-1]),),
    _no_gradient,
    values=0,
    rowwise=False,
)


def linear_token_stats(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> TokenStats:
    """Compare two models token by token, from their hidden states and LM heads.

    :func:`kl_gpu.token_stats` of the logits that :func:`kl_gpu.linear_div` describes. Only `chunk_rows` rows
    of both sides exist at a time, made by one matrix product each. There is no gradient: tensors that require
    one are fine, and the result is detached.

    Args:
        student_hidden, student_weight, teacher_hidden, teacher_weight: As in :func:`kl_gpu.linear_div`.
        labels: int `[N]`, as in :func:`kl_gpu.token_stats`.
        student_bias, teacher_bias, softcap, teacher_softcap: As in :func:`kl_gpu.linear_div`.
        logit_scale, teacher_logit_scale, chunk_rows: Likewise.
        temperature, teacher_temperature, mask, ignore_index, backend: As in :func:`kl_gpu.token_stats`.
        shift: Hidden states at t go with entry t + 1 of labels and mask. Needs `[batch, time, H]` and returns
            `[batch, time − 1]`.
        vocab_size: The softmax is over the first `vocab_size` rows of the weights on both sides. Required
            where the two V differ.

    Returns:
        TokenStats: float32 (float64 where both sides' logits are float64).

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, range, name or combination is wrong; the message names the argument.

    Example:
        >>> import torch, kl_gpu
        >>> hidden, head = torch.randn(4, 16), torch.randn(100, 16)
        >>> rounded = head.to(torch.float16).float()
        >>> stats = kl_gpu.linear_token_stats(hidden, rounded, hidden, head)
        >>> stats.forward_kl.shape
        torch.Size([4])
    """
    validation.of_one_rank(
        "linear_token_stats", student_hidden, student_weight, teacher_hidden, teacher_weight
    )
    sides = student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias
    options = Options(
        temperature=temperature, teacher_temperature=teacher_temperature, mask=mask, labels=labels,
        ignore_index=ignore_index, shift=shift, vocab_size=vocab_size, backend=backend,
    )  # fmt: skip
    return run_linear_token_stats(
        sides, options, fields_of_heads, softcap=softcap, teacher_softcap=teacher_softcap,
        logit_scale=logit_scale, teacher_logit_scale=teacher_logit_scale, chunk_rows=chunk_rows,
    )  # fmt: skip


def run_linear_token_stats(
    sides: tuple[Any, ...], options: Options, fields: Fields, columns: int | None = None, total: int = 0,
    **products: Any,
) -> TokenStats:  # fmt: skip
    """`linear_token_stats`, whatever computes the fields.

    Args:
        sides: hidden states, weight and bias, of the student and then of the teacher.
        columns: how many rows of the weights count, where they are a shard's of `total`.
        products: what makes the logits, as `rows.two_heads` has it.
    """
    validation.booleans(shift=options.shift)
    validation.temperatures(options.temperature, options.teacher_temperature)
    sides = tuple(x.detach() if isinstance(x, Tensor) else x for x in sides)
    flat, params, factors = two_heads(sides, ("forward_kl", 0.0), options, columns, **products)
    validation.rows(sides[0], options.mask, options.labels, options.ignore_index, None)
    lead = without_last_time(sides[0], options.shift).shape[:-1]

    def fields_of(valid: Tensor | None, labels: Tensor | None) -> tuple[Tensor, ...]:
        scales = options.scales(sides[0], valid, factors)
        rows = (None if x is None else x.reshape(-1) for x in (valid, labels))
        (found,) = transforms.apply(_STEP, (fields, params.scaled(scales)), *flat, *rows, flat_scales(scales))
        return tuple(x.view(lead) for x in found.t().contiguous().unbind(0))

    dtypes = params.student.dtype, params.teacher.dtype
    return run_token_stats(fields_of, options, total or params.vocab_size, *dtypes)

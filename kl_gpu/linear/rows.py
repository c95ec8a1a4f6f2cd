"""Rows that hidden states and an LM head stand for: what the entries of one model ask of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..arguments import validation
from ..arguments.options import Options
from ..arguments.params import (
    ComplementParams,
    DivergenceParams,
    HeadParams,
    LinearParams,
    LinearSplitParams,
)
from ..arguments.reduction import LogitsWindow
from ..arguments.temperatures import Scales, Temperature
from ..backends import registry
from ..columns import check_map
from ..complement import Rows
from ..inference_tensors import ordinary_rows
from . import split


def without_last_time(hidden: Tensor, shift: bool) -> Tensor:
    return hidden[:, :-1] if shift else hidden


def _logits_dtype(hidden: Tensor) -> torch.dtype:
    """What `F.linear` would compute in: under autocast everything but float64 is cast."""
    if validation.autocasts(hidden.device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def _products(
    hidden: Tensor, cap: tuple[str, Any], factor: tuple[str, Any], temperature: Temperature
) -> tuple[HeadParams, float]:
    """What makes the logits, and what multiplies them behind their cap, but for the temperature.

    Without a cap that is all of the factor: the sweep multiplies anyway. Both come with their arguments'
    names.
    """
    checked_cap, checked = validation.softcap(*cap), validation.logit_scale(*factor, temperature)
    inner, outer = (checked, 1.0) if checked_cap else (1.0, checked)
    return HeadParams(_logits_dtype(hidden), inner, checked_cap), outer


def _rows_per_chunk(value: Any) -> int:
    """0 where there is no wish."""
    if value is not None:
        validation.whole("chunk_rows", value, 1, " or None")
    return value or 0


def one_head(
    side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: int | None = None, *,
    softcap: Any, logit_scale: Any, temperature: Any, chunk_rows: Any, vocab_size: Any, shift: Any,
) -> Rows:  # fmt: skip
    """The rows of one model, checked.

    Args:
        side: what the arguments' names begin with.
        columns: how many rows of the weight count, where they are a shard's; else `vocab_size` says it.
    """
    validation.booleans(shift=shift)
    validation.temperature("temperature", temperature)
    validation.head(side, hidden, weight, bias, shift, least=1 if columns is None else 0)
    if columns is None:
        columns = validation.vocabulary({f"{side}weight": len(weight)}, "rows", vocab_size)
    how = _products(hidden, ("softcap", softcap), ("logit_scale", logit_scale), temperature)
    of = partial(_split, weight=weight, bias=bias, how=how, chunk_rows=_rows_per_chunk(chunk_rows))
    window = LogitsWindow(columns, shift)
    return Rows(f"{side}hidden", hidden, how[0].dtype, window, columns, of, factor=how[1])


def _split(
    hidden: Tensor, ids: Tensor, valid: Tensor | None, scales: Tensor | None, params: ComplementParams, *,
    weight: Tensor, bias: Tensor | None, how: tuple[HeadParams, float], chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`complement.SplitRows` of hidden states."""
    head, factor = how
    of = LinearSplitParams(
        head, params.window.vocab_size, chunk_rows, params.scale * factor, params.sweeps, params.entropy,
        params.validate, params.argument, params.backend,
    )  # fmt: skip
    states = without_last_time(hidden, params.window.shift)
    own = None if scales is None else scales * factor
    return split.split(states, weight, bias, ids, valid, own, of)


def rows_of_heads(
    heads: tuple[Any, ...], student_columns: Tensor | None, teacher_columns: Tensor | None, vocab_size: Any
) -> tuple[Any, ...]:
    """Both models' weights and biases in the rows that two vocabularies share."""
    if vocab_size is not None:
        raise ValueError(
            "vocab_size must be None where student_columns or teacher_columns say which columns count, "
            f"got {vocab_size}"
        )
    found: list[Any] = []
    for side, columns, (weight, bias) in (
        ("student", student_columns, heads[:2]), ("teacher", teacher_columns, heads[2:]),
    ):  # fmt: skip
        if columns is None:
            found += [weight, bias]
            continue
        validation.matrix(f"{side}_weight", weight)
        check_map(f"{side}_columns", columns, len(weight), weight.device)
        rows = ordinary_rows(columns).long()
        found += [None if x is None else x.index_select(0, rows) for x in (weight, bias)]
    if len(found[0]) != len(found[2]):
        raise ValueError(
            "student_columns and teacher_columns must name as many columns on both sides, "
            f"got {len(found[0])} of the student's and {len(found[2])} of the teacher's"
        )
    return tuple(found)


def two_heads(
    sides: tuple[Any, ...], kind: tuple[str, float], options: Options, columns: int | None = None, *,
    softcap: Any, teacher_softcap: Any, logit_scale: Any, teacher_logit_scale: Any, chunk_rows: Any,
) -> tuple[list[Tensor | None], LinearParams, tuple[float, float]]:  # fmt: skip
    """Both models' hidden states `[rows, H]`, weights and biases, checked; what to make of them but for their
    temperatures, which are checked; and the factors of both sides' logits.

    Args:
        sides: hidden states, weight and bias, of the student and then of the teacher.
        kind: what compares the logits, as `Kind.at` has it.
        columns: how many rows of the weights count, where they are a shard's; else `vocab_size` says it.
    """
    shift, temperature, other = options.shift, options.temperature, options.teacher_temperature
    validation.heads(sides, shift, least=1 if columns is None else 0)
    student, student_factor = _products(
        sides[0], ("softcap", softcap), ("logit_scale", logit_scale), temperature
    )
    teacher, teacher_factor = _products(
        sides[3], ("teacher_softcap", teacher_softcap), ("teacher_logit_scale", teacher_logit_scale),
        temperature if other is None else other,
    )  # fmt: skip
    chunk = _rows_per_chunk(chunk_rows)
    if columns is None:
        sizes = {"student_weight": len(sides[1]), "teacher_weight": len(sides[4])}
        columns = validation.vocabulary(sizes, "rows", options.vocab_size)
    divergence = DivergenceParams(*kind, 1.0, 1.0, registry.resolve(options.backend, sides[0].device))
    hidden = (without_last_time(x, shift).reshape(-1, x.shape[-1]) for x in (sides[0], sides[3]))
    flat = [next(hidden), *sides[1:3], next(hidden), *sides[4:6]]
    params = LinearParams(student, teacher, columns, chunk, divergence)
    return flat, params, (student_factor, teacher_factor)


def flat_scales(scales: Scales) -> Tensor | None:
    """1/temperature of each row, `[rows, 1]` or `[rows, 2]`."""
    return None if scales.rows is None else scales.rows.reshape(-1, scales.rows.shape[-1])

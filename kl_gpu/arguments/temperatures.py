"""Temperatures: numbers that all rows share, or tensors of each row's own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..inference_tensors import ordinary_rows
from . import validation
from .reduction import wide_dtype

# What an entry is given: a number, or a tensor of each row's.
Temperature = float | Tensor


class Scales(NamedTuple):
    """What multiplies the logits of both sides.

    Attributes:
        student, teacher: 1/temperature; 1 where `rows` has it.
        rows: 1/temperature of each row, in `wide_dtype`: `[*, 1]` of both sides, or `[*, 2]`, the student's
            and the teacher's. Some number > 0 in rows that do not count. None where all rows share one.
    """

    student: float
    teacher: float
    rows: Tensor | None


def of_rows(
    argument: str, value: Tensor, rows: Tensor, valid: Tensor | None, shift: bool, factor: float = 1.0
) -> Tensor:
    """Temperatures as the result has its rows, in `wide_dtype`, of logits that come with a factor.

    1 in rows that do not count. One that is out of range, by itself or over the factor, is refused where it
    can be looked at; elsewhere it is NaN, and so is its row. Nothing waits for a device.

    Args:
        rows: logits `[*, V]` or hidden states `[*, H]`, before any shift.
        valid: which rows count, as the result has them; None: all.
    """
    validation.temperature_of_rows(argument, value, rows)
    given = ordinary_rows(value.detach())
    given = given[:, :-1] if shift else given
    found = given.to(wide_dtype(given.device))
    if valid is not None:
        found = torch.where(valid, found, 1.0)
    low, high = validation.TEMPERATURE_RANGE
    good = (found >= low) & (found <= high)
    over = (found >= low * factor) & (found <= high * factor)
    good = good & (over if valid is None else over | ~valid)
    if validation.readable(value) and (valid is None or validation.readable(valid)):
        validation.temperatures_in_range(argument, found, good)
    return torch.where(good, found, torch.nan)


def scales(
    temperature: Temperature, teacher_temperature: Temperature | None, rows: Tensor, valid: Tensor | None,
    shift: bool, factors: tuple[float, float] = (1.0, 1.0), over: float = 1.0,
) -> Scales:  # fmt: skip
    """What multiplies both sides, whose logits come with these factors. A teacher's None is the student's.

    The temperatures' types have been checked, as have numbers; `rows` and `valid` as in `of_rows`. `over` is
    a factor that is applied elsewhere: rows' temperatures must be in range over it as well.
    """
    teacher = temperature if teacher_temperature is None else teacher_temperature
    if not (isinstance(temperature, Tensor) or isinstance(teacher, Tensor)):
        return Scales(factors[0] / float(temperature), factors[1] / float(teacher), None)
    # Not `!=`: torch.compile would take two symbols that are equal once for two constants.
    shared = teacher is temperature and not (factors[0] < factors[1] or factors[0] > factors[1])
    sides = [("temperature", temperature, factors[0])]
    if not shared:
        name = "temperature" if teacher is temperature else "teacher_temperature"
        sides.append((name, teacher, factors[1]))
    columns = [
        factor / (of_rows(name, x, rows, valid, shift, factor * over) if isinstance(x, Tensor) else float(x))
        for name, x, factor in sides
    ]
    whole = next(x for x in columns if isinstance(x, Tensor))
    each = [x if isinstance(x, Tensor) else torch.ones_like(whole) * x for x in columns]
    return Scales(1.0, 1.0, torch.stack(each, -1))

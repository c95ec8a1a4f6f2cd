"""The check of an output against float64, with the clock stopped."""

from __future__ import annotations

import torch

from .cases import Problem
from .systems import Entry, Output

_GRADIENT_ROWS = 4  # the first, the last and two between: all N in float64 would not fit


class WrongOutput(Exception):
    """A system returned something that is not the divergence it was asked for."""


def check(entry: Entry, workload: str, problem: Problem, turn: int, output: Output) -> float:
    """The value's largest relative error, over all rows. Raises WrongOutput."""
    system = entry.system

    def wrong(what: str) -> WrongOutput:
        return WrongOutput(f"{system.name} is wrong: {workload}, {problem.case}: {what}")

    _, _, pairs = problem.turn(turn)
    expected = problem.value[pairs]
    if workload == "value_grad":
        expected = expected.mean()
    if output.value.shape != expected.shape:
        raise wrong(f"value of shape {list(output.value.shape)}, not {list(expected.shape)}")

    error = float(((output.value.double() - expected).abs() / expected).max())
    if not error <= system.value_tolerance:  # so written that NaN fails
        raise wrong(f"value off by {error:.1e}, where {system.value_tolerance:.0e} is allowed")
    if workload != "value":
        excess = _gradient_excess(system.gradient_tolerance, workload, problem, turn, output)
        if not excess <= 1:
            raise wrong(f"gradient off by {excess:.1e} times what is allowed")
    return error


def _gradient_excess(tolerance: float, workload: str, problem: Problem, turn: int, output: Output) -> float:
    """The gradient's largest error, in units of what `tolerance` and the rounding to its dtype allow."""
    student, _, pairs = problem.turn(turn)
    gradient = output.gradient
    if gradient is None or gradient.shape != student.shape or gradient.dtype != student.dtype:
        return float("inf")
    rows = torch.linspace(0, len(pairs) - 1, _GRADIENT_ROWS).long().unique().to(pairs.device)
    pairs = pairs[rows]
    scale = problem.row_gradient[rows, None].double()
    if workload == "value_grad":
        scale = torch.full_like(scale, 1 / problem.case.rows)
    expected = problem.gradient[pairs] * scale
    number = torch.finfo(student.dtype)
    rounding = number.eps / 2 * expected.abs() + number.smallest_normal * number.eps
    allowed = tolerance * problem.gradient_unit[pairs] * scale + rounding
    return float(((gradient[rows].double() - expected).abs() / allowed).max())

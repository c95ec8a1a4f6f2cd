"""The operators of divergences with numbers of the student beside them, for backends that join the two.

As `ops.pair`, of which they are the variants: what the student's side is asked for is found in the same visit
of a row. `registry.joins` says which backends have them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..arguments.params import DivergenceParams
from ..backends import registry
from ..backends.interface import Beside, Joining, RowPair
from ..kinds import KINDS
from .pair import GRADS, INPUTS, PARAMS, ROW_SCALES, ask, split_arguments, value_outputs
from .register import no_output, operator
from .views import whole

_LABELS = "Tensor? labels, Tensor? label_scales"
_operator = partial(operator, of_rows=True)

# Values, statistics, entropies and surprises.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _outputs(student: Tensor, teacher: Tensor, *_: object) -> Outputs:
    entropies, surprises = (student.new_empty(student.shape[:-1], dtype=torch.float64) for _ in range(2))
    return *value_outputs(student, teacher), entropies, surprises


def _joining(params: DivergenceParams) -> Joining:
    backend = registry.joining(params.backend)
    if backend is None:
        raise RuntimeError(f"backend {params.backend!r} finds nothing beside a divergence")
    return backend


def _whole(found: list[Any], lead: torch.Size) -> Outputs:
    """What the blocks answer as one tensor each; zeros for what was not asked for."""
    values, stats = (whole([block[i] for block in found], lead) for i in (0, 1))
    beside = []
    for i in (0, 1):
        parts = [block[2][i] for block in found]
        missing = any(x is None for x in parts)
        zeros = torch.zeros(lead, dtype=torch.float64, device=values.device) if missing else None
        beside.append(whole(parts, lead) if zeros is None else zeros)
    return values, stats, beside[0], beside[1]


@_operator(
    f"value_and_beside({INPUTS}, {_LABELS}, bool entropy, {PARAMS}, {ROW_SCALES}) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _outputs,
)
def value_and_beside(
    student: Tensor, teacher: Tensor, rows: Tensor | None, labels: Tensor | None, label_scales: Tensor | None,
    entropy: bool, *params: Any,
) -> Outputs:  # fmt: skip
    """Values and statistics as `ops.pair.value` has them, the student's entropies and −log q of the labels,
    float64 `[N]` each; 0 where they are not asked for.

    Args:
        labels: int64 `[N]`, or None.
        label_scales: 1/temperature of that q, `[N]` or `[N, 1]`; None: 1.
    """
    of, scales = DivergenceParams(*params[: len(DivergenceParams._fields)]), None
    if len(params) > len(DivergenceParams._fields):
        scales = params[-1]
    of_a, run = KINDS[of.kind].as_ab(True, False)[0], _joining(of).value_and_beside

    def block(pair: RowPair, labels: Tensor | None, label_scales: Tensor | None) -> Any:
        return run(pair, Beside(of_a, entropy, labels, label_scales))

    return _whole(ask(block, student, teacher, rows, of, scales, (labels, label_scales)), student.shape[:-1])


@_operator(
    f"value_and_gradient_and_beside({INPUTS}, {_LABELS}, bool entropy, Tensor row_scale, "
    f"Tensor? label_row_scale, {PARAMS}, {GRADS}, {ROW_SCALES}) -> (Tensor, Tensor, Tensor, Tensor)",
    _outputs,
)
def value_and_gradient_and_beside(
    student: Tensor, teacher: Tensor, rows: Tensor | None, labels: Tensor | None, label_scales: Tensor | None,
    entropy: bool, row_scale: Tensor, label_row_scale: Tensor | None, *arguments: Any,
) -> Outputs:  # fmt: skip
    """`value_and_beside` with the gradient that `gradient_with_labels` writes."""
    of, scales, grads = split_arguments(arguments)
    of_a, run = KINDS[of.kind].as_ab(True, False)[0], _joining(of).value_and_gradient_and_beside

    def block(pair: RowPair, *own: Any) -> Any:
        row_scale, labels, label_scales, label_row_scale, *to = own
        return run(pair, Beside(of_a, entropy, labels, label_scales), row_scale, label_row_scale, *to)

    per_row = row_scale, labels, label_scales, label_row_scale
    return _whole(ask(block, student, teacher, rows, of, scales, per_row, grads), student.shape[:-1])


@_operator(
    f"gradient_with_labels({INPUTS}, {_LABELS}, Tensor stats, Tensor surprises, Tensor row_scale, "
    f"Tensor label_row_scale, {PARAMS}, {GRADS}, {ROW_SCALES}) -> ()",
    no_output,
)
def gradient_with_labels(
    student: Tensor, teacher: Tensor, rows: Tensor | None, labels: Tensor | None, label_scales: Tensor | None,
    stats: Tensor, surprises: Tensor, row_scale: Tensor, label_row_scale: Tensor, *arguments: Any,
) -> None:  # fmt: skip
    """As `Joining.gradient_with_labels` has it."""
    of, scales, grads = split_arguments(arguments)
    of_a, run = KINDS[of.kind].as_ab(True, False)[0], _joining(of).gradient_with_labels

    def block(pair: RowPair, *own: Any) -> None:
        labels, label_scales, *others = own
        run(pair, Beside(of_a, False, labels, label_scales), *others)

    per_row = labels, label_scales, stats, surprises, row_scale, label_row_scale
    ask(block, student, teacher, rows, of, scales, per_row, grads)

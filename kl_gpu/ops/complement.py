"""The operators of a row's picked columns and their complement, registered with torch.library."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments.reduction import wide_dtype
from ..backends import registry
from ..backends.interface import COMPLEMENT_STATS, ComplementArgs
from .register import like_first, no_output, operator
from .views import blocks, each_whole, flat_rows

_MOST = 1.05  # a row's probability: 16-bit rounding may add 2 %

_ROWS = "Tensor logits, Tensor ids, Tensor? rows"
# 1/temperature of each row, `[N, 1]`, in place of `scale`.
_ROW_SCALES = "Tensor? scales=None"


def present(ids: Tensor, columns: int) -> Tensor:
    return (ids >= 0) & (ids < columns)


def check_ids(ids: Tensor, rows: Tensor | None, columns: int, argument: str) -> None:
    """Refuse ids that are out of range or given twice. Waits for the device."""
    lowest = 0 if argument == "token_ids" else -1
    if rows is not None:
        ids = torch.where(rows[..., None], ids, lowest)
    outside = (ids >= columns) | (ids < lowest)
    if bool(outside.any()):
        absent = ", or -1 for an absent entry" if lowest else ""
        raise ValueError(f"{argument} must be within [0, {columns}){absent}, got {int(ids[outside][0])}")
    if ids.shape[-1] == 1:
        return
    ordered = ids.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if bool(twice.any()):
        raise ValueError(
            f"{argument} must be different within a row, got {int(ordered[..., 1:][twice][0])} twice; "
            "an absent entry has id -1, or log-probability -inf where its id stands elsewhere in the row"
        )


def _picked_logits_output(logits: Tensor, ids: Tensor, *_: object) -> Tensor:
    return logits.new_empty(ids.shape, dtype=wide_dtype(logits.device))


@operator(f"given_columns({_ROWS}, bool validate, str argument) -> Tensor", _picked_logits_output)
def picked_logits(logits: Tensor, ids: Tensor, rows: Tensor | None, validate: bool, argument: str) -> Tensor:
    if validate:
        check_ids(ids, rows, logits.shape[-1], argument)
    # An id outside never reaches memory: column 0 is read in its place.
    here = present(ids, logits.shape[-1])
    picked = logits.gather(-1, torch.where(here, ids, 0)).to(wide_dtype(logits.device))
    return torch.where(here, picked, -torch.inf)


@operator("without_padding(Tensor ids, Tensor log_p, SymInt columns) -> Tensor", like_first)
def without_padding(ids: Tensor, log_p: Tensor, columns: int) -> Tensor:
    """The ids, −1 where an entry has log-probability −inf and its id stands elsewhere in its row.

    Many programs pad a row with (0, −inf). Taken as given, such ids would count as often as they stand there.
    A single one stays: it says that this token has probability 0.
    """
    empty = torch.isneginf(log_p) & present(ids, columns)  # what lies outside is for `check_ids` to refuse
    # Sorting is slow on a CPU, and asking costs nothing there.
    if ids.shape[-1] == 1 or (ids.device.type == "cpu" and not bool(empty.any())):
        return ids.clone()
    ordered, where = ids.sort(-1)
    same = ordered[..., 1:] == ordered[..., :-1]
    pad = torch.nn.functional.pad
    twice = torch.empty_like(empty).scatter_(-1, where, pad(same, (0, 1)) | pad(same, (1, 0)))
    return torch.where(empty & twice, -1, ids)


def _refuse(wrong: Tensor, mass: Tensor, rows: Tensor | None, message: str) -> None:
    """Refuse rows that are wrong, with the probability that the first of them holds. Waits for the device."""
    if rows is not None:
        wrong = wrong & rows
    if bool(wrong.any()):
        raise ValueError(f"{message} {float(mass[wrong][0]):.6g}")


@operator("check_mass(Tensor log_p, Tensor? rows, str side) -> Tensor", like_first)
def check_mass(log_p: Tensor, rows: Tensor | None, side: str) -> Tensor:
    """log_p itself, once its rows are known to be log-probabilities. Waits for the device.

    A result, so that torch.compile does not drop the question.
    """
    mass = torch.exp(log_p).sum(-1)
    _refuse(
        mass > _MOST, mass, rows,
        f"{side}_logprobs must be log-probabilities under the {side}'s full softmax, "
        "got a row that sums to",
    )  # fmt: skip
    return log_p.clone()


@operator("check_tail(Tensor rest_log_p, Tensor log_p, Tensor? rows) -> Tensor", like_first)
def check_tail(rest_log_p: Tensor, log_p: Tensor, rows: Tensor | None) -> Tensor:
    """rest_log_p itself, once it is known to be what log_p may leave. Waits for the device.

    A NaN in log_p is not its fault: such a row is NaN, as `topk_logprobs` gives it.
    """
    mass = torch.exp(rest_log_p) + torch.exp(log_p).sum(-1)
    _refuse(
        (mass > _MOST) | (torch.isnan(rest_log_p) & ~torch.isnan(log_p).any(-1)), mass, rows,
        "teacher_tail_logprob must be the log-probability of all tokens outside teacher_ids together, "
        "got a row that sums with teacher_logprobs to",
    )  # fmt: skip
    return rest_log_p.clone()


def _complement_outputs(logits: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    lead, dtype = logits.shape[:-1], wide_dtype(logits.device)
    shapes = lead, lead, (*lead, COMPLEMENT_STATS)
    return tuple(logits.new_empty(shape, dtype=dtype) for shape in shapes)  # type: ignore[return-value]


@operator(
    f"remainder({_ROWS}, float scale, bool entropy, str backend, {_ROW_SCALES}) -> (Tensor, Tensor, Tensor)",
    _complement_outputs,
    of_rows=True,
)
def complement(
    logits: Tensor, ids: Tensor, rows: Tensor | None, scale: float, entropy: bool, backend: str,
    scales: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The complement's log-sum-exp and entropy `[N]`, and row statistics `[N, COMPLEMENT_STATS]`."""
    run, lead = registry.load(backend).complement, logits.shape[:-1]
    rows = None if rows is None else rows.contiguous()
    found = [
        run(ComplementArgs(x, some_ids, keep, scale, own), entropy)
        for (x, keep), (some_ids, own) in blocks(
            lead, [logits, rows], [flat_rows(ids, lead), flat_rows(scales, lead)]
        )
    ]
    return each_whole(found, lead)


@operator(
    f"remainder_gradient({_ROWS}, Tensor stats, Tensor to_given, Tensor to_rest, Tensor? to_entropy, "
    f"float scale, str backend, Tensor(a!) grad, {_ROW_SCALES}) -> ()",
    no_output,
    of_rows=True,
)
def complement_gradient(
    logits: Tensor, ids: Tensor, rows: Tensor | None, stats: Tensor, grad_picked: Tensor, grad_rest: Tensor,
    grad_entropy: Tensor | None, scale: float, backend: str, grad: Tensor,
    scales: Tensor | None = None,
) -> None:  # fmt: skip
    """As `Backend.complement_gradient` has it."""
    run, lead = registry.load(backend).complement_gradient, logits.shape[:-1]
    rows = None if rows is None else rows.contiguous()
    flat = [flat_rows(x, lead) for x in (ids, scales, stats, grad_picked, grad_rest, grad_entropy)]
    for (x, keep, to), (some_ids, of_rows, own, to_picked, to_rest, turn) in blocks(
        lead, [logits, rows, grad], flat
    ):
        run(ComplementArgs(x, some_ids, keep, scale, of_rows), own, to_picked, to_rest, turn, to)

"""The operators of a row's picked columns and their complement, registered with torch.library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..backends import registry
from ..backends.interface import COMPLEMENT_STATS, ComplementArgs, wide_dtype
from . import symbols
from .register import Implementations, no_output, register
from .views import flat_rows, views

_MOST = 1.05  # a row's probability: 16-bit rounding may add 2 %

_library = torch.library.Library("kl_gpu", "FRAGMENT")
_ROWS = "Tensor logits, Tensor ids, Tensor? rows"
_library.define(f"given_columns({_ROWS}, bool validate, str argument) -> Tensor")
_library.define("check_mass(Tensor log_p, Tensor? rows) -> Tensor")
_library.define("check_tail(Tensor rest_log_p, Tensor log_p, Tensor? rows) -> Tensor")
_library.define("without_padding(Tensor ids, Tensor log_p, SymInt columns) -> Tensor")
_library.define(f"remainder({_ROWS}, float scale, bool entropy, str backend) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"remainder_gradient({_ROWS}, Tensor stats, Tensor to_given, Tensor to_rest, Tensor? to_entropy, "
    "float scale, str backend, Tensor(a!) grad) -> ()"
)


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


def _picked_logits(logits: Tensor, ids: Tensor, rows: Tensor | None, validate: bool, argument: str) -> Tensor:
    if validate:
        check_ids(ids, rows, logits.shape[-1], argument)
    # An id outside never reaches memory: column 0 is read in its place.
    here = present(ids, logits.shape[-1])
    picked = logits.gather(-1, torch.where(here, ids, 0)).to(wide_dtype(logits.device))
    return torch.where(here, picked, -torch.inf)


def _picked_logits_fake(logits: Tensor, ids: Tensor, *_: object) -> Tensor:
    return logits.new_empty(ids.shape, dtype=wide_dtype(logits.device))


def _without_padding(ids: Tensor, log_p: Tensor, columns: int) -> Tensor:
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


def _without_padding_fake(ids: Tensor, *_: object) -> Tensor:
    return torch.empty_like(ids)


def _refuse(wrong: Tensor, mass: Tensor, rows: Tensor | None, message: str) -> None:
    """Refuse rows that are wrong, with the probability that the first of them holds. Waits for the device."""
    if rows is not None:
        wrong = wrong & rows
    if bool(wrong.any()):
        raise ValueError(f"{message} {float(mass[wrong][0]):.6g}")


def _check_mass(log_p: Tensor, rows: Tensor | None) -> Tensor:
    """log_p itself, once its rows are known to be log-probabilities. Waits for the device.

    A result, so that torch.compile does not drop the question.
    """
    mass = torch.exp(log_p).sum(-1)
    _refuse(
        mass > _MOST, mass, rows,
        "teacher_logprobs must be log-probabilities under the teacher's full softmax, "
        "got a row that sums to",
    )  # fmt: skip
    return log_p.clone()


def _check_mass_fake(log_p: Tensor, rows: Tensor | None) -> Tensor:
    return torch.empty_like(log_p)


def _check_tail(rest_log_p: Tensor, log_p: Tensor, rows: Tensor | None) -> Tensor:
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


def _check_tail_fake(rest_log_p: Tensor, *_: object) -> Tensor:
    return torch.empty_like(rest_log_p)


def _blocks(
    logits: Tensor, ids: Tensor, valid: Tensor | None, scale: float, grad: Tensor | None = None
) -> Iterator[tuple[slice, ComplementArgs, Any]]:
    """Each block of rows of two strides: its flat row numbers, what a backend is asked, its gradient."""
    tensors = [logits, ids.contiguous(), None if valid is None else valid.contiguous(), grad]
    start = 0
    for x, some_ids, keep, to in views(logits.shape[:-1], tensors):
        args = ComplementArgs(x, some_ids.view(-1, ids.shape[-1]), keep, scale)
        part = slice(start, start + args.n_rows)
        start = part.stop
        yield part, args, to


def _complement_outputs(logits: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    lead, dtype = logits.shape[:-1], wide_dtype(logits.device)
    shapes = lead, lead, (*lead, COMPLEMENT_STATS)
    return tuple(logits.new_empty(shape, dtype=dtype) for shape in shapes)  # type: ignore[return-value]


def _complement(
    logits: Tensor, ids: Tensor, rows: Tensor | None, scale: float, entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if logits.numel() == 0:
        return _complement_outputs(logits)
    run, lead = registry.load(backend).complement, logits.shape[:-1]
    found = [run(args, entropy) for _, args, _ in _blocks(logits, ids, rows, scale)]
    rest_lse, rest_entropy, stats = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
    return rest_lse.view(lead), rest_entropy.view(lead), stats.view(*lead, COMPLEMENT_STATS)


def _complement_gradient(
    logits: Tensor, ids: Tensor, rows: Tensor | None, stats: Tensor, grad_picked: Tensor, grad_rest: Tensor,
    grad_entropy: Tensor | None, scale: float, backend: str, grad: Tensor,
) -> None:  # fmt: skip
    if logits.numel() == 0:
        return
    run, lead = registry.load(backend).complement_gradient, logits.shape[:-1]
    flat_stats, flat_picked, flat_rest = (flat_rows(x, lead) for x in (stats, grad_picked, grad_rest))
    flat_entropy = None if grad_entropy is None else flat_rows(grad_entropy, lead)
    for part, args, to in _blocks(logits, ids, rows, scale, grad):
        some_entropy = None if flat_entropy is None else flat_entropy[part]
        run(args, flat_stats[part], flat_picked[part], flat_rest[part], some_entropy, to)


_IMPLEMENTATIONS: Implementations = {
    "given_columns": (_picked_logits, _picked_logits_fake),
    "remainder": (_complement, _complement_outputs),
    "remainder_gradient": (_complement_gradient, no_output),
    "check_mass": (_check_mass, _check_mass_fake),
    "check_tail": (_check_tail, _check_tail_fake),
    "without_padding": (_without_padding, _without_padding_fake),
}
register(_library, _IMPLEMENTATIONS)

picked_logits = torch.ops.kl_gpu.given_columns.default
check_mass = torch.ops.kl_gpu.check_mass.default
check_tail = torch.ops.kl_gpu.check_tail.default
without_padding = torch.ops.kl_gpu.without_padding.default
complement = symbols.operator("remainder")
complement_gradient = symbols.operator("remainder_gradient")

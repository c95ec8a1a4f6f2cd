"""A row of logits split at given columns: their logits, and the log-sum-exp of all the others.

What `token_logprobs` and `topk_div` are made of. With s the scaled logits and u = log Σ e^{s_j} over the
columns not given, a function of the given columns' s and of u is all they need, and its gradient is sparse
but for one term: ∂u/∂s_j = e^{s_j − u} in every other column. u is summed without the given columns, never by
taking them off again: where they hold nearly all the mass, nothing would be left but rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autograd, ops, symbols, transforms
from .autograd import once_differentiable
from .rows import Window

_MODULES = {
    "triton": "kl_gpu.triton.remainder",
    "native": "kl_gpu.native_remainder",
    "eager": "kl_gpu.eager_remainder",
}
# Numbers kept per row between value and gradient. What they mean is each backend's own affair.
STATS = 4
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


@cache
def _module(backend: str) -> ModuleType:
    return import_module(_MODULES[backend])


def wide_dtype(device: torch.device) -> torch.dtype:
    """What is computed per given column: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class Part(NamedTuple):
    """What a backend is asked: log Σ exp(scale · logit) over the columns not in `ids`, row by row.

    Attributes:
        logits: `[A, B, V]`, last stride 1, the other two anything.
        ids: int64 `[A*B, K]`, contiguous; what lies outside [0, V) names no column.
        rows: bool `[A, B]`, or None where every row counts. A row that is False has gradient 0.
        scale: 1/temperature.
    """

    logits: Tensor
    ids: Tensor
    rows: Tensor | None
    scale: float

    @property
    def n_rows(self) -> int:
        return self.ids.shape[0]


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


def _given_columns(logits: Tensor, ids: Tensor, rows: Tensor | None, validate: bool, argument: str) -> Tensor:
    if validate:
        check_ids(ids, rows, logits.shape[-1], argument)
    # An id outside never reaches memory: column 0 is read in its place.
    here = present(ids, logits.shape[-1])
    given = logits.gather(-1, torch.where(here, ids, 0)).to(wide_dtype(logits.device))
    return torch.where(here, given, -torch.inf)


def _given_columns_fake(logits: Tensor, ids: Tensor, *_: object) -> Tensor:
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


def _parts(
    logits: Tensor, ids: Tensor, rows: Tensor | None, scale: float, grad: Tensor | None = None
) -> Iterator[tuple[slice, Part, Tensor | None]]:
    ids = ids.contiguous()
    rows = None if rows is None else rows.contiguous()
    start = 0
    for x, some_ids, keep, to in ops.views(logits.shape[:-1], [logits, ids, rows, grad]):
        part = Part(x, some_ids.view(-1, ids.shape[-1]), keep, scale)
        rows_of_part = slice(start, start + part.n_rows)
        start = rows_of_part.stop
        yield rows_of_part, part, to


def _remainder_fake(logits: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    lead, dtype = logits.shape[:-1], wide_dtype(logits.device)
    return tuple(logits.new_empty(shape, dtype=dtype) for shape in (lead, lead, (*lead, STATS)))  # type: ignore[return-value]


def _remainder(
    logits: Tensor, ids: Tensor, rows: Tensor | None, scale: float, entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if logits.numel() == 0:
        return _remainder_fake(logits)
    run, lead = _module(backend).remainder, logits.shape[:-1]
    found = [run(part, entropy) for _, part, _ in _parts(logits, ids, rows, scale)]
    rest, spread, stats = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
    return rest.view(lead), spread.view(lead), stats.view(*lead, STATS)


def _remainder_gradient(
    logits: Tensor,
    ids: Tensor,
    rows: Tensor | None,
    stats: Tensor,
    to_given: Tensor,
    to_rest: Tensor,
    to_entropy: Tensor | None,
    scale: float,
    backend: str,
    grad: Tensor,
) -> None:
    if logits.numel() == 0:
        return
    run = _module(backend).gradient
    flat = [None if x is None else x.contiguous().view(-1) for x in (to_rest, to_entropy)]
    flat_stats, flat_given = stats.reshape(-1, STATS), to_given.contiguous().view(-1, ids.shape[-1])
    for some, part, to in _parts(logits, ids, rows, scale, grad):
        some_rest, some_entropy = (None if x is None else x[some] for x in flat)
        run(part, flat_stats[some], flat_given[some], some_rest, some_entropy, to)


def _nothing(*_: object) -> None:
    return None


_IMPLEMENTATIONS: ops.Implementations = {
    "given_columns": (_given_columns, _given_columns_fake),
    "remainder": (_remainder, _remainder_fake),
    "remainder_gradient": (_remainder_gradient, _nothing),
    "check_mass": (_check_mass, _check_mass_fake),
    "check_tail": (_check_tail, _check_tail_fake),
    "without_padding": (_without_padding, _without_padding_fake),
}
ops.register(_library, _IMPLEMENTATIONS)

given_columns = torch.ops.kl_gpu.given_columns.default
check_mass = torch.ops.kl_gpu.check_mass.default
check_tail = torch.ops.kl_gpu.check_tail.default
without_padding = torch.ops.kl_gpu.without_padding.default
remainder = symbols.operator("remainder")
remainder_gradient = symbols.operator("remainder_gradient")


def _constant(*_: object) -> Any:
    raise RuntimeError("kl_gpu has no gradient to the teacher's log-probabilities")


def _of_the_teacher(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operator of tensors and constants that is not differentiable, also under torch.func."""
    step = transforms.Step(lambda call, *tensors: (function(*tensors, *call),), _constant, values=0)

    def run(*tensors: Tensor | None, constants: tuple[Any, ...] = ()) -> Tensor:
        if transforms.are_active():
            return transforms.run(step, constants, *tensors)[0]
        return function(*tensors, *constants)

    return run


checked_mass = _of_the_teacher(check_mass)
checked_tail = _of_the_teacher(check_tail)
unpadded = _of_the_teacher(without_padding)


class Call(NamedTuple):
    """What stays the same between forward and backward, tensors apart.

    Attributes:
        scale: 1/temperature.
        sweeps: whether the columns not given count; without them only the given are read.
        entropy: whether the entropy of the columns not given is asked for.
        validate: whether ids that are out of range or given twice are refused, in the name of `argument`.
    """

    scale: float
    sweeps: bool
    entropy: bool
    validate: bool
    argument: str
    backend: str
    window: Window
    inplace: bool = False


def _split(
    call: Call, logits: Tensor, ids: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `Split` gives, and the row statistics."""
    x = call.window.of(logits)
    given = given_columns(x, ids, rows, call.validate, call.argument) * call.scale
    if call.sweeps:
        return given, *remainder(x, ids, rows, call.scale, call.entropy, call.backend)
    rest, entropy = (given.new_zeros(x.shape[:-1]) for _ in range(2))
    return given, rest, entropy, given.new_zeros((*x.shape[:-1], STATS))


def _to_logits(
    call: Call, logits: Tensor, ids: Tensor, rows: Tensor | None, stats: Tensor, incoming: Any
) -> Tensor:
    to_given, to_rest, to_entropy = incoming
    with torch.no_grad():
        grad = logits.detach() if call.inplace else torch.empty_like(logits)
        remainder_gradient(
            call.window.of(logits), ids, rows, stats, to_given, to_rest,
            to_entropy if call.entropy else None, call.scale, call.backend, call.window.of(grad),
        )  # fmt: skip
        call.window.zero_rest(grad)
        if call.inplace:
            # A second backward would read gradients as logits: the version counter makes it raise.
            torch.autograd.graph.increment_version(logits)
    return grad


def _pull(call: Call, needs: Any, incoming: Any, tensors: Any, kept: Any) -> Any:
    logits, ids, rows = tensors
    return _to_logits(call, logits, ids, rows, kept[0], incoming), None, None


_STEP = transforms.Step(_split, _pull, values=3)


class Split(torch.autograd.Function):
    """From logits `[*, V]` and ids `[*, K]` to the ids' scaled logits, u, and the others' entropy.

    In float64. −inf for an absent id, and for u where no other column has mass. Without `sweeps` u and the
    entropy are 0.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, rows: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        given, rest, entropy, stats = _split(call, logits, ids, rows)
        autograd.keep(ctx, logits, ids, rows, stats)
        ctx.call = call
        return given, rest, entropy

    @staticmethod
    def backward(
        ctx: Any, to_given: Tensor, to_rest: Tensor, to_entropy: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, ids, rows, stats = autograd.kept(ctx)
        grad = _to_logits(ctx.call, logits, ids, rows, stats, (to_given, to_rest, to_entropy))
        (tied,) = once_differentiable((grad,), to_given, to_rest, logits)
        return tied, None, None, None


def split(logits: Tensor, ids: Tensor, rows: Tensor | None, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """`Split`, also under torch.func."""
    if transforms.are_active():
        return transforms.run(_STEP, call, logits, ids, rows)[:3]  # type: ignore[return-value]
    found: tuple[Tensor, Tensor, Tensor] = Split.apply(logits, ids, rows, call)
    return found


# What gives `Split`'s three, from logits, ids, the rows that count and the call.
SplitRows = Callable[[Tensor, Tensor, "Tensor | None", Call], "tuple[Tensor, Tensor, Tensor]"]

"""A row of logits split in picked columns and their complement, the log-sum-exp of all others.

What `token_logprobs` and `topk_div` are made of. With s the scaled logits and u = log Σ e^{s_j} over the
complement, a function of the picked columns' s and of u is all they need, and its gradient is sparse but for
one term: ∂u/∂s_j = e^{s_j − u} in every column of the complement. u is summed without the picked columns,
never by taking them off again: where they hold nearly all the mass, nothing would be left but rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import transforms
from .arguments import validation
from .arguments.params import ComplementParams
from .arguments.reduction import LogitsWindow, last_contiguous
from .arguments.temperatures import Scales
from .backends.interface import COMPLEMENT_STATS
from .ops import complement as ops
from .ops.memory import gradient_buffer


def _constant(*_: object) -> Any:
    raise RuntimeError("kl_gpu has no gradient to the teacher's log-probabilities")


def _of_the_teacher(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operator of tensors and constants that is not differentiable, also under torch.func."""
    step = transforms.Step(lambda constants, *tensors: (function(*tensors, *constants),), _constant, values=0)

    def run(*tensors: Tensor | None, constants: tuple[Any, ...] = ()) -> Tensor:
        found: Tensor = transforms.apply(step, constants, *tensors)[0]
        return found

    return run


check_ids = ops.check_ids
checked_mass = _of_the_teacher(ops.check_mass)
checked_tail = _of_the_teacher(ops.check_tail)
unpadded = _of_the_teacher(ops.without_padding)


def _split(
    params: ComplementParams, logits: Tensor, ids: Tensor, valid: Tensor | None, scales: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `split` gives, and the row statistics."""
    x = params.window.of(logits)
    picked = ops.picked_logits(x, ids, valid, params.validate, params.argument)
    picked = picked * (params.scale if scales is None else scales)
    if params.sweeps:
        return picked, *ops.complement(x, ids, valid, params.scale, params.entropy, params.backend, scales)
    rest_lse, rest_entropy = (picked.new_zeros(x.shape[:-1]) for _ in range(2))
    return picked, rest_lse, rest_entropy, picked.new_zeros((*x.shape[:-1], COMPLEMENT_STATS))


def _to_logits(params: ComplementParams, needs: Any, incoming: Any, tensors: Any, kept: Any) -> Any:
    (logits, ids, valid, scales), (stats,) = tensors, kept
    grad_picked, grad_rest, grad_entropy = incoming
    with torch.no_grad():
        grad = logits.detach() if params.inplace else gradient_buffer(logits)
        ops.complement_gradient(
            params.window.of(logits), ids, valid, stats, grad_picked, grad_rest,
            grad_entropy if params.entropy else None, params.scale, params.backend, params.window.of(grad),
            scales,
        )  # fmt: skip
        params.window.zero_rest(grad)
        if params.inplace:
            # A second backward would read gradients as logits: the version counter makes it raise.
            torch.autograd.graph.increment_version(logits)
    return grad, None, None, None


_STEP = transforms.Step(_split, _to_logits, values=3)


def split(
    logits: Tensor, ids: Tensor, valid: Tensor | None, scales: Tensor | None, params: ComplementParams
) -> tuple[Tensor, Tensor, Tensor]:
    """From logits `[*, V]` and ids `[*, K]` to the picked scaled logits, and the complement's log-sum-exp and
    entropy.

    In float64. −inf for an absent id, and for the log-sum-exp where no other column has mass. Without
    `sweeps` it and the entropy are 0. `scales` `[*, 1]` are 1/temperature of each row, in place of the
    parameters'.
    """
    found: tuple[Tensor, Tensor, Tensor] = transforms.apply(
        _STEP, params, last_contiguous(logits), ids, valid, scales
    )
    return found


def entropies(
    split_rows: SplitRows, logits: Tensor, valid: Tensor | None, scales: Scales, window: LogitsWindow,
    backend: str,
) -> Tensor:  # fmt: skip
    """−Σ q log q of the student's rows, in `wide_dtype`, as a constant; 0 in rows that do not count.

    All columns are the complement of none that is picked.
    """
    lead = window.of(logits).shape[:-1]
    none = torch.full((*lead, 1), -1, dtype=torch.int64, device=logits.device)
    params = ComplementParams(scales.student, True, True, False, "", backend, window)
    own = None if scales.rows is None else scales.rows[..., :1]
    found = split_rows(logits.detach(), none, valid, own, params)[2].detach()
    return found if valid is None else torch.where(valid, found, 0.0)


# What computes `split`, from logits, ids, the rows that count, their scales and the parameters.
SplitRows = Callable[
    [Tensor, Tensor, "Tensor | None", "Tensor | None", ComplementParams], "tuple[Tensor, Tensor, Tensor]"
]


class Rows(NamedTuple):
    """Rows of logits, or what takes their place, and what splits them.

    Attributes:
        argument: the tensor's name among the caller's arguments.
        tensor: `[*, V]`, or hidden states `[*, H]`; what is given per row has its leading shape and device.
        dtype: of the logits.
        window: the part that counts, of the columns that are here.
        columns: how many count in the whole vocabulary.
        split: what computes `split`.
        factor: what `split` multiplies the logits by, besides 1/temperature.
    """

    argument: str
    tensor: Tensor
    dtype: torch.dtype
    window: LogitsWindow
    columns: int
    split: SplitRows
    factor: float = 1.0


def logits_rows(
    argument: str, logits: Tensor, vocab_size: int | None, shift: bool, columns: int = 0,
    split: SplitRows = split,
) -> Rows:  # fmt: skip
    """The rows of logits `[*, V]`, checked; `columns` where they are a shard of more."""
    validation.booleans(shift=shift)
    here = validation.one_sided_logits(argument, logits, vocab_size, shift)
    return Rows(argument, logits, logits.dtype, LogitsWindow(here, shift), columns or here, split)

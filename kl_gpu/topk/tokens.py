"""Log-probabilities of one token per row, and of K, among which one may stand more than once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import transforms
from ..arguments.params import ComplementParams
from ..arguments.reduction import LogitsWindow
from ..complement import SplitRows
from ..ops.complement import present
from . import token_formulas as formulas


def _value(
    columns: int, s: Tensor, rest_lse: Tensor, rest_entropy: Tensor, ids: Tensor, valid: Tensor | None
) -> tuple[Tensor, ...]:
    """log q of the token, the entropy, and the five derivatives that `token_formulas.token` names."""
    # A token outside the vocabulary has no probability to report: NaN, never a plausible number.
    s = torch.where(present(ids, columns), s, torch.nan)
    found: list[Tensor] = formulas.token(s, rest_lse, rest_entropy)
    return tuple(found) if valid is None else tuple(torch.where(valid, x, 0.0) for x in found)


def _pull_one(columns: int, needs: Any, incoming: Any, tensors: Any, kept: Any) -> Any:
    grad_logprob, grad_entropy = incoming
    logprob_s, logprob_rest, entropy_s, entropy_rest, entropy_rest_entropy = kept
    return (
        grad_logprob * logprob_s + grad_entropy * entropy_s,
        grad_logprob * logprob_rest + grad_entropy * entropy_rest,
        grad_entropy * entropy_rest_entropy,
        None,
        None,
    )


# From a row's split (`complement.split`) to log q of its token and the entropy, `[*]` each.
ONE = transforms.Step(_value, _pull_one, values=2, saves_inputs=False)


def surprises(
    split_rows: SplitRows, logits: Tensor, labels: Tensor, valid: Tensor | None, window: LogitsWindow,
    columns: int, backend: str,
) -> Tensor:  # fmt: skip
    """−log q of the rows' labels `[*]`, at temperature 1, in `wide_dtype`; 0 in rows that do not count.

    Args:
        labels: int64, as the result has its rows; NaN for one that is none of the `columns` of the whole row.
    """
    params = ComplementParams(1.0, True, False, False, "labels", backend, window)
    picked, *rest = split_rows(logits, labels[..., None], valid, None, params)
    logprob: Tensor = transforms.apply(ONE, columns, picked[..., 0], *rest, labels, valid)[0]
    return -logprob


class Places(NamedTuple):
    """Where K tokens of a row stand once they are sorted and those given twice are set aside; `[*, K]` each.

    Attributes:
        order: the sorted entries' places in the given order.
        ordered: the ids in ascending order, −1 where absent.
        picked: the same, −1 also where an id stands before it already.
        first: for an entry in the given order, where its id first stands among the sorted ones.
    """

    order: Tensor
    ordered: Tensor
    picked: Tensor
    first: Tensor

    @classmethod
    def of(cls, ids: Tensor) -> Places:
        ordered, order = ids.sort(-1)
        again = pad(ordered[..., 1:] == ordered[..., :-1], (1, 0))
        place = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
        first = torch.where(again, 0, place).cummax(-1).values
        back = torch.empty_like(order).scatter_(-1, order, place)
        return cls(order, ordered, torch.where(again, -1, ordered), first.gather(-1, back))


def sums_of_equals(given: Tensor, places: Places) -> Tensor:
    """What entries of one id hold together, at the first of them in the sorted order; `[*, K]`.

    Added in a fixed order, as a scatter on a device would not.
    """
    total, step = given.gather(-1, places.order), 1
    while step < total.shape[-1]:
        same = places.ordered[..., step:] == places.ordered[..., :-step]
        total = total + torch.where(pad(same, (0, step)), pad(total[..., step:], (0, step)), 0.0)
        step *= 2
    return total


def _values(
    columns: int, picked: Tensor, rest_lse: Tensor, rest_entropy: Tensor, valid: Tensor | None, *at: Tensor
) -> tuple[Tensor, ...]:
    """log q of the tokens `[*, K]` in the given order, the entropy, and what their gradient needs."""
    places = Places(*at)
    log_q, entropy, rest_q, turn = formulas.tokens(picked, rest_lse, rest_entropy)
    found = log_q.gather(-1, places.first)
    ids = places.ordered.gather(-1, places.first)
    # A token outside the vocabulary has no probability to report: NaN, never a plausible number.
    found = torch.where(ids == -1, 0.0, torch.where(present(ids, columns), found, torch.nan))
    if valid is not None:
        found, entropy = torch.where(valid[..., None], found, 0.0), torch.where(valid, entropy, 0.0)
    return found, entropy, log_q, entropy.clone(), rest_q, turn


def _pull(columns: int, needs: Any, incoming: Any, tensors: Any, kept: Any) -> Any:
    (grad_logprob, grad_entropy), places, valid = incoming, Places(*tensors[4:]), tensors[3]
    log_q, entropy, rest_q, turn = kept
    total = torch.where(places.picked < 0, 0.0, sums_of_equals(grad_logprob, places))
    grad_rest_entropy = grad_entropy * rest_q
    grads = *formulas.tokens_gradient(total, grad_entropy, log_q, entropy, rest_q, turn), grad_rest_entropy
    if valid is not None:
        keep = valid[..., None], valid, valid
        grads = tuple(torch.where(rows, x, 0.0) for rows, x in zip(keep, grads, strict=True))
    return *grads, None, *(None,) * len(places)


# From a row's split (`complement.split`) to log q of its K tokens, `[*, K]`, and the entropy, `[*]`.
SEVERAL = transforms.Step(_values, _pull, values=2)

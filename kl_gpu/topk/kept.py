"""Log-probabilities of tokens under a softmax over a kept set of columns, a sampler's top-k or top-p."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import transforms
from . import token_formulas as formulas
from .tokens import Places, places_among, sums_of_equals


def _values(call: None, picked: Tensor, valid: Tensor | None) -> tuple[Tensor, ...]:
    """log q of every kept column `[*, K]` and the entropy `[*]`, of s, −inf where absent."""
    nothing = picked.new_full(picked.shape[:-1], -torch.inf)
    log_q, entropy, rest_q, turn = formulas.tokens(picked, nothing, torch.zeros_like(nothing))
    if valid is not None:
        log_q, entropy = torch.where(valid[..., None], log_q, 0.0), torch.where(valid, entropy, 0.0)
    return log_q, entropy, log_q.clone(), entropy.clone(), rest_q, turn


def _pull(call: None, needs: Any, incoming: Any, tensors: Any, kept: Any) -> Any:
    (picked, valid), (grad_log_q, grad_entropy) = tensors, incoming
    to_picked, _ = formulas.tokens_gradient(grad_log_q, grad_entropy, *kept)
    to_picked = torch.where(picked.isneginf(), 0.0, to_picked)
    return to_picked if valid is None else torch.where(valid[..., None], to_picked, 0.0), None


_KEPT = transforms.Step(_values, _pull, values=2)


def _at(call: None, log_q: Tensor, place: Tensor) -> tuple[Tensor]:
    return (torch.where(place < 0, -torch.inf, log_q.gather(-1, place.clamp_min(0))),)


def _from(call: None, needs: Any, incoming: Any, tensors: Any, kept: Any) -> Any:
    log_q, place = tensors
    places, columns = Places.of(place), log_q.shape[-1]
    flow = sums_of_equals(incoming[0], places)
    # One more column takes what belongs to none.
    grad = log_q.new_zeros((*log_q.shape[:-1], columns + 1))
    return grad.scatter_(-1, torch.where(places.picked < 0, columns, places.picked), flow)[..., :-1], None


# From log q of the kept columns `[*, K]` to those at `[*, tokens]` places, −inf where a place is below 0.
_SELECT = transforms.Step(_at, _from)


def logprobs(picked: Tensor, support: Tensor, ids: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """log q of tokens `[*, tokens]`, and the entropy `[*]`, of a softmax over the kept columns alone.

    Args:
        picked: `[*, K]`, the kept columns' scaled logits.
        support: int64 `[*, K]`, their ids, each once; −1 where absent.
        ids: int64 `[*, tokens]`; one that is not kept has log q = −inf, and gradient 0.
    """
    log_q, entropy = transforms.apply(_KEPT, None, picked, valid)
    found: Tensor = transforms.apply(_SELECT, None, log_q, places_among(support, ids))[0]
    return found if valid is None else torch.where(valid[..., None], found, 0.0), entropy

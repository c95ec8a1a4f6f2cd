"""`kl_gpu.remainder.Split` on logits whose columns are shared among ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import remainder
from . import collectives, states
from .shards import Shard


class _Merged(torch.autograd.Function):
    """From a shard's split to the whole row's; what flows back is this rank's part of it, with no collective.

    A given column is held by one rank and −inf on the others. With w_r the share of rank r in the mass of
    the columns not given, their entropy is Σ w_r (H_r − log w_r).
    """

    @staticmethod
    def forward(
        ctx: Any, given: Tensor, rest: Tensor, spread: Tensor, entropy: bool, group: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        numbers = [given, rest[..., None]] + ([spread[..., None]] if entropy else [])
        found = collectives.gather(torch.cat(numbers, -1), group, "the given columns and the rest's mass")
        columns = given.shape[-1]
        whole_given, rests = found[..., :columns].amax(0), found[..., columns]
        nothing = rests.isneginf().all(0)
        whole_rest = torch.where(nothing, -torch.inf, states.log_sum(rests))
        log_share = torch.where(rests.isneginf(), -torch.inf, rests - whole_rest)
        own = torch.where(rest.isneginf(), 0.0, torch.exp(rest - whole_rest))
        whole_spread, turn = torch.zeros_like(rest), torch.zeros_like(rest)
        if entropy:
            share = torch.exp(log_share)
            terms = found[..., columns + 1] - log_share
            whole_spread = torch.where(share == 0, 0.0, share * terms).sum(0)
            gap = spread - (rest - whole_rest) - whole_spread
            turn = torch.where(own == 0, 0.0, own * gap)
        ctx.save_for_backward(given.isneginf(), own, turn)
        return whole_given, whole_rest, whole_spread

    @staticmethod
    def backward(ctx: Any, to_given: Tensor, to_rest: Tensor, to_spread: Tensor) -> tuple[Tensor | None, ...]:
        absent, own, turn = ctx.saved_tensors
        return (
            torch.where(absent, 0.0, to_given),
            to_rest * own + to_spread * turn,
            to_spread * own,
            None,
            None,
        )


def split(
    logits: Tensor, ids: Tensor, rows: Tensor | None, call: remainder.Call, *, shard: Shard, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """As `remainder.Split`, ids being those of the whole vocabulary."""
    if call.validate:
        remainder.check_ids(ids, rows, shard.total, call.argument)
    local = call._replace(validate=False)
    parts = remainder.Split.apply(logits, shard.own(ids), rows, local)
    merged: tuple[Tensor, Tensor, Tensor] = _Merged.apply(*parts, call.entropy, group)
    return merged

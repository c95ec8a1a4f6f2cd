"""`kl_gpu.complement.split` on logits whose columns are shared among ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import complement
from ..arguments.params import ComplementParams
from ..backends.shard_merge import log_sum
from ..ops.complement import check_ids
from . import collectives
from .shards import Shard


def _whole(found: Tensor, columns: int, rest_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The picked columns and the others' log-sum-exp of whole rows, and this rank's share of the others.

    `found` is `[ranks, *, columns + 1]` or more: each rank's picked columns and the log-sum-exp `rest_lse`.
    """
    picked, rests = found[..., :columns].amax(0), found[..., columns]
    rest = torch.where(rests.isneginf().all(0), -torch.inf, log_sum(rests))
    return picked, rest, torch.where(rest_lse.isneginf(), 0.0, torch.exp(rest_lse - rest))


class SharedColumns(NamedTuple):
    """`linear.heads.SharedRows` of a group of ranks."""

    shard: Shard
    group: Any

    @property
    def columns(self) -> int:
        return self.shard.total

    def own(self, labels: Tensor) -> Tensor:
        return self.shard.own(labels)

    def merged(self, picked: Tensor, rest_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        numbers = torch.cat((picked, rest_lse[:, None]), -1)
        found = collectives.gather(numbers, self.group, "the labels' logits and the others' mass")
        return _whole(found, picked.shape[-1], rest_lse)


class _Merged(torch.autograd.Function):
    """From a shard's split to the whole row's; what flows back is this rank's part of it, with no collective.

    A picked column is held by one rank and −inf on the others. With w_r the share of rank r in the mass of
    the columns not picked, their entropy is Σ w_r (H_r − log w_r).
    """

    @staticmethod
    def forward(
        ctx: Any, picked: Tensor, rest_lse: Tensor, rest_entropy: Tensor, entropy: bool, group: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        numbers = [picked, rest_lse[..., None]] + ([rest_entropy[..., None]] if entropy else [])
        found = collectives.gather(torch.cat(numbers, -1), group, "the given columns and the rest's mass")
        columns = picked.shape[-1]
        whole_picked, whole_rest, own = _whole(found, columns, rest_lse)
        rests = found[..., columns]
        log_share = torch.where(rests.isneginf(), -torch.inf, rests - whole_rest)
        whole_entropy, turn = torch.zeros_like(rest_lse), torch.zeros_like(rest_lse)
        if entropy:
            share = torch.exp(log_share)
            terms = found[..., columns + 1] - log_share
            whole_entropy = torch.where(share == 0, 0.0, share * terms).sum(0)
            gap = rest_entropy - (rest_lse - whole_rest) - whole_entropy
            turn = torch.where(own == 0, 0.0, own * gap)
        ctx.save_for_backward(picked.isneginf(), own, turn)
        return whole_picked, whole_rest, whole_entropy

    @staticmethod
    def backward(
        ctx: Any, grad_picked: Tensor, grad_rest: Tensor, grad_entropy: Tensor
    ) -> tuple[Tensor | None, ...]:
        absent, own, turn = ctx.saved_tensors
        return (
            torch.where(absent, 0.0, grad_picked),
            grad_rest * own + grad_entropy * turn,
            grad_entropy * own,
            None,
            None,
        )


def split(
    rows: Tensor, ids: Tensor, valid: Tensor | None, scales: Tensor | None, params: ComplementParams, *,
    shard: Shard, group: Any, own_split: complement.SplitRows = complement.split,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `complement.split`, ids being those of the whole vocabulary. `own_split` splits the columns here."""
    if params.validate:
        check_ids(ids, valid, shard.total, params.argument)
    local = params._replace(validate=False)
    parts = own_split(rows, shard.own(ids), valid, scales, local)
    merged: tuple[Tensor, Tensor, Tensor] = _Merged.apply(*parts, params.entropy, group)
    return merged

"""What a shard says about its rows, and what follows for whole rows (mathematics: `backends.shard_merge`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import registry
from ..backends.interface import Scale
from ..backends.shard_merge import log_sum
from ..ops import complement


def sides_scales(shared: tuple[float, float], rows: Tensor | None) -> tuple[Scale, Scale]:
    """What multiplies the student and the teacher, as backends ask for it: numbers, or `[N]` each, the same
    tensor where both sides have one temperature."""
    if rows is None:
        return shared
    student, *teacher = (x.contiguous() for x in rows.unbind(-1))
    return student, teacher[0] if teacher else student


def packed(
    a: Tensor, b: Tensor, rows: Tensor | None, stats: Tensor, inside: Sequence[Tensor],
    scales: tuple[Scale, Scale], backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A shard's state, float64 `[2 + len(inside), N]`: log Σ e^a, log Σ e^b less that, and `inside`.

    Also where there is no mass, of which a backend has only NaN to report: the first is −inf where a has
    none, and the second is log Σ e^b itself then, −inf where b has none. A NaN that remains stands for one
    among the logits. The second tensor, `[N]`, is log Σ e^b, also beside a NaN in a.
    """
    state, finite = registry.load(backend).shard_states(stats, inside, *scales)
    log_b = state[0] + state[1]
    if finite:
        return state, log_b
    odd = ~torch.isfinite(log_b)
    if rows is not None:
        odd = odd & rows
    none = torch.full((*a.shape[:-1], 1), -1, dtype=torch.int64, device=a.device)
    own_a, own_b = (
        complement.complement(
            x,
            none,
            odd,
            *(
                (1.0, False, backend, scale[..., None])
                if isinstance(scale, Tensor)
                else (scale, False, backend)
            ),
        )[0]
        for x, scale in zip((a, b), scales, strict=True)
    )
    own_ratio = torch.where(own_a.isneginf(), own_b, own_b - own_a)
    normalisers = torch.where(odd, torch.stack((own_a, own_ratio)), state[:2])
    return torch.cat((normalisers, state[2:])), torch.where(odd, own_b, log_b)


def merged(found: Tensor, backend: str) -> tuple[Tensor, bool]:
    """The states of whole rows from the ranks' `packed` ones, as `Backend.merge_shards` has it."""
    return registry.load(backend).merge_shards(found)


def entropy(log_masses: Tensor, inside: Tensor) -> Tensor:
    """Of whole rows of one side, from its normalisers and the entropies inside the shards, `[ranks, N]` each.

    H = Σ_r P_r H_r + H(P): the chain rule of entropy (Cover and Thomas, theorem 2.5.1), terms ≥ 0 only.
    """
    log_share = log_masses - log_sum(log_masses)
    share = torch.exp(log_share)
    return torch.where(share == 0, 0.0, share * (inside - log_share)).sum(0)

"""How the shards of a row become one, for backends without kernels of their own for it.

With P_r and Q_r the mass that a and b give to the columns of shard r, and a|r, b|r what they are there,

    KL(a‖b) = Σ_r P_r KL(a|r ‖ b|r) + KL(P‖Q)

(Cover and Thomas, Elements of Information Theory, theorem 2.5.3). Both parts are sums of non-negative terms,
so nothing cancels, and log Q_r/P_r comes from each shard's own log(Z_b/Z_a), which is good relative to the
ratios b/a themselves: a difference of two normalisers near 10 could not tell a ratio of 1 + 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..formulas import column_terms
from .interface import Scale


def log_sum(x: Tensor) -> Tensor:
    """log Σ e^x over the ranks; NaN where none has mass. The order of the ranks is that of the sum."""
    top = x.amax(0)
    top = torch.where(torch.isfinite(top), top, torch.nan)
    return top + torch.log(torch.exp(x - top).sum(0))


def shard_states_from(
    normalisers: Callable[[Tensor, Scale, Scale], tuple[Tensor, Tensor]],
    stats: Tensor,
    inside: Sequence[Tensor],
    a_scale: Scale,
    b_scale: Scale,
) -> tuple[Tensor, bool]:
    """As `Backend.shard_states`, from the normalisers that a backend reads off its statistics."""
    state = torch.stack([*normalisers(stats, a_scale, b_scale), *(x.double() for x in inside)])
    # Elsewhere asking would wait for the device; a kernel that finds no such row returns at once.
    finite = state.device.type == "cpu" and bool(torch.isfinite(state[:2].sum(0)).all())
    return state, finite


def merge_shards(found: Tensor) -> tuple[Tensor, bool]:
    """As `Backend.merge_shards`, in float64 torch."""
    (log_a, ratio), shares, r = _shared(found[:, 0], found[:, 1])
    # A row in which a side has no distribution is NaN, also where its terms are infinite.
    nowhere = ratio.isnan() | log_a.isnan()
    kls = [
        torch.where(nowhere, torch.nan, _chain(*way, inside))
        for way, inside in zip(((*shares, r), (*shares[::-1], -r)), found[:, 2:].unbind(1), strict=False)
    ]
    return torch.stack([log_a, ratio, *kls]), True


def _shared(log_a: Tensor, second: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """How a and b share their mass, from the first two numbers of every rank's state, `[ranks, N]` each.

    Returns the whole row's log Σ e^a, and log Σ e^b less that, `[N]`; the shares of a and of b, `[ranks, N]`,
    each side's adding up to 1; and log b/a of a rank's shares, −inf and +inf where one has no mass, 0 where
    neither.
    """
    no_a = log_a.isneginf()
    log_b = torch.where(no_a, second, log_a + second)
    no_b = log_b.isneginf()
    both = ~no_a & ~no_b
    whole_a, whole_b = log_sum(log_a), log_sum(log_b)
    a = torch.where(no_a, 0.0, torch.exp(log_a - whole_a))
    # The whole row's ratio about the mean of the shards', so that ratios of 1 + 1e-6 keep their digits
    # beside normalisers of a thousand.
    c = torch.where(both, a * second, 0.0).sum(0)
    x = torch.where(both, second - c, 0.0)
    grown = torch.where(x.abs() < 1, a * torch.expm1(x), torch.exp(log_b - whole_a - c) - a)
    y = torch.where(both, grown, torch.exp(log_b - whole_a - c) - a).sum(0)
    ratio = torch.where(y.abs() < 0.5, c + torch.log1p(y), whole_b - whole_a)
    # log1p makes a number of a side without mass.
    ratio = torch.where(torch.isfinite(whole_a) & torch.isfinite(whole_b), ratio, torch.nan)
    r = torch.where(both, second - ratio, 0.0)
    r = torch.where(no_a & ~no_b, torch.inf, torch.where(no_b & ~no_a, -torch.inf, r))
    b = torch.where(no_b, 0.0, torch.exp(log_b - (whole_a + ratio)))
    return (whole_a, ratio), (a, b), r


def _chain(a: Tensor, b: Tensor, r: Tensor, inside: Tensor) -> Tensor:
    """KL of the whole rows, `[N]`, from the shares of the ranks and the KL inside each."""
    between = column_terms("kl", (a, b), r, 0.0)[0]
    # A token that a allows and b excludes makes it infinite, however little a gives to that shard. Otherwise
    # a shard without mass says nothing, not even where its logits are too far down for a number of its own.
    own = torch.where(inside.isposinf(), torch.inf, torch.where(a == 0, 0.0, a * inside))
    own = torch.where(r.isinf(), 0.0, own)
    return (between + own).sum(0).clamp_min(0.0)

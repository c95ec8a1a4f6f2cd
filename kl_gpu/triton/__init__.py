"""Triton backend: one file per kernel family, kernel first, launcher below it."""

from __future__ import annotations

from torch import Tensor

from ..problem import Problem
from .gradients import gradient
from .kl import kl_value
from .sums import add_sums

__all__ = ["gradient", "value"]


def value(p: Problem) -> tuple[Tensor, Tensor]:
    """Per-row divergence `[A*B]` and the row statistics `[A*B, STATS]` that `gradient` needs.

    KL moves 2 U; the other families sweep the row a second time, 4 U.
    """
    value, stats = kl_value(p)
    if p.family != "kl":
        add_sums(p, value, stats)
    return value, stats

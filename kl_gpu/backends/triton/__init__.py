"""Backend "triton": one file per sweep over columns; pair.py holds the main kernel and its launcher."""

from __future__ import annotations

from functools import partial

from ..shard_merge import merge_shards, shard_states_from
from .complement import complement, complement_gradient
from .pair import divergence, gradient, value, value_and_gradient
from .shard import formula_sums, normalisers, statistics
from .token_stats import token_stats

fuses = True
viewless = False
shard_states = partial(shard_states_from, normalisers)

__all__ = [
    "complement",
    "complement_gradient",
    "divergence",
    "formula_sums",
    "fuses",
    "gradient",
    "merge_shards",
    "shard_states",
    "statistics",
    "token_stats",
    "value",
    "value_and_gradient",
    "viewless",
]

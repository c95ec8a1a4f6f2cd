"""Backend "triton": one file per sweep over columns; pair.py holds the main kernel and its launcher."""

from functools import partial

from ..shard_merge import merge_shards, shard_states_from
from .complement import complement, complement_gradient
from .pair import divergence, gradient, value, value_and_gradient
from .shard import formula_sums, normalisers, statistics
from .token_stats import token_stats

fuses = True
viewless = True
shard_states = partial(shard_states_from, normalisers)

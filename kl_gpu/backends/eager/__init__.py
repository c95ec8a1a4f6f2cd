"""Backend "eager": plain PyTorch in float64, on any device."""

from functools import partial

from ..shard_merge import merge_shards, shard_states_from
from .complement import complement, complement_gradient
from .pair import (
    divergence,
    formula_sums,
    gradient,
    normalisers,
    statistics,
    token_stats,
    value,
    value_and_gradient,
)

fuses = False
viewless = False
shard_states = partial(shard_states_from, normalisers)

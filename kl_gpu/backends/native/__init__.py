"""Backend "native": the compiled CPU kernels of `kernels/`."""

from .complement import complement, complement_gradient
from .extension import available, isa, supported_isas
from .pair import (
    divergence,
    formula_sums,
    gradient,
    gradient_with_labels,
    token_stats,
    token_stats_and_comparison,
    value,
    value_and_beside,
    value_and_gradient,
    value_and_gradient_and_beside,
)
from .shard import merge_shards, shard_states, statistics

fuses = True
viewless = True

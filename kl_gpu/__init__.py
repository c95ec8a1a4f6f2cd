"""Token-level divergences straight from logits, for LLM-sized vocabularies."""

from .functional import divergence, js_div, kl_div
from .kinds import KINDS
from .nn import DivergenceLoss
from .ops import BACKENDS
from .rl import kl_penalty
from .stats import TokenStats, token_stats

__all__ = [
    "BACKENDS",
    "KINDS",
    "DivergenceLoss",
    "TokenStats",
    "divergence",
    "js_div",
    "kl_div",
    "kl_penalty",
    "token_stats",
]
__version__ = "0.1.0"

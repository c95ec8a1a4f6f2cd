"""Token-level divergences straight from logits, for LLM-sized vocabularies."""

from .functional import divergence, js_div, kl_div
from .kinds import KINDS
from .nn import DivergenceLoss
from .ops import BACKENDS
from .rl import kl_penalty

__all__ = ["BACKENDS", "KINDS", "DivergenceLoss", "divergence", "js_div", "kl_div", "kl_penalty"]
__version__ = "0.1.0"

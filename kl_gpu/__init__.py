"""Token-level divergences straight from logits, for LLM-sized vocabularies."""

from .functional import divergence, js_div, kl_div
from .kinds import KINDS
from .nn import DivergenceLoss
from .ops import BACKENDS

__all__ = ["BACKENDS", "KINDS", "DivergenceLoss", "divergence", "js_div", "kl_div"]
__version__ = "0.1.0"

"""Token-level divergences straight from logits, for LLM-sized vocabularies."""

from importlib import import_module
from types import ModuleType

from .functional import divergence, js_div, kl_div
from .kinds import KINDS
from .linear import linear_div
from .logprobs import token_logprobs
from .nn import DivergenceLoss
from .ops import BACKENDS
from .rl import kl_penalty
from .stats import TokenStats, token_stats
from .topk import TAILS, topk_div

__all__ = [
    "BACKENDS",
    "KINDS",
    "TAILS",
    "DivergenceLoss",
    "TokenStats",
    "divergence",
    "js_div",
    "kl_div",
    "kl_penalty",
    "linear_div",
    "token_logprobs",
    "token_stats",
    "topk_div",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    # A third of the package's import time, for those who have more than one process.
    if name == "distributed":
        return import_module("kl_gpu.distributed")
    raise AttributeError(f"module 'kl_gpu' has no attribute {name!r}")

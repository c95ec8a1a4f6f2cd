"""Token-level divergences straight from logits, for LLM-sized vocabularies."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .backends.registry import BACKENDS
from .functional import divergence, js_div, kl_div
from .kinds import KINDS
from .logprobs import token_logprobs
from .nn import DivergenceLoss
from .rl import kl_penalty
from .stats import TokenStats, token_stats
from .topk.api import TAILS, topk_div
from .topk.teacher import TopkLogprobs, topk_logprobs

if TYPE_CHECKING:
    from .linear.api import linear_div

__all__ = [
    "BACKENDS",
    "KINDS",
    "TAILS",
    "DivergenceLoss",
    "TokenStats",
    "TopkLogprobs",
    "divergence",
    "js_div",
    "kl_div",
    "kl_penalty",
    "linear_div",
    "token_logprobs",
    "token_stats",
    "topk_div",
    "topk_logprobs",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Half of the package's import time, for those who ask for it.
    if name == "distributed":
        return import_module("kl_gpu.distributed")
    if name == "linear_div":
        # Kept, so that torch.compile finds it like any other function.
        globals()[name] = import_module("kl_gpu.linear.api").linear_div
        return globals()[name]
    raise AttributeError(f"module 'kl_gpu' has no attribute {name!r}")

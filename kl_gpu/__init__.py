"""Token-level divergences straight from logits, for LLM-sized vocabularies."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .backends.registry import BACKENDS
from .functional import divergence, js_div, kl_div
from .kinds import KINDS
from .logprobs import token_logprobs
from .nn import DivergenceLoss
from .ops.memory import empty_cache
from .rl import kl_penalty
from .stats import TokenStats, token_stats
from .topk.api import TAILS, topk_div
from .topk.sparse import sparse_div
from .topk.teacher import TopkLogprobs, topk_logprobs

if TYPE_CHECKING:
    from .diagnostics import show_config
    from .linear.api import linear_div
    from .linear.stats import linear_token_stats
    from .linear.tokens import linear_token_logprobs
    from .linear.topk import linear_topk_div

__all__ = [
    "BACKENDS",
    "KINDS",
    "TAILS",
    "DivergenceLoss",
    "TokenStats",
    "TopkLogprobs",
    "divergence",
    "empty_cache",
    "js_div",
    "kl_div",
    "kl_penalty",
    "linear_div",
    "linear_token_logprobs",
    "linear_token_stats",
    "linear_topk_div",
    "show_config",
    "sparse_div",
    "token_logprobs",
    "token_stats",
    "topk_div",
    "topk_logprobs",
]
__version__ = "0.1.0"


_LATER = {
    "linear_div": "linear.api",
    "linear_token_logprobs": "linear.tokens",
    "linear_token_stats": "linear.stats",
    "linear_topk_div": "linear.topk",
    "show_config": "diagnostics",
}


def __getattr__(name: str) -> Any:
    # Half of the package's import time, for those who ask for it.
    if name == "distributed":
        return import_module("kl_gpu.distributed")
    if name in _LATER:
        # Kept, so that torch.compile finds it like any other function.
        globals()[name] = getattr(import_module(f"kl_gpu.{_LATER[name]}"), name)
        return globals()[name]
    raise AttributeError(f"module 'kl_gpu' has no attribute {name!r}")

"""Divergences of logits that no single rank holds: vocabulary shared, rows spread, or both."""

from .counts import GlobalCount, global_count
from .divergence import vocab_parallel_div
from .linear import vocab_parallel_linear_div, vocab_parallel_linear_token_stats
from .linear_tokens import vocab_parallel_linear_token_logprobs, vocab_parallel_linear_topk_div
from .tokens import vocab_parallel_token_logprobs, vocab_parallel_token_stats
from .topk import vocab_parallel_topk_div

__all__ = [
    "GlobalCount",
    "global_count",
    "vocab_parallel_div",
    "vocab_parallel_linear_div",
    "vocab_parallel_linear_token_logprobs",
    "vocab_parallel_linear_token_stats",
    "vocab_parallel_linear_topk_div",
    "vocab_parallel_token_logprobs",
    "vocab_parallel_token_stats",
    "vocab_parallel_topk_div",
]

"""Divergences of logits that no single rank holds: vocabulary shared, rows spread, or both."""

from .divergence import vocab_parallel_div

__all__ = ["vocab_parallel_div"]

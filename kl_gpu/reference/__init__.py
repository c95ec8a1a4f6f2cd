"""The specification: every entry in NumPy float64, by definition. No backend imports it."""

from .pair import column_terms, divergence, g, gradients, log_softmax, token_stats

__all__ = ["column_terms", "divergence", "g", "gradients", "log_softmax", "token_stats"]

"""Triton backend: one file per sweep over columns; rows.py holds the kernel and its launcher."""

from __future__ import annotations

from .rows import divergence, gradient, value, value_and_gradient
from .shards import formula_sums, normalisers, statistics
from .stats import token_stats

__all__ = [
    "divergence",
    "formula_sums",
    "gradient",
    "normalisers",
    "statistics",
    "token_stats",
    "value",
    "value_and_gradient",
]

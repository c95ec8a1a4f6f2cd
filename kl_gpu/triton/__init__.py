"""Triton backend: one file per sweep over columns; rows.py holds the kernel and its launcher."""

from __future__ import annotations

from .rows import gradient, value, value_and_gradient

__all__ = ["gradient", "value", "value_and_gradient"]

"""Triton backend: one file per kernel family, kernel first, launcher below it."""

from .kl import gradient, value

__all__ = ["gradient", "value"]

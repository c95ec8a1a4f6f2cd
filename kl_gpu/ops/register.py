"""Registration with torch.library: one node per call under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import symbols

# By operator: what runs, and what tells torch.compile its outputs' shapes.
Implementations = dict[str, tuple[Callable[..., Any], Callable[..., Any]]]


def register(library: torch.library.Library, implementations: Implementations) -> None:
    """Give the operators that `library` defined in kl_gpu their implementation on every device.

    One Python function serves every device: the backend argument, resolved by the caller, picks the kernels.
    """
    for name, (run, fake) in implementations.items():
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"kl_gpu::{name}", fake, lib=library)
        symbols.define_overload(library, name, run, fake)


def no_output(*_: object) -> None:
    """The fake of an operator that writes into its arguments."""

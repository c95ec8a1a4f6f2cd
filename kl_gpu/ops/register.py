"""Registration with torch.library: one node per call under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import symbols
from .direct import nobody_listens
from .log import logged

Function = Callable[..., Any]
_library = torch.library.Library("kl_gpu", "FRAGMENT")


def operator(schema: str, fake: Function, *, of_rows: bool = False) -> Callable[[Function], Function]:
    """Make a function the implementation of the operator of this schema in kl_gpu; it becomes what calls it.

    One Python function serves every device: the backend argument, resolved by the caller, picks the kernels.

    Args:
        fake: what tells torch.compile the outputs' shapes.
        of_rows: whether there is nothing to compute where the first tensor has no elements: the fake's
            outputs are the result then, and no backend is asked.
    """

    def register(function: Function) -> Function:
        def run_rows(*arguments: Any) -> Any:
            return function(*arguments) if arguments[0].numel() else fake(*arguments)

        name = schema.partition("(")[0]
        run = logged(name, run_rows if of_rows else function)
        _library.define(schema)
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"kl_gpu::{name}", fake, lib=_library)
        dispatched = symbols.define_overload(_library, name, run, fake)

        def call(*arguments: Any) -> Any:
            return run(*arguments) if nobody_listens(arguments) else dispatched(*arguments)

        return call

    return register


def like_first(first: torch.Tensor, *_: object) -> torch.Tensor:
    """The fake of an operator whose output is as its first tensor."""
    return torch.empty_like(first)


def no_output(*_: object) -> None:
    """The fake of an operator that writes into its arguments."""

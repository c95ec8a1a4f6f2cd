"""Temperatures, β and other numbers that change from call to call under torch.compile.

From its second value on, Dynamo takes a Python float for a symbol that a 0-d tensor brings. A symbol lasts
through arithmetic with numbers and through +, -, * and / with a tensor. An operator's argument of type
`float`, `torch.full`, math.log, a table or an equality that holds turn it into a constant: then every new
value compiles anew. So each operator of the package that takes floats has a second overload, `numbers`, that
takes them as a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

_CPU = torch.device("cpu")
# Before 2.8 Dynamo cannot say what is a symbol, and every number is taken for a constant.
_KNOWS_SYMBOLS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)
# The overload reads its numbers on the host: a recorded CUDA graph would repeat those of the recording.
_TAGS = tuple(getattr(torch.Tag, tag) for tag in ("cudagraph_unsafe",) if hasattr(torch.Tag, tag))


def is_symbol(number: object) -> bool:
    """Whether torch.compile is at work, and `number` is a float that may change without another graph."""
    if not (is_dynamo_compiling() and _KNOWS_SYMBOLS) or type(number) is not float:
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(number)


def tensor_of(number: float, device: torch.device = _CPU) -> Tensor:
    """A symbol as a 0-d float64 tensor. `torch.tensor` and `torch.full` would make it a constant."""
    return torch.ones((), dtype=torch.float64, device=device) * number


def clamp(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """`x.clamp(low, high)`, with limits that may be symbols."""
    if is_symbol(low) or is_symbol(high):
        return x.clamp(*(None if limit is None else tensor_of(limit, x.device) for limit in (low, high)))
    return x.clamp(low, high)


def define_overload(
    library: torch.library.Library, name: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define `numbers`, where the operator takes floats: them as a float64 tensor `[n]` on the CPU, in their
    order, and then the other arguments.

    Returns what calls the operator, by this overload where one of the floats is a symbol.
    """
    default = getattr(torch.ops.kl_gpu, name).default
    inputs, outputs = str(default._schema).partition("(")[2].split(") -> ")
    arguments = inputs.split(", ")
    places = [i for i, argument in enumerate(arguments) if argument.startswith("float ")]
    if not places:
        return default
    others = (argument for i, argument in enumerate(arguments) if i not in places)
    overload = f"{name}.numbers"
    library.define(f"{overload}({', '.join(('Tensor numbers', *others))}) -> {outputs}", tags=_TAGS)

    def call(function: Callable[..., Any], numbers: list[float], others: tuple[Any, ...]) -> Any:
        filled = list(others)
        for place, number in zip(places, numbers, strict=True):
            filled.insert(place, number)
        return function(*filled)

    def run_overload(numbers: Tensor, *others: Any) -> Any:
        return call(run, numbers.tolist(), others)

    def fake_overload(numbers: Tensor, *others: Any) -> Any:
        return call(fake, [math.nan] * len(places), others)  # shapes do not depend on them

    library.impl(overload, run_overload, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kl_gpu::{overload}", fake_overload, lib=library)
    by_numbers = getattr(torch.ops.kl_gpu, name).numbers

    def operator(*arguments: Any) -> Any:
        if is_dynamo_compiling() and any(map(is_symbol, arguments)):
            floats = [tensor_of(x) for x in arguments if type(x) is float]
            return by_numbers(torch.stack(floats), *(x for x in arguments if type(x) is not float))
        return default(*arguments)

    return operator

"""Triton's language as compiled code needs it, in a process whose kernels are interpreted otherwise.

Import this before any kernel is interpreted: the interpreter replaces the language's functions by its own,
and leaves them there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from triton import JITFunction
from triton import language as tl
from triton.runtime.interpreter import InterpretedFunction

_PLACES: tuple[Any, ...] = (
    *(tl, tl.core, tl.standard, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base),
)
_compiled: dict[InterpretedFunction, JITFunction] = {}


def _as_compiled(value: object) -> object:
    """Triton's own device functions (tl.sum, tl.max, ...) may have been decorated for the interpreter."""
    if not isinstance(value, InterpretedFunction):
        return value
    return _compiled.setdefault(value, JITFunction(value.fn))


_LANGUAGE = [{name: _as_compiled(value) for name, value in vars(place).items()} for place in _PLACES]


def _put(place: object, name: str, there: bool, value: object) -> None:
    if there:
        setattr(place, name, value)
    else:
        delattr(place, name)


@contextmanager
def compiled_language() -> Iterator[None]:
    """Within it, functions of `triton.language` are those that the compiler knows."""
    undo = []
    for place, wanted in zip(_PLACES, _LANGUAGE, strict=True):
        found = dict(vars(place))
        for name in found.keys() | wanted.keys():
            if found.get(name) is wanted.get(name) or isinstance(found.get(name), ModuleType):
                continue
            undo.append((place, name, name in found, found.get(name)))
            _put(place, name, name in wanted, wanted.get(name))
    try:
        yield
    finally:
        for change in undo:
            _put(*change)

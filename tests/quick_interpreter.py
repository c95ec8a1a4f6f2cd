"""Triton's interpreter without what it does again and again: half of what the tests that it runs would take.

Where it has changed and lacks one of these functions, it stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    _patch_the_language_once()
    _look_up_dtypes_once()


def _patch_the_language_once() -> None:
    """It looks through all of triton.language at every call of a device function.

    It has been patched by then, mostly.
    """
    if not (hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope")):
        return
    patch, nothing = interpreter._patch_lang, interpreter._LangPatchScope

    def patch_if_needed(function: Callable[..., object]) -> object:
        languages = [x for x in function.__globals__.values() if x is tl or x is tl.core]
        return patch(function) if any(tl.core.is_builtin(x.load) for x in languages) else nothing()

    interpreter._patch_lang = patch_if_needed


def _look_up_dtypes_once() -> None:
    """It builds its table of all dtypes at every look at one."""
    if not hasattr(interpreter, "_get_np_dtype"):
        return
    look_up = interpreter._get_np_dtype
    known: dict[str, object] = {}

    def known_or_looked_up(dtype: tl.dtype) -> object:
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    interpreter._get_np_dtype = known_or_looked_up

"""The trainers' packages, which may be missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def require(module: str) -> Any:
    """The module of that name.

    Raises:
        ImportError: it, or something that it imports, is not installed; the message names the extra.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"kl_gpu's integration needs {module}, which cannot be imported here ({error}); "
            f"install it by: pip install kl_gpu[integrations]"
        ) from error


def base_class(module: str, name: str) -> Any:
    """A class to derive from; where its package is missing, one of which no instance can be made."""
    try:
        return getattr(require(module), name)
    except ImportError as error:
        reason = str(error)

    class Missing:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise ImportError(reason)

    return Missing

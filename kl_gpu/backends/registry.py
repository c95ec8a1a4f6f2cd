"""The backends by name: which can run where, loaded when first asked for, checked against the interface."""

from __future__ import annotations

import importlib.util
import inspect
import os
import warnings
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import cast

import torch

from ..arguments import validation
from ..arguments.reduction import has_float64
from .interface import Backend, Joining

BACKENDS = ("triton", "native", "eager")
# Those with what `Joining` has.
_JOINING = frozenset({"native"})
_TRITON_DEVICES = frozenset({"cuda", "xpu"})
_CPU = torch.device("cpu")  # comparing with it is quicker than asking a device for its type
_OLDEST_TRITON = (3, 4)  # older compilers refuse the kernels

# What was looked for, and whether it can be used. A dict: Dynamo warns of every functools.cache it meets.
_usable: dict[str, bool] = {}


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # blocked, or half removed
        return False


def _has_triton() -> bool:
    if "triton" not in _usable:
        _usable["triton"] = _is_installed("triton") and _is_new_enough(import_module("triton"))
    return _usable["triton"]


# What torch.compiler.assume_constant_result sets: Dynamo calls the function in place of tracing it, for the
# import in it cannot be traced. That function itself would import the compiler for those who never compile.
_has_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _has_kernels_for(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device: once a row they compute in float64."""
    return device.type in _TRITON_DEVICES and has_float64(device)


def _is_new_enough(triton: ModuleType) -> bool:
    return tuple(map(int, triton.__version__.split(".")[:2])) >= _OLDEST_TRITON


def _has_native() -> bool:
    if "native" not in _usable:
        _usable["native"] = _is_installed("kl_gpu._native")
    return _usable["native"]


@cache
def _say_that_native_is_missing() -> None:
    warnings.warn(
        "kl_gpu was installed without its compiled CPU kernels (no working C++20 compiler was found): "
        "CPU tensors go through the slower eager backend",
        stacklevel=2,
    )


def resolve(backend: str | None, device: torch.device) -> str:
    """The backend for tensors on `device`: the one named, or the fastest that can run there.

    Raises:
        TypeError: `backend` is neither a string nor None.
        ValueError: `backend` is unknown, or cannot run on this device or in this installation.
    """
    if backend is None:
        if device == _CPU and _has_native():
            return "native"
        if device.type == "cpu" and not torch.compiler.is_compiling():
            _say_that_native_is_missing()
        return "triton" if _has_kernels_for(device) and _has_triton() else "eager"
    validation.backend(backend)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "native":
        if not _has_native():
            raise ValueError(
                "backend='native' needs the compiled kernels, which this installation lacks: "
                "reinstall kl_gpu where a C++20 compiler is available"
            )
        if device.type != "cpu":
            raise ValueError(f"backend='native' runs on the CPU, got tensors on {device}")
    if backend == "triton":
        if not _has_triton():
            oldest = ".".join(map(str, _OLDEST_TRITON))
            raise ValueError(
                f"backend='triton' needs the triton package, {oldest} or later, which is not installed"
            )
        if device.type not in _TRITON_DEVICES and os.environ.get("TRITON_INTERPRET", "0") != "1":
            raise ValueError(
                f"backend='triton' runs on {', '.join(sorted(_TRITON_DEVICES))}, got tensors on {device}; "
                "TRITON_INTERPRET=1 in the environment runs its kernels on the CPU, slowly"
            )
        if not has_float64(device):
            raise ValueError(f"backend='triton' computes in float64 once a row, which {device} does not have")
    return backend


# Loaded once, and checked then.
_loaded: dict[str, Backend] = {}


def load(backend: str) -> Backend:
    """The backend of this name.

    Raises:
        TypeError: its module lacks a member of the interface, or has one with other parameters.
    """
    if backend not in _loaded:
        module = import_module(f"kl_gpu.backends.{backend}")
        check(module)
        if backend in _JOINING:
            check(module, Joining)
        _loaded[backend] = cast(Backend, module)
    return _loaded[backend]


def joins(backend: str) -> bool:
    """Whether the backend of this name has what `Joining` has; torch.compile can trace this question."""
    return backend in _JOINING


def joining(backend: str) -> Joining | None:
    """The backend of this name as one that joins functions, None where it does not."""
    return cast(Joining, load(backend)) if joins(backend) else None


def check(module: ModuleType, protocol: type = Backend) -> None:
    """Check a module against `Backend`, or `Joining`, member by member and parameter by parameter."""
    for name, member in vars(protocol).items():
        if name.startswith("_"):
            continue
        if not hasattr(module, name):
            raise TypeError(f"{module.__name__} is no backend: it lacks {name}")
        if isinstance(member, property):
            continue
        _, *wanted = inspect.signature(member).parameters
        found = list(inspect.signature(getattr(module, name)).parameters)
        if found != wanted:
            raise TypeError(f"{module.__name__}.{name} takes {found}, the interface says {wanted}")

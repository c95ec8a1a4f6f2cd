"""Operators registered with torch.library, and the choice of the backend that runs them.

Schemas and fakes let `torch.compile` treat each call as one node. An operator sees logits, a row mask and
numbers; masks by label, weights and reductions stay in `functional`.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .kinds import STATS

_MODULES = {"triton": "kl_gpu.triton", "native": "kl_gpu.native", "eager": "kl_gpu.eager"}
BACKENDS = tuple(_MODULES)
_TRITON_DEVICES = frozenset({"cuda", "xpu"})

_library = torch.library.Library("kl_gpu", "DEF")
_library.define(
    "value(Tensor student, Tensor teacher, Tensor? rows, str kind, float student_scale, float teacher_scale, "
    "str backend) -> (Tensor, Tensor)"
)
_library.define(
    "gradient(Tensor student, Tensor teacher, Tensor? rows, Tensor stats, Tensor row_scale, str kind, "
    "float student_scale, float teacher_scale, str backend, "
    "Tensor(a!)? grad_student, Tensor(b!)? grad_teacher) -> ()"
)


@cache
def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # blocked, or half removed
        return False


@cache
def _has_native() -> bool:
    return importlib.util.find_spec("kl_gpu._native") is not None


def resolve_backend(backend: str | None, device: torch.device) -> str:
    """The backend for tensors on `device`: the one named, or the fastest that can run there.

    Raises:
        ValueError: `backend` is unknown, or cannot run on this device or in this installation.
    """
    if backend is None:
        if device.type == "cpu" and _has_native():
            return "native"
        return "triton" if device.type in _TRITON_DEVICES and _has_triton() else "eager"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "native":
        if not _has_native():
            raise ValueError("backend='native' needs the compiled kernels, which this installation has not")
        if device.type != "cpu":
            raise ValueError(f"backend='native' runs on the CPU, got tensors on {device}")
    if backend == "triton":
        if not _has_triton():
            raise ValueError("backend='triton' needs the triton package, which is not installed")
        if device.type not in _TRITON_DEVICES and os.environ.get("TRITON_INTERPRET", "0") != "1":
            raise ValueError(
                f"backend='triton' runs on {', '.join(sorted(_TRITON_DEVICES))}, got tensors on {device}; "
                "TRITON_INTERPRET=1 in the environment runs its kernels on the CPU, slowly"
            )
    return backend


@cache
def _module(backend: str) -> ModuleType:
    return import_module(_MODULES[backend])


def value_dtype(student: torch.dtype, teacher: torch.dtype) -> torch.dtype:
    """What rows are computed in: float64 if either side is, else float32."""
    return torch.float64 if torch.float64 in (student, teacher) else torch.float32


def _views(lead: torch.Size, tensors: list[Tensor | None]) -> Iterator[list[Any]]:
    """The tensors `[*lead, ...]` as `[A, B, ...]` views, several times where one pair (A, B) cannot do it.

    Two leading strides cover every slice of a `[batch, time, V]` tensor. More are walked in Python rather
    than copied.
    """
    for split in range(len(lead) + 1):
        shape = (math.prod(lead[:split]), math.prod(lead[split:]))
        try:
            yield [None if t is None else t.view(*shape, *t.shape[len(lead) :]) for t in tensors]
        except RuntimeError:  # not a view with these two strides
            continue
        return
    for i in range(lead[0]):
        yield from _views(lead[1:], [None if t is None else t[i] for t in tensors])


def _value(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    kind: str,
    student_scale: float,
    teacher_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lead = student.shape[:-1]
    if student.numel() == 0:
        return _value_fake(student, teacher, rows, kind, student_scale, teacher_scale, backend)
    run = _module(backend).value
    rows = None if rows is None else rows.contiguous()
    parts = [
        run(*views, kind, student_scale, teacher_scale) for views in _views(lead, [student, teacher, rows])
    ]
    if len(parts) == 1:
        value, stats = parts[0]
    else:
        value, stats = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return value.view(lead), stats.view(*lead, STATS)


def _value_fake(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    kind: str,
    student_scale: float,
    teacher_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lead = student.shape[:-1]
    dtype = value_dtype(student.dtype, teacher.dtype)
    return student.new_empty(lead, dtype=dtype), student.new_empty((*lead, STATS), dtype=dtype)


def _gradient(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    stats: Tensor,
    row_scale: Tensor,
    kind: str,
    student_scale: float,
    teacher_scale: float,
    backend: str,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
) -> None:
    if student.numel() == 0:
        return
    run = _module(backend).gradient
    rows = None if rows is None else rows.contiguous()
    tensors = [student, teacher, rows, grad_student, grad_teacher]
    # contiguous: the gradient of a sum comes as one number with stride 0, which a kernel would read past.
    start, flat_stats, flat_scale = 0, stats.reshape(-1, STATS), row_scale.contiguous().view(-1)
    for s, t, keep, grad_s, grad_t in _views(student.shape[:-1], tensors):
        part = slice(start, start + s.shape[0] * s.shape[1])
        start = part.stop
        numbers = (flat_stats[part], flat_scale[part], kind, student_scale, teacher_scale)
        run(s, t, keep, *numbers, grad_s, grad_t)


def _gradient_fake(*_: object) -> None:
    return None


# One Python function serves every device: the backend argument, resolved by the caller, picks the kernels.
_library.impl("value", _value, "CompositeExplicitAutograd")
_library.impl("gradient", _gradient, "CompositeExplicitAutograd")
torch.library.register_fake("kl_gpu::value", _value_fake, lib=_library)
torch.library.register_fake("kl_gpu::gradient", _gradient_fake, lib=_library)

value = torch.ops.kl_gpu.value.default
gradient = torch.ops.kl_gpu.gradient.default

"""Operators registered with torch.library, and the choice of the backend that runs them.

Schemas and fakes let `torch.compile` treat each call as one node. An operator sees logits, a row mask and
numbers; masks by label, weights and reductions stay in `functional`.
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import checks, symbols
from .kinds import KINDS, STATS
from .problem import TOKEN_STATS, Problem, arithmetic

_MODULES = {"triton": "kl_gpu.triton", "native": "kl_gpu.native", "eager": "kl_gpu.eager"}
BACKENDS = tuple(_MODULES)
_TRITON_DEVICES = frozenset({"cuda", "xpu"})
_CPU = torch.device("cpu")  # comparing with it is quicker than asking a device for its type
_OLDEST_TRITON = (3, 4)  # older compilers refuse the kernels

# Backends that take `[N, V]` and `[A, B, V]` as given: on a small problem a view takes as long as the kernel.
_VIEWLESS = frozenset({"native"})

# Backends that compute value and gradient in one visit of the row where the row factors are known.
_FUSED = frozenset({"native", "triton"})

_library = torch.library.Library("kl_gpu", "DEF")
_INPUTS = "Tensor student, Tensor teacher, Tensor? rows"
_NUMBERS = "str kind, float beta, float student_scale, float teacher_scale, str backend"
_GRADS = "Tensor(a!)? grad_student, Tensor(b!)? grad_teacher"
_library.define(f"value({_INPUTS}, {_NUMBERS}) -> (Tensor, Tensor)")
_library.define(f"divergence({_INPUTS}, {_NUMBERS}) -> Tensor")
_library.define(
    f"gradient({_INPUTS}, Tensor stats, Tensor row_scale, Tensor? incoming, {_NUMBERS}, {_GRADS}) -> ()"
)
_library.define(f"value_and_gradient({_INPUTS}, Tensor row_scale, {_NUMBERS}, {_GRADS}) -> (Tensor, Tensor)")
_library.define(f"formula_sums({_INPUTS}, Tensor stats, {_NUMBERS}) -> Tensor")
_library.define("copy(Tensor x) -> Tensor")
_SCALES = "float student_scale, float teacher_scale, str backend"
_library.define(f"token_stats({_INPUTS}, Tensor? labels, {_SCALES}) -> Tensor")


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


def resolve_backend(backend: str | None, device: torch.device) -> str:
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
        return "triton" if device.type in _TRITON_DEVICES and _has_triton() else "eager"
    checks.backend(backend)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "native":
        if not _has_native():
            raise ValueError(
                "backend='native' needs the compiled kernels, which this installation has not: "
                "install kl_gpu again where a C++20 compiler is at hand"
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
    return backend


@cache
def _module(backend: str) -> ModuleType:
    return import_module(_MODULES[backend])


def implementation(backend: str) -> ModuleType:
    """The backend's own module, for what is arithmetic on a few numbers per row and no operator."""
    return _module(backend)


def fuses(backend: str) -> bool:
    """Whether `value_and_gradient` moves less memory than `value` and `gradient` one after the other."""
    return backend in _FUSED


def views(lead: torch.Size, tensors: list[Tensor | None]) -> Iterator[list[Any]]:
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
        yield from views(lead[1:], [None if t is None else t[i] for t in tensors])


def _parts(lead: torch.Size, tensors: list[Tensor | None], backend: str) -> Iterable[list[Any]]:
    """`views`, or the tensors themselves where the backend takes them as given."""
    return (tensors,) if backend in _VIEWLESS and 1 <= len(lead) <= 2 else views(lead, tensors)


def _problems(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    numbers: tuple[str, float, float, float],
    backend: str,
    grad_student: Tensor | None = None,
    grad_teacher: Tensor | None = None,
) -> Iterator[tuple[slice, Problem, Tensor | None, Tensor | None]]:
    """What the backend is asked, part by part: flat row numbers, problem, and both gradients' buffers."""
    rows = None if rows is None else rows.contiguous()
    order, start = KINDS[numbers[0]].order, 0
    tensors = [student, teacher, rows, grad_student, grad_teacher]
    for s, t, keep, grad_s, grad_t in _parts(student.shape[:-1], tensors, backend):
        problem = Problem.of(s, t, keep, *numbers)
        part = slice(start, start + problem.n_rows)
        start = part.stop
        yield part, problem, *order(grad_s, grad_t)


def _flat(per_row: Tensor, lead: torch.Size) -> Tensor:
    """`[*lead, ...]` as `[rows, ...]`, for kernels that step through it without strides."""
    per_row = per_row.contiguous()
    return per_row if len(lead) == 1 else per_row.view(-1, *per_row.shape[len(lead) :])


def _cut(flat: Tensor, part: slice) -> Tensor:
    return flat if part.stop - part.start == len(flat) else flat[part]


def _joined(parts: list[tuple[Tensor, Tensor]], lead: torch.Size) -> tuple[Tensor, Tensor]:
    value, stats = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    if len(lead) == 1:  # as they are
        return value, stats
    return value.view(lead), stats.view(*lead, STATS)


def _outputs(student: Tensor, teacher: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lead = student.shape[:-1]
    dtype = arithmetic(student, teacher)
    return student.new_empty(lead, dtype=dtype), student.new_empty((*lead, STATS), dtype=dtype)


def _value(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    kind: str,
    beta: float,
    student_scale: float,
    teacher_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if student.numel() == 0:
        return _outputs(student, teacher)
    run = _module(backend).value
    numbers = (kind, beta, student_scale, teacher_scale)
    parts = [run(problem) for _, problem, *_ in _problems(student, teacher, rows, numbers, backend)]
    return _joined(parts, student.shape[:-1])


def _divergence_output(student: Tensor, teacher: Tensor, *_: object) -> Tensor:
    return student.new_empty(student.shape[:-1], dtype=arithmetic(student, teacher))


def _divergence(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    kind: str,
    beta: float,
    student_scale: float,
    teacher_scale: float,
    backend: str,
) -> Tensor:
    """`value` for callers who will ask for no gradient."""
    if student.numel() == 0:
        return _divergence_output(student, teacher)
    run, lead = _module(backend).divergence, student.shape[:-1]
    rows = None if rows is None else rows.contiguous()
    parts = [
        run(Problem.of(s, t, keep, kind, beta, student_scale, teacher_scale))
        for s, t, keep in _parts(lead, [student, teacher, rows], backend)
    ]
    value: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return value if len(lead) == 1 else value.view(lead)


def _gradient(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    stats: Tensor,
    row_scale: Tensor,
    incoming: Tensor | None,
    kind: str,
    beta: float,
    student_scale: float,
    teacher_scale: float,
    backend: str,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
) -> None:
    if student.numel() == 0:
        return
    run = _module(backend).gradient
    numbers = (kind, beta, student_scale, teacher_scale)
    lead = student.shape[:-1]
    flat_stats, flat_scale = _flat(stats, lead), _flat(row_scale, lead)
    asked = _problems(student, teacher, rows, numbers, backend, grad_student, grad_teacher)
    for part, problem, *grads in asked:
        run(problem, _cut(flat_stats, part), _cut(flat_scale, part), *grads, incoming)


def _value_and_gradient(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    row_scale: Tensor,
    kind: str,
    beta: float,
    student_scale: float,
    teacher_scale: float,
    backend: str,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if student.numel() == 0:
        return _outputs(student, teacher)
    run = _module(backend).value_and_gradient
    numbers = (kind, beta, student_scale, teacher_scale)
    lead = student.shape[:-1]
    scale = _flat(row_scale, lead)
    asked = _problems(student, teacher, rows, numbers, backend, grad_student, grad_teacher)
    parts = [run(problem, _cut(scale, part), *grads) for part, problem, *grads in asked]
    return _joined(parts, lead)


def _gradient_fake(*_: object) -> None:
    return None


def _formula_sums_output(student: Tensor, *_: object) -> Tensor:
    return student.new_empty((*student.shape[:-1], 3), dtype=torch.float64)


def _formula_sums(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    stats: Tensor,
    kind: str,
    beta: float,
    student_scale: float,
    teacher_scale: float,
    backend: str,
) -> Tensor:
    """What a family's formula adds up to over these columns, for rows whose normalisers lie elsewhere."""
    if student.numel() == 0:
        return _formula_sums_output(student)
    run = _module(backend).formula_sums
    numbers = (kind, beta, student_scale, teacher_scale)
    lead = student.shape[:-1]
    flat = _flat(stats, lead)
    asked = _problems(student, teacher, rows, numbers, backend)
    parts = [run(problem, _cut(flat, part)) for part, problem, *_ in asked]
    return torch.cat(parts).view(*lead, 3)


def _token_stats_output(student: Tensor, teacher: Tensor, *_: object) -> Tensor:
    return student.new_empty((TOKEN_STATS, *student.shape[:-1]), dtype=arithmetic(student, teacher))


def _token_stats(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    labels: Tensor | None,
    student_scale: float,
    teacher_scale: float,
    backend: str,
) -> Tensor:
    if student.numel() == 0:
        return _token_stats_output(student, teacher)
    run = _module(backend).token_stats
    lead = student.shape[:-1]
    tensors = [student, teacher, *(None if x is None else x.contiguous() for x in (rows, labels))]
    parts = [
        run(Problem.of(s, t, keep, "forward_kl", 0.0, student_scale, teacher_scale), tokens)
        for s, t, keep, tokens in _parts(lead, tensors, backend)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).view(TOKEN_STATS, *lead)


def _copy(x: Tensor) -> Tensor:
    return x.clone()


def _copy_output(x: Tensor) -> Tensor:
    return torch.empty_like(x)


# By operator: what runs, and what tells torch.compile its outputs' shapes.
Implementations = dict[str, tuple[Callable[..., Any], Callable[..., Any]]]


def register(library: torch.library.Library, implementations: Implementations) -> None:
    """Give the operators that `library` defined in kl_gpu their implementation on every device."""
    for name, (run, fake) in implementations.items():
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"kl_gpu::{name}", fake, lib=library)
        symbols.define_overload(library, name, run, fake)


# One Python function serves every device: the backend argument, resolved by the caller, picks the kernels.
_IMPLEMENTATIONS: Implementations = {
    "value": (_value, _outputs),
    "divergence": (_divergence, _divergence_output),
    "gradient": (_gradient, _gradient_fake),
    "value_and_gradient": (_value_and_gradient, _outputs),
    "formula_sums": (_formula_sums, _formula_sums_output),
    "token_stats": (_token_stats, _token_stats_output),
    "copy": (_copy, _copy_output),
}
register(_library, _IMPLEMENTATIONS)

value = symbols.operator("value")
divergence = symbols.operator("divergence")
gradient = symbols.operator("gradient")
value_and_gradient = symbols.operator("value_and_gradient")
formula_sums = symbols.operator("formula_sums")
token_stats = symbols.operator("token_stats")
# A copy that the compiler cannot leave out, nor make again in backward from what was copied.
copy = torch.ops.kl_gpu.copy.default

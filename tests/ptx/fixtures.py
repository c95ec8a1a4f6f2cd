"""How tests ask for the executor: a backend named "triton-ptx", or an architecture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from .requirements import ARCHITECTURES, missing

NAME = "triton-ptx"
AS_USUAL = "as usual"
_ARCHITECTURE = "sm_90"  # of the backend; tests of the kernels take both

if not missing():
    from . import backend


def _marks() -> list[pytest.MarkDecorator]:
    why = missing()
    return [pytest.mark.exhaustive, *([pytest.mark.skip(reason=why)] if why else [])]


def backends() -> list[Any]:
    """The backend, for tests of every backend; `make test-all` runs it."""
    return [pytest.param(NAME, marks=_marks())]


def executions() -> list[Any]:
    """How tests of the Triton backend alone run: as kernels run here, and in `make test-all` as on GPUs."""
    return [AS_USUAL, *(pytest.param(arch, marks=_marks()) for arch in ARCHITECTURES)]


@contextmanager
def executed(name: str) -> Iterator[str]:
    """The name that kl_gpu knows the backend by, while kernels run as `name` says."""
    arch = _ARCHITECTURE if name == NAME else name
    if arch in ARCHITECTURES:
        with backend.executed(arch):
            yield "triton"
    else:
        yield name


def is_executed() -> bool:
    return not missing() and backend.is_executed()

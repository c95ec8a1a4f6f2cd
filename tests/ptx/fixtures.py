"""How tests ask for the executor: a backend named "triton-ptx", or an architecture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch

NAME = "triton-ptx"
_ARCHITECTURE = "sm_90"  # of the backend; tests of the kernels take both
# Where a GPU is, it runs the kernels itself.
_POSSIBLE = find_spec("triton") is not None and not torch.cuda.is_available()

if _POSSIBLE:
    from . import backend, driver


def _why_not() -> str | None:
    return driver.missing() if _POSSIBLE else "the PTX executor needs Triton, and CPU tensors"


def backends() -> list[Any]:
    """The backend, for tests of every backend; `make test-all` runs it."""
    if not _POSSIBLE:
        return []
    why = _why_not()
    return [
        pytest.param(NAME, marks=[pytest.mark.exhaustive, *([pytest.mark.skip(reason=why)] if why else [])])
    ]


def executions() -> list[str]:
    """How tests of the Triton backend alone run: as on GPUs that are not there, else as kernels run here."""
    return ["as usual"] if _why_not() else list(driver.ARCHITECTURES)


@contextmanager
def executed(name: str) -> Iterator[str]:
    """The name that kl_gpu knows the backend by, while kernels run as `name` says."""
    arch = _ARCHITECTURE if name == NAME else name
    if _POSSIBLE and arch in driver.ARCHITECTURES:
        with backend.executed(arch):
            yield "triton"
    else:
        yield name


def is_executed() -> bool:
    return _POSSIBLE and backend.is_executed()

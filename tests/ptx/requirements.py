"""What the executor needs; this file imports nothing that may not be there."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from . import library

# What the executor was tried with; another version's PTX may hold what it does not know.
TRITON_VERSIONS = ("3.7.1",)
ARCHITECTURES = ("sm_80", "sm_90")


@cache
def missing() -> str | None:
    """Why nothing can be executed here, or None."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        return "the PTX executor needs Triton, which is not installed"
    if triton not in TRITON_VERSIONS:
        return f"the PTX executor knows Triton {', '.join(TRITON_VERSIONS)}, this is {triton}"
    if torch.cuda.is_available():
        return "a GPU runs the kernels itself"
    if library.compiler() is None:
        return "the PTX executor needs a C++20 compiler, and found none"
    return None

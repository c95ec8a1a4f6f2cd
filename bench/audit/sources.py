"""What a row of the audit follows from, as one hash: while it stands, the row need not be made again."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import triton

from .classes import V_CLASSES
from .compiled import signature, warp_size
from .matrix import Case

# What counts, and what says which launch is compiled; the kernels' own code is in their cache keys.
_COUNTING = ("classes.py", "compiled.py", "kernels.py", "machine_code.py", "occupancy.py", "rows.py")


@cache
def _counting() -> str:
    return "".join((Path(__file__).parent / name).read_text() for name in _COUNTING)


def hash_of(case: Case) -> str:
    """Of the kernel with all that it calls, what it is compiled for, the compiler, and what counts."""
    logits, lanes = V_CLASSES[case.V_class].logits(case.dtype), warp_size(case.arch)
    configuration = sorted((name, str(x)) for name, x in case.entry.configuration(logits, lanes).items())
    columns = case.entry.columns(logits, lanes)
    types = signature(case.entry, case.dtype)
    made_of = (
        *(triton.__version__, _counting(), case.entry.function.cache_key, types, configuration, columns),
        *(repr(case.entry), case[1:]),
    )
    return hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]

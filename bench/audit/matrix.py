"""Which variants a whole audit compiles: what tells something that another variant does not.

float16 is left out: its code is bfloat16's but for conversions. float32 is compiled for sm_90, and for sm_80
and sm_100 where registers are scarcest; for gfx942, whose ragged rows no test bounds, aligned bfloat16 rows.
`--dtype`, `--arch` and `--v-class` ask for the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from .classes import DTYPES, V_CLASSES
from .compiled import ARCHITECTURES, warp_size
from .kernels import Entry, entries

_SCARCEST = ("value_grad", "token_stats")


class Case(NamedTuple):
    entry: Entry
    dtype: str
    arch: str
    V_class: str


def _is_told_by_others(case: Case) -> bool:
    if case.arch.startswith("gfx"):
        return (case.dtype, case.V_class) != ("bf16", "aligned")
    if case.dtype == "fp32" and case.arch != "sm_90":
        return case.entry.kernel not in _SCARCEST or case.V_class != "aligned"
    return case.dtype == "fp16"


def _configuration(case: Case) -> dict[str, object]:
    logits = V_CLASSES[case.V_class].logits(case.dtype)
    return {**case.entry.configuration(logits, warp_size(case.arch))}


def _is_compiled_already(case: Case) -> bool:
    """Whether an earlier class of V gives the compiler the same: float32 rows of any odd stride, for one."""
    own = _configuration(case)
    earlier = list(V_CLASSES)[: list(V_CLASSES).index(case.V_class)]
    return any(_configuration(case._replace(V_class=name)) == own for name in earlier)


def whole() -> Iterator[Case]:
    """Every case of the committed audit."""
    for case in map(Case._make, product(entries(), DTYPES, ARCHITECTURES, V_CLASSES)):
        if not _is_told_by_others(case) and not _is_compiled_already(case):
            yield case


Names = Sequence[str]


def chosen(kernels: Names = (), dtypes: Names = (), archs: Names = (), V_classes: Names = ()) -> list[Case]:
    """Those of the whole by these names; what is named of dtype, architecture and class, all of it."""
    if not (dtypes or archs or V_classes):
        return [case for case in whole() if not kernels or case.entry.kernel in kernels]
    named = [entry for entry in entries() if not kernels or entry.kernel in kernels]
    dtypes = dtypes or [name for name in DTYPES if name != "fp16"]
    return list(map(Case._make, product(named, dtypes, archs or ARCHITECTURES, V_classes or V_CLASSES)))

"""The kernels' instructions counted as they execute: on realistic rows, with all that lies around the loops.

The table of `rows` counts the usual path through the main loops. Here whole launches run on the CPU
(tests/ptx): moves of the reference, prologue, merges of splits, ragged tiles and finish are counted too.
Instructions of PTX are counted, and of SASS inferred (`sass_of_ptx`); neither has a cache or a clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from kl_gpu.backends.interface import RowPair
from tests.ptx import backend, driver
from tests.ptx.counts import Counts, counts
from tests.ptx.requirements import ARCHITECTURES
from tests.realistic_rows import FAMILIES

from .classes import DTYPES, V_CLASSES
from .kernels import Entry, StatsEntry, entries
from .rows import audit_one
from .sass_of_ptx import blocks, disassembled, executed_instructions

ROWS = 4
_LANES = 32


@dataclass(frozen=True)
class Executed:
    """Per column: instructions of lanes, of SASS and of PTX, and bytes of global memory; barriers per row."""

    sass: float
    ptx: float
    loaded: float
    stored: float
    reads: float
    barriers: float
    counts: Counts


def can_execute(entry: Entry) -> bool:
    """The kernels of pairs of rows; what runs on one tensor is counted by its loops alone."""
    return type(entry) in (Entry, StatsEntry)


def problem(entry: Entry, dtype: str, V: int, family: str) -> RowPair:
    """Realistic rows of V columns, with the teacher in the formula's role of a where it has a side."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (x.to(DTYPES[dtype])[None] for x in FAMILIES[family](ROWS, V, generator))
    return RowPair(teacher, student, None, entry.formula, 0.5, 1.0, 1.0, torch.float32)


def _call(triton: Any, entry: Entry, p: RowPair, counted: driver.Driver) -> None:
    """The entry's launches, those before it uncounted."""
    if isinstance(entry, StatsEntry):
        counted.counted = True
        triton.token_stats(p, None)
        return
    scale = torch.ones(p.n_rows)
    grads = [
        torch.empty_like(x) if entry.side in (side, "both") else None for side, x in (("a", p.a), ("b", p.b))
    ]
    if entry.sweeps_value and entry.side:
        counted.counted = True
        triton.value_and_gradient(p, scale, *grads)
        return
    counted.counted = entry.sweeps_value
    _, stats = triton.value(p)
    if not entry.sweeps_value:
        counted.counted = True
        triton.gradient(p, stats, scale, *grads)


def execute(entry: Entry, dtype: str, arch: str, V: int, family: str = "tops on a floor") -> Executed:
    """One launch of a few rows: blocks one after another, so that no instruction only waits."""
    modules = backend.load()
    with backend.executed(arch) as gpu:
        gpu.settings.resident = 1
        gpu.settings.hazards = False
        _call(modules[backend.NAME], entry, problem(entry, dtype, V, family), gpu)
        launches = list(gpu.launches)
    found = counts(launches)
    columns = ROWS * V
    sass = sum(
        executed_instructions(blocks(disassembled(one.program.ptx)), counts([one]).lines) for one in launches
    )
    warps = launches[0].program.warps
    return Executed(
        sass * _LANES / columns,
        sum(found.instructions.values()) * _LANES / columns,
        found.loaded / columns,
        found.stored / columns,
        found.reads,
        found.instructions["barrier"] / warps / ROWS,
        found,
    )


_HEADING = [
    *("kernel", "kind", "dtype", "arch", "loops", "SASS", "PTX", "loaded", "stored", "reads", "barriers"),
]


def lines(kernels: Sequence[str], dtypes: Sequence[str], archs: Sequence[str]) -> Iterator[list[str]]:
    """A table: what the loops' usual path says, and beside it what was executed."""
    chosen = [entry for entry in entries() if can_execute(entry) and (not kernels or entry.kernel in kernels)]
    yield _HEADING
    for entry, dtype, arch in product(chosen, dtypes or ("bf16",), archs or ARCHITECTURES):
        loops = audit_one(entry, dtype, arch, "aligned").instructions_per_element
        found = execute(entry, dtype, arch, V_CLASSES["aligned"].V)
        figures = (loops, found.sass, found.ptx, found.loaded, found.stored, found.reads, found.barriers)
        yield [entry.kernel, entry.kind, dtype, arch, *(f"{figure:.1f}" for figure in figures)]

"""One line of the audit: a variant of a kernel, compiled for an architecture, and what came out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path

import triton

from .classes import DTYPES, V_CLASSES
from .compiled import Compiled, compile_entry, warp_size
from .kernels import Entry
from .machine_code import main_loops, mix
from .matrix import Case
from .occupancy import CORES, budget, resident_programs
from .sources import hash_of

RESULTS = Path(__file__).parents[1] / "results" / "audit.json"


@dataclass(frozen=True)
class Row:
    """Registers and spilled bytes are of a thread, shared bytes of a program, widths in bits of an access.

    An element is a column of a row: a pair of logits, or one logit of a kernel that reads one tensor.
    `columns` are those that one pass through the (first) main loop covers. `programs_per_core` are resident
    at a time, by registers, warps and shared memory; `budget` is in instructions per element, of which the
    kernel reads or writes `tensors`. `source` is the hash of what the row follows from (sources.py).
    """

    kernel: str
    kind: str
    dtype: str
    arch: str
    V_class: str
    V: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    load_bits: int
    store_bits: int
    instructions_per_element: float
    ex2_per_element: float
    tensors: int
    budget: float
    warps: int
    columns: int
    programs_per_core: int
    source: str = ""

    @property
    def name(self) -> tuple[str, ...]:
        return self.kernel, self.kind, self.dtype, self.arch, self.V_class


def audit_one(entry: Entry, dtype: str, arch: str, V_class: str) -> Row:
    """Compiles one entry and counts."""
    return counted(entry, dtype, arch, V_class, compile_entry(entry, dtype, arch, V_class))


def counted(entry: Entry, dtype: str, arch: str, V_class: str, compiled: Compiled) -> Row:
    loops = main_loops(compiled.code, entry.loops_on(arch))
    found = [mix(loop) for loop in loops]
    whole = mix([here for loop in loops for here in loop])
    threads = compiled.warps * warp_size(arch)

    def each(count: str) -> float:
        per_loop = zip(found, compiled.columns, strict=True)
        return round(sum(getattr(one, count) * threads / columns for one, columns in per_loop), 2)

    held = (compiled.registers, compiled.warps, compiled.shared_bytes)
    return Row(
        *(entry.kernel, entry.kind, dtype, arch, V_class, V_CLASSES[V_class].V),
        *(compiled.registers, compiled.spill_bytes, compiled.shared_bytes),
        *(whole.load_bits, whole.store_bits),
        *(each("instructions"), each("ex2")),
        entry.tensors,
        budget(entry.tensors, DTYPES[dtype].itemsize),
        *(compiled.warps, compiled.columns[0], resident_programs(CORES[arch], *held)),
    )


def name_of(case: Case) -> tuple[str, ...]:
    return case.entry.kernel, case.entry.kind, *case[1:]


def audit(cases: Sequence[Case], earlier: Iterable[Row] = ()) -> Iterator[Row]:
    """The rows of these cases, from `earlier` where what they follow from is still the same.

    The others are compiled, as many at a time as there are cores.
    """
    known = {(row.name, row.source): row for row in earlier}
    sources = [hash_of(case) for case in cases]
    keys = [(name_of(case), source) for case, source in zip(cases, sources, strict=True)]
    missing = [case for case, key in zip(cases, keys, strict=True) if key not in known]
    # Not forked: a fork of a process that has compiled may hang on LLVM's locks.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        made = iter(pool.map(audit_one, *zip(*missing, strict=True)) if missing else ())
        for key in keys:
            yield known[key] if key in known else replace(next(made), source=key[1])


def load(path: Path = RESULTS) -> tuple[dict[str, str], list[Row]]:
    """The document's head and its rows."""
    document = json.loads(path.read_text())
    return document, [Row(**row) for row in document.pop("rows")]


def save(rows: Sequence[Row], path: Path) -> None:
    head = {"triton": triton.__version__, "date": f"{datetime.now(timezone.utc):%Y-%m-%d}"}
    lines = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in rows)
    path.write_text(json.dumps(head)[:-1] + f', "rows": [\n{lines}\n]}}\n')

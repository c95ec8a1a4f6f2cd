"""Compiles every kernel for every GPU architecture, without a GPU, and says what came out: `make audit`.

Each kernel × kind × dtype × architecture × class of V goes through Triton's own compilers; the machine code
of its main loop is counted, and bench/gpu_model.py predicts from the counts what will limit it. One element
is one column of a row, that is, a pair of logits; figures per element are operations of one lane. Registers
and spilled bytes are of a thread, shared bytes of a program, widths in bits of a thread's access. Shares are
predicted, not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .gpu_model import Counts, bound
from .gpus import USUAL, gpu

RESULTS = Path(__file__).parent / "results" / "audit.json"
_ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Row:
    """One line of the table, of one variant of a kernel.

    `columns` are those that one pass through the (first) main loop covers, `exchanges` the longest chain of
    shuffles and barriers in a pass. `overhead_instructions`, of a warp, lie around the main loops, ragged
    tail left out; `finish_instructions` are what the last program of a row to end does besides. reads to
    ahead are as in `bench.kernels.Entry`.
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
    fma_per_element: float
    alu_per_element: float
    special_per_element: float
    lsu_per_element: float
    exchanges: int
    overhead_instructions: int
    finish_instructions: int
    warps: int
    columns: int
    reads: int
    writes: int
    l2_reads: int
    programs: int
    ahead: int
    bound: str = ""
    predicted_share_of_copy: float = 0.0

    def counts(self) -> Counts:
        gcn = self.arch.startswith("gfx")
        return Counts(
            itemsize=_ITEMSIZE[self.dtype],
            V=self.V,
            aligned=self.V_class == "aligned",
            columns=self.columns,
            warps=self.warps,
            warp=64 if gcn else 32,
            registers=self.registers,
            shared_bytes=self.shared_bytes,
            store_bits=self.store_bits,
            instructions=self.instructions_per_element,
            fma=self.fma_per_element,
            # A special function takes AMD's vector unit for four turns, and NVIDIA's ALU not at all.
            alu=self.alu_per_element + (4 * self.special_per_element if gcn else 0),
            special=self.special_per_element,
            lsu=self.lsu_per_element,
            exchanges=self.exchanges,
            overhead_instructions=self.overhead_instructions,
            finish_instructions=self.finish_instructions,
            reads=self.reads,
            writes=self.writes,
            l2_reads=self.l2_reads,
            programs=self.programs,
            ahead=self.ahead,
        )

    def predicted(self) -> Row:
        """The same row with the model's answer for the architecture's usual GPU."""
        slowest, share = bound(self.counts(), gpu(USUAL[self.arch]))
        known = asdict(self) | {"bound": slowest, "predicted_share_of_copy": round(share, 3)}
        return Row(**known)


@dataclass(frozen=True)
class Choice:
    """What to compile: names to keep, all of them where empty."""

    kernels: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    archs: Sequence[str] = ()
    V_classes: Sequence[str] = ()

    def restricts(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))


def audit_one(entry: Any, dtype: str, arch: str, V_class: str) -> Row:
    """Compiles one `bench.kernels.Entry` and counts."""
    from .compiled import compile_entry, warp_size
    from .kernels import V_CLASSES
    from .machine_code import main_paths, mix

    compiled = compile_entry(entry, dtype, arch, V_class)
    paths = main_paths(compiled.code, entry.loops_on(arch))
    found = [mix(body) for body in paths.bodies]
    whole = mix([here for body in paths.bodies for here in body])
    threads = compiled.warps * warp_size(arch)

    def each(count: str) -> float:
        per_loop = zip(found, compiled.columns, strict=True)
        return round(sum(getattr(one, count) * threads / columns for one, columns in per_loop), 2)

    return Row(
        kernel=entry.kernel,
        kind=entry.kind,
        dtype=dtype,
        arch=arch,
        V_class=V_class,
        V=V_CLASSES[V_class],
        registers=compiled.registers,
        spill_bytes=compiled.spill_bytes,
        shared_bytes=compiled.shared_bytes,
        load_bits=whole.load_bits,
        store_bits=whole.store_bits,
        instructions_per_element=each("instructions"),
        ex2_per_element=each("ex2"),
        fma_per_element=each("fma"),
        alu_per_element=each("alu"),
        special_per_element=each("special"),
        lsu_per_element=each("lsu"),
        exchanges=whole.exchanges,
        overhead_instructions=len(paths.overhead),
        finish_instructions=len(paths.finish),
        warps=compiled.warps,
        columns=compiled.columns[0],
        reads=entry.reads,
        writes=entry.writes,
        l2_reads=entry.l2_reads,
        programs=entry.programs(dtype, V_CLASSES[V_class], warp_size(arch)),
        ahead=entry.ahead,
    ).predicted()


def audit(choice: Choice) -> Iterator[Row]:
    from .compiled import ARCHITECTURES
    from .kernels import DTYPES, V_CLASSES, entries

    for entry in entries():
        if choice.kernels and entry.kernel not in choice.kernels:
            continue
        for dtype in choice.dtypes or DTYPES:
            for arch in choice.archs or ARCHITECTURES:
                for V_class in choice.V_classes or V_CLASSES:
                    yield audit_one(entry, dtype, arch, V_class)


def load(path: Path = RESULTS) -> tuple[dict[str, str], list[Row]]:
    """The document's head and its rows, with predictions made anew from the counts."""
    document = json.loads(path.read_text())
    rows = [Row(**row).predicted() for row in document.pop("rows")]
    return document, rows


def save(rows: Sequence[Row], path: Path) -> None:
    import triton

    head = {"triton": triton.__version__, "date": f"{datetime.now(timezone.utc):%Y-%m-%d}"}
    lines = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in rows)
    path.write_text(json.dumps(head)[:-1] + f', "rows": [\n{lines}\n]}}\n')


def print_table(rows: Sequence[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption_justify="left")
    for heading in ("kernel", "kind", "dtype", "arch", "V"):
        table.add_column(heading, no_wrap=True)
    for heading in ("regs", "spill", "shared", "load", "store", "instr", "ex2", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    for row in rows:
        table.add_row(
            *(row.kernel, row.kind, row.dtype, row.arch, row.V_class),
            *map(str, (row.registers, row.spill_bytes, row.shared_bytes, row.load_bits, row.store_bits)),
            *(f"{row.instructions_per_element:.1f}", f"{row.ex2_per_element:.1f}"),
            *(f"{row.predicted_share_of_copy:.0%}", row.bound),
        )
    table.caption = (
        "instr, ex2: per column of a row (a pair of logits). share: of copy speed, predicted, not measured."
    )
    Console(width=120 if not sys.stdout.isatty() else None).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.audit", description=__doc__, formatter_class=raw)
    parser.add_argument("--kernel", nargs="+", default=[], help="only these kernels")
    parser.add_argument("--dtype", nargs="+", default=[], choices=_ITEMSIZE)
    parser.add_argument("--arch", nargs="+", default=[], choices=USUAL)
    parser.add_argument("--v-class", nargs="+", default=[], choices=("aligned", "odd"))
    parser.add_argument("--out", type=Path, help=f"default of a whole audit: {RESULTS.name} in bench/results")
    parser.add_argument("--docs", action="store_true", help="compile nothing; rewrite docs from the results")
    chosen = parser.parse_args(arguments)
    if chosen.docs:
        from .model_docs import write

        write()
        return 0
    # Interpreted kernels have no machine code.
    os.environ.pop("TRITON_INTERPRET", None)
    choice = Choice(chosen.kernel, chosen.dtype, chosen.arch, chosen.v_class)
    rows = list(audit(choice))
    print_table(rows)
    if not choice.restricts() or chosen.out:
        save(rows, chosen.out or RESULTS)
    if not choice.restricts() and not chosen.out:
        from .model_docs import write

        write()
    spilled = [row for row in rows if row.spill_bytes]
    for row in spilled:
        print(f"spills {row.spill_bytes} bytes: {row.kernel} {row.kind} {row.dtype} {row.arch} {row.V_class}")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())

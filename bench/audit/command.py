"""Compiles every kernel for every GPU architecture, without a GPU, and says what came out: `make audit`.

Each kernel × kind × dtype × architecture × class of V goes through Triton's own compilers, and the machine
code of its main loops is counted. docs/gpu-model.md says what is counted, and how to read it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from .occupancy import CORES

if TYPE_CHECKING:
    from .rows import Row


def print_table(rows: Sequence[Row]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption_justify="left")
    for heading in ("kernel", "kind", "dtype", "arch", "V"):
        table.add_column(heading, no_wrap=True)
    for heading in ("regs", "spill", "shared", "load", "store", "instr", "budget", "ex2", "programs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        over = row.instructions_per_element > row.budget
        table.add_row(
            *(row.kernel, row.kind, row.dtype, row.arch, row.V_class),
            *map(str, (row.registers, row.spill_bytes, row.shared_bytes, row.load_bits, row.store_bits)),
            f"{row.instructions_per_element:.1f}{' >' if over else '  '}",
            *(f"{row.budget:.1f}", f"{row.ex2_per_element:.1f}", str(row.programs_per_core)),
        )
    table.caption = "instr, ex2: per column of a row. programs: resident on an SM or compute unit at a time."
    Console(width=120 if not sys.stdout.isatty() else None).print(table)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernel", nargs="+", default=[], help="only these kernels")
    parser.add_argument("--dtype", nargs="+", default=[], choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--arch", nargs="+", default=[], choices=tuple(CORES))
    parser.add_argument("--v-class", nargs="+", default=[], choices=("aligned", "odd"))
    parser.add_argument("--out", type=Path, help="default of a whole audit: bench/results/audit.json")
    parser.add_argument("--docs", action="store_true", help="compile nothing; rewrite docs from the results")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    # Interpreted kernels have no machine code, and which they are is settled as they are imported.
    os.environ.pop("TRITON_INTERPRET", None)
    from . import docs
    from .rows import RESULTS, audit, save

    if options.docs:
        docs.write()
        return 0
    choice = (options.kernel, options.dtype, options.arch, options.v_class)
    rows = list(audit(*choice))
    print_table(rows)
    whole = not any(choice) and not options.out
    if whole or options.out:
        save(rows, RESULTS if whole else options.out)
    if whole:
        docs.write()
    spilled = [row for row in rows if row.spill_bytes]
    for row in spilled:
        print(f"spills {row.spill_bytes} bytes: {row.kernel} {row.kind} {row.dtype} {row.arch} {row.V_class}")
    return 1 if spilled else 0

"""Compiles every kernel for every GPU architecture, without a GPU, and says what came out: `make audit`.

Kernel × kind × dtype × architecture × class of V, but for what others tell (matrix.py), goes through
Triton's own compilers, and the machine code of its main loops is counted. docs/gpu-model.md says what is
counted, and how to read it. Rows of the committed results are kept where kernel, compiler and counting are
still the same.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .classes import DTYPES, V_CLASSES
from .occupancy import CORES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernel", nargs="+", default=[], help="only these kernels")
    parser.add_argument("--dtype", nargs="+", default=[], choices=tuple(DTYPES))
    parser.add_argument("--arch", nargs="+", default=[], choices=tuple(CORES))
    parser.add_argument("--v-class", nargs="+", default=[], choices=tuple(V_CLASSES))
    parser.add_argument("--out", type=Path, help="default of a whole audit: bench/results/audit.json")
    parser.add_argument(
        "--executed",
        action="store_true",
        help="beside the loops' path, what realistic rows execute (tests/ptx)",
    )
    parser.add_argument("--fresh", action="store_true", help="take nothing from the committed results")
    parser.add_argument("--docs", action="store_true", help="compile nothing; rewrite docs from the results")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    # Interpreted kernels have no machine code, and which they are is settled as they are imported.
    os.environ.pop("TRITON_INTERPRET", None)
    from . import docs
    from .matrix import chosen
    from .rows import RESULTS, audit, load, save

    if options.docs:
        docs.write()
        return 0
    if options.executed:
        from . import executed

        for line in executed.lines(options.kernel, options.dtype, options.arch):
            print(f"{line[0]:12} {line[1]:22}" + " ".join(f"{cell:>9}" for cell in line[2:]), flush=True)
        return 0
    choice = (options.kernel, options.dtype, options.arch, options.v_class)
    cases = chosen(*choice)
    if not cases:
        parser.error(f"no kernel is called {' or '.join(options.kernel)}")
    earlier = [] if options.fresh or not RESULTS.exists() else load()[1]
    rows = list(audit(cases, earlier))
    for line in docs.lines(rows):
        print(f"{line[0]:12} {line[1]:22}" + " ".join(f"{cell:>9}" for cell in line[2:]))
    whole = not any(choice) and not options.out
    if whole or options.out:
        save(rows, RESULTS if whole else options.out)
    if whole:
        docs.write()
    spilled = [row for row in rows if row.spill_bytes]
    for row in spilled:
        print(f"spills {row.spill_bytes} bytes: {row.kernel} {row.kind} {row.dtype} {row.arch} {row.V_class}")
    return 1 if spilled else 0

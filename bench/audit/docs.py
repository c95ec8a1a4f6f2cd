"""The tables of docs/gpu-model.md, from bench/results/audit.json: none of them is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .rows import RESULTS, Row, load

PAGE = Path(__file__).parents[2] / "docs" / "gpu-model.md"
_HEADING = [
    *("kernel", "kind", "dtype", "arch", "V", "registers", "shared", "load", "store"),
    *("instructions", "budget", "ex2", "programs"),
]
_OF_ALL = slice(3, 5)  # what is the same in every row of the page


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """What was compiled, as cells, their names first."""
    found = [list(_HEADING)]
    for row in rows:
        widths = [str(x) for x in (row.registers, row.shared_bytes, row.load_bits, row.store_bits)]
        counts = [f"{x:.1f}" for x in (row.instructions_per_element, row.budget, row.ex2_per_element)]
        name = [row.kernel, row.kind, row.dtype, row.arch, row.V_class]
        found.append([*name, *widths, *counts, str(row.programs_per_core)])
    return found


def counts_table(rows: Sequence[Row], arch: str) -> str:
    """What was compiled for one architecture in aligned rows, in Markdown."""
    cells = lines(
        [row for row in rows if (row.arch, row.V_class) == (arch, "aligned") and row.dtype != "fp16"]
    )
    for line in cells:
        del line[_OF_ALL]
    cells.insert(1, ["---"] * len(cells[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def regions(path: Path = RESULTS) -> dict[str, str]:
    """The text of every marked region of the page."""
    head, rows = load(path)
    spills = sum(row.spill_bytes > 0 for row in rows)
    compiled = f"{len(rows)} compilations with Triton {head['triton']} on {head['date']}"
    # Rows that were not compiled again when what they follow from changed have no hash of it.
    older = sum(not row.source for row in rows)
    kept = f" ({older} of them of earlier kernels)" if older else ""
    return {"summary": f"{compiled}{kept}; {spills} of them spill.", "counts": counts_table(rows, "sm_90")}


def fill(page: str, found: dict[str, str]) -> str:
    """The page with every `<!-- audit:NAME -->` … `<!-- end -->` region replaced; unknown names raise."""

    def region(match: re.Match[str]) -> str:
        return f"<!-- audit:{match[1]} -->\n{found[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- audit:([\w-]+) -->\n.*?<!-- end -->", region, page, flags=re.DOTALL)


def write(page: Path = PAGE) -> None:
    page.write_text(fill(page.read_text(), regions()))

"""The tables of docs/gpu-model.md, from bench/results/audit.json and the list of GPUs: none typed by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from kl_gpu.kinds import KINDS

from .audit import RESULTS, Row, load
from .gpu_model import ROWS, bound, lines, resident_programs
from .gpus import GPUS, USUAL, Gpu, Known, gpu
from .traffic import PASSES

PAGE = Path(__file__).parents[1] / "docs" / "gpu-model.md"
_LINES = ("memory", "L2", "issue", "fma", "alu", "ex2", "lsu", "latency")
_LABELS = {
    "ghz": "clock, GHz",
    "copy_tbps": "copy, TB/s",
    "l2_tbps": "l2, TB/s",
    "special": "ex2 and its like",
    "shared_kb": "shared memory, KB",
    "latency_ns": "wait for a load, ns",
    "clocks_alone": "a: clocks between a warp's instructions",
    "clocks_exchange": "e: clocks of an exchange",
}


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in body)


def _select(rows: Sequence[Row], **wanted: object) -> list[Row]:
    return [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]


def gpu_tables() -> dict[str, str]:
    names = [field.name for field in fields(Gpu) if field.name not in ("name", "arch")]
    known: dict[str, list[Known]] = {name: [getattr(one, name) for one in GPUS] for name in names}
    figures = _table(
        ["", *(f"{one.name} ({one.arch})" for one in GPUS)],
        (
            [
                _LABELS.get(name, name),
                *(f"{figure.value:g}" if figure.value else "–" for figure in known[name]),
            ]
            for name in names
        ),
    )
    origins = _table(["figure", "GPU", "origin"], _origins(known))
    return {"gpus": figures, "origins": origins}


def _origins(known: dict[str, list[Known]]) -> Iterator[list[str]]:
    for name, values in known.items():
        by_origin: dict[str, list[str]] = {}
        for one, value in zip(GPUS, values, strict=True):
            by_origin.setdefault(value.origin, []).append(one.name)
        for origin, owners in by_origin.items():
            yield [_LABELS.get(name, name), "all" if len(owners) == len(GPUS) else ", ".join(owners), origin]


def counts_table(rows: Sequence[Row], arch: str) -> str:
    heading = ["kernel", "kind", "dtype", "registers", "shared", "load", "store", "instructions", "ex2"]
    heading += ["fma", "alu", "exchanges", "overhead", "finish", "programs an SM"]
    return _table(
        heading,
        (
            [row.kernel, row.kind, row.dtype]
            + [str(x) for x in (row.registers, row.shared_bytes, row.load_bits, row.store_bits)]
            + [f"{x:.1f}" for x in (row.instructions_per_element, row.ex2_per_element)]
            + [f"{x:.1f}" for x in (row.fma_per_element, row.alu_per_element)]
            + [str(x) for x in (row.exchanges, row.overhead_instructions, row.finish_instructions)]
            + [str(resident_programs(row.counts(), gpu(USUAL[arch])))]
            for row in _select(rows, arch=arch, V_class="aligned")
            if row.dtype != "fp16"
        ),
    )


def lines_table(rows: Sequence[Row], name: str) -> str:
    """Milliseconds of every line of the KL kernels on one GPU."""
    one = gpu(name)
    body = []
    for row in _select(rows, arch=one.arch):
        if row.kind.startswith("kl") and row.dtype != "fp16" and not row.kind.endswith("both"):
            found = lines(row.counts(), one)
            slowest, share = bound(row.counts(), one)
            cells = [f"{1e3 * found[line]:.2f}" if line in found else "–" for line in _LINES]
            body.append([row.kernel, row.kind, row.dtype, str(row.V), *cells, slowest, f"{share:.0%}"])
    return _table(["kernel", "kind", "dtype", "V", *_LINES, "bound", "share"], body)


def shares_table(rows: Sequence[Row], V_class: str) -> str:
    """Predicted share of copy speed and the bound, per kernel on every architecture's usual GPU."""
    columns = [(arch, dtype) for arch in USUAL for dtype in ("bf16", "fp32")]
    body = []
    for kernel, kind in dict.fromkeys((row.kernel, row.kind) for row in rows):
        cells = []
        for arch, dtype in columns:
            found = _select(rows, kernel=kernel, kind=kind, arch=arch, dtype=dtype, V_class=V_class)
            cells += [f"{row.predicted_share_of_copy:.0%} {row.bound}" for row in found] or ["–"]
        body.append([kernel, kind, *cells])
    return _table(["kernel", "kind", *(f"{USUAL[arch].split()[0]} {dtype}" for arch, dtype in columns)], body)


def _steps(kind: str, work: str) -> list[tuple[str, str]]:
    from .kernels import steps

    return steps(kind, work)


def works_table(rows: Sequence[Row], dtype: str, V_class: str) -> str:
    """Share of copy speed of whole works, charged with the bytes of bench/traffic.py, on every GPU."""
    chosen = {(row.kernel, row.kind, row.arch): row for row in _select(rows, dtype=dtype, V_class=V_class)}
    body = []
    for work, passes in PASSES.items():
        for kind in KINDS:
            moved, cells = 0, []
            for one in GPUS:
                launches = [chosen[name, variant, one.arch] for name, variant in _steps(kind, work)]
                times = [lines(row.counts(), one) for row in launches]
                moved = sum(row.reads + row.writes for row in launches)
                charged = sum(found["memory"] for found in times) * passes / moved
                cells.append(f"{charged / sum(max(found.values()) for found in times):.0%}")
            body.append([work, kind, f"{passes} U", f"{moved} U", *cells])
    return _table(["work", "kind", "charged", "moves", *(one.name for one in GPUS)], body)


def regions(path: Path = RESULTS) -> dict[str, str]:
    """Text of every marked region of the page."""
    head, rows = load(path)
    spills = sum(row.spill_bytes > 0 for row in rows)
    summary = (
        f"{len(rows)} compilations with Triton {head['triton']} on {head['date']}; {spills} of them spill. "
        f"Predictions are for N = {ROWS} rows."
    )
    return {
        "summary": summary,
        **gpu_tables(),
        "counts": counts_table(rows, "sm_90"),
        "lines": lines_table(rows, "H100 SXM"),
        "aligned": shares_table(rows, "aligned"),
        "odd": shares_table(rows, "odd"),
        "works": works_table(rows, "bf16", "aligned"),
        "works-odd": works_table(rows, "bf16", "odd"),
    }


def fill(page: str, found: dict[str, str]) -> str:
    """The page with every `<!-- audit:NAME -->` … `<!-- end -->` region replaced; unknown names raise."""

    def region(match: re.Match[str]) -> str:
        return f"<!-- audit:{match[1]} -->\n{found[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- audit:([\w-]+) -->\n.*?<!-- end -->", region, page, flags=re.DOTALL)


def write(page: Path = PAGE) -> None:
    page.write_text(fill(page.read_text(), regions()))

"""Draws a stored run: GB/s against V with the copy's line, time against N, peak memory against V."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..harness.results import Document, read
from ..harness.traffic import PASSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = list[dict[str, Any]]

# One colour each in every picture, whoever else is in it.
_COLOURS = {"kl_gpu": "C0", "torch": "C3", "torch.compile": "C1", "liger": "C2", "trl": "C4"}


def plot(document: Document, folder: Path, stem: str, kind: str = "forward_kl") -> list[Path]:
    """Writes `stem-bandwidth.png`, `stem-rows.png`, `stem-memory.png`; nothing where `kind` has no rows."""
    rows = [row for row in document["rows"] if row["kind"] == kind]
    if not rows:
        return []
    most: dict[tuple[str, int], set[int]] = {}
    for row in rows:
        most.setdefault((row["dtype"], row["V"]), set()).add(row["N"])
    widest = max(most, key=lambda at: len(most[at]))
    full = [row for row in rows if 2 * row["N"] >= max(most[row["dtype"], row["V"]])]
    few = [row for row in rows if (row["dtype"], row["V"]) == widest]

    def bandwidth(axes: Axes, panel: Rows) -> None:
        _lines(axes, panel, "V", lambda row: row["gbps"])
        axes.axhline(document["copy_gbps"], color="grey", linestyle="--", label="device copy")
        axes.set(xlabel="V", ylabel="GB/s of the least traffic", ylim=(0, None))

    def times(axes: Axes, panel: Rows) -> None:
        _lines(axes, panel, "N", lambda row: row["ms"])
        axes.set(xlabel="N", ylabel="ms", xscale="log", yscale="log")

    def memory(axes: Axes, panel: Rows) -> None:
        _lines(axes, panel, "V", lambda row: row["peak_extra_bytes"] / 1e9)
        axes.set(xlabel="V", ylabel="GB beyond the inputs", ylim=(0, None))

    about = f"{document['device']}, {document['date'][:10]}, {kind}"
    least, largest = min(row["N"] for row in full), max(row["N"] for row in full)
    sizes = f"{about}, N = {largest}" if least == largest else f"{about}, N = {least} to {largest}"
    return [
        _draw(folder / f"{stem}-bandwidth.png", sizes, full, bandwidth),
        _draw(folder / f"{stem}-rows.png", f"{about}, V = {widest[1]}", few, times),
        _draw(folder / f"{stem}-memory.png", sizes, full, memory),
    ]


def _draw(path: Path, title: str, rows: Rows, panel_of: Callable[[Axes, Rows], None]) -> Path:
    """A panel for every work and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    works = [work for work in PASSES if any(row["work"] == work for row in rows)]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, grid = pyplot.subplots(
        len(dtypes), len(works), figsize=(4.2 * len(works), 3.4 * len(dtypes)), squeeze=False
    )
    for dtype, line in zip(dtypes, grid, strict=True):
        for work, axes in zip(works, line, strict=True):
            panel = [row for row in rows if row["work"] == work and row["dtype"] == dtype]
            panel_of(axes, panel)
            axes.set_title(f"{work} {PASSES[work]}U, {dtype}", fontsize=10)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _lines(axes: Axes, rows: Rows, over: str, of: Callable[[dict[str, Any]], float]) -> None:
    for system in dict.fromkeys(row["system"] for row in rows):
        points = {row[over]: of(row) for row in rows if row["system"] == system}  # a later row replaces
        at = sorted(points)
        axes.plot(
            at, [points[x] for x in at], marker="o", markersize=4, label=system, color=_COLOURS.get(system)
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path)
    parser.add_argument("--kind", default="forward_kl")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: beside the file")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        document = read(options.file)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    folder = options.out or options.file.parent
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plot(document, folder, options.file.name.split(".")[0], options.kind)
    if not drawn:
        parser.error(f"{options.file} has no rows of kind {options.kind!r}")
    print(*drawn, sep="\n")
    return 0

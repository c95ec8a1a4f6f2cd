"""Draws a stored run: GB/s against V with the copy's line, time against N, peak memory against V."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..harness.traffic import PASSES

Document = dict[str, Any]
Rows = list[dict[str, Any]]

_FIELDS = ("device", "date", "torch", "triton", "driver", "copy_gbps", "rows")
# One colour each in every picture, whoever else is in it.
_COLOURS = {"kl_gpu": "C0", "torch": "C3", "torch.compile": "C1", "liger": "C2"}


def read(path: Path) -> Document:
    """A run's JSON.

    Raises:
        ValueError: it is something else.
    """
    document = json.loads(path.read_text())
    if not isinstance(document, dict) or not set(_FIELDS) <= set(document):
        raise ValueError(f"{path} is not a run's JSON: it must have {', '.join(_FIELDS)}")
    return document


def plot(document: Document, folder: Path, stem: str, kind: str = "forward_kl") -> list[Path]:
    """Writes `stem-bandwidth.png`, `stem-rows.png`, `stem-memory.png`; nothing where `kind` has no rows."""
    rows = [row for row in document["rows"] if row["kind"] == kind]
    if not rows:
        return []
    sizes: dict[tuple[str, int], set[int]] = {}
    for row in rows:
        sizes.setdefault((row["dtype"], row["V"]), set()).add(row["N"])
    widest = max(sizes, key=lambda at: len(sizes[at]))
    full = [row for row in rows if 2 * row["N"] >= max(sizes[row["dtype"], row["V"]])]
    few = [row for row in rows if (row["dtype"], row["V"]) == widest]
    about = f"{document['device']}, {document['date'][:10]}, {kind}"
    over_v = f"{about}, N up to {max(row['N'] for row in full)}"
    speed = {"xlabel": "V", "ylabel": "GB/s of the least traffic", "ylim": (0, None)}
    time = {"xlabel": "N", "ylabel": "ms", "xscale": "log", "yscale": "log"}
    memory = {"xlabel": "V", "ylabel": "GB beyond the inputs", "ylim": (0, None)}
    name = str(folder / stem)
    return [
        _draw(f"{name}-bandwidth.png", over_v, full, lambda row: row["gbps"], speed, document["copy_gbps"]),
        _draw(f"{name}-rows.png", f"{about}, V = {widest[1]}", few, lambda row: row["ms"], time),
        _draw(f"{name}-memory.png", over_v, full, lambda row: row["peak_extra_bytes"] / 1e9, memory),
    ]


def _draw(
    path: str, title: str, rows: Rows, of: Callable[[dict[str, Any]], float], labels: dict[str, Any],
    copy: float | None = None,
) -> Path:  # fmt: skip
    """A panel for every work and dtype, a line for every system."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    works = [work for work in PASSES if any(row["work"] == work for row in rows)]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    size = (4.2 * len(works), 3.4 * len(dtypes))
    figure, grid = pyplot.subplots(len(dtypes), len(works), figsize=size, squeeze=False)
    for dtype, line in zip(dtypes, grid, strict=True):
        for work, axes in zip(works, line, strict=True):
            panel = [row for row in rows if row["work"] == work and row["dtype"] == dtype]
            for system in dict.fromkeys(row["system"] for row in panel):
                points = sorted((row[labels["xlabel"]], of(row)) for row in panel if row["system"] == system)
                axes.plot(*zip(*points, strict=True), "o-", ms=4, label=system, color=_COLOURS.get(system))
            if copy is not None:
                axes.axhline(copy, color="grey", linestyle="--", label="device copy")
            axes.set(**labels)
            axes.set_title(f"{work} {PASSES[work]}U, {dtype}", fontsize=10)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return Path(path)


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

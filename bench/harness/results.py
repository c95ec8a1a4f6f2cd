"""Stored runs: finding them, and telling a GPU's from the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "results"
FIELDS = ("device", "date", "torch", "triton", "driver", "copy_gbps", "rows")

Document = dict[str, Any]


def read(path: Path) -> Document:
    """A run's JSON.

    Raises:
        ValueError: it is something else.
    """
    document = json.loads(path.read_text())
    if not isinstance(document, dict) or not set(FIELDS) <= set(document):
        raise ValueError(f"{path} is not a run's JSON: it must have {', '.join(FIELDS)}")
    return document


def newest_per_gpu(folder: Path = FOLDER) -> list[tuple[Path, Document]]:
    """The newest complete run of each GPU, by device name. A run on a CPU has no driver."""
    newest: dict[str, tuple[Path, Document]] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(".partial.json"):
            continue
        try:
            document = read(path)
        except ValueError:
            continue  # accuracy, audit, checks
        device = document["device"]
        older = newest.get(device)
        if document["driver"] is not None and (older is None or older[1]["date"] < document["date"]):
            newest[device] = path, document
    return [newest[device] for device in sorted(newest)]

"""The Triton backend with one fault planted in its source."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

from .backend import SOURCES


class Place(NamedTuple):
    """A piece of a source file."""

    file: str
    line: int
    begin: int
    end: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.text}".replace(" ", "")


def places(file: str, pattern: str) -> list[Place]:
    """Where the pattern is found."""
    source = (SOURCES / file).read_text()
    return [
        Place(file, source.count("\n", 0, found.start()) + 1, *found.span(), found[0])
        for found in re.finditer(pattern, source)
    ]


def planted(folder: Path, place: Place, text: str) -> Path:
    """A copy of the backend's package in `folder`, with `text` in that place."""
    copy = folder / "triton"
    shutil.copytree(SOURCES, copy, ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / place.file).read_text()
    assert source[place.begin : place.end] == place.text
    (copy / place.file).write_text(source[: place.begin] + text + source[place.end :])
    return copy

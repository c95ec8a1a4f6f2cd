"""Packages that a machine without network may lack, carried as wheels: `make wheels` fetches them."""

from __future__ import annotations

import importlib
import os
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

from .correctness import ROOT

FOLDER = ROOT / "wheels"
# By the names they are imported by. Without pytest-xdist tests share one process, without Liger there is one
# baseline less, and without matplotlib there are no plots.
NEEDED = ("pytest", "pytest_benchmark", "pytest_reportlog", "pytest_timeout")


def use(wheels: Path, into: Path) -> list[str]:
    """Makes importable, here and in processes started from here, what is not installed. Returns its names.

    Wheels are unpacked, since Triton reads the source of kernels. What is installed comes first.
    """
    taken = []
    for path in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(path) as wheel:
            if not all(map(find_spec, _modules(wheel))):
                wheel.extractall(into)
                taken.append(path.name.partition("-")[0])
    if taken:
        sys.path.append(str(into))
        paths = (os.environ.get("PYTHONPATH"), str(into))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        importlib.invalidate_caches()
    return taken


def _modules(wheel: zipfile.ZipFile) -> set[str]:
    """What can be imported, by its first name."""
    first = {name.partition("/")[0] for name in wheel.namelist()}
    return {name.removesuffix(".py") for name in first if not name.endswith((".dist-info", ".data"))}


def missing() -> list[str]:
    """What a session cannot do without."""
    return [name for name in NEEDED if find_spec(name) is None]

"""Packages that a machine without network may lack, carried as wheels: `make wheels` fetches them."""

from __future__ import annotations

import importlib
import os
import re
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
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
    for wheel in sorted(wheels.glob("*.whl")):
        name = wheel.name.partition("-")[0]
        if not _is_installed(name):
            zipfile.ZipFile(wheel).extractall(into)
            taken.append(name)
    if taken:
        sys.path.append(str(into))
        path = (os.environ.get("PYTHONPATH"), str(into))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        importlib.invalidate_caches()
    return taken


def _is_installed(name: str) -> bool:
    try:
        distribution(re.sub(r"[-_.]+", "-", name))
    except PackageNotFoundError:
        return False
    return True


def missing() -> list[str]:
    """What a session cannot do without."""
    return [name for name in NEEDED if find_spec(name) is None]

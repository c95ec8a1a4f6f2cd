"""The C++ core, compiled once with the system's compiler into build/ptx, and loaded."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from .operations import generated

CORE = Path(__file__).parent / "core"
BUILD = Path(__file__).parents[2] / "build" / "ptx"
_STANDARD = ("-std=c++20", "-Wall", "-Wextra")
# Every operation rounds once, as PTX says; nothing reads the flags that a trap or errno would come from.
_FLAGS = (
    *(*_STANDARD, "-O2", "-march=native", "-ftree-vectorize", "-fvisibility=hidden", "-shared", "-fPIC"),
    *("-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"),
)


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first of the usual names that is there."""
    names = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


@cache
def load() -> ctypes.CDLL:
    """The library for this machine and these sources.

    Raises:
        RuntimeError: there is no compiler, or it refuses the sources.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("the PTX executor needs a C++20 compiler, and found none")
    # Which instructions -march=native means, and the compiler's version: both are macros.
    macros = _printed(cxx, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    sources = {path.name: path.read_text() for path in sorted(CORE.iterdir())} | {
        "operations.inc": generated()
    }
    key = hashlib.sha256(repr((macros, _FLAGS, sources)).encode()).hexdigest()[:16]
    folder = BUILD / key
    built = folder / "core.so"
    if not built.exists():
        # Tests run in several processes: each builds beside, and the first to end names the result.
        own = BUILD / f"{key}.{os.getpid()}"
        own.mkdir(parents=True, exist_ok=True)
        (own / "operations.inc").write_text(sources["operations.inc"])
        _printed(cxx, *_FLAGS, f"-I{own}", str(CORE / "scheduler.cpp"), "-o", str(own / "core.so"))
        try:
            own.rename(folder)
        except OSError:
            shutil.rmtree(own)
    library = ctypes.CDLL(str(built))
    library.ptx_run.restype = ctypes.c_int64
    return library


def _printed(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout

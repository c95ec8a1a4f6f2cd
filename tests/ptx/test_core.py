"""The C++ core compiles without a warning."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.ptx import library
from tests.ptx.operations import generated


def test_the_core_compiles_without_a_warning(tmp_path: Path) -> None:
    (tmp_path / "operations.inc").write_text(generated())
    strict = ("-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{tmp_path}")
    command = [str(library.compiler()), *strict, str(library.CORE / "scheduler.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

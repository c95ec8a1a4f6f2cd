"""The worked example of CONTRIBUTING stays true: it applies, and a new kind stays small."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATCH = ROOT / "docs" / "hellinger.patch"


def test_a_new_kind_takes_under_forty_lines_over_all_backends() -> None:
    added = [line for line in PATCH.read_text().splitlines() if line[:1] == "+" and line[:3] != "+++"]
    assert 20 < len(added) < 40
    assert {"formulas.py", "formulas-inl.h", "eager.py", "reference.py"} <= {
        Path(line.split()[1]).name for line in PATCH.read_text().splitlines() if line.startswith("+++")
    }


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_worked_example_still_applies() -> None:
    done = subprocess.run(
        ["git", "apply", "--check", str(PATCH)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

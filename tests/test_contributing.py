"""The worked example of CONTRIBUTING stays true: it applies, and a new kind stays small."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kl_gpu.backends.interface import Backend

ROOT = Path(__file__).parent.parent
PATCH = ROOT / "docs" / "hellinger.patch"


def test_a_new_kind_takes_under_forty_lines_over_all_backends() -> None:
    added = [line for line in PATCH.read_text().splitlines() if line[:1] == "+" and line[:3] != "+++"]
    assert 20 < len(added) < 40
    assert {"formulas.py", "formulas-inl.h", "pair.py", "kinds.py"} <= {
        Path(line.split()[1]).name for line in PATCH.read_text().splitlines() if line.startswith("+++")
    }


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_worked_example_still_applies() -> None:
    done = subprocess.run(
        ["git", "apply", "--check", str(PATCH)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_worked_example_works(tmp_path: Path) -> None:
    """Applied to a copy, the eager backend computes the new kind as its specification has it."""
    for name in ("kl_gpu", "kernels", "bench"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    subprocess.run(["git", "apply", str(PATCH)], cwd=tmp_path, check=True)
    # An editable installation's finder comes before any path.
    code = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
import torch, kl_gpu
from kl_gpu import reference
assert kl_gpu.__file__.startswith(DIRECTORY), kl_gpu.__file__
s, t = torch.randn(2, 4, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
s.requires_grad_()
value = kl_gpu.divergence(s, t, "hellinger", reduction="none", backend="eager")
torch.testing.assert_close(value.detach(), torch.tensor(reference.divergence(s.detach(), t, "hellinger")))
value.sum().backward()
want = reference.gradients(s.detach(), t, "hellinger")[0]
torch.testing.assert_close(s.grad, torch.tensor(want), rtol=1e-10, atol=1e-12)
assert s.grad.abs().max() > 1e-3
""".replace("DIRECTORY", repr(str(tmp_path)))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_list_of_a_backend_is_the_interface() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    block = text[text.index("## A backend") :].split("\n\n")[2]
    listed = [re.match(r" {4}(\w+)", line).group(1) for line in block.splitlines()]
    assert listed == [name for name in vars(Backend) if not name.startswith("_")]

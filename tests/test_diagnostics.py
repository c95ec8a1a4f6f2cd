"""What a bug report is made of: `python -m kl_gpu`, and `KL_GPU_LOG=1`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import kl_gpu
from kl_gpu import diagnostics, reference


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, env=os.environ | environment
    )


def test_the_module_prints_what_runs_where() -> None:
    found = run("-m", "kl_gpu", KL_GPU_CACHE_MB="7").stdout
    versions, cpu, *_ = lines = found.splitlines()
    assert f"kl_gpu {kl_gpu.__version__}, torch {torch.__version__.partition('+')[0]}" in versions
    assert cpu.startswith(("CPU: native (C++), instruction set", "CPU: eager, since"))
    assert any("KL_GPU_CACHE_MB=7" in line for line in lines)
    assert lines[-1].endswith(": good")


def test_the_self_check_finds_wrong_values(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.divergence
    monkeypatch.setattr(
        reference, "divergence", lambda s, t, kind: right(s, t, kind) * (1.0 + 1e-5 * (kind == "js"))
    )
    text, good = diagnostics.report()
    assert "(js): BROKEN" in text
    assert not good
    monkeypatch.setattr(reference, "divergence", lambda s, t, kind: right(s, t, kind) * float("nan"))
    assert "nan% of what is promised" in diagnostics.report()[0]
    monkeypatch.setattr(diagnostics, "divergence", None)
    text, good = diagnostics.report()
    assert "TypeError" in text
    assert not good


def test_a_line_for_each_operator() -> None:
    code = (
        "import torch, kl_gpu\n"
        "kl_gpu.kl_div(torch.randn(3, 40), torch.randn(3, 80).bfloat16()[:, :40], direction='reverse')"
    )
    (line,) = run("-c", code, KL_GPU_LOG="1").stderr.splitlines()
    assert line.startswith(
        "kl_gpu.divergence(float32[3, 40] strides (40, 1) on cpu, bfloat16[3, 40] strides (80, 1)"
    )
    assert "reverse_kl" in line
    assert run("-c", code).stderr == ""

"""The layout of a Hugging Face kernel, loaded from its folder as the `kernels` library loads one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kl_gpu.integrations import hf_kernels

# What kernel-builder adds: a namespace that no other build has.
BUILT = """
import torch
ops = torch.ops._kl_gpu_cafe
def add_op_namespace_prefix(name):
    return f"_kl_gpu_cafe::{name}"
"""
PROGRAM = """
import importlib.util, sys
import torch
import kl_gpu as installed
path, device = sys.argv[1:]
spec = importlib.util.spec_from_file_location("kl_gpu_cafe", f"{path}/__init__.py")
kernel = importlib.util.module_from_spec(spec)
sys.modules["kl_gpu_cafe"] = kernel
spec.loader.exec_module(kernel)
student, teacher = torch.randn(2, 3, 200, device=device).unbind()
found = []
for module in installed, kernel:
    leaf = student.clone().requires_grad_()
    value = module.js_div(leaf, teacher, beta=0.3, backend="triton")
    value.backward()
    logprobs = module.token_logprobs(leaf, torch.arange(3, device=device), backend="triton")
    found.append((value.detach(), leaf.grad, logprobs.detach()))
assert all(torch.equal(a, b) for a, b in zip(*found))
assert found[0][1].abs().max() > 0
ours = {name for name in sys.modules if name.startswith("kl_gpu_cafe.")}
assert "kl_gpu_cafe.backends.triton.pair" in ours
assert torch.ops._kl_gpu_cafe.value is not torch.ops.kl_gpu.value
print("same bits")
"""


def test_the_folder_loads_beside_an_installed_kl_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    hf_kernels.main([str(tmp_path), "--repo-id", "someone/kl-gpu"])
    module = tmp_path / "torch-ext" / "kl_gpu"
    (module / "_ops.py").write_text(BUILT)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    environment = os.environ | ({} if device == "cuda" else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-c", PROGRAM, str(module), device]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "same bits\n", done.stderr
    assert 'repo-id = "someone/kl-gpu"' in (tmp_path / "build.toml").read_text()
    assert "`kl_div`" in (tmp_path / "CARD.md").read_text()
    assert not (module / "integrations").exists()


def test_what_must_be_rewritten_is_missed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_kernels, "_REWRITTEN", (("no such line", ""),))
    with pytest.raises(RuntimeError, match="nothing like no such line"):
        hf_kernels.write(tmp_path, "someone/kl-gpu")

"""Importing the package: without Triton, and what comes with it. Each in an interpreter of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch


def run(code: str, **environment: str) -> str:
    environment = os.environ | environment
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout


BLOCK = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == BLOCKED or name.startswith(BLOCKED + "."):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import torch, warnings, kl_gpu
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        value = kl_gpu.kl_div(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
print(float(value))
print(len(said), *(str(w.message) for w in said))
try:
    kl_gpu.kl_div(torch.zeros(1, 2), torch.zeros(1, 2), backend=BACKEND)
except ValueError as error:
    print(error)
"""


def without(module: str, backend: str) -> list[str]:
    lines = run(f"BLOCKED, BACKEND = {module!r}, {backend!r}\n{BLOCK}").splitlines()
    assert abs(float(lines[0]) - 0.46211715726) < 1e-6  # tanh(1/2)
    return lines[1:]


def test_without_triton() -> None:
    _, message = without("triton", "triton")
    assert "triton" in message
    assert "not installed" in message


def test_without_the_compiled_kernels() -> None:
    said, message = without("kl_gpu._native", "native")
    assert said.startswith("1 ")
    assert "without its compiled CPU kernels" in said
    assert "install kl_gpu again" in message


def test_a_triton_too_old_for_the_kernels_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    from kl_gpu.backends import registry

    monkeypatch.setattr(triton, "__version__", "3.3.1")
    registry._usable.clear()
    try:
        assert registry.resolve(None, torch.device("cuda")) == "eager"
        with pytest.raises(ValueError, match=r"triton.*3\.4"):
            registry.resolve("triton", torch.device("cuda"))
        monkeypatch.setattr(triton, "__version__", "3.10.0+git1")
        registry._usable.clear()
        assert registry.resolve(None, torch.device("cuda")) == "triton"
    finally:
        registry._usable.clear()


def test_import_brings_in_no_more_than_it_needs() -> None:
    """Triton, kl_gpu.distributed and linear_div are imported when asked for, other packages never."""
    code = """
import json, sys
import torch
at_hand = set(sys.modules)
import kl_gpu
print(json.dumps(sorted(set(sys.modules) - at_hand)))
"""
    brought = set(json.loads(run(code)))
    assert "kl_gpu.functional" in brought
    assert not brought & {
        "kl_gpu.backends.triton",
        "kl_gpu.backends.native",
        "kl_gpu.linear",
        "kl_gpu.distributed",
    }
    packages = {name.partition(".")[0] for name in brought}
    assert packages - sys.stdlib_module_names == {"kl_gpu"}


def test_public_names() -> None:
    import kl_gpu

    for name in kl_gpu.__all__:
        assert getattr(kl_gpu, name) is not None


def test_distributed_is_there_when_asked_for() -> None:
    import kl_gpu

    assert callable(kl_gpu.distributed.vocab_parallel_div)
    assert all(getattr(kl_gpu.distributed, name) is not None for name in kl_gpu.distributed.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = kl_gpu.nothing

"""New tensors lie where the inputs do, whatever torch.set_default_device says."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kl_gpu

PACKAGE = Path(kl_gpu.__file__).parent
TESTS = Path(__file__).parent
# What makes a tensor of numbers, so on the default device unless it is told another.
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "frombuffer", "full",
    "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor",
    "sparse_coo_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip


def factory_calls_without_a_device(source: str) -> Iterator[int]:
    """Lines that call a factory of torch and name no device; `new_…` and `…_like` follow their tensor."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        if of_torch and node.func.attr in FACTORIES and "device" not in {x.arg for x in node.keywords}:
            yield node.lineno


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_factory_call_without_a_device(path: Path) -> None:
    assert list(factory_calls_without_a_device(path.read_text())) == []


def test_the_search_finds_them() -> None:
    source = (
        "torch.zeros(3)\ntorch.zeros(3, device=x)\nx.new_zeros(3)\ntorch.zeros_like(x)\ntorch.tensor(1.0)"
    )
    assert list(factory_calls_without_a_device(source)) == [1, 5]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.xdist_group("distributed")
def test_every_entry_while_another_device_is_the_default(backend: str, tmp_path: Path) -> None:
    # Its own process: what went wrong here was a crash.
    on_the_cpu = {"PYTHONPATH": str(PACKAGE.parent), "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    found = subprocess.run(
        [sys.executable, str(TESTS / "factory_calls.py"), str(tmp_path), backend], text=True,
        capture_output=True, timeout=300, check=False, env=os.environ | on_the_cpu,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    name, calls = found.stdout.split()
    assert name == backend
    assert int(calls) > 50

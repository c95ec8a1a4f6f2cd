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
    assert "reinstall kl_gpu where a C++20 compiler is available" in message


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


COMPILED_FIRST = """
import sys
import torch
import kl_gpu
from kl_gpu.backends import registry

before = set(registry._loaded)
names = [name for name in kl_gpu.BACKENDS if name != "native" or registry._has_native()]
registry._usable.clear()
hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(50, 8)
student, teacher = torch.randn(4, 50, requires_grad=True), torch.randn(4, 50)
ids, best = torch.arange(4), teacher.log_softmax(-1).topk(3)
CALLS = {
    "kl_div": lambda b: kl_gpu.kl_div(student, teacher, backend=b),
    "token_logprobs": lambda b: kl_gpu.token_logprobs(student, ids, backend=b).sum(),
    "topk_div": lambda b: kl_gpu.topk_div(student, *best, backend=b),
    "linear_div": lambda b: kl_gpu.linear_div(hidden, head, teacher[:, :8], head, backend=b),
    "linear_token_logprobs": lambda b: kl_gpu.linear_token_logprobs(hidden, head, ids, backend=b).sum(),
}
for backend in names:
    registry._loaded.pop(backend, None)
    call = CALLS[ENTRY]
    torch.compile(lambda: call(backend), fullgraph=True, backend="aot_eager")().backward()
    torch.compiler.reset()
print(*before, "|", *sorted(registry._loaded))
print(float(student.grad.abs().max()) if student.grad is not None else float(hidden.grad.abs().max()))
"""


@pytest.mark.parametrize(
    "entry", ["kl_div", "token_logprobs", "topk_div", "linear_div", "linear_token_logprobs"]
)
def test_the_first_call_of_a_process_may_be_a_compiled_one(entry: str) -> None:
    """Which loads the backend, and asks for Triton, while the call is traced."""
    loaded, largest = run(f"ENTRY = {entry!r}\n{COMPILED_FIRST}", TRITON_INTERPRET="1").splitlines()
    assert loaded.startswith("|")
    assert "eager" in loaded
    assert "triton" in loaded
    assert float(largest) > 1e-3

"""Where the tests run: on the GPU where there is one, else on the CPU with Triton's interpreter."""

from __future__ import annotations

import os

import torch

# Before anything imports the kernels: the interpreter is chosen when they are decorated.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

import kl_gpu
from kl_gpu import ops
from support import DEVICE, WORST


def _runs_here(backend: str) -> bool:
    try:
        ops.resolve_backend(backend, DEVICE)
    except ValueError:
        return False
    return True


@pytest.fixture(params=[backend for backend in kl_gpu.BACKENDS if _runs_here(backend)])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=list(kl_gpu.KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if WORST:
        terminalreporter.section("worst error as a share of the promised bound")
        for (what, backend, kind), (share, where) in sorted(WORST.items()):
            terminalreporter.write_line(f"{what:9} {backend:7} {kind:11} {share:6.1%}  at {where}")

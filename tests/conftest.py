"""Where the tests run: on the GPU where there is one, else on the CPU with Triton's interpreter."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Generator, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

# Before anything imports the kernels: the interpreter is chosen when they are decorated.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

import kl_gpu
import thinned
from frames import with_room
from kl_gpu.backends import registry
from support import DEVICE, WORST, record
from tests.ptx import fixtures as ptx


def _runs_here(backend: str) -> bool:
    try:
        registry.resolve(backend, DEVICE)
    except ValueError:
        return False
    return True


@pytest.fixture(params=[*(backend for backend in kl_gpu.BACKENDS if _runs_here(backend)), *ptx.backends()])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend's name; of "triton-ptx" it is "triton", while its kernels' PTX is executed (tests/ptx)."""
    with ptx.executed(request.param) as name:
        yield name


@pytest.fixture(params=ptx.executions())
def triton_execution(request: pytest.FixtureRequest) -> Iterator[str]:
    """backend="triton" as usual, and as GPUs of each architecture run it."""
    with ptx.executed(request.param):
        yield request.param


@pytest.fixture(params=list(kl_gpu.KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def wide_triton_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16384 columns under the interpreter, which takes as long for a small one."""
    if DEVICE.type == "cpu" and not ptx.is_executed():
        from kl_gpu.backends.triton import launch

        monkeypatch.setattr(launch, "warps_of", lambda shape: 64)


@pytest.fixture
def wide_programs(backend: str, request: pytest.FixtureRequest) -> None:
    """The same in tests of every backend: one that is Triton's alone would run once for each of them."""
    if backend == "triton":
        request.getfixturevalue("wide_triton_programs")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run, the same in every process that takes a share of the tests."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


OPTIONAL = ("filelock", "hypothesis", "matplotlib", "mpmath", "rich", "scipy", "tokenizers", "transformers")


def missing_package(path: Path) -> str | None:
    """The first optional package that a test file imports at its top and this machine has not."""
    imported = re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
    return next((name for name in imported if name in OPTIONAL and find_spec(name) is None), None)


if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    import quick_interpreter

    quick_interpreter.quicken()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    function = pyfuncitem.obj
    pyfuncitem.obj = partial(with_room, function)
    try:
        return (yield)
    finally:
        pyfuncitem.obj = function


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report(collector: pytest.Collector) -> pytest.CollectReport | None:
    """A file whose optional package is missing is skipped; its import would end the whole run."""
    if not isinstance(collector, pytest.Module) or (name := missing_package(collector.path)) is None:
        return None
    why = (str(collector.path), 1, f"Skipped: {name} is not installed")
    return pytest.CollectReport(collector.nodeid, "skipped", why, [])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> Iterator[None]:
    """Of one function PyTorch keeps eight graphs, and the ninth is an error where the whole must be one."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]["total"]:
        dynamo.reset()
        dynamo.utils.counters.clear()


@pytest.fixture(autouse=True)
def _no_plans_of_other_tests() -> None:
    """Tests change what launches are planned from: the size of programs, the columns that one sweeps."""
    prepared = sys.modules.get("kl_gpu.backends.triton.prepared")
    if prepared is not None:
        prepared.forget_plans()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes: hand the figures to the first
        session.config.workeroutput["worst"] = list(WORST.items())


class _Workers:
    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        for key, (share, where) in getattr(node, "workeroutput", {}).get("worst", ()):
            record(*key, share, where)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Workers())
    config.pluginmanager.register(thinned)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if WORST:
        terminalreporter.section("worst error as a share of the promised bound")
        for (what, backend, kind), (share, where) in sorted(WORST.items()):
            terminalreporter.write_line(f"{what:9} {backend:7} {kind:15} {share:6.1%}  at {where}")

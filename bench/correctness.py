"""The test suite on the device: which tests, how they are started, and what is kept of their report."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .bounded import Finished, run
from .budget import CUT_SHORT, DONE, FAILED, Ending

ROOT = Path(__file__).parents[1]

# What only a GPU can show comes first, and what compiles hundreds of kernels last.
_FIRST = ("cuda", "accuracy", "edges", "determinism", "autograd", "views", "options")
_LAST = ("ops", "parity", "properties")
# These say nothing about the device at hand.
_ELSEWHERE = frozenset({
    "bench", "contributing", "examples", "gpu_report", "gpu_session", "import", "machine_code", "native",
    "reference", "traffic",
})  # fmt: skip


def files_for_a_gpu(folder: Path) -> list[Path]:
    """The tests that bear on a GPU, in the order in which they should run. New files are in by themselves."""

    def rank(path: Path) -> tuple[int, int, str]:
        name = path.stem.removeprefix("test_")
        if name in _FIRST:
            return 0, _FIRST.index(name), name
        return (2, _LAST.index(name), name) if name in _LAST else (1, 0, name)

    files = folder.glob("test_*.py")
    return sorted((f for f in files if f.stem.removeprefix("test_") not in _ELSEWHERE), key=rank)


@dataclass
class PytestReport:
    """pytest's closing line, and the line of each test that failed."""

    line: str = ""
    failures: list[str] = field(default_factory=list)


_CLOSING = re.compile(r"\b\d+ (passed|failed|skipped|errors?|deselected)\b.* in [\d.]+s|no tests ran")
_FAILURE = re.compile(r"(FAILED|ERROR) \S+::|ERROR \S+\.py")


def read_report(output: str) -> PytestReport:
    lines = [line.strip() for line in output.splitlines()]
    closing = [line.strip("= ") for line in lines if _CLOSING.search(line)]
    return PytestReport(closing[-1] if closing else "", [line for line in lines if _FAILURE.match(line)])


def environment() -> dict[str, str]:
    """Kernels compiled for the device, not interpreted; the repository importable."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return kept | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def command(files: Sequence[Path], chosen: str) -> list[str]:
    """pytest over `files`, of their tests those that the expression `chosen` names."""
    parallel = []
    workers = min(8, (os.cpu_count() or 1) // 2)
    if workers > 1 and importlib.util.find_spec("xdist"):
        parallel = ["--numprocesses", str(workers), "--dist", "loadgroup"]
    options = ["-rfE", "--tb=short", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60"]
    return [sys.executable, "-m", "pytest", *options, *parallel, "-k", chosen, *map(str, files)]


def run_tests(
    files: Sequence[Path],
    chosen: str,
    limit: float,
    log: Path,
    variables: Mapping[str, str],
) -> tuple[PytestReport, Ending]:
    finished = run(command(files, chosen), limit, log, ROOT, dict(environment()) | dict(variables))
    tests = read_report(finished.output)
    return tests, _ending(tests, finished)


def _ending(tests: PytestReport, finished: Finished) -> Ending:
    if tests.failures:
        return Ending(FAILED, tests.line or f"{len(tests.failures)} failures")
    if finished.timed_out:
        return Ending(CUT_SHORT, tests.line or "no summary in time")
    if finished.code != 0:
        last = (finished.output.strip().splitlines() or [""])[-1]
        return Ending(FAILED, tests.line or f"pytest ended with {finished.code}: {last}")
    return Ending(DONE, tests.line)

"""The test suite on the device: which tests, how they are started, and what is kept of their report."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ..harness.report_log import PytestReport, events
from .limited import Finished, run
from .phases import CUT_SHORT, DONE, FAILED, Ending

ROOT = Path(__file__).parents[2]
_HANGS = 90  # seconds: a test that takes longer hangs

# What only a GPU can show: programs that wait for one another, compiled.
_QUEUE = ("cuda", "queue", "rows")
_FIRST = ("accuracy", "edges", "determinism", "autograd", "views", "options")
# What compiles hundreds of kernels.
_LAST = ("ops", "parity", "properties")
# A file that looks at the device at hand, or runs on every backend there.
_BEARS_ON_A_GPU = re.compile(r"\bDEVICE\b|\bbackend: str\b|cuda\.is_available")


def of_the_queue(folder: Path) -> list[Path]:
    return [folder / f"test_{name}.py" for name in _QUEUE]


def others(folder: Path) -> list[Path]:
    """The other tests that bear on a GPU, in the order in which they should run.

    New files are in by themselves, but for those of several processes, for which a session has no time.
    """

    def rank(path: Path) -> tuple[int, int, str]:
        name = path.stem.removeprefix("test_")
        if name in _FIRST:
            return 0, _FIRST.index(name), name
        return (2, _LAST.index(name), name) if name in _LAST else (1, 0, name)

    left_out = {*of_the_queue(folder), *folder.glob("test_distributed*.py")}
    files = {file for file in folder.glob("test_*.py") if _BEARS_ON_A_GPU.search(file.read_text())}
    return sorted(files - left_out, key=rank)


def environment() -> dict[str, str]:
    """Kernels compiled for the device, not interpreted; the repository importable."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return kept | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def command(files: Sequence[Path], chosen: str, log: Path) -> list[str]:
    """pytest over `files`, of their tests those that the expression `chosen` names."""
    parallel = []
    workers = min(12, (os.cpu_count() or 1) * 3 // 4)  # each compiles, and holds a context on the GPU
    if workers > 1 and importlib.util.find_spec("xdist"):
        # A test that hangs takes its process along; pytest-xdist starts another.
        parallel = ["--numprocesses", str(workers), "--dist", "loadgroup"]
    options = ["-rfE", "--tb=short", "-p", "no:cacheprovider", f"--report-log={log}"]
    hangs = [f"--timeout={_HANGS}", "--timeout-method=thread"]
    return [sys.executable, "-m", "pytest", *options, *hangs, *parallel, "-k", chosen, *map(str, files)]


def run_tests(
    files: Sequence[Path], chosen: str, limit: float, log: Path, folder: Path = ROOT
) -> tuple[PytestReport, Ending]:
    """Runs the tests from `folder` for at most `limit` seconds; pytest's own output is added to `log`."""
    record = log.with_suffix(".tests")
    record.unlink(missing_ok=True)
    finished = run(command(files, chosen, record), limit, log, folder, environment())
    report = PytestReport().add(events(record))
    record.unlink(missing_ok=True)
    return report, _ending(report, finished)


def _ending(report: PytestReport, finished: Finished) -> Ending:
    if report.failures:
        return Ending(FAILED, report.line)
    if finished.timed_out:
        return Ending(CUT_SHORT, report.line or "no test ended in time")
    if finished.code != 0:
        last = (finished.output.strip().splitlines() or [""])[-1]
        return Ending(FAILED, f"pytest ended with {finished.code}: {last}")
    return Ending(DONE, report.line)

"""A pytest plugin that writes down each test's outcome as it comes: `-p bench.pytest_record --record FILE`.

pytest's own summary comes last, and never where the run is killed: where a kernel hangs, say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


class _Recorder:
    def __init__(self, path: Path) -> None:
        self._path = path

    def _write(self, **what: str) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(what) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(test=nodeid, outcome="running")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # a skip may come with the setup
            self._write(test=report.nodeid, outcome=report.outcome, why=_reason(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self._write(test=report.nodeid, outcome=report.outcome, why=_reason(report))


def _reason(report: Any) -> str:
    """The exception's first line."""
    if report.outcome == "passed":
        return ""
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    message = crash.message if crash else str(report.longrepr).strip().rpartition("\n")[2]
    return message.partition("\n")[0]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="write each test's outcome here")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record")
    if path and not hasattr(config, "workerinput"):  # of several processes the first hears of every test
        config.pluginmanager.register(_Recorder(path))

"""The pytest plugin of the suite: it says which tests there are, and shows what pytest-benchmark measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ..harness.clock import timer_of
from ..harness.report import COPY, Finding
from ..harness.systems import available
from .plan import Point

NAME = "kl-gpu-suite"
PASSES = 3


@dataclass(frozen=True)
class Timing:
    """One test: a system at a workload of a point, in one of the passes."""

    point: Point
    workload: str
    system: str
    number: int

    def __str__(self) -> str:
        return f"{self.point}-{self.workload}-{self.system}-pass {self.number}"


def findings_of(properties: Sequence[Sequence[Any]]) -> list[Finding]:
    """What a test report's properties hold."""
    return [Finding(**value) for name, value in properties if name == "finding"]


class Suite:
    """Points to time on a device, each system so many times in all.

    `begun` are tests that an earlier process began, and that are left out: one of them ended it. `show` is
    called with all findings of a point once they are there.
    """

    def __init__(
        self,
        points: Sequence[Point],
        device: torch.device,
        repeats: int,
        begun: Collection[str] = (),
        show: Callable[[list[Finding]], None] | None = None,
    ) -> None:
        self.points = points
        self.device = device
        self.passes = min(PASSES, repeats)
        self.rounds = -(-repeats // self.passes)
        self._begun = frozenset(begun)
        self._show = show
        self._findings: list[Finding] = []

    def timings(self) -> Iterator[Timing]:
        known = available(self.device)
        for point in self.points:
            for workload in point.workloads:
                able = [
                    name for name in point.systems if name not in known or known[name].does(point.kind, workload)
                ]
                for number in range(self.passes if able else 0):
                    for name in (COPY, *able):
                        yield Timing(point, workload, name, number)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "timing" in metafunc.fixturenames:
            metafunc.parametrize("timing", list(self.timings()), ids=str)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid not in self._begun]
        for item in items:
            timing = getattr(item, "callspec").params["timing"]  # noqa: B009  # of functions alone
            group = f"{timing.point}, {timing.workload}"
            item.add_marker(pytest.mark.benchmark(group=group, timer=timer_of(self.device), disable_gc=True))

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Tables say it better than dots do."""
        return (report.outcome if report.when == "call" else "", "", "") if self._show else None

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            found = findings_of(report.user_properties)
            if found and self._findings and found[0].case != self._findings[0].case:
                self._flush()
            self._findings += found
        if report.failed and not self._answers():
            os._exit(1)  # the report is written: another process goes on behind this test

    def pytest_sessionfinish(self) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._findings and self._show:
            self._show(self._findings)
        self._findings = []

    def _answers(self) -> bool:
        """After some errors every further call on a device fails, until the process ends."""
        try:
            (torch.zeros(1, device=self.device) + 1).item()
        except RuntimeError:
            return False
        return True

"""The pytest plugin of the suite: it says which tests there are, and keeps what pytest-benchmark measured."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ..harness.clock import timer_of
from ..harness.report import COPY, Finding
from ..harness.systems import available
from ..harness.traffic import PASSES as TENSORS
from .plan import Point, passes_of
from .stage import Stage


@dataclass(frozen=True)
class Timing:
    """One test: a system at a workload of a point, in one of the passes."""

    point: Point
    workload: str
    system: str
    number: int

    def __str__(self) -> str:
        return f"{self.point}-{self.workload}-{self.system}-pass {self.number}"


class Suite:
    """Points to time on a device, each system so many times in all.

    `begun` are tests that an earlier process began, and that are left out: one of them ended it.
    """

    def __init__(
        self, points: Sequence[Point], device: torch.device, repeats: int, begun: Collection[str] = ()
    ) -> None:
        self.points = points
        self.device = device
        self.passes, self.rounds = passes_of(repeats)
        self._begun = frozenset(begun)
        self.findings: list[Finding] = []

    @pytest.fixture(scope="session")
    def suite(self) -> Suite:
        return self

    @pytest.fixture(scope="session")
    def stage(self) -> Stage:
        return Stage(self.device)

    def timings(self) -> Iterator[Timing]:
        known = available(self.device)
        for point in self.points:
            for workload in point.workloads:
                able = [
                    name
                    for name in point.systems
                    if name not in known or known[name].does(point.kind, workload)
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
            group = f"{timing.point}, {timing.workload} {TENSORS[timing.workload]}U"
            item.add_marker(pytest.mark.benchmark(group=group, timer=timer_of(self.device), disable_gc=True))

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            recorded: Sequence[tuple[str, Any]] = report.user_properties
            self.findings += (Finding(**value) for name, value in recorded if name == "finding")
        if report.failed and not self._answers():
            os._exit(1)  # the report is written: another process goes on behind this test

    def _answers(self) -> bool:
        """After some errors every further call on a device fails, until the process ends."""
        try:
            (torch.zeros(1, device=self.device) + 1).item()
        except RuntimeError:
            return False
        return True

"""Reads what pytest-reportlog wrote, also where its writer was killed: counts, failures, unfinished tests."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Event = dict[str, Any]


def events(path: Path) -> Iterator[Event]:
    """Every whole line: the last one may have been cut off with its writer."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return (json.loads(line) for line in lines if line.endswith("\n"))


def reason(event: Event) -> str:
    """The first line of why a test failed or was skipped."""
    why = event["longrepr"]
    if isinstance(why, list):  # of a skip: file, line, reason
        return why[2].removeprefix("Skipped: ")
    if isinstance(why, dict) and why.get("reprcrash"):
        return why["reprcrash"]["message"].partition("\n")[0]
    text = why["longrepr"] if isinstance(why, dict) and "longrepr" in why else why
    return str(text).strip().rpartition("\n")[2]


@dataclass
class PytestReport:
    """A run of pytest: its last word on every test, and whether it came to its own end."""

    tests: dict[str, Event] = field(default_factory=dict)
    begun: dict[str, bool] = field(default_factory=dict)  # test: whether it ended, too
    ended: bool = False

    def add(self, log: Iterable[Event]) -> PytestReport:
        for event in log:
            kind = event.get("$report_type")
            self.ended |= kind == "SessionFinish"
            if kind == "CollectReport" and event["outcome"] != "passed":
                self.tests[event["nodeid"]] = event
            if kind == "TestReport":
                test = event["nodeid"]
                self.begun[test] = event["when"] == "teardown"
                # A setup that passes says nothing of the test; a skip may come with the setup.
                if event["when"] == "call" or event["outcome"] != "passed":
                    self.tests[test] = event
        return self

    @property
    def failures(self) -> list[str]:
        return [f"{test}: {reason(event)}" for test, event in self._with("failed")]

    @property
    def skips(self) -> list[str]:
        """The reasons, each once."""
        return list(dict.fromkeys(reason(event) for _, event in self._with("skipped")))

    @property
    def stopped(self) -> list[str]:
        """What was running when the run was stopped, or crashed."""
        return [test for test, ended in self.begun.items() if not ended and test not in self.tests]

    @property
    def line(self) -> str:
        counts = Counter(event["outcome"] for event in self.tests.values())
        parts = [f"{counts[outcome]} {outcome}" for outcome in sorted(counts)]
        return ", ".join([*parts, *([f"{len(self.stopped)} unfinished"] if self.stopped else [])])

    def properties(self, name: str) -> list[Any]:
        """What the tests recorded under this name, by pytest's `record_property`."""
        recorded = (pair for event in self.tests.values() for pair in event.get("user_properties", ()))
        return [value for key, value in recorded if key == name]

    def _with(self, outcome: str) -> Iterator[tuple[str, Event]]:
        return ((test, event) for test, event in self.tests.items() if event["outcome"] == outcome)

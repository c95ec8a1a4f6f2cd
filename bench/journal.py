"""What happened so far, line by line on disk: a process that dies or is killed loses nothing it measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .measure import Measured, Row
from .plan import Point
from .report import Report

Event = dict[str, Any]


class Journal:
    """A file of JSON lines. The first holds the plan; then one for each beginning, result and failure."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, event: str, **fields: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, **fields}, allow_nan=False) + "\n")

    def begin(self, report: Report, device: str, repeats: int, points: Sequence[Point]) -> None:
        about = {key: value for key, value in asdict(report).items() if key not in ("copy_gbps", "rows")}
        self.path.write_text("")
        plan = [asdict(point) for point in points]
        self.add("plan", about=about, device=device, repeats=repeats, points=plan)

    def measured(self, results: dict[str, Measured]) -> None:
        for work, result in results.items():
            self.add(
                "measured",
                work=work,
                copy_gbps=result.copy_gbps,
                rows=[asdict(row) for row in result.rows],
                left_out=result.left_out,
            )

    def read(self) -> list[Event]:
        """Every whole line: the last one may have been cut off with its writer."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


def points_of(events: Sequence[Event]) -> list[Point]:
    """The plan."""
    return [
        Point(**{**point, "systems": tuple(point["systems"]), "works": tuple(point["works"])})
        for point in events[0]["points"]
    ]


def report_of(events: Sequence[Event]) -> Report:
    """The JSON document of all that was measured."""
    report = Report(**events[0]["about"])
    for event in events:
        if event["event"] == "measured":
            report.rows += [Row(**row) for row in event["rows"]]
            report.copy_gbps = max(report.copy_gbps, event["copy_gbps"])
    return report


def points_in_state(events: Sequence[Event]) -> dict[str, list[dict[str, str]]]:
    """The plan's points by what became of them: measured, failed (with why), not reached.

    A point that began and neither ended nor failed took its process with it.
    """
    ended = {event["point"]: event for event in events if event["event"] in ("done", "failed")}
    began = {event["point"] for event in events if event["event"] == "start"}
    states: dict[str, list[dict[str, str]]] = {"measured": [], "failed": [], "not reached": []}
    for number, point in enumerate(points_of(events)):
        name = {"point": f"{point} {' '.join(point.systems)}"}
        if number in ended and ended[number]["event"] == "done":
            states["measured"].append(name)
        elif number in ended:
            states["failed"].append({**name, "why": ended[number]["why"]})
        elif number in began:
            states["failed"].append({**name, "why": "its process crashed, hung or was stopped"})
        else:
            states["not reached"].append(name)
    return states

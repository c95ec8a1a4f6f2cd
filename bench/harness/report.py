"""The report of a run: rows from what was timed, as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch

from . import machine
from .cases import Case
from .traffic import COPY_PASSES, PASSES

COPY = "copy"


@dataclass
class Task:
    """What was timed."""

    system: str
    kind: str
    work: str
    dtype: str
    N: int
    V: int

    @property
    def case(self) -> Case:
        return Case(self.kind, self.dtype, self.N, self.V)


@dataclass
class Finding(Task):
    """What one test of the suite measured. `seconds` are empty where the system failed."""

    seconds: list[float] = field(default_factory=list)
    peak_extra_bytes: int = 0
    max_rel_error: float = 0.0
    group: str = ""  # who was timed together


@dataclass
class Row(Task):
    """One line of the JSON."""

    ms: float
    bytes: int
    gbps: float
    share_of_copy: float
    peak_extra_bytes: int
    max_rel_error: float


@dataclass
class Report:
    """The JSON document. `copy_gbps` is the best case's: the others' copies were cut short by their size."""

    device: str
    date: str  # ISO 8601 with zone
    torch: str
    triton: str | None
    driver: str | None
    copy_gbps: float = 0.0
    rows: list[Row] = field(default_factory=list)

    def add(self, findings: Iterable[Finding]) -> None:
        """Adds a row for each system and workload that was timed beside the copy, and failed in no pass.

        What was timed twice has the row of the later group.
        """
        groups: dict[tuple[Case, str, str], dict[str, list[Finding]]] = {}
        for finding in findings:
            group = groups.setdefault((finding.case, finding.work, finding.group), {})
            group.setdefault(finding.system, []).append(finding)
        for (case, work, _), group in groups.items():
            whole = {name: passes for name, passes in group.items() if all(each.seconds for each in passes)}
            if COPY in whole:
                self._add(case, work, whole)

    def _add(self, case: Case, work: str, group: Mapping[str, list[Finding]]) -> None:
        ms_of = {
            name: median(1e3 * s for each in passes for s in each.seconds) for name, passes in group.items()
        }
        copy_gbps = COPY_PASSES * case.tensor_bytes / ms_of.pop(COPY) / 1e6
        self.copy_gbps = max(self.copy_gbps, copy_gbps)
        required = PASSES[work] * case.tensor_bytes
        for name, ms in ms_of.items():
            speed = required / ms / 1e6
            peak = max(each.peak_extra_bytes for each in group[name])
            error = max(each.max_rel_error for each in group[name])
            task = (name, case.kind, work, case.dtype, case.rows, case.vocab)
            self.rows = [row for row in self.rows if (row.system, row.case, row.work) != (name, case, work)]
            self.rows.append(Row(*task, ms, required, speed, speed / copy_gbps, peak, error))

    @property
    def stem(self) -> str:
        """Device and date, as a file's name."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        return f"{slug}-{datetime.fromisoformat(self.date):%Y%m%d-%H%M%S}"

    def save(self, folder: Path, *, complete: bool) -> Path:
        """Writes `device-date.json`, or `….partial.json` of a run that is still going on or was stopped."""
        partial = folder / f"{self.stem}.partial.json"
        partial.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")
        return partial.rename(folder / f"{self.stem}.json") if complete else partial


def new_report(device: torch.device) -> Report:
    return Report(
        device=machine.name(device),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        torch=torch.__version__,
        triton=machine.triton_version(),
        driver=machine.driver_version(device),
    )

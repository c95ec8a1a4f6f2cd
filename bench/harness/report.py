"""The report of a run: rows from what was timed, JSON for everybody, tables for the terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch
from rich import box
from rich.markup import escape
from rich.table import Table

from . import machine
from .cases import Case
from .traffic import COPY_PASSES, PASSES, gbps

COPY = "copy"


@dataclass
class Finding:
    """What one test of the suite measured. `seconds` are empty where the system failed."""

    system: str
    kind: str
    work: str
    dtype: str
    N: int
    V: int
    seconds: list[float] = field(default_factory=list)
    peak_extra_bytes: int = 0
    max_rel_error: float = 0.0

    @property
    def case(self) -> Case:
        return Case(self.kind, self.dtype, self.N, self.V)


@dataclass(frozen=True)
class Row:
    """One line of the JSON."""

    system: str
    kind: str
    work: str
    dtype: str
    N: int
    V: int
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
        """Adds a row for each system and workload that was timed beside the copy, and failed in no pass."""
        groups: dict[tuple[Case, str], dict[str, list[Finding]]] = {}
        for finding in findings:
            group = groups.setdefault((finding.case, finding.work), {})
            group.setdefault(finding.system, []).append(finding)
        for (case, work), group in groups.items():
            whole = {name: passes for name, passes in group.items() if all(each.seconds for each in passes)}
            if COPY in whole:
                self._add(case, work, whole)

    def _add(self, case: Case, work: str, group: Mapping[str, list[Finding]]) -> None:
        ms_of = {
            name: median(1e3 * s for each in passes for s in each.seconds) for name, passes in group.items()
        }
        copy_gbps = gbps(COPY_PASSES * case.tensor_bytes, ms_of.pop(COPY))
        self.copy_gbps = max(self.copy_gbps, copy_gbps)
        required = PASSES[work] * case.tensor_bytes
        for name, ms in ms_of.items():
            speed = gbps(required, ms)
            peak = max(each.peak_extra_bytes for each in group[name])
            error = max(each.max_rel_error for each in group[name])
            task = (name, case.kind, work, case.dtype, case.rows, case.vocab)
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


def summary_table(rows: Sequence[Row]) -> Table:
    """Medians over kinds and sizes: the share of copy speed, and the time as a multiple of kl_gpu's."""
    systems = list(dict.fromkeys(row.system for row in rows))
    ours = {_task(row): row.ms for row in rows if row.system == "kl_gpu"}
    groups: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        groups.setdefault((row.work, row.dtype), {}).setdefault(row.system, []).append(row)

    title = "Medians: share of copy speed, time ÷ kl_gpu's"
    table = Table("work", title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for system in systems:
        table.add_column(escape(system), justify="right")
    for (work, dtype), group in groups.items():
        cells = []
        for system in systems:
            mine = group.get(system, [])
            share = f"{median(row.share_of_copy for row in mine):.0%}" if mine else "–"
            ratios = [row.ms / ours[_task(row)] for row in mine if _task(row) in ours]
            cells.append(f"{share}  {_short(median(ratios))}×" if ratios else share)
        table.add_row(f"{work} {dtype}", *cells)
    return table


def _task(row: Row) -> tuple[str, str, str, int, int]:
    return row.kind, row.work, row.dtype, row.N, row.V


def _short(number: float) -> str:
    """Three digits without an exponent, and none at all below a thousandth."""
    return f"{number:.3g}" if 0.001 <= number < 999.5 else f"{number:.0f}"

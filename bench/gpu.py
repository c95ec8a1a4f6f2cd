"""One session on a GPU: correctness, timings, sanitizer, plots; over in --minutes, whatever happens.

    python -m bench.gpu [--out DIR] [--minutes 9]

Writes into DIR: the timings' JSON, linear_div's, a third with what was checked, run and skipped, the plots,
the journal, and session.log with every command's output. What was measured is on disk at once. Without a GPU
it says what it skips and times a little on the CPU. Status 1 where a check failed or an output was wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from . import machine, watchdog
from .acceptance import TARGETS, worded
from .bounded import run
from .budget import CUT_SHORT, DONE, FAILED, SKIPPED, Budget, Ending, Outcome, Phase, run_phases
from .correctness import ROOT, PytestReport, environment, files_for_a_gpu, run_tests
from .journal import Journal, points_in_state, report_of
from .plan import Point, cpu_plan, gpu_plan, tiny_plan
from .report import Report, new_report, summary_table
from .sanitizer import NAME, TOOLS, sanitize, tool
from .timings import BROKEN

_RESERVE = 10.0  # seconds for what frames the phases
_SHOWN = 10  # lines of a kind on the terminal; all are in the JSON
_NO_GPU = "no GPU; `make test` runs the kernels through Triton's interpreter"


@dataclass
class Session:
    """What the phases share, and what will be in the second JSON."""

    folder: Path
    device: torch.device
    report: Report
    points: Sequence[Point]
    outcomes: list[Outcome] = field(default_factory=list)
    tests: dict[str, PytestReport] = field(default_factory=dict)
    sanitizer: dict[str, str] = field(default_factory=dict)
    timings: Path | None = None

    @property
    def log(self) -> Path:
        return self.folder / "session.log"

    @property
    def journal(self) -> Journal:
        return Journal(self.folder / "journal.jsonl")

    def phases(self) -> list[Phase]:
        """The most important first. Shares are seconds of 540, more or less."""
        no_gpu = "" if self.device.type == "cuda" else _NO_GPU
        program = tool()
        no_tool = no_gpu or ("" if program else f"not found: {NAME}")
        return [
            Phase("tests", 170, 20, partial(self.test, "tests", "not eager"), no_gpu),
            Phase("timings", 270, 10, self.time),
            Phase("linear", 30, 20, self.linear, no_gpu),
            *(Phase(check, 35, 15, partial(self.sanitize, program or "", check), no_tool) for check in TOOLS),
            Phase("plots", 15, 5, self.plot),
            Phase("tests of eager", 15, 10, partial(self.test, "tests of eager", "eager"), no_gpu),
        ]

    def test(self, name: str, chosen: str, limit: float) -> Ending:
        tests, ending = run_tests(files_for_a_gpu(ROOT / "tests"), chosen, limit, self.log)
        self.tests[name] = tests
        return ending

    def sanitize(self, program: str, check: str, limit: float) -> Ending:
        ending = sanitize(program, check, limit, self.log, environment())
        self.sanitizer[check] = f"{ending.outcome}: {ending.why}"
        return ending

    def time(self, limit: float) -> Ending:
        """The points one process after the other: where one breaks, the next goes on behind it."""
        budget = Budget(limit)
        code: int | None = BROKEN
        begun = -1
        while code != 0 and budget.left() > 10:
            before, begun = begun, sum(event["event"] == "start" for event in self.journal.read())
            if begun == before:
                break  # it ended without having begun anything: again would be the same
            seconds = budget.left()
            command = [sys.executable, "-m", "bench.timings", "--journal", str(self.journal.path)]
            # A margin for the process's own start and end, so that it stops by itself.
            arguments = ["--seconds", f"{max(5.0, seconds - 15):.0f}"]
            finished = run([*command, *arguments], seconds, self.log, ROOT, environment())
            code = finished.code
            if finished.timed_out:
                break
        events = self.journal.read()
        if (report := report_of(events)).rows:
            self.timings = report.save(self.folder, complete=True)
        states = points_in_state(events)
        counts = ", ".join(f"{len(points)} {state}" for state, points in states.items() if points)
        if states["failed"] or self.wrong():
            return Ending(FAILED, f"points: {counts}; wrong outputs: {len(self.wrong())}")
        return Ending(CUT_SHORT if states["not reached"] else DONE, f"points: {counts}")

    def linear(self, limit: float) -> Ending:
        """linear_div and its peers; the last line of what is printed says how it stands to its targets."""
        command = [sys.executable, "-m", "bench.gpu_linear", "--out", str(self.folder)]
        finished = run(command, limit, self.log, ROOT, environment())
        if finished.timed_out:
            return Ending(CUT_SHORT)
        if finished.code != 0:
            return Ending(FAILED, "see session.log")
        return Ending(DONE, finished.output.strip().rpartition("\n")[2])

    def wrong(self) -> list[str]:
        return [event["what"] for event in self.journal.read() if event["event"] == "wrong"]

    def left_out(self) -> dict[str, str]:
        """Systems that were not timed, everywhere or at some point, and the first reason."""
        reasons: dict[str, str] = {}
        for event in self.journal.read():
            for name, why in event.get("left_out", {}).items():
                reasons.setdefault(name, why)
        return reasons

    def plot(self, limit: float) -> Ending:
        if self.timings is None:
            return Ending(SKIPPED, "no timings to draw")
        command = [sys.executable, "-m", "bench.plots", str(self.timings)]
        finished = run(command, limit, self.log, ROOT, environment())
        return Ending() if finished.code == 0 else Ending(FAILED, "see session.log")

    def checks(self) -> dict[str, Any]:
        """The second JSON."""
        about = {key: value for key, value in asdict(self.report).items() if key not in ("copy_gbps", "rows")}
        return {
            **about,
            "phases": [asdict(outcome) for outcome in self.outcomes],
            "tests": {name: asdict(tests) for name, tests in self.tests.items()},
            "sanitizer": self.sanitizer,
            "points": points_in_state(self.journal.read()),
            "wrong": self.wrong(),
            "left_out": self.left_out(),
        }

    def note(self, outcome: Outcome) -> Path:
        """Keeps a phase's outcome, on disk at once."""
        self.outcomes.append(outcome)
        path = self.folder / f"{self.report.stem}-checks.json"
        path.write_text(json.dumps(self.checks(), indent=1, allow_nan=False) + "\n")
        return path


def _device(text: str) -> torch.device:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("PyTorch sees no CUDA device")
    return torch.device(text, 0) if text == "cuda" else torch.device(text)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 1 <= minutes <= 600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes of at least 1")
    return minutes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/gpu"), metavar="DIR", help="default: out/gpu")
    add("--minutes", type=_minutes, default=9.0, help="the session's length at most; default: 9")
    add("--device", type=_device, help="cpu or cuda; default: a GPU if there is one")
    add("--tiny", action="store_true", help="a few points of no interest, to try the command itself")
    options = parser.parse_args(arguments)
    budget = Budget(60 * options.minutes - _RESERVE)

    device = options.device or _device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    points = tiny_plan() if options.tiny else gpu_plan() if on_gpu else cpu_plan()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "session.log").write_bytes(b"")
    except OSError as error:
        parser.error(f"argument --out: {error}")
    # Over in time also where this very process hangs.
    watchdog.end_after(max(1.0, budget.left() + _RESERVE))
    repeats = 20 if on_gpu and not options.tiny else 3
    session = Session(options.out.resolve(), device, new_report(device), points)
    session.journal.begin(session.report, str(device), repeats, points)

    console = Console()
    console.width = max(console.width, 100)
    console.print(f"{session.report.device}; torch {session.report.torch}, triton {session.report.triton}")
    if not on_gpu and machine.is_busy():
        console.print("This machine is busy: figures will be off, and not by the same factor.")
    checks = session.folder
    for outcome in run_phases(session.phases(), budget):
        checks = session.note(outcome)
        line = f"{outcome.name}: {outcome.outcome} after {outcome.seconds:.0f} s. {outcome.why}"
        console.print(line, markup=False, highlight=False)
    _show(console, session)
    console.print(f"{session.timings}\n{checks}", markup=False, soft_wrap=True)
    watchdog.off()
    return int(any(outcome.outcome == FAILED for outcome in session.outcomes))


def _show(console: Console, session: Session) -> None:
    checks = session.checks()
    failures = [line for tests in session.tests.values() for line in tests.failures]
    lines = [*failures[:_SHOWN], *checks["wrong"][:_SHOWN]]
    lines += [f"{point['point']} failed: {point['why']}" for point in checks["points"]["failed"][:_SHOWN]]
    lines += [f"{point['point']}: not reached" for point in checks["points"]["not reached"][:_SHOWN]]
    lines += [f"{name} is left out: {why}" for name, why in checks["left_out"].items()]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    report = report_of(session.journal.read())
    if report.rows:
        console.print(summary_table(report.rows))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("work", "target", session.report.device):
        table.add_column(heading)
    rows = asdict(report)["rows"] if session.device.type == "cuda" else []
    for target in TARGETS:
        table.add_row(target.work, target.wanted, worded(target, rows))
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())

"""One session on a GPU: correctness, timings, sanitizer, plots; over in --minutes, whatever happens.

Writes into --out: the timings' JSON, linear_div's, a third with what was checked, run and skipped, the plots,
the journal (pytest-reportlog's, of the timings), and session.log with every command's output. What was
measured is on disk at once. Without a GPU it says what it skips and times a little on the CPU. Status 1 where
a check failed or an output was wrong.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..harness import machine
from ..harness.options import usual_device
from ..harness.report import Finding, Report, new_report
from ..harness.report_log import PytestReport, events
from ..suite.plan import PLANS
from .correctness import ROOT, environment, files_for_a_gpu, run_tests
from .limited import Finished
from .limited import run as run_limited
from .phases import CUT_SHORT, DONE, FAILED, SKIPPED, Budget, Ending, Outcome, Phase, run_phases
from .sanitizer import NAME, TOOLS, sanitize, tool
from .targets import table

_RESERVE = 10.0  # seconds for what frames the phases
_HANGS = 75  # seconds: a timing that takes longer hangs, a program waiting for another that never runs, say
_SHOWN = 10  # lines of a kind on the terminal; all are in the JSON
_NO_GPU = "no GPU; `make test` runs the kernels through Triton's interpreter"


@dataclass
class Session:
    """What the phases share, and what will be in the second JSON."""

    folder: Path
    device: torch.device
    report: Report
    plan: str
    repeats: int = 3
    outcomes: list[Outcome] = field(default_factory=list)
    tests: dict[str, PytestReport] = field(default_factory=dict)
    sanitizer: dict[str, str] = field(default_factory=dict)
    suite: PytestReport = field(default_factory=PytestReport)
    timings: Path | None = None

    @property
    def log(self) -> Path:
        return self.folder / "session.log"

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
        self.tests[name], ending = run_tests(files_for_a_gpu(ROOT / "tests"), chosen, limit, self.log)
        return ending

    def sanitize(self, program: str, check: str, limit: float) -> Ending:
        ending = sanitize(program, check, limit, self.log, environment())
        self.sanitizer[check] = f"{ending.outcome}: {ending.why}"
        return ending

    def time(self, limit: float) -> Ending:
        """Times the points in one process after the other: where one breaks, the next goes on behind it."""
        budget = Budget(limit)
        skip = self.folder / "begun.txt"
        while not self.suite.ended and budget.left() > 10:
            before, crashed = len(self.suite.begun), set(self.suite.stopped)
            skip.write_text("\n".join(self.suite.begun))
            log = self.folder / f"journal-{before}.jsonl"
            arguments = ["--plan", self.plan, "--device", str(self.device), "--repeats", str(self.repeats)]
            arguments += ["--skip", str(skip), "--report-log", str(log), "--limit", str(_HANGS)]
            finished = self._run("suite", *arguments, limit=budget.left())
            self.suite.add(events(log))
            if finished.timed_out:
                for test in {*self.suite.stopped} - crashed:
                    del self.suite.begun[test]  # its time was over: that is no failure
            if finished.timed_out or len(self.suite.begun) == before:
                break  # where it ended without having begun anything, again would be the same
        skip.unlink(missing_ok=True)
        self.report.add(Finding(**value) for value in self.suite.properties("finding"))
        if self.report.rows:
            self.timings = self.report.save(self.folder, complete=True)
        states = self.points()
        counts = ", ".join(f"{len(points)} {state}" for state, points in states.items() if points)
        if states["failed"] or self.suite.failures:
            return Ending(FAILED, f"points: {counts}; failures: {len(self.suite.failures)}")
        return Ending(CUT_SHORT if states["not reached"] else DONE, f"points: {counts}")

    def linear(self, limit: float) -> Ending:
        """Times linear_div and its baselines; the last line printed says how it stands to its targets."""
        finished = self._run("linear", "--out", str(self.folder), limit=limit)
        if finished.timed_out:
            return Ending(CUT_SHORT)
        if finished.code != 0:
            return Ending(FAILED, "see session.log")
        return Ending(DONE, finished.output.strip().rpartition("\n")[2])

    def plot(self, limit: float) -> Ending:
        if self.timings is None:
            return Ending(SKIPPED, "no timings to draw")
        finished = self._run("plots", str(self.timings), limit=limit)
        return Ending() if finished.code == 0 else Ending(FAILED, "see session.log")

    def _run(self, *arguments: str, limit: float) -> Finished:
        """Runs another command of the benchmarks in a process of its own."""
        return run_limited([sys.executable, "-m", "bench", *arguments], limit, self.log, ROOT, environment())

    def points(self) -> dict[str, list[str]]:
        """The plan's points by what became of them. One that began and did not end took its process along."""
        states: dict[str, list[str]] = {"measured": [], "failed": [], "not reached": []}
        failed = [*self.suite.failures, *self.suite.stopped]
        for point in PLANS[self.plan]():
            mine = f"[{point}-"
            state = "measured" if any(mine in test for test in self.suite.begun) else "not reached"
            states["failed" if any(mine in test for test in failed) else state].append(str(point))
        return states

    def left_out(self) -> dict[str, str]:
        """Systems that were not timed, everywhere or at some point, and the first reason."""
        reasons: dict[str, str] = {}
        for skip in self.suite.skips:
            name, _, why = skip.partition(" is left out: ")
            reasons.setdefault(name, why)
        return reasons

    def checks(self) -> dict[str, Any]:
        """The second JSON."""
        about = {key: value for key, value in asdict(self.report).items() if key not in ("copy_gbps", "rows")}
        return {
            **about,
            "phases": [asdict(outcome) for outcome in self.outcomes],
            "tests": {
                name: {"line": tests.line, "failures": tests.failures, "stopped": tests.stopped}
                for name, tests in self.tests.items()
            },
            "sanitizer": self.sanitizer,
            "points": self.points(),
            "wrong": [*self.suite.failures, *(f"{test}: did not end" for test in self.suite.stopped)],
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/gpu"), metavar="DIR", help="default: out/gpu")
    add("--minutes", type=_minutes, default=9.0, help="the session's length at most; default: 9")
    add("--device", type=_device, help="cpu or cuda; default: a GPU if there is one")
    add("--tiny", action="store_true", help="a few points of no interest, to try the command itself")


def end_after(seconds: float) -> None:
    """Ends this process with every thread's traceback, also from within a call that never returns."""
    where = sys.__stderr__
    faulthandler.dump_traceback_later(seconds, exit=True, file=2 if where is None else where)


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    budget = Budget(60 * options.minutes - _RESERVE)
    device = options.device or usual_device()
    on_gpu = device.type == "cuda"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "session.log").write_bytes(b"")
    except OSError as error:
        parser.error(f"argument --out: {error}")
    end_after(max(1.0, budget.left() + _RESERVE))  # over in time also where this very process hangs
    plan = "tiny" if options.tiny else "gpu" if on_gpu else "cpu"
    repeats = 21 if on_gpu and not options.tiny else 3
    session = Session(options.out.resolve(), device, new_report(device), plan, repeats)

    print(f"{session.report.device}; torch {session.report.torch}, triton {session.report.triton}")
    if not on_gpu and machine.is_busy():
        print("This machine is busy: figures will be off, and not by the same factor.")
    checks = session.folder
    for outcome in run_phases(session.phases(), budget):
        checks = session.note(outcome)
        print(f"{outcome.name}: {outcome.outcome} after {outcome.seconds:.0f} s. {outcome.why}", flush=True)
    _show(session)
    print(session.timings, checks, sep="\n")
    faulthandler.cancel_dump_traceback_later()
    return int(any(outcome.outcome == FAILED for outcome in session.outcomes))


def _show(session: Session) -> None:
    checks = session.checks()
    failures = [line for tests in session.tests.values() for line in tests.failures]
    lines = [*failures[:_SHOWN], *checks["wrong"][:_SHOWN]]
    lines += [f"{point}: not reached" for point in checks["points"]["not reached"][:_SHOWN]]
    lines += [f"{name} is left out: {why}" for name, why in checks["left_out"].items()]
    rows = asdict(session.report)["rows"] if session.device.type == "cuda" else []
    print(*lines, table(rows), sep="\n")

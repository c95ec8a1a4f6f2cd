"""One session on a GPU: timings, correctness, sanitizer, plots; over in --minutes, whatever happens.

Writes into --out: the timings' JSON, linear_div's, a third with what was checked, run and skipped, the plots,
the journal (pytest-reportlog's, of the timings), and session.log with every command's output. What was
measured is on disk at once. Without a GPU it says what it skips and times a little on the CPU. Status 1 where
a check failed or an output was wrong.

On a machine that is lent for minutes: --dry-run before, elsewhere, says whether all of it fits; --smoke there
takes a minute and a half at most, and finds what would spoil the rest.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..harness import machine
from ..harness.options import usual_device
from ..harness.report import Finding, Report, new_report
from ..harness.report_log import PytestReport, events
from ..suite.plan import PLANS, REPEATS
from . import wheels
from .calls import WRONG, calls_of
from .correctness import ROOT, environment, of_the_queue, others, run_tests
from .limited import Finished
from .limited import run as run_limited
from .phases import CUT_SHORT, DONE, FAILED, SKIPPED, Budget, Ending, Outcome, Phase, run_phases
from .sanitizer import NAME, TOOLS, sanitize, tool
from .targets import table

_RESERVE = 10.0  # seconds for what frames the phases
_HANGS = 75  # seconds: a timing that takes longer hangs, a program waiting for another that never runs, say
_SHOWN = 10  # lines of a kind on the terminal; all are in the JSON
_NO_GPU = "no GPU; `make test` runs the kernels through Triton's interpreter"
_MINUTES, SMOKE_MINUTES = 9.0, 1.5
# The phases and their seconds, the most important first. What one leaves the later ones have. --dry-run says
# whether they suffice.
RUN = {
    "compile": 65, "time kl": 75, "test the queue": 85, "time kinds": 60, "memcheck": 30, "racecheck": 30,
    "test": 40, "time baselines": 55, "linear": 20, "time compile": 60, "plots": 10,
}  # fmt: skip
SMOKE = {"smoke": 55, "time smoke": 25}


@dataclass
class Session:
    """What the phases share, and what will be in the second JSON."""

    folder: Path
    device: torch.device
    report: Report
    seconds: dict[str, int]
    outcomes: list[Outcome] = field(default_factory=list)
    wrong_calls: list[str] = field(default_factory=list)
    tests: dict[str, PytestReport] = field(default_factory=dict)
    sanitizer: dict[str, str] = field(default_factory=dict)
    suite: PytestReport = field(default_factory=PytestReport)
    timings: Path | None = None

    @property
    def log(self) -> Path:
        return self.folder / "session.log"

    def phases(self) -> list[Phase]:
        return [self._phase(name, share) for name, share in self.seconds.items()]

    def _phase(self, name: str, share: float) -> Phase:
        no_gpu = "" if self.device.type == "cuda" else _NO_GPU
        if name.startswith("time "):
            return Phase(name, share, 10, partial(self.time, name.removeprefix("time ")))
        if name == "plots":
            return Phase(name, share, 5, self.plot)
        if name == "linear":
            return Phase(name, share, 20, self.linear, no_gpu)
        if name in TOOLS:
            no_tool = no_gpu or ("" if tool() else f"not found: {NAME}")
            return Phase(name, share, 15, partial(self.sanitize, tool() or "", name), no_tool)
        if name.startswith("test"):
            return Phase(name, share, 20, partial(self.test, name), no_gpu)
        return Phase(name, share, 20, partial(self.call, calls_of(name)), no_gpu)

    @property
    def plans(self) -> list[str]:
        return [name.removeprefix("time ") for name in self.seconds if name.startswith("time ")]

    def call(self, name: str, limit: float) -> Ending:
        """Calls of our kernels, in as many processes as there are cores: they are compiled, and checked."""
        processes = ["--processes", str(os.cpu_count() or 1), "--device", str(self.device)]
        command = [sys.executable, "-m", "bench.gpu.calls", name, *processes]
        finished = run_limited(command, limit, self.log, ROOT, environment())
        lines = finished.output.strip().splitlines() or [""]
        self.wrong_calls += [line.removeprefix(WRONG) for line in lines if line.startswith(WRONG)]
        if finished.timed_out:
            return Ending(CUT_SHORT, "kernels are left to compile where they are first used")
        return Ending(DONE if finished.code == 0 else FAILED, lines[-1])

    def test(self, name: str, limit: float) -> Ending:
        files = (of_the_queue if name == "test the queue" else others)(ROOT / "tests")
        self.tests[name], ending = run_tests(files, "not eager", limit, self.log)
        return ending

    def sanitize(self, program: str, check: str, limit: float) -> Ending:
        ending = sanitize(program, check, limit, self.log, environment())
        self.sanitizer[check] = f"{ending.outcome}: {ending.why}"
        return ending

    def time(self, plan: str, limit: float) -> Ending:
        """Times the points in one process after the other: where one breaks, the next goes on behind it."""
        budget = Budget(limit)
        skip, log = self.folder / "begun.txt", self.folder / f"{plan}.jsonl"
        suite = PytestReport()
        while not suite.ended and budget.left() > 10:
            before, crashed = len(suite.begun), set(suite.stopped)
            skip.write_text("\n".join(suite.begun))
            arguments = ["--plan", plan, "--device", str(self.device), "--repeats", str(REPEATS[plan])]
            arguments += ["--skip", str(skip), "--report-log", str(log), "--limit", str(_HANGS)]
            finished = self._run("suite", *arguments, limit=budget.left())
            suite.add(events(log))
            self._keep(log)
            if finished.timed_out:
                for test in {*suite.stopped} - crashed:
                    del suite.begun[test]  # its time was over: that is no failure
            if finished.timed_out or len(suite.begun) == before:
                break  # where it ended without having begun anything, again would be the same
        skip.unlink(missing_ok=True)
        self.suite.tests |= suite.tests
        self.suite.begun |= suite.begun
        self.report.add(Finding(**value) for value in suite.properties("finding"))
        if self.report.rows:
            self.timings = self.report.save(self.folder, complete=True)
        states = self.points(plan)
        counts = ", ".join(f"{len(points)} {state}" for state, points in states.items() if points)
        if states["failed"] or suite.failures:
            return Ending(FAILED, f"points: {counts}; failures: {len(suite.failures)}")
        return Ending(CUT_SHORT if states["not reached"] else DONE, f"points: {counts}")

    def _keep(self, log: Path) -> None:
        """All journals in one file: what comes back from a lent machine may be few files."""
        if log.exists():
            with (self.folder / "journal.jsonl").open("a") as journal:
                journal.write(log.read_text())
            log.unlink()

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

    def points(self, *plans: str) -> dict[str, list[str]]:
        """The plans' points by what became of them. One that began and did not end took its process along."""
        states: dict[str, list[str]] = {"measured": [], "failed": [], "not reached": []}
        failed = [*self.suite.failures, *self.suite.stopped]
        for point in (point for plan in plans or self.plans for point in PLANS[plan]()):
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
            "wrong": [
                *self.wrong_calls,
                *self.suite.failures,
                *(f"{test}: did not end" for test in self.suite.stopped),
            ],
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
    add(
        "--minutes",
        type=_minutes,
        help=f"its length at most; default: {_MINUTES:.0f}, of --smoke {SMOKE_MINUTES}",
    )
    add("--device", type=_device, help="cpu or cuda; default: a GPU if there is one")
    add("--wheels", type=Path, default=wheels.FOLDER, metavar="DIR", help="packages that may be missing")
    kind = parser.add_mutually_exclusive_group()
    add = kind.add_argument
    add("--smoke", action="store_true", help="every kernel on a few rows, and one timing")
    add(
        "--dry-run", action="store_true", help="compile here for an H200, and say whether the plan fits there"
    )
    add("--tiny", action="store_true", help="a few points of no interest, to try the command itself")


def end_after(seconds: float) -> None:
    """Ends this process with every thread's traceback, also from within a call that never returns."""
    where = sys.__stderr__
    faulthandler.dump_traceback_later(seconds, exit=True, file=2 if where is None else where)


def _seconds(options: argparse.Namespace, on_gpu: bool) -> dict[str, int]:
    phases = SMOKE if options.smoke else RUN
    if on_gpu and not options.tiny:
        return phases
    timed = "time cpu" if phases is RUN and not options.tiny else "time tiny"
    return {timed: 300} | {name: share for name, share in phases.items() if not name.startswith("time ")}


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    minutes = options.minutes or (SMOKE_MINUTES if options.smoke else _MINUTES)
    if options.dry_run:
        from . import timetable

        smoke = timetable.Command("--smoke", 60 * SMOKE_MINUTES, _RESERVE, SMOKE)
        return timetable.show((smoke, timetable.Command("run", 60 * minutes, _RESERVE, RUN)))
    with tempfile.TemporaryDirectory() as unpacked:
        wheels.use(options.wheels, Path(unpacked))
        if missing := wheels.missing():
            names = ", ".join(missing)
            parser.error(
                f"not installed, and not among the wheels in {options.wheels}: {names} (make wheels)"
            )
        return _run(options, parser, 60 * minutes - _RESERVE)


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser, seconds: float) -> int:
    budget = Budget(seconds)
    device = options.device or usual_device()
    on_gpu = device.type == "cuda"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "session.log").write_bytes(b"")
        (options.out / "journal.jsonl").unlink(missing_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    end_after(max(1.0, budget.left() + _RESERVE))  # over in time also where this very process hangs
    phases = _seconds(options, on_gpu)
    session = Session(options.out.resolve(), device, new_report(device), phases)

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

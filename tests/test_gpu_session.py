"""`python -m bench gpu` where there is no GPU: its time, its record, what it makes of each failure."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("pytest_reportlog")
pytest.importorskip("pytest_timeout")

import conftest
from bench.__main__ import main as bench
from bench.gpu import correctness, limited, sanitizer
from bench.gpu.limited import Finished, run
from bench.gpu.phases import Budget, Ending, Outcome, Phase, run_phases
from bench.gpu.session import RUN, Session
from bench.harness import baselines
from bench.harness.report import COPY, Finding, Report
from bench.harness.report_log import PytestReport, events
from bench.suite import plan, stage
from bench.suite.plan import PLANS, VOCABS, Point, tiny_plan
from kl_gpu import KINDS, reference

CPU = torch.device("cpu")


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time

    def spend(self, seconds: float) -> None:
        self.time += seconds


def phase(clock: Clock, name: str, share: float, takes: float, least: float = 1, **more: Any) -> Phase:
    """One that takes what it wants, but keeps to its limit."""

    def work(limit: float) -> Ending:
        clock.spend(min(takes, limit))
        return Ending()

    return Phase(name, share, least, work, **more)


def record(phases: list[Phase], seconds: float, clock: Clock) -> dict[str, Outcome]:
    return {outcome.name: outcome for outcome in run_phases(phases, Budget(seconds, clock))}


def test_phases_share_what_is_left() -> None:
    clock = Clock()
    phases = [phase(clock, name, 1, 1000) for name in "abc"]
    found = record(phases, 90, clock)
    assert [found[name].seconds for name in "abc"] == [30, 30, 30]
    assert clock.time == 90


def test_time_that_one_phase_leaves_the_later_ones_have() -> None:
    clock = Clock()
    phases = [
        phase(clock, "a", 1, 10),
        phase(clock, "b", 1, 1000, skip="no tool"),
        phase(clock, "c", 3, 1000),
        phase(clock, "d", 1, 5),
    ]
    found = record(phases, 100, clock)
    assert found["a"].seconds == 10
    assert (found["b"].outcome, found["b"].why) == ("skipped", "no tool")
    assert found["c"].seconds == pytest.approx(90 * 3 / 4)
    assert (found["d"].outcome, found["d"].seconds) == ("done", 5)


def test_a_phase_without_time_is_skipped_and_a_shorter_one_runs() -> None:
    clock = Clock()
    phases = [phase(clock, "a", 9, 95), phase(clock, "b", 1, 9, least=20), phase(clock, "c", 1, 2)]
    found = record(phases, 100, clock)
    assert found["b"].outcome == "skipped"
    assert "no time: 18 s were left, it needs 20" in found["b"].why
    assert found["c"].outcome == "done"


def test_a_phase_gets_the_least_it_needs_beyond_its_share() -> None:
    clock = Clock()
    found = record([phase(clock, "a", 1, 50, least=40), phase(clock, "b", 9, 50)], 100, clock)
    assert (found["a"].seconds, found["b"].seconds) == (40, 50)


def test_a_phase_that_raises_is_a_failure_and_not_the_end() -> None:
    def broken(limit: float) -> Ending:
        raise OSError("no such thing\nand more")

    clock = Clock()
    found = record([Phase("a", 1, 1, broken), phase(clock, "b", 1, 5)], 100, clock)
    assert (found["a"].outcome, found["a"].why) == ("failed", "OSError: no such thing")
    assert found["b"].outcome == "done"


@pytest.fixture
def limit_reached_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """The next command's limit is reached once it has made this file, however long that takes."""
    start = subprocess.Popen

    def prepare(file: Path) -> None:
        def ring(process: subprocess.Popen[bytes]) -> None:
            while not file.exists() and process.poll() is None:
                time.sleep(0.02)
            process.send_signal(signal.SIGALRM)  # what `timeout` wakes up by

        def started(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
            process = start(command, **options)
            threading.Thread(target=ring, args=(process,), daemon=True).start()
            return process

        monkeypatch.setattr(limited.subprocess, "Popen", started)

    return prepare


STUBBORN = """
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
pathlib.Path("ready").touch()
time.sleep(600)
"""


def test_a_command_that_will_not_stop_is_killed_with_its_children(
    tmp_path: Path, limit_reached_once: Callable[[Path], None]
) -> None:
    limit_reached_once(tmp_path / "ready")
    done = run([sys.executable, "-c", STUBBORN], 20, tmp_path / "log", tmp_path, os.environ)
    assert done.timed_out
    assert done.code == -9
    child = int(done.output)
    for _ in range(100):  # it is gone once it has been waited for, which is init's business
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child lives on")


def test_a_command_that_is_asked_to_stop_can_say_its_last_words(
    tmp_path: Path, limit_reached_once: Callable[[Path], None]
) -> None:
    code = """
import pathlib, time
try:
    pathlib.Path("ready").touch()
    time.sleep(600)
except KeyboardInterrupt:
    print("so far so good")
"""
    log = tmp_path / "log"
    log.write_text("before")
    limit_reached_once(tmp_path / "ready")
    done = run([sys.executable, "-c", code], 300, log, tmp_path, os.environ)
    assert done.timed_out
    assert done.output == "so far so good\n"
    assert log.read_text().startswith("before")


def test_the_plan_covers_what_was_asked_for_the_important_first() -> None:
    timed = [name.removeprefix("time ") for name in RUN if name.startswith("time ")]
    points = [point for name in timed for point in PLANS[name]()]
    assert (points[0].kind, points[0].dtype, points[0].vocab) == ("forward_kl", "bf16", 128256)
    ours = {(p.kind, p.dtype, p.rows, p.vocab) for p in points if "kl_gpu" in p.systems}
    for kind in ("forward_kl", "reverse_kl"):
        assert {(kind, dtype, 8192, V) for dtype in ("bf16", "fp32") for V in VOCABS} <= ours
    for kind in KINDS.keys() - {"nla", "lk"}:  # their sweeps are tv's and KL's, and minutes are few
        assert {(kind, dtype, 8192, 128256) for dtype in ("bf16", "fp32")} <= ours
        assert {(kind, "bf16", 8192, V) for V in (32000, 50257, 262144)} <= ours
    assert {("forward_kl", "bf16", N, 128256) for N in (1, 16, 132, 1024)} <= ours
    assert all(
        "kl_gpu" in p.systems for p in points
    )  # every baseline's time is beside ours of the same passes
    assert {name for p in points for name in p.systems} == {"kl_gpu", "torch", "torch.compile", "liger"}
    assert len({str(point) for point in points}) == len(points)  # they are told apart by their names


def test_a_session_times_the_kls_first_and_what_compiles_longest_last() -> None:
    phases = list(RUN)
    assert phases[:3] == ["compile", "time kl", "test the queue"]
    assert [name for name in phases if name.startswith("time ")][-1] == "time compile"
    before = [point for name in ("kl", "kinds", "baselines") for point in PLANS[name]()]
    assert not any("torch.compile" in point.systems for point in before)
    assert {point.kind for point in PLANS["kl"]()} == {"forward_kl", "reverse_kl"}


def test_memory_decides_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [60 * 2**30]  # by the allocator, of the point before
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: kept.__setitem__(0, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (78 * 2**30 - kept[0], 80 * 2**30))
    gpu = torch.device("cuda", 0)
    everybody, ours = PLANS["baselines"]()[0], Point("js", "fp32", 8192, 262144, ("kl_gpu",))
    assert stage.rows_of(everybody, gpu) == 8192
    assert stage.rows_of(ours, gpu) == 8192
    beside_plain = stage.rows_of(Point("js", "fp32", 8192, 262144, ("kl_gpu", "torch")), gpu)
    assert 3072 < beside_plain < 6144
    assert beside_plain % 64 == 0
    assert stage.rows_of(ours, CPU) == 8192


def suite_log(folder: Path, *tests: str) -> PytestReport:
    """What pytest-reportlog leaves of tests that are named by what became of them."""
    lines = []
    for number, outcome in enumerate(tests):
        test = {"$report_type": "TestReport", "nodeid": f"suite.py::test[{number}]", "user_properties": []}
        lines.append(test | {"when": "setup", "outcome": "passed", "longrepr": None})
        if outcome != "crashed":
            why = {"reprcrash": {"message": "RuntimeError: out of resources\nand more"}}
            lines.append(test | {"when": "call", "outcome": outcome, "longrepr": why})
            lines.append(test | {"when": "teardown", "outcome": "passed", "longrepr": None})
    log = folder / "journal.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"$report_type": "Sess')
    return PytestReport().add(events(log))


def test_a_journal_that_was_cut_off_tells_what_ended_and_what_did_not(tmp_path: Path) -> None:
    report = suite_log(tmp_path, "passed", "failed", "crashed")
    assert report.line == "1 failed, 1 passed, 1 unfinished"
    assert report.failures == ["suite.py::test[1]: RuntimeError: out of resources"]
    assert report.stopped == ["suite.py::test[2]"]
    assert not report.ended
    report.add([{"$report_type": "SessionFinish", "exitstatus": 1}])
    assert report.ended


def device_report() -> Report:
    return Report("a device", "2026-01-02T03:04:05+00:00", "2", "3", None)


def finding(system: str, number: float, **more: Any) -> Finding:
    return Finding(system, "forward_kl", "value", "fp32", 2, 1000, [number, 2 * number, number], **more)


def test_a_speed_is_a_ratio_of_medians_over_all_passes() -> None:
    found = [finding(COPY, 1e-3), finding("kl_gpu", 2e-3, max_rel_error=1e-7)]
    found += [finding(COPY, 3e-3), finding("kl_gpu", 4e-3, max_rel_error=2e-7)]
    report = device_report()
    report.add(found)
    (row,) = report.rows
    assert (row.ms, row.max_rel_error) == (4, 2e-7)
    assert row.share_of_copy == pytest.approx(2.5 / 4)  # medians of 1, 1, 2, 3, 3, 6 and 2, 2, 4, 4, 4, 8


def test_a_system_that_failed_in_one_pass_has_no_row() -> None:
    broken = Finding("torch", "forward_kl", "value", "fp32", 2, 1000)
    found = [finding(COPY, 1e-3), finding("kl_gpu", 2e-3), finding("torch", 2e-3), broken]
    report = device_report()
    report.add(found)
    assert [row.system for row in report.rows] == ["kl_gpu"]


def test_the_tests_chosen_for_a_gpu() -> None:
    folder = Path(__file__).parent
    queue, others = (
        [path.stem.removeprefix("test_") for path in files(folder)]
        for files in (correctness.of_the_queue, correctness.others)
    )
    assert all(path.exists() for path in correctness.of_the_queue(folder))
    assert {"queue", "rows"} < set(queue)
    assert not set(queue) & set(others)
    assert others[-1] == "properties"
    assert {"accuracy", "edges", "autograd", "options", "views", "ops", "determinism", "parity"} < set(others)
    assert not {"bench", "contributing", "examples", "machine_code", "native", "reference"} & set(others)
    assert not [name for name in others if "distributed" in name]
    assert Path(__file__).stem.removeprefix("test_") not in others  # a session must not start a session


@pytest.fixture
def some_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Ending]]:
    """Runs a file of tests as a session does, in one process."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q\n")

    def run_them(text: str, limit: float) -> tuple[Any, Ending]:
        file = tmp_path / "test_some.py"
        file.write_text(text)
        return correctness.run_tests([file], "not eager", limit, tmp_path / "log", tmp_path)

    return run_them


def test_a_report_keeps_counts_and_failures(some_tests: Any, tmp_path: Path) -> None:
    text = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2
def test_eager(): assert 0
def test_not_here(): pytest.skip("needs two")
"""
    report, ending = some_tests(text, 60)
    assert report.line == "1 failed, 1 passed, 1 skipped"
    assert report.failures == ["test_some.py::test_bad: assert 1 == 2"]
    assert ending == Ending("failed", report.line)
    assert "1 failed, 1 passed, 1 skipped, 1 deselected" in (tmp_path / "log").read_text()


def test_a_report_of_tests_that_hang(
    some_tests: Any, tmp_path: Path, limit_reached_once: Callable[[Path], None]
) -> None:
    text = """
import pathlib, signal, time
def test_good(): pass
def test_hangs():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pathlib.Path(__file__).with_name("ready").touch()
    time.sleep(600)
"""
    limit_reached_once(tmp_path / "ready")
    report, ending = some_tests(text, 20)
    assert report.line == "1 passed, 1 unfinished"
    assert report.stopped == ["test_some.py::test_hangs"]
    assert ending == Ending("cut short", report.line)


def test_a_file_that_cannot_be_imported_is_a_failure(some_tests: Any) -> None:
    report, ending = some_tests("import no_such_package", 60)
    assert ending.outcome == "failed"
    assert "no_such_package" in report.failures[0]


def test_the_device_tests_never_run_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" not in correctness.environment()


def test_a_test_file_that_needs_a_missing_package_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "test_needs.py"
    file.write_text("import json\nfrom no_such_package.part import x\n")
    assert conftest.missing_package(file) is None  # not one that may be missing: the import says so
    monkeypatch.setattr(conftest, "OPTIONAL", ("json", "no_such_package"))
    assert conftest.missing_package(file) == "no_such_package"


@pytest.mark.parametrize(
    ("says", "status", "ending"),
    [
        ("ERROR SUMMARY: 0 errors", 0, Ending("done", "ERROR SUMMARY: 0 errors")),
        ("ERROR SUMMARY: 3 errors", sanitizer._ERROR, Ending("failed", "ERROR SUMMARY: 3 errors")),
        ("Device not supported", 1, Ending("skipped", "compute-sanitizer: Device not supported")),
        ("Traceback: no such module", 1, Ending("failed", "Traceback: no such module")),
        (
            "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
            0,
            Ending("done", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"),
        ),
    ],
)
def test_what_the_sanitizer_says(tmp_path: Path, says: str, status: int, ending: Ending) -> None:
    tool = tmp_path / "tool"
    tool.write_text(f'#!/bin/sh\necho "========= {says}"\nexit {status}\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    got = sanitizer.sanitize(str(tool), "memcheck", 20, tmp_path / "log", os.environ)
    assert got.outcome == ending.outcome
    assert got.why.removeprefix("========= ") == ending.why


class _Loss:
    """Another library's loss by its documented interface: log-probabilities in; β of the JSD."""

    def __init__(self, beta: float = 0.0, **options: object) -> None:
        self.beta = beta

    def __call__(self, log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(self.beta, "js")
        given = {"beta": self.beta} if kind == "js" else {}
        return torch.as_tensor(reference.divergence(log_q.numpy(), log_p.numpy(), kind, **given).mean())


def test_other_libraries_are_asked_for_the_divergence_they_are_judged_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = type(sys)("liger_kernel.transformers")
    library.LigerKLDIVLoss = library.LigerJSD = _Loss
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", library)
    student, teacher = torch.randn(4, 50), torch.randn(4, 50)
    losses = baselines.liger()
    assert set(losses) == {"forward_kl", "reverse_kl", "js"}
    for kind, mean in losses.items():
        want = reference.divergence(student.numpy(), teacher.numpy(), kind).mean()
        np.testing.assert_allclose(float(mean(student, teacher)), want, rtol=1e-5)


def test_a_library_that_is_not_there_or_has_changed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", type(sys)("liger_kernel.transformers"))
    with pytest.raises(ImportError, match=r"liger_kernel\.transformers has no LigerKLDIVLoss"):
        baselines.liger()


def test_a_process_that_hangs_is_ended() -> None:
    hang = "import time; from bench.gpu.session import end_after; end_after(0.3); time.sleep(60)"
    command = [sys.executable, "-c", hang]
    done = subprocess.run(
        command, cwd=correctness.ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    assert "most recent call first" in done.stderr  # where it hung


@pytest.fixture
def timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Ending, Session, int]]:
    """The session's timings, by processes that leave in the journal what they are told, and end."""

    def timings_of(*lives: list[dict[str, Any]]) -> tuple[Ending, Session, int]:
        session = Session(tmp_path, CPU, device_report(), {"time tiny": 100})
        skipped = []

        def pretended(command: list[str], limit: float, *_: object) -> Finished:
            life = lives[len(skipped)]
            skipped.append(Path(command[command.index("--skip") + 1]).read_text().split("\n"))
            log = Path(command[command.index("--report-log") + 1])
            log.write_text("".join(json.dumps(event) + "\n" for event in life))
            return Finished(1, {"over": True} in life, "")

        monkeypatch.setattr("bench.gpu.session.run_limited", pretended)
        return session.time("tiny", 100), session, len(skipped)

    return timings_of


def event(number: int, when: str, system: str, outcome: str = "passed", why: str = "") -> dict[str, Any]:
    point = tiny_plan()[number]
    found = Finding(system, point.kind, "value", point.dtype, point.rows, point.vocab, [1e-3])
    return {
        "$report_type": "TestReport", "nodeid": f"s.py::test[{point}-value-{system}-pass 0]", "when": when,
        "outcome": outcome, "longrepr": {"reprcrash": {"message": why}},
        "user_properties": [["finding", asdict(found)]],
    }  # fmt: skip


def test_timings_go_on_behind_a_point_that_took_its_process_along(timing: Any) -> None:
    crash = [event(0, "setup", COPY)]
    names = (COPY, "kl_gpu")
    work = [event(1, when, name) for name in names for when in ("setup", "call", "teardown")]
    ending, session, started = timing(crash, [*work, {"$report_type": "SessionFinish"}])
    assert started == 2
    assert ending.outcome == "failed"
    assert ending.why == "points: 1 measured, 1 failed; failures: 0"
    assert session.timings is not None
    assert len(json.loads(session.timings.read_text())["rows"]) == 1

    failed = event(0, "call", "kl_gpu", "failed", "no\nand more") | {"nodeid": "test_a.py::test_b"}
    session.tests["tests"] = PytestReport().add([failed])
    session.sanitizer["memcheck"] = "done: ERROR SUMMARY: 0 errors"
    kept = json.loads(session.note(Outcome("timings", ending.outcome, ending.why, 1.0)).read_text())
    assert kept["tests"]["tests"]["line"] == "1 failed"
    assert kept["tests"]["tests"]["failures"] == ["test_a.py::test_b: no"]
    assert kept["sanitizer"] == {"memcheck": "done: ERROR SUMMARY: 0 errors"}
    assert [phase["outcome"] for phase in kept["phases"]] == ["failed"]
    assert len(kept["points"]["failed"]) == 1


def test_timings_that_cannot_even_begin_are_not_tried_for_ever(timing: Any) -> None:
    ending, session, started = timing([])
    assert started == 1
    assert (ending.outcome, session.timings) == ("cut short", None)


def test_a_point_that_the_limit_cuts_off_is_no_failure(timing: Any) -> None:
    whole = [event(0, when, name) for name in (COPY, "kl_gpu") for when in ("setup", "call", "teardown")]
    ending, session, started = timing([*whole, event(1, "setup", COPY), {"over": True}])
    assert started == 1
    assert (ending.outcome, ending.why) == ("cut short", "points: 1 measured, 1 not reached")
    assert [row.system for row in session.report.rows] == ["kl_gpu"]


def test_a_wrong_system_is_named_and_the_others_are_timed(timing: Any) -> None:
    wrong = event(0, "call", "torch", "failed", "WrongOutput: torch is wrong: value")
    others = [event(number, when, COPY) for number in (0, 1) for when in ("setup", "call", "teardown")]
    others += [event(number, "call", "kl_gpu") for number in (0, 1)]
    ending, session, _ = timing([*others, wrong, {"$report_type": "SessionFinish"}])
    assert ending.outcome == "failed"
    assert "torch is wrong: value" in session.checks()["wrong"][0]
    assert "kl_gpu" in {row.system for row in session.report.rows}


def test_linear_div_against_its_baselines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rows", "24", "--hidden", "16", "--columns", "300", "--repeats", "2"]
    assert bench(["linear", *sizes, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "TFLOP/s; peak extra memory" in shown[-1]
    found = json.loads((tmp_path / "linear.json").read_text())
    rows = {row["contender"]: row for row in found["contenders"]}
    assert set(rows) >= {"products", "kl_gpu forward_kl", "kl_gpu js", "torch forward_kl"}
    assert all(row["ms"] > 0 and row["peak_extra_bytes"] > 0 for row in rows.values())
    ours, plain = rows["kl_gpu forward_kl"], rows["torch forward_kl"]
    assert ours["value"] == pytest.approx(plain["value"], rel=0.02)
    assert ours["value"] > 1e-3


@pytest.mark.parametrize(
    ("command", "outcome", "why"),
    [
        ("print('a'); print('time: 60 ms')", "done", "time: 60 ms"),
        ("raise SystemExit(1)", "failed", "see session.log"),
    ],
)
def test_what_the_session_makes_of_linear_div(
    timing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, outcome: str, why: str
) -> None:
    _, session, _ = timing([])
    monkeypatch.setattr(
        "bench.gpu.session.run_limited", lambda _, *rest: run([sys.executable, "-c", command], *rest)
    )
    ending = session.linear(20.0)
    assert (ending.outcome, ending.why) == (outcome, why)


@pytest.mark.parametrize(
    ("command", "outcome", "why"),
    [
        ("print('3 calls, 0 of them wrong, 9 s')", "done", "3 calls, 0 of them wrong, 9 s"),
        ("print('wrong: js: NaN\\n3 calls, 1 wrong'); raise SystemExit(1)", "failed", "3 calls, 1 wrong"),
    ],
)
def test_what_the_session_makes_of_calls(
    timing: Any, monkeypatch: pytest.MonkeyPatch, command: str, outcome: str, why: str
) -> None:
    _, session, _ = timing([])
    monkeypatch.setattr(
        "bench.gpu.session.run_limited", lambda _, *rest: run([sys.executable, "-c", command], *rest)
    )
    ending = session.call("smoke", 60.0)
    assert (ending.outcome, ending.why) == (outcome, why)
    assert session.checks()["wrong"] == (["js: NaN"] if outcome == "failed" else [])


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What one whole session on the CPU printed, and its folder."""
    out = tmp_path_factory.mktemp("gpu")
    options = ["--tiny", "--device", "cpu", "--minutes", "20"]  # many, for slow machines: it ends when done
    command = [sys.executable, "-m", "bench", "gpu", *options, "--out", out]
    done = subprocess.run(
        command, cwd=correctness.ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=1300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, out


def test_a_session_without_a_gpu_says_what_it_skips(session: tuple[str, Path]) -> None:
    shown, out = session
    (path,) = out.glob("*-checks.json")
    checks = json.loads(path.read_text())
    assert list(checks) == [
        *("device", "date", "torch", "triton", "driver", "phases", "tests", "sanitizer", "points", "wrong"),
        "left_out",
    ]
    outcomes = {phase["name"]: phase["outcome"] for phase in checks["phases"]}
    needs_a_gpu = ("compile", "test the queue", "test", "memcheck", "racecheck", "linear")
    assert outcomes == dict.fromkeys(needs_a_gpu, "skipped") | {"time tiny": "done", "plots": "done"}
    for phase in checks["phases"]:
        assert f"{phase['name']}: {phase['outcome']} after" in shown
        assert ("no GPU" in phase["why"]) == (phase["outcome"] == "skipped")
    assert "liger is left out: its kernels need a GPU" in shown
    assert "not measured" in shown
    assert len(checks["points"]["measured"]) == len(plan.tiny_plan())
    assert not checks["points"]["not reached"]


def test_a_session_leaves_its_json_and_its_plots(session: tuple[str, Path]) -> None:
    _, out = session
    assert len(list(out.iterdir())) <= 8
    assert not list(out.glob("*.partial.json"))
    (path,) = (path for path in out.glob("*.json") if not path.name.endswith("-checks.json"))
    report = json.loads(path.read_text())
    assert list(report) == ["device", "date", "torch", "triton", "driver", "copy_gbps", "rows"]
    assert report["copy_gbps"] > 0
    found = {(row["system"], row["work"], row["N"], row["V"]) for row in report["rows"]}
    assert len(found) == len(report["rows"])
    assert found == {
        (system, work, p.rows, p.vocab)
        for p in plan.tiny_plan()
        for system in ("kl_gpu", "torch")
        for work in ("value", "value_grad", "forward_backward")
    }
    pictures = {file.name for file in out.glob("*.png")}
    assert pictures == {f"{path.stem}-{what}.png" for what in ("bandwidth", "rows", "memory")}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--minutes", "0"], "--minutes: '0' is not a number of minutes"),
        (["--minutes", "nan"], "--minutes: 'nan' is not a number of minutes"),
        (["--device", "tpu"], "--device: 'tpu' is neither cpu nor cuda"),
        (["--out", __file__], "--out: "),
    ],
)
def test_bad_options(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench(["gpu", *arguments])
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err

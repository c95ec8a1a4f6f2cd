"""The calls by which a GPU session compiles, checks and sanitizes, and the timetable that is made of them."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.gpu import calls, timetable, wheels
from bench.gpu.calls import CALLS, Call, make, new_first
from bench.gpu.correctness import ROOT
from bench.gpu.variants import variants
from bench.harness.cases import Problem
from bench.harness.check import WrongOutput
from bench.harness.systems import WORKLOADS, Output
from bench.suite.plan import PLANS, tiny_plan
from kl_gpu import KINDS
from kl_gpu.backends.triton import launch
from support import DEVICE


@pytest.mark.parametrize("what", [*WORKLOADS, *calls.OTHERS])
def test_every_call_runs(what: str) -> None:
    make(Call("js" if what == "formula_sums" else "forward_kl", "bf16", 3, 600, what), DEVICE, "triton")


def test_a_wrong_value_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    value = WORKLOADS["value"]

    def off(*arguments: object) -> Output:
        return Output(1.0001 * value(*arguments).value)  # type: ignore[arg-type]

    monkeypatch.setitem(WORKLOADS, "value", off)
    with pytest.raises(WrongOutput, match="value off by"):
        make(Call("forward_kl", "fp32", 3, 600, "value"), DEVICE)


def test_what_differs_from_eager_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(problem: Problem, backend: str | None) -> calls.Results:
        return (problem.value * (1 if backend == "eager" else 1.0001),)

    monkeypatch.setitem(calls.OTHERS, "token_stats", off)
    with pytest.raises(AssertionError):
        make(Call("forward_kl", "fp32", 3, 600, "token_stats"), DEVICE)


def test_other_bits_are_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def drifting(problem: Problem, backend: str | None) -> calls.Results:
        seen.append(0)
        return (problem.value * (1 + 1e-9 * len(seen)),)

    monkeypatch.setitem(calls.OTHERS, "token_stats", drifting)
    call = Call("forward_kl", "fp32", 3, 600, "token_stats")
    assert list(calls.wrong([call], DEVICE)) == [f"{call}: OtherBits: {call}: other bits the second time"]


def test_calls_in_several_processes() -> None:
    right = Call("forward_kl", "fp32", 3, 600, "value")
    assert list(calls.wrong([right], DEVICE, 2)) == []
    (line,) = calls.wrong([right, replace(right, what="no such call")], DEVICE, 2)
    assert line == f"{replace(right, what='no such call')}: KeyError: 'no such call'"


def test_a_smoke_run_calls_every_kind_and_every_kernel() -> None:
    called = list(CALLS["smoke"]())
    assert {call.kind for call in called} == set(KINDS)
    assert {call.what for call in called} == {*WORKLOADS, *calls.OTHERS}


def test_the_sanitizer_sees_two_kinds_and_rows_that_programs_share() -> None:
    called = list(CALLS["sanitizer"]())
    assert {call.kind for call in called} == {"forward_kl", "js"}
    for kind in ("forward_kl", "js"):
        shared = {c.what for c in called if c.kind == kind and launch.splits_of(c.vocab, 1024).number > 1}
        assert shared >= {"value_grad", "both sides"}
    assert {call.vocab % 8 == 0 for call in called} == {True, False}


def test_a_session_compiles_what_it_times_and_sanitizes() -> None:
    compiled = {variant for call in CALLS["session"]() for variant in variants(call)}
    for point in (point for plan in ("kl", "kinds", "baselines", "compile") for point in PLANS[plan]()):
        for what in point.workloads:
            case = (point.kind, point.dtype, point.rows, point.vocab)
            assert variants(Call(*case, what)) <= compiled, f"{point}, {what}"
    assert {variant for call in CALLS["sanitizer"]() for variant in variants(call)} <= compiled


@pytest.mark.parametrize("what", ["value_grad", "forward_backward", "both sides", "token_stats"])
def test_vocabularies_of_one_layout_share_their_kernels(what: str) -> None:
    first, *others = (
        variants(Call("js", "bf16", 8192, V, what)) for V in (128256, 32000, 65536, 151936, 262144)
    )
    assert all(found == first for found in others)
    assert variants(Call("js", "bf16", 8192, 50257, what)) != first


def test_calls_that_compile_something_new_come_first() -> None:
    few = [Call("forward_kl", "bf16", rows, 600, what) for what in ("value", "value_grad") for rows in (1, 2)]
    assert new_first(few, variants) == [few[0], few[2], few[1], few[3]]


def test_a_timing_takes_longer_the_more_it_moves() -> None:
    (small, *_) = tiny_plan()
    seconds = [timetable.seconds_of(replace(small, rows=rows, vocab=128256), 21) for rows in (1024, 8192)]
    assert 0 < seconds[0] < seconds[1]


DRY_RUN = """
import sys
from bench.gpu import calls, timetable

if __name__ == "__main__":
    few = [calls.Call("forward_kl", "fp32", 3, 1000, "value")]
    calls.CALLS["smoke"] = lambda: iter(few)
    kept = {}

    def counted(wanted, really=timetable.counted):
        return kept or kept.update(really(wanted)) or kept

    timetable.counted = counted
    plans = {"smoke": 60, "time tiny": 20, "plots": 5}
    for seconds in ({}, {"smoke": 1}, {"plots": 100}):
        command = timetable.Command("a command", 95, 10, plans | seconds)
        print("status", timetable.show([command]))
    print("seconds", *kept.values())
"""


def test_a_dry_run_compiles_counts_and_says_what_does_not_fit(tmp_path: Path) -> None:
    program = tmp_path / "dry_run.py"
    program.write_text(DRY_RUN)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(program)], env=environment | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("status")] == ["status 0", "status 1", "status 1"]
    late = [line for line in lines if "DOES NOT FIT" in line]
    assert len(late) == 2
    assert "smoke" in late[0]
    assert "in all" in late[1]
    assert float(lines[-1].split()[1]) > 0.1  # a compiler ran


def wheel(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}/__init__.py", text)
        file.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )


def test_a_carried_package_serves_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = tmp_path / "wheels"
    wheel(carried, "a_package_nobody_has", "number = 7\n")
    wheel(carried, "pytest", "raise ImportError('not this one')\n")
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("PYTHONPATH", "before")
    into = tmp_path / "unpacked"
    assert wheels.use(carried, into) == ["a_package_nobody_has"]
    import a_package_nobody_has  # type: ignore[import-not-found]

    assert a_package_nobody_has.number == 7
    assert os.environ["PYTHONPATH"].split(os.pathsep) == ["before", str(into)]
    assert not (into / "pytest").exists()


BARE = """
import importlib.abc, sys

LACKING = {"pytest", "pytest_benchmark", "pytest_reportlog", "pytest_timeout", "matplotlib", "hypothesis",
           "scipy", "xdist", "filelock", "rich", "transformers", "tokenizers", "liger_kernel"}

class Lacking(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in LACKING or name == "kl_gpu._native":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Lacking())
from bench.gpu import calls, session, timetable, variants, wheels
wheels.find_spec = lambda name: None if name in LACKING else object()
import torch
assert list(calls.wrong([calls.Call("js", "fp32", 3, 600, "both sides")], torch.device("cpu"))) == []
from bench.__main__ import main
main(["gpu", "--wheels", "no-such-folder"])
"""


def test_without_optional_packages_a_session_names_what_it_cannot_do_without(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BARE], env=environment, cwd=tmp_path, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    said = done.stderr.strip().splitlines()[-1]
    assert "pytest, pytest_benchmark, pytest_reportlog, pytest_timeout" in said
    assert "make wheels" in said

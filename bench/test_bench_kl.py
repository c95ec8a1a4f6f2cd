"""The same systems under pytest-benchmark, on a few of the cases: `pytest bench/ --benchmark-only`.

For watching one change; the figures to quote come from `python -m bench`, which interleaves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import machine
from .cases import Case, Problem
from .check import check
from .measure import run_of
from .systems import PLAIN, WORKS, System, available, usual
from .timing import T
from .traffic import COPY_PASSES, PASSES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = 2048 if DEVICE.type == "cuda" else 32
CASES = [
    Case(kind, dtype, ROWS, V)
    for V, dtype, kind in itertools.product((32000, 128256), ("fp32", "bf16"), PLAIN)
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param, DEVICE, machine.cache_bytes(DEVICE))


def _measure(benchmark: BenchmarkFixture, call: Callable[[int], T], moved: int) -> tuple[T, int]:
    """The last run's result, and its turn."""
    turns = itertools.count()
    last = 0

    def next_turn() -> tuple[tuple[int], dict[str, object]]:
        nonlocal last
        last = next(turns)
        return (last,), {}

    def finished(turn: int) -> T:
        result = call(turn)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.extra_info["bytes"] = moved
    return benchmark.pedantic(finished, setup=next_turn, rounds=7, warmup_rounds=2), last


@pytest.mark.parametrize(
    "system", [available(DEVICE)[name] for name in usual(DEVICE)], ids=lambda system: system.name
)
@pytest.mark.parametrize("work", WORKS)
def test_divergence(benchmark: BenchmarkFixture, problem: Problem, work: str, system: System) -> None:
    if not system.does(problem.case.kind, work):
        pytest.skip(f"{system.name} does not do {work} of {problem.case.kind}")
    entry = system.enter(problem.case.kind)
    benchmark.group = f"{work} {problem.case}"
    output, turn = _measure(benchmark, run_of(entry, work, problem), PASSES[work] * problem.case.tensor_bytes)
    benchmark.extra_info["max_rel_error"] = check(entry, work, problem, turn, output)


def test_copy(benchmark: BenchmarkFixture, problem: Problem) -> None:
    benchmark.group = f"copy {problem.case}"
    _measure(benchmark, problem.copy, COPY_PASSES * problem.case.tensor_bytes)

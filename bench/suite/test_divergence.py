"""Divergences under pytest-benchmark, ours beside baselines and a device copy: `pytest bench/suite`.

One test is one contestant in one pass: all contestants of a workload follow one another, and all of them once
more in each further pass, so that a slow spell of the machine that is longer than a pass hits all alike. A
speed is a ratio of the medians over all passes of one run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from ..harness.check import WrongOutput
from ..harness.report import Finding
from .plugin import Suite, Timing
from .stage import LeftOut, Stage


def test_divergence(
    benchmark: BenchmarkFixture,
    record_property: Callable[[str, object], None],
    suite: Suite,
    stage: Stage,
    timing: Timing,
) -> None:
    point, workload, name = timing.point, timing.workload, timing.system
    try:
        contestant = stage.contestant(point, workload, name)
    except LeftOut as left_out:
        pytest.skip(f"{name} is left out: {left_out}")
    case = contestant.problem.case
    finding = Finding(name, case.kind, workload, case.dtype, case.rows, case.vocab, group=str(point))
    try:
        contestant.rehearse()
        benchmark.pedantic(contestant.run, setup=contestant.set_up, rounds=suite.rounds, warmup_rounds=1)
        contestant.check_last()
        finding.seconds = list(benchmark.stats.stats.data) if benchmark.stats else []
        finding.peak_extra_bytes = contestant.peak_extra_bytes
        finding.max_rel_error = contestant.max_rel_error
    except Exception as error:  # a baseline may fail in its own ways, and not only with RuntimeError
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        stage.failed[workload, name] = why
        finding.seconds = []
        if contestant.required or isinstance(error, WrongOutput):
            raise
        pytest.skip(f"{name} is left out: {why}")
    finally:
        record_property("finding", asdict(finding))
        benchmark.extra_info.update(asdict(finding))
        benchmark.extra_info.pop("seconds")

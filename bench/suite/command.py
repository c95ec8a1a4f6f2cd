"""Times kl_gpu against plain PyTorch and torch.compile on the device at hand, under pytest-benchmark.

Every output is compared with float64 while it is timed: a wrong one ends the run with an error.
"""

from __future__ import annotations

import argparse
import itertools
import os
from pathlib import Path

import pytest
import torch

from kl_gpu.backends import registry

from ..harness import machine
from ..harness.options import DTYPES, at_least, device, usual_device
from ..harness.report import new_report
from ..harness.systems import PLAIN, WORKLOADS, available, usual
from .plan import PLANS, Point
from .plugin import Suite

FOLDER = Path(__file__).parent
_VOCABS = (32000, 50257, 128256, 151936)
_KLS = ["forward_kl", "reverse_kl"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", type=device, help="cpu, cuda, cuda:1, …; default: a GPU if there is one")
    add("--vocab", type=at_least(2), nargs="+", metavar="V", default=_VOCABS, help="default: four of models")
    add("--dtype", choices=tuple(DTYPES), nargs="+", default=["fp32", "bf16"], help="default: fp32 bf16")
    add("--kind", choices=tuple(PLAIN), nargs="+", default=_KLS, help="default: the KLs")
    add("--work", choices=tuple(WORKLOADS), nargs="+", default=list(WORKLOADS), help="default: all")
    add("--rows", type=at_least(1), nargs="+", metavar="N", help="default: 512; on a GPU 8192, or what fits")
    add("--repeats", type=at_least(1), metavar="K", help="runs, of which the median counts; default: 6 or 30")
    add("--systems", nargs="+", metavar="NAME", help="default: all; on a GPU its default backend")
    add("--out", type=Path, default=Path("out/bench"), metavar="DIR", help="for the JSON; default: out/bench")
    session = parser.add_argument_group("for `python -m bench gpu`")
    add = session.add_argument
    add("--plan", choices=tuple(PLANS), help="the points, in place of those above; goes on past errors")
    add("--report-log", type=Path, metavar="FILE", help="where pytest-reportlog writes each result at once")
    add("--skip", type=Path, metavar="FILE", help="a list of tests to leave out, one a line")
    add("--limit", type=at_least(1), metavar="SECONDS", help="a test that takes longer hangs: pytest-timeout")


def _points(options: argparse.Namespace, on: torch.device) -> list[Point]:
    if options.plan:
        return PLANS[options.plan]()
    systems, workloads = tuple(options.systems or usual(on)), tuple(options.work)
    rows = options.rows or [8192 if on.type == "cuda" else 512]
    cases = itertools.product(options.vocab, options.dtype, rows, options.kind)
    return [Point(kind, dtype, n, vocab, systems, workloads) for vocab, dtype, n, kind in cases]


def _pytest_arguments(options: argparse.Namespace) -> list[str]:
    arguments = [str(FOLDER), "--benchmark-columns=median,iqr,rounds", "--benchmark-sort=name"]
    arguments += ["--quiet", "--no-header", "--tb=short", "-rs"]
    # No configuration but this: neither the test suite's nor that of the folder this runs in.
    arguments += ["-c", os.devnull, f"--rootdir={FOLDER.parents[1]}", "-p", "no:cacheprovider"]
    if options.report_log:
        arguments.append(f"--report-log={options.report_log}")
    if options.limit:
        # In a thread: a call into the driver that never returns sees no signal.
        arguments += [f"--timeout={options.limit}", "--timeout-method=thread"]
    return arguments if options.plan else [*arguments, "--exitfirst"]


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    on = options.device or usual_device()
    if on.type == "cuda":
        torch.cuda.set_device(on)  # the clock's events and Triton's launches go to the current device
    known = available(on)
    for name in options.systems or ():
        if name not in known:
            parser.error(f"argument --systems: {name!r} is not one of {', '.join(known)}")
    report = new_report(on)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    backend = registry.resolve(None, on)
    print(f"{report.device}; torch {report.torch}, triton {report.triton}; kl_gpu: {backend}")
    print("2U, 3U, 5U: so many tensors of logits are the least to move.")
    if on.type == "cpu" and machine.is_busy():
        print("This machine is busy: figures will be off, and not by the same factor.")
    begun = options.skip.read_text().splitlines() if options.skip else ()
    repeats = options.repeats or (30 if on.type == "cuda" else 6)
    suite = Suite(_points(options, on), on, repeats, begun)
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
        del os.environ[name]  # of the process that runs our own tests: pytest-benchmark would time nothing
    status = pytest.main(_pytest_arguments(options), plugins=[suite])
    if not options.report_log:  # else whoever asked for that makes a report of it
        report.add(suite.findings)
        print(report.save(options.out, complete=status == pytest.ExitCode.OK))
    return int(status)

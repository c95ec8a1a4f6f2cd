"""The CPU kernels against the machine's own memory, torch.compile and plain PyTorch: README's CPU table.

Every candidate takes its turn in every round, so that a busy moment hits all alike; figures are medians, and
shares are medians of the shares within a round. Counted bytes: value reads both tensors (2 U); value and
gradient also writes one (3 U). "memory" is a loop over the same buffers that does nothing but read them, or
read them and write the third with non-temporal stores. "kl_div" is the public call, autograd and a new
gradient buffer included, as the baselines have it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

import kl_gpu
from kl_gpu import _native, native
from kl_gpu.problem import Problem

from ..harness.clock import interleaved, ratio
from ..harness.options import DTYPES
from . import rounds

FLOORS = {  # share of memory, times torch.compile, times plain PyTorch
    ("fp32", "value"): (0.88, 3.0, 22),
    ("fp32", "value + gradient"): (0.68, 7.0, 40),
    ("bf16", "value"): (0.48, 3.7, 32),
    ("bf16", "value + gradient"): (0.38, 6.5, 29),
}


def per_row(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return kl_gpu.kl_div(student, teacher, reduction="none")


def candidates(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    n, v, threads = options.rows, options.columns, options.threads
    student, teacher = rounds.logits(n, v, dtype)
    grad, row_scale = torch.zeros_like(student), torch.full((n,), 1 / n)
    leaf = student.clone().requires_grad_()
    problem = Problem.of(student[None], teacher[None], None, "forward_kl", 0.0, 1.0, 1.0)
    compiled = torch.compile(rounds.plain, dynamic=False)
    s, t, g = student.data_ptr(), teacher.data_ptr(), grad.data_ptr()

    def backward(f: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def run() -> None:
            leaf.grad = None
            f(leaf, teacher).mean().backward()

        return run

    def value(f: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def run() -> torch.Tensor:
            with torch.no_grad():
                return f(student, teacher)

        return run

    return {
        "memory/value": lambda: _native.probe_read(s, t, student.nbytes, threads),
        "ours/value": lambda: native.value(problem),
        "kl_div/value": value(per_row),
        "compile/value": value(compiled),
        "plain/value": value(rounds.plain),
        "memory/value + gradient": lambda: _native.probe_write(s, t, g, student.nbytes, threads),
        "ours/value + gradient": lambda: native.value_and_gradient(problem, row_scale, None, grad[None]),
        "kl_div/value + gradient": backward(kl_gpu.kl_div),
        "compile/value + gradient": backward(compiled),
        "plain/value + gradient": backward(rounds.plain),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rounds.add_arguments(parser, rows=256, columns=128256)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    rounds.begin(options)
    print(f"{'':27}{'ms':>8}{'GB/s':>7}{'of memory':>15}{'of torch.compile':>20}{'of plain':>16}")
    report = []
    for name in options.dtype:
        dtype = DTYPES[name]
        times = interleaved(candidates(options, dtype), options.repeats)
        for work, passes in (("value", 2), ("value + gradient", 3)):
            of_work = {who: times[f"{who}/{work}"] for who in ("memory", "ours", "kl_div", "compile", "plain")}
            moved = passes * options.rows * options.columns * dtype.itemsize
            _print(name, work, moved, of_work)
            report.append({"dtype": name, "work": work, "passes": passes, "seconds": of_work})
    if options.json:
        sizes = {"rows": options.rows, "columns": options.columns, "threads": options.threads}
        options.json.write_text(json.dumps({"isa": native.isa(), **sizes, "results": report}, indent=1))
    return 0


def _print(dtype: str, work: str, moved: int, times: dict[str, list[float]]) -> None:
    ours, public = times["ours"], times["kl_div"]
    seconds = statistics.median(ours)
    share, compiled, plain = (ratio(times[other], ours) for other in ("memory", "compile", "plain"))
    least = FLOORS.get((dtype, work), (0, 0, 0))
    print(
        f"{dtype + ' ' + work:27}{seconds * 1e3:8.2f}{moved / seconds / 1e9:7.1f}{share:8.0%} (≥{least[0]:3.0%})"
        f"{compiled:11.1f} × (≥{least[1]:3.1f}){plain:8.1f} × (≥{least[2]:2d})"
    )
    compiled, plain = (ratio(times[other], public) for other in ("compile", "plain"))
    print(
        f"{'  through kl_div':27}{statistics.median(public) * 1e3:8.2f}{'':22}"
        f"{compiled:11.1f} ×{'':9}{plain:8.1f} ×"
    )

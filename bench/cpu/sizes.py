"""The CPU kernels' time per byte over V and over N: no size should fall out of its neighbours' line.

All sizes of a line take turns, so that a busy moment hits all alike, and a turn makes as many calls, each on
logits and a gradient of its own, as no cache holds. "over" is the time per byte divided by the faster
neighbour's, the median over the rounds. Value and gradient reads two tensors and writes a third.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from kl_gpu import native
from kl_gpu.problem import Problem

from ..harness.clock import interleaved, ratio
from ..harness.options import DTYPES
from . import rounds

LINES = {
    "over V, 2²⁴ logits": [(2**24 // v, v) for v in (8192, 32000, 50257, 128256, 151936, 262144)],
    "over N": [(n, 128256) for n in (1, 2, 4, 16, 64, 256, 4096)],
}
OUT_OF_CACHE = 2**26  # bytes of a tensor that no cache holds a part of when its turn comes again


def turns(n: int, v: int, dtype: torch.dtype) -> tuple[Callable[[], object], Callable[[], object], int]:
    """A turn of values, one of values and gradients, and the bytes that either reads of one side."""
    calls = max(1, OUT_OF_CACHE // (dtype.itemsize * n * v))
    teacher = torch.randn(calls, n, v).mul_(3)
    student = torch.randn(calls, n, v).mul_(0.5).add_(teacher).to(dtype)
    teacher = teacher.to(dtype)
    row_scale = torch.full((n,), 1 / n)
    problems = [
        Problem.of(s, t, None, "forward_kl", 0.0, 1.0, 1.0)
        for s, t in zip(student.split(1), teacher.split(1), strict=True)
    ]
    gradients = torch.zeros_like(student).split(1)

    def value() -> None:
        for problem in problems:
            native.value(problem)

    def both() -> None:
        for problem, to in zip(problems, gradients, strict=True):
            native.value_and_gradient(problem, row_scale, None, to)

    return value, both, student.nbytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rounds.add_arguments(parser, repeats=25)
    parser.set_defaults(dtype=["fp32"])
    parser.add_argument("--quick", action="store_true", help="two sizes a line, to try the command itself")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    rounds.begin(options)
    for name in options.dtype:
        for line, sizes in LINES.items():
            time_line(f"{name} {line}", sizes[:2] if options.quick else sizes, DTYPES[name], options.repeats)
    return 0


def time_line(title: str, sizes: list[tuple[int, int]], dtype: torch.dtype, repeats: int) -> None:
    """Prints the time per byte of every size, and how it stands to its neighbours'."""
    heading = f"{'value, ps/byte':>18}{'over':>6}{'value + gradient':>20}{'over':>6}"
    print(f"{title:27}{'N':>6}{'V':>8}{heading}")
    runs: dict[str, Callable[[], object]] = {}
    scale: dict[str, float] = {}
    for n, v in sizes:
        value, both, size = turns(n, v, dtype)
        runs |= {f"{n} × {v} value": value, f"{n} × {v} both": both}
        scale |= {f"{n} × {v} value": 1 / (2 * size), f"{n} × {v} both": 1 / (3 * size)}
    seconds = interleaved(runs, repeats)
    per_byte = {name: [t * scale[name] for t in times] for name, times in seconds.items()}
    for i, (n, v) in enumerate(sizes):
        cells = ""
        for work, width in (("value", 18), ("both", 20)):
            own = per_byte[f"{n} × {v} {work}"]
            around = [per_byte[f"{m} × {w} {work}"] for m, w in sizes[max(0, i - 1) : i + 2] if (m, w) != (n, v)]
            over = max(ratio(own, neighbour) for neighbour in around)
            cells += f"{statistics.median(own) * 1e12:{width}.1f}{over:6.2f}"
        print(f"{'':27}{n:6}{v:8}{cells}")

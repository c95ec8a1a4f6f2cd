"""The CPU kernels' time per byte over V and over N: no size should fall out of its neighbours' line.

    python -m bench.cpu_sizes [--dtype float32] [--threads 2] [--repeats 25]

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

from .cpu_roofline import interleaved, ratio

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


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for line, sizes in LINES.items():
        print(
            f"{line:22}{'N':>6}{'V':>8}"
            + f"{'value, ps/byte':>18}{'over':>6}{'value + gradient':>20}{'over':>6}"
        )
        runs: dict[str, Callable[[], object]] = {}
        scale: dict[str, float] = {}
        for n, v in sizes:
            value, both, size = turns(n, v, getattr(torch, args.dtype))
            runs |= {f"{n} × {v} value": value, f"{n} × {v} both": both}
            scale |= {f"{n} × {v} value": 1 / (2 * size), f"{n} × {v} both": 1 / (3 * size)}
        seconds = interleaved(runs, args.repeats)
        per_byte = {name: [t * scale[name] for t in times] for name, times in seconds.items()}
        for i, (n, v) in enumerate(sizes):
            cells = ""
            for work, width in (("value", 18), ("both", 20)):
                own = per_byte[f"{n} × {v} {work}"]
                neighbours = [
                    per_byte[f"{m} × {w} {work}"] for m, w in sizes[max(0, i - 1) : i + 2] if (m, w) != (n, v)
                ]
                over = max(ratio(own, neighbour) for neighbour in neighbours)
                cells += f"{statistics.median(own) * 1e12:{width}.1f}{over:6.2f}"
            print(f"{'':22}{n:6}{v:8}{cells}")


if __name__ == "__main__":
    main()

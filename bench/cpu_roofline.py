"""The CPU kernels against the machine's own memory, torch.compile and eager PyTorch.

    python -m bench.cpu_roofline [--rows 256] [--columns 128256] [--threads 2] [--repeats 15]

Every candidate takes its turn in every round, so that a busy moment hits all alike; figures are
medians, and shares are medians of the shares within a round. Counted bytes: value reads both tensors (2 U);
value and gradient also writes one (3 U). "memory" is a loop over the same buffers that does nothing
but read them, or read them and write the third past the cache. "kl_div" is the public call, autograd and a
new gradient buffer included, as the peers have it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import kl_gpu
from kl_gpu import _native, native
from kl_gpu.problem import Problem

FLOORS = {  # share of memory, times torch.compile, times eager
    ("float32", "value"): (0.88, 3.0, 22),
    ("float32", "value + gradient"): (0.68, 7.0, 40),
    ("bfloat16", "value"): (0.48, 3.7, 32),
    ("bfloat16", "value + gradient"): (0.38, 6.5, 29),
}


def interleaved(
    candidates: dict[str, Callable[[], object]],
    repeats: int,
    before: dict[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each candidate, round by round; what must happen before some of them is not timed."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    prepare = {name: (before or {}).get(name, lambda: None) for name in candidates}
    for name, run in candidates.items():
        prepare[name]()
        run()
    for _ in range(repeats):
        for name, run in candidates.items():
            prepare[name]()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def plain(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """What people write: per-token KL(teacher‖student) from log-softmax."""
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def per_row(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return kl_gpu.kl_div(student, teacher, reduction="none")


def candidates(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    n, v = args.rows, args.columns
    teacher = (3 * torch.randn(1, n, v)).to(dtype)
    student = (teacher.float() + 0.7 + 0.5 * torch.randn(1, n, v)).to(dtype)
    grad, row_scale = torch.zeros_like(student), torch.full((n,), 1 / n)
    leaf = student[0].clone().requires_grad_()
    problem = Problem.of(student, teacher, None, "forward_kl", 0.0, 1.0, 1.0)
    compiled = torch.compile(plain, dynamic=False)
    size = student.numel() * student.element_size()
    s, t, g = student.data_ptr(), teacher.data_ptr(), grad.data_ptr()

    def backward(f: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def run() -> None:
            leaf.grad = None
            f(leaf, teacher[0]).mean().backward()

        return run

    def value(f: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def run() -> torch.Tensor:
            with torch.no_grad():
                return f(student[0], teacher[0])

        return run

    return {
        "memory/value": lambda: _native.probe_read(s, t, size, args.threads),
        "ours/value": lambda: native.value(problem),
        "kl_div/value": value(per_row),
        "compile/value": value(compiled),
        "eager/value": value(plain),
        "memory/value + gradient": lambda: _native.probe_write(s, t, g, size, args.threads),
        "ours/value + gradient": lambda: native.value_and_gradient(problem, row_scale, None, grad),
        "kl_div/value + gradient": backward(kl_gpu.kl_div),
        "compile/value + gradient": backward(compiled),
        "eager/value + gradient": backward(plain),
    }


def ratio(over: list[float], under: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=128256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{native.isa()}, {args.threads} threads, {args.rows} × {args.columns}, {args.repeats} rounds")
    print(f"{'':27}{'ms':>8}{'GB/s':>7}{'of memory':>15}{'of torch.compile':>20}{'of eager':>16}")
    report = []
    for dtype in (torch.float32, torch.bfloat16):
        times = interleaved(candidates(args, dtype), args.repeats)
        for work, passes in (("value", 2), ("value + gradient", 3)):
            name = str(dtype).removeprefix("torch.")
            ours = times[f"ours/{work}"]
            seconds = statistics.median(ours)
            share, against_compile, against_eager = (
                ratio(times[f"{other}/{work}"], ours) for other in ("memory", "compile", "eager")
            )
            floor = FLOORS[name, work]
            rate = passes * args.rows * args.columns * dtype.itemsize / seconds / 1e9
            print(
                f"{name + ' ' + work:27}{seconds * 1e3:8.2f}{rate:7.1f}{share:8.0%} (≥{floor[0]:3.0%})"
                f"{against_compile:11.1f} × (≥{floor[1]:3.1f}){against_eager:8.1f} × (≥{floor[2]:2d})"
            )
            public = times[f"kl_div/{work}"]
            public_compile, public_eager = (ratio(times[f"{x}/{work}"], public) for x in ("compile", "eager"))
            print(
                f"{'  through kl_div':27}{statistics.median(public) * 1e3:8.2f}{'':22}"
                f"{public_compile:11.1f} ×{'':9}{public_eager:8.1f} ×"
            )
            rounds = {k: v for k, v in times.items() if k.endswith("/" + work)}
            report.append({"dtype": name, "work": work, "passes": passes, "seconds": rounds})
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"isa": native.isa(), "arguments": vars(args), "results": report}, file, indent=1)


if __name__ == "__main__":
    main()

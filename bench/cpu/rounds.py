"""What the benchmarks of the CPU kernels share: options, logits, and the table of a race.

Shares of the memory's own speed move by ten points with whatever else the machine does just then, so here
contestants take turns in every round (`harness.clock.interleaved`), and ratios are medians of the ratios
within a round. pytest-benchmark, which finishes one contestant before the next begins, cannot do that.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kl_gpu.backends import native

from ..harness.clock import interleaved, ratio
from ..harness.options import DTYPES, add_sizes

Runs = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Race:
    """Calls that take turns, what comes before some of them, and those whose time the others are shown in."""

    title: str
    calls: Runs
    references: tuple[str, ...]
    before: Mapping[str, Callable[[], object]] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser, *, repeats: int = 15, **sizes: int) -> None:
    """Adds the sizes of a benchmark, threads and rounds, and the dtypes it goes through."""
    add_sizes(parser, **sizes, threads=2, repeats=repeats)
    parser.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", default=["fp32", "bf16"])


def begin(options: argparse.Namespace) -> None:
    """Sets threads and seed, and says what is measured."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = ("rows", "hidden", "columns", "k")
    about = "".join(f", {name} {value}" for name, value in vars(options).items() if name in sizes)
    print(f"{native.isa()}, {options.threads} threads, {options.repeats} rounds{about}")


def hold(
    options: argparse.Namespace, races: Callable[[argparse.Namespace, torch.dtype], Iterable[Race]]
) -> int:
    """Runs the races of every dtype, and prints medians."""
    begin(options)
    for name in options.dtype:
        for race in races(options, DTYPES[name]):
            times = interleaved(race.calls, options.repeats, race.before)
            print(
                f"{name + ' ' + race.title:34}{'ms':>10}"
                + "".join(f"{f'× {r}':>26}" for r in race.references)
            )
            for who, seconds in times.items():
                ratios = "".join(f"{ratio(seconds, times[other]):26.2f}" for other in race.references)
                print(f"  {who:32}{1e3 * statistics.median(seconds):10.3f}{ratios}", flush=True)
    return 0


def logits(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Student and teacher."""
    teacher = (3 * torch.randn(rows, columns)).to(dtype)
    return (teacher.float() + 0.7 + 0.5 * torch.randn(rows, columns)).to(dtype), teacher


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    """What people write: per-token KL(teacher‖student) from log-softmax."""
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

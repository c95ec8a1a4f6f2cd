"""The C++ kernels beside the machine's memory, torch.compile and plain PyTorch, in rounds.

RACE is the table of KLs in docs/performance.md, token_stats, or token_logprobs and topk_div. Shares of the
memory's own speed move by ten points with whatever else the machine does just then, so contestants take turns
in every round, which pytest-benchmark cannot do, and ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from kl_gpu.backends import native

from ..harness.clock import interleaved, ratio
from ..harness.options import DTYPES, add_sizes
from .races import RACES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("race", choices=tuple(RACES))
    add_sizes(parser, rows=256, columns=128256, k=64, threads=2, repeats=15)
    parser.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", default=["fp32", "bf16"])


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = ", ".join(f"{name} {getattr(options, name)}" for name in ("rows", "columns", "k", "threads"))
    print(f"{native.isa()}, {sizes}, {options.repeats} rounds")
    for name in options.dtype:
        for race in RACES[options.race](options, DTYPES[name]):
            times = interleaved(race.calls, options.repeats, race.before)
            references = "".join(f"{f'× {reference}':>26}" for reference in race.references)
            print(f"{name + ' ' + race.title:34}{'ms':>10}{references}")
            for who, seconds in times.items():
                ratios = "".join(f"{ratio(seconds, times[other]):26.2f}" for other in race.references)
                print(f"  {who:32}{1e3 * statistics.median(seconds):10.3f}{ratios}", flush=True)
    return 0

"""What a call costs where the logits cost nothing: `[1, 32]`, beside an operator that does nothing.

"empty operator" is a `torch.library` operator in Python that takes two tensors and allocates its result,
registered by `Library.impl`, as ours are; "empty custom_op" is the same through the decorator. Every
candidate makes its calls in every round; figures are medians, in microseconds a call, and "beyond" is the
median over the rounds of what a call takes more than the empty operator.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

import kl_gpu

from ..harness.clock import interleaved
from ..harness.options import DTYPES
from . import rounds

CALLS = 50  # a round: long against the clock's own steps, short against a slow spell of the machine


def _nothing(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.empty(len(student))


# Its operators go with the library: it must outlive the calls.
_library = torch.library.Library("kl_gpu_bench", "DEF")
_library.define("nothing(Tensor student, Tensor teacher) -> Tensor")
_library.impl("nothing", _nothing, "CompositeExplicitAutograd")
_decorated = torch.library.custom_op("kl_gpu_bench::decorated", _nothing, mutates_args=())


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    return rounds.plain(student, teacher).mean()


def candidates(student: Tensor, teacher: Tensor) -> dict[str, Callable[[], object]]:
    leaf = student.clone().requires_grad_()
    nothing = torch.ops.kl_gpu_bench.nothing.default

    def backward(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def run() -> None:
            leaf.grad = None
            loss(leaf, teacher).backward()

        return run

    return {
        "empty operator": lambda: nothing(student, teacher),
        "empty custom_op": lambda: _decorated(student, teacher),
        "kl_div, per token": lambda: kl_gpu.kl_div(student, teacher, reduction="none"),
        "kl_div": lambda: kl_gpu.kl_div(student, teacher),
        "kl_div and backward": backward(kl_gpu.kl_div),
        "divergence, js": lambda: kl_gpu.divergence(student, teacher, "js"),
        "token_stats": lambda: kl_gpu.token_stats(student, teacher),
        "F.kl_div": lambda: plain(student, teacher),
        "F.kl_div and backward": backward(plain),
    }


def repeated(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rounds.add_arguments(parser, rows=1, columns=32, repeats=200)
    parser.set_defaults(dtype=["fp32"])


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    rounds.begin(options)
    for name in options.dtype:
        sides = torch.randn(2, options.rows, options.columns).to(DTYPES[name]).unbind()
        runs = {name: repeated(call) for name, call in candidates(*sides).items()}
        seconds = interleaved(runs, options.repeats)
        nothing = seconds["empty operator"]
        print(f"{name:24}{'µs a call':>12}{'beyond':>10}")
        for what, times in seconds.items():
            beyond = statistics.median(t - e for t, e in zip(times, nothing, strict=True))
            print(f"{what:24}{statistics.median(times) / CALLS * 1e6:12.1f}{beyond / CALLS * 1e6:10.1f}")
    return 0

"""What a call costs where the logits cost nothing: `[1, 32]`, beside an operator that does nothing.

"empty operator" is a `torch.library` operator in Python that takes two tensors and allocates its result,
registered by `Library.impl`, as ours are; "empty custom_op" is the same through the decorator. Every
candidate makes 50 calls in every round: a millisecond of 50 calls is 20 µs a call.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import kl_gpu

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


def races(options: argparse.Namespace, dtype: torch.dtype) -> Iterator[rounds.Race]:
    student, teacher = torch.randn(2, options.rows, options.columns).to(dtype).unbind()
    leaf = student.clone().requires_grad_()
    nothing = torch.ops.kl_gpu_bench.nothing.default

    def backward(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def run() -> None:
            leaf.grad = None
            loss(leaf, teacher).backward()

        return run

    calls: rounds.Runs = {
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
    title = f"{CALLS} calls on {list(student.shape)}"
    yield rounds.Race(title, {name: repeated(call) for name, call in calls.items()}, ("F.kl_div",))


def repeated(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rounds.add_arguments(parser, rows=1, columns=32, repeats=200)
    parser.set_defaults(dtype=["fp32"])


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    return rounds.hold(options, races)

"""token_logprobs and topk_div on the CPU against the plain PyTorch they replace, forward and backward.

Everything takes its turn in every round, right after a call of its own that is not timed: a training loop
finds the memory that its last step gave back, not what another candidate left of it. Figures are medians,
ratios medians of the ratios within a round.
The checking of ids is part of the time, and so is a new gradient buffer, whose pages the system hands out
one by one; with inplace=True there is none. "memory" is what a forward and backward must move, one read,
then one read and one write, by loops that do nothing else, into memory that is there or into a new buffer.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kl_gpu
from kl_gpu import _native

from ..harness.clock import interleaved, ratio
from ..harness.options import DTYPES
from . import rounds

FLOOR = 8.0  # times plain PyTorch


def plain_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    return F.log_softmax(logits, -1).gather(-1, ids[:, None])[:, 0]


def plain_bucket(logits: Tensor, logprobs: Tensor, ids: Tensor) -> Tensor:
    """Forward KL of K + 1 outcomes as people write it."""
    log_q = F.log_softmax(logits, -1).gather(-1, ids).float()
    p, q = logprobs.exp(), log_q.exp()
    rest_p, rest_q = ((1 - x.sum(-1)).clamp_min(1e-8) for x in (p, q))
    return (p * (logprobs - log_q)).sum(-1) + rest_p * (rest_p / rest_q).log()


class Output(torch.autograd.Function):
    """Logits as a model gives them: no leaf, in memory that may be written over."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


Runs = dict[str, Callable[[], object]]


def candidates(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Runs, Runs]:
    """What is timed, and what must happen before it."""
    teacher = 3 * torch.randn(args.rows, args.columns)
    student = (teacher + 0.5 * torch.randn_like(teacher)).to(dtype)
    logprobs, ids = teacher.log_softmax(-1).topk(args.k)
    tokens = torch.randint(0, args.columns, (args.rows,))
    leaf, to = student.clone().requires_grad_(), torch.zeros_like(student)
    output, weight = student.clone(), torch.zeros((), requires_grad=True)
    size = student.numel() * student.element_size()
    half = size // 2

    def both_ways(loss: Callable[[], Any]) -> Callable[[], object]:
        def run() -> None:
            leaf.grad = None
            loss().mean().backward()

        return run

    def move(to: Tensor) -> None:
        x = student.data_ptr()
        # The probes read two buffers: the halves of one.
        _native.probe_read(x, x + half, half, args.threads)
        _native.probe_write(x, x, to.data_ptr(), size, args.threads)

    def logprobs_of(logits: Tensor, inplace: bool = False) -> Any:
        return kl_gpu.token_logprobs(logits, tokens, inplace=inplace)

    def topk_of(logits: Tensor, inplace: bool = False) -> Tensor:
        return kl_gpu.topk_div(logits, logprobs, ids, reduction="none", inplace=inplace)  # type: ignore[return-value]

    timed: Runs = {
        "memory": lambda: move(to),
        "memory, new buffer": lambda: move(torch.empty_like(student)),
        "token_logprobs": both_ways(lambda: logprobs_of(leaf)),
        "token_logprobs, inplace": both_ways(lambda: logprobs_of(Output.apply(weight, output), True)),
        "token_logprobs plain": both_ways(lambda: plain_logprobs(leaf, tokens)),
        "topk_div": both_ways(lambda: topk_of(leaf)),
        "topk_div, inplace": both_ways(lambda: topk_of(Output.apply(weight, output), True)),
        "topk_div plain": both_ways(lambda: plain_bucket(leaf, logprobs, ids)),
    }

    def prepare(name: str) -> None:
        timed[name]()
        output.copy_(student)

    return timed, {name: partial(prepare, name) for name in timed}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rounds.add_arguments(parser, rows=256, columns=128256, k=64, repeats=11)


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    rounds.begin(options)
    print(f"{'forward + backward':34}{'ms':>8}{'plain PyTorch, ms':>20}{'faster':>20}{'memory, ms':>13}")
    for dtype in options.dtype:
        timed, before = candidates(options, DTYPES[dtype])
        times = interleaved(timed, options.repeats, before)
        ms = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
        for entry in ("token_logprobs", "topk_div"):
            for way, memory in (("", "memory, new buffer"), (", inplace", "memory")):
                ours, plain = entry + way, entry + " plain"
                print(
                    f"{dtype + ' ' + ours:34}{ms[ours]:8.1f}{ms[plain]:20.1f}"
                    f"{ratio(times[plain], times[ours]):11.1f} × (≥{FLOOR:3.0f}){ms[memory]:13.1f}"
                )
    return 0

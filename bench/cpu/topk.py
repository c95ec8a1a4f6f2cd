"""token_logprobs and topk_div on the CPU against the plain PyTorch they replace, forward and backward.

Each is timed right after a call of its own that is not: a training loop finds the memory that its last step
gave back, not what another candidate left of it. The checking of ids is part of the time, and so is a new
gradient buffer, whose pages the system hands out one by one; with inplace=True there is none. "memory" is
what a forward and backward must move, one read, then one read and one write, by loops that do nothing else,
into memory that is there or into a new buffer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kl_gpu
from kl_gpu import _native

from . import rounds


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


def races(options: argparse.Namespace, dtype: torch.dtype) -> Iterator[rounds.Race]:
    teacher = 3 * torch.randn(options.rows, options.columns)
    student = (teacher + 0.5 * torch.randn_like(teacher)).to(dtype)
    logprobs, ids = teacher.log_softmax(-1).topk(options.k)
    tokens = torch.randint(0, options.columns, (options.rows,))
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
        _native.probe_read(x, x + half, half, options.threads)
        _native.probe_write(x, x, to.data_ptr(), size, options.threads)

    def logprobs_of(logits: Tensor, inplace: bool = False) -> Any:
        return kl_gpu.token_logprobs(logits, tokens, inplace=inplace)

    def topk_of(logits: Tensor, inplace: bool = False) -> Tensor:
        return kl_gpu.topk_div(logits, logprobs, ids, reduction="none", inplace=inplace)  # type: ignore[return-value]

    memory: rounds.Runs = {
        "memory": lambda: move(to),
        "memory, new buffer": lambda: move(torch.empty_like(student)),
    }
    logprobs_calls: rounds.Runs = {
        "ours": both_ways(lambda: logprobs_of(leaf)),
        "ours, inplace": both_ways(lambda: logprobs_of(Output.apply(weight, output), True)),
        "plain PyTorch": both_ways(lambda: plain_logprobs(leaf, tokens)),
    }
    topk_calls: rounds.Runs = {
        "ours": both_ways(lambda: topk_of(leaf)),
        "ours, inplace": both_ways(lambda: topk_of(Output.apply(weight, output), True)),
        "plain PyTorch": both_ways(lambda: plain_bucket(leaf, logprobs, ids)),
    }

    def prepare(call: Callable[[], object]) -> None:
        call()
        output.copy_(student)

    for title, calls in (("token_logprobs", logprobs_calls), ("topk_div", topk_calls)):
        timed = memory | calls
        before = {name: partial(prepare, call) for name, call in timed.items()}
        yield rounds.Race(title, timed, ("ours", "ours, inplace"), before)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rounds.add_arguments(parser, rows=256, columns=128256, k=64, repeats=11)


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    return rounds.hold(options, races)

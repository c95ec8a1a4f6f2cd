"""Who races whom on the CPU.

`table` counts bytes: value reads both tensors (2 U), value and gradient also writes one (3 U). "memory" is a
loop over the same buffers that does nothing but move them, the written one with non-temporal stores: its time
over "kernel" is the kernel's share of the memory's speed. "kl_div" is the public call, autograd and a new
gradient buffer included, as the baselines have it.

`topk` is forward and backward, each call right after one of its own that is not timed: a training loop
finds the memory that its last step gave back, not what another candidate left of it. "memory" is one read,
then one read and one write, into memory that is there or into a new buffer, whose pages come one by one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kl_gpu
from kl_gpu import _native
from kl_gpu.backends import native
from kl_gpu.backends.interface import RowPair

Call = Callable[[], object]
Calls = dict[str, Call]


@dataclass(frozen=True)
class Race:
    """Calls that take turns, what comes before some of them, and those whose time the others are shown in."""

    title: str
    calls: Calls
    references: tuple[str, ...]
    before: Mapping[str, Call] = field(default_factory=dict)


def _logits(options: argparse.Namespace, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Student and teacher."""
    teacher = (3 * torch.randn(options.rows, options.columns)).to(dtype)
    return (teacher.float() + 0.7 + 0.5 * torch.randn_like(teacher.float())).to(dtype), teacher


def _backward(leaf: Tensor, loss: Callable[[], Any]) -> Call:
    def run() -> None:
        leaf.grad = None
        loss().backward()

    return run


def _plain_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """What people write: per-token KL(teacher‖student) from log-softmax."""
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def table(options: argparse.Namespace, dtype: torch.dtype) -> Iterator[Race]:
    student, teacher = _logits(options, dtype)
    grad, row_scale = torch.zeros_like(student), torch.full((options.rows,), 1 / options.rows)
    leaf = student.clone().requires_grad_()
    problem = RowPair.of(student[None], teacher[None], None, "forward_kl", 0.0, 1.0, 1.0)
    compiled = torch.compile(_plain_kl, dynamic=False)
    weight = torch.zeros((), requires_grad=True)

    def output() -> Tensor:
        return _Output.apply(weight, grad)

    s, t, g = student.data_ptr(), teacher.data_ptr(), grad.data_ptr()
    calls: Calls = {
        "memory": lambda: _native.probe_read(s, t, student.nbytes, options.threads),
        "kernel": lambda: native.value(problem),
        "kl_div": lambda: kl_gpu.kl_div(student, teacher, reduction="none"),
        "torch.compile": torch.no_grad()(lambda: compiled(student, teacher)),
        "plain PyTorch": torch.no_grad()(lambda: _plain_kl(student, teacher)),
    }
    yield Race("value, 2 U", calls, ("kernel", "kl_div"))
    calls = {
        "memory": lambda: _native.probe_write(s, t, g, student.nbytes, options.threads),
        "kernel": lambda: native.value_and_gradient(problem, row_scale, None, grad[None]),
        "kl_div": _backward(leaf, lambda: kl_gpu.kl_div(leaf, teacher)),
        "kl_div, inplace": _backward(leaf, lambda: kl_gpu.kl_div(output(), teacher, inplace=True)),
        "torch.compile": _backward(leaf, lambda: compiled(leaf, teacher).mean()),
        "plain PyTorch": _backward(leaf, lambda: _plain_kl(leaf, teacher).mean()),
    }
    before = {"kl_div, inplace": lambda: grad.copy_(student)}
    yield Race("value + gradient, 3 U", calls, ("kernel", "kl_div"), before)


def plain_stats(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """What people write, from one log-softmax a side."""
    log_q, log_p = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    q, p = log_q.exp(), log_p.exp()
    return (
        (p * (log_p - log_q)).sum(-1),
        (q * (log_q - log_p)).sum(-1),
        -(q * log_q).sum(-1),
        -(p * log_p).sum(-1),
        log_q.gather(-1, labels[:, None])[:, 0],
        log_p.gather(-1, labels[:, None])[:, 0],
        (student.argmax(-1) == teacher.argmax(-1)).float(),
    )


def token_stats(options: argparse.Namespace, dtype: torch.dtype) -> Iterator[Race]:
    student, teacher = _logits(options, dtype)
    labels = torch.randint(0, options.columns, (options.rows,))
    calls: Calls = {
        "token_stats": lambda: kl_gpu.token_stats(student, teacher, labels),
        "kl_div": lambda: kl_gpu.kl_div(student, teacher, reduction="none"),
        "plain PyTorch": lambda: plain_stats(student, teacher, labels),
    }
    yield Race("token_stats", calls, ("token_stats", "kl_div"))


def plain_bucket(logits: Tensor, logprobs: Tensor, ids: Tensor) -> Tensor:
    """Forward KL of K + 1 outcomes as people write it."""
    log_q = F.log_softmax(logits, -1).gather(-1, ids).float()
    p, q = logprobs.exp(), log_q.exp()
    rest_p, rest_q = ((1 - x.sum(-1)).clamp_min(1e-8) for x in (p, q))
    return (p * (logprobs - log_q)).sum(-1) + rest_p * (rest_p / rest_q).log()


class _Output(torch.autograd.Function):
    """Logits as a model gives them: no leaf, in memory that may be written over."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def topk(options: argparse.Namespace, dtype: torch.dtype) -> Iterator[Race]:
    student, teacher = _logits(options, dtype)
    logprobs, ids = teacher.float().log_softmax(-1).topk(options.k)
    tokens = torch.randint(0, options.columns, (options.rows,))
    leaf, to = student.clone().requires_grad_(), torch.zeros_like(student)
    output, weight = student.clone(), torch.zeros((), requires_grad=True)
    half = student.nbytes // 2

    def move(to: Tensor) -> None:
        x = student.data_ptr()
        # The probes read two buffers: the halves of one.
        _native.probe_read(x, x + half, half, options.threads)
        _native.probe_write(x, x, to.data_ptr(), student.nbytes, options.threads)

    def prepare(call: Call) -> None:
        call()
        output.copy_(student)

    def race(title: str, ours: Callable[..., Any], plain: Callable[[Tensor], Tensor]) -> Race:
        def in_place() -> Tensor:
            return ours(_Output.apply(weight, output), inplace=True).mean()

        calls: Calls = {
            "memory": lambda: move(to),
            "memory, new buffer": lambda: move(torch.empty_like(student)),
            "ours": _backward(leaf, lambda: ours(leaf).mean()),
            "ours, inplace": _backward(leaf, in_place),
            "plain PyTorch": _backward(leaf, lambda: plain(leaf).mean()),
        }
        before = {name: partial(prepare, call) for name, call in calls.items()}
        return Race(title, calls, ("ours", "ours, inplace"), before)

    ours: Callable[..., Any] = partial(kl_gpu.token_logprobs, token_ids=tokens)
    yield race("token_logprobs", ours, lambda x: F.log_softmax(x, -1).gather(-1, tokens[:, None])[:, 0])
    ours = partial(kl_gpu.topk_div, teacher_logprobs=logprobs, teacher_ids=ids, reduction="none")
    yield race("topk_div", ours, lambda x: plain_bucket(x, logprobs, ids))


RACES: dict[str, Callable[[argparse.Namespace, torch.dtype], Iterator[Race]]] = {
    "table": table,
    "token-stats": token_stats,
    "topk": topk,
}

"""token_stats against one value of a KL, and against plain PyTorch computing the same, on the CPU.

All read both tensors of logits once at least (2 U); kl_div is the per-token forward KL under no_grad.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import kl_gpu

from . import rounds


def plain(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
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


def races(options: argparse.Namespace, dtype: torch.dtype) -> Iterator[rounds.Race]:
    student, teacher = rounds.logits(options.rows, options.columns, dtype)
    labels = torch.randint(0, options.columns, (options.rows,))
    calls: rounds.Runs = {
        "token_stats": lambda: kl_gpu.token_stats(student, teacher, labels),
        "kl_div": torch.no_grad()(lambda: kl_gpu.kl_div(student, teacher, reduction="none")),
        "plain PyTorch": torch.no_grad()(lambda: plain(student, teacher, labels)),
    }
    yield rounds.Race("token_stats", calls, ("token_stats", "kl_div"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rounds.add_arguments(parser, rows=256, columns=128256)


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    return rounds.hold(options, races)

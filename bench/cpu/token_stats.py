"""token_stats against one value of a KL, and against plain PyTorch computing the same, on the CPU.

Candidates take turns in every round; figures are medians, and ratios are medians of the ratios within a
round. All read both tensors of logits once at least (2 U); kl_div is the per-token forward KL under no_grad.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import kl_gpu

from ..harness.clock import interleaved, ratio
from ..harness.options import DTYPES
from . import rounds

FLOORS = {"kl_div": 1 / 1.7, "plain": 10.0}  # times of the others over ours, at least


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


def candidates(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    student, teacher = rounds.logits(rows, columns, dtype)
    labels = torch.randint(0, columns, (rows,))
    return {
        "kl_div": lambda: kl_gpu.kl_div(student, teacher, reduction="none"),
        "token_stats": lambda: kl_gpu.token_stats(student, teacher, labels),
        "plain": lambda: plain(student, teacher, labels),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rounds.add_arguments(parser, rows=256, columns=128256)


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    rounds.begin(options)
    for name in options.dtype:
        with torch.no_grad():
            times = interleaved(candidates(options.rows, options.columns, DTYPES[name]), options.repeats)
        ours = times["token_stats"]
        print(
            f"{name:9}token_stats {statistics.median(ours) * 1e3:6.2f} ms; "
            f"kl_div {statistics.median(times['kl_div']) * 1e3:6.2f} ms, "
            f"{ratio(ours, times['kl_div']):.2f} × its time (≤ {1 / FLOORS['kl_div']:.1f}); "
            f"plain PyTorch {statistics.median(times['plain']) * 1e3:6.1f} ms, "
            f"{ratio(times['plain'], ours):.1f} × ours (≥ {FLOORS['plain']:.0f})"
        )
    return 0

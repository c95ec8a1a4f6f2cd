"""token_stats against one value of a KL, and against plain PyTorch computing the same, on the CPU.

    python -m bench.token_stats [--rows 256] [--columns 128256] [--threads 2] [--repeats 15]

Candidates take turns, as in bench.cpu_roofline; figures are medians, and ratios are medians of the ratios
within a round. All read both tensors of logits once at least (2 U); kl_div is the per-token forward KL under
no_grad.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import kl_gpu
from kl_gpu import native

from .cpu_roofline import interleaved, ratio

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
    teacher = (3 * torch.randn(rows, columns)).to(dtype)
    student = (teacher.float() + 0.7 + 0.5 * torch.randn(rows, columns)).to(dtype)
    labels = torch.randint(0, columns, (rows,))
    return {
        "kl_div": lambda: kl_gpu.kl_div(student, teacher, reduction="none"),
        "token_stats": lambda: kl_gpu.token_stats(student, teacher, labels),
        "plain": lambda: plain(student, teacher, labels),
    }


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=128256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{native.isa()}, {args.threads} threads, {args.rows} × {args.columns}, {args.repeats} rounds")
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            times = interleaved(candidates(args.rows, args.columns, dtype), args.repeats)
        ours = times["token_stats"]
        print(
            f"{str(dtype).removeprefix('torch.'):9}"
            f"token_stats {statistics.median(ours) * 1e3:6.2f} ms; "
            f"kl_div {statistics.median(times['kl_div']) * 1e3:6.2f} ms, "
            f"{ratio(ours, times['kl_div']):.2f} × its time (≤ {1 / FLOORS['kl_div']:.1f}); "
            f"plain PyTorch {statistics.median(times['plain']) * 1e3:6.1f} ms, "
            f"{ratio(times['plain'], ours):.1f} × ours (≥ {FLOORS['plain']:.0f})"
        )


if __name__ == "__main__":
    main()

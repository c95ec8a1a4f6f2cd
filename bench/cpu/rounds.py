"""What the benchmarks of the CPU kernels share: options, logits, and plain PyTorch's KL."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from kl_gpu import native

from ..harness.options import DTYPES, add_sizes


def add_arguments(parser: argparse.ArgumentParser, *, repeats: int = 15, **sizes: int) -> None:
    """Adds the sizes of a benchmark, threads and rounds, and the dtypes it goes through."""
    add_sizes(parser, **sizes, threads=2, repeats=repeats)
    parser.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", default=["fp32", "bf16"])


def begin(options: argparse.Namespace) -> None:
    """Sets threads and seed, and says what is measured."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = {name: value for name, value in vars(options).items() if name in ("rows", "hidden", "columns", "k")}
    about = ", ".join(f"{name} {value}" for name, value in sizes.items())
    print(f"{native.isa()}, {options.threads} threads, {options.repeats} rounds: {about}")


def logits(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Student and teacher."""
    teacher = (3 * torch.randn(rows, columns)).to(dtype)
    return (teacher.float() + 0.7 + 0.5 * torch.randn(rows, columns)).to(dtype), teacher


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    """What people write: per-token KL(teacher‖student) from log-softmax."""
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

"""linear_div on the CPU against its four products alone, plain PyTorch and torch.compile: time and memory.

Forward KL, value and gradients of the student's hidden states and weight. Each is timed right after a call of
its own that is not: a training loop finds the memory that its last step gave back, not what another
candidate's gigabytes left of it. "products" are the same calls of the same library on the same chunks and
buffers, and nothing else. Memory is the peak of a fresh process's resident set over its inputs, from which the
gradients it returns are then taken off: what a library takes for scratch counts.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import kl_gpu
from kl_gpu import linear_chunks, linear_sums, native

from ..harness.linear import Loss, plain
from ..harness.memory import resident_peak_bytes
from ..harness.options import DTYPES
from . import rounds

FLAT = (1024, 2048, 4096, 8192, 16384)
_MIB = float(1 << 20)


class Heads(NamedTuple):
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor


LOSSES: dict[str, Loss] = {
    "linear_div": kl_gpu.linear_div,
    "linear_div, softcap 30": partial(kl_gpu.linear_div, softcap=30.0, teacher_softcap=30.0),
    "plain PyTorch": plain,
    "torch.compile": torch.compile(plain, dynamic=False),
}


def problem(options: argparse.Namespace, dtype: torch.dtype) -> Heads:
    n, h, v = options.rows, options.hidden, options.columns
    shapes = (n, h), (v, h), (n, h), (v, h)
    hidden, weight, *teacher = (torch.randn(shape).to(dtype) for shape in shapes)
    # Logits of standard deviation 3.
    return Heads(hidden, weight.mul_(3 * h**-0.5), teacher[0], teacher[1].mul_(3 * h**-0.5))


def both_ways(loss: Loss, heads: Heads) -> tuple[Tensor, ...]:
    leaves = heads.hidden.requires_grad_(), heads.weight.requires_grad_()
    return torch.autograd.grad(loss(*heads), leaves)


def products(heads: Heads) -> Callable[[], object]:
    """The four products of every chunk, as `linear_ops` calls them, into memory that exists already."""
    hidden, weight, teacher_hidden, teacher_weight = (x.detach() for x in heads)
    n, v = len(hidden), len(weight)
    call = linear_chunks.Call(
        hidden.dtype, hidden.dtype, 1.0, 1.0, 0.0, 0.0, v, 0, "forward_kl", 0.0, 1.0, 1.0, "native"
    )
    rows = linear_chunks.chosen_rows(n, call, hidden.device)
    empty = (torch.empty(rows, v, dtype=hidden.dtype) for _ in range(2))
    student, teacher, to_weight = (
        native.on_large_pages(x).zero_() for x in (*empty, torch.empty_like(weight))
    )
    to_hidden = torch.zeros_like(hidden)

    def run() -> None:
        for start in range(0, n, rows):
            part = slice(start, min(start + rows, n))
            s, t = (x[: part.stop - start] for x in (student, teacher))
            torch.mm(hidden[part], weight.t(), out=s)
            torch.mm(teacher_hidden[part], teacher_weight.t(), out=t)
            torch.mm(s, weight, out=to_hidden[part])
            if hidden.dtype == torch.float32:
                torch.addmm(to_weight, s.t(), hidden[part], beta=float(start > 0), out=to_weight)
            else:
                for block in linear_sums.product_blocks(v, weight.shape[1], "cpu"):
                    torch.mm(s.t()[block], hidden[part], out=to_weight[block])

    return run


def peak(options: argparse.Namespace, name: str, dtype: str, rows: int) -> int:
    """Bytes beyond the inputs, the gradients included, of one call in a process of its own."""
    sizes = ["--rows", rows, "--hidden", options.hidden, "--columns", options.columns, "--threads", options.threads]
    command = [sys.executable, "-m", "bench", "cpu", "linear", "--peak-of", name, "--dtype", dtype]
    command += map(str, sizes)
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def print_peak(options: argparse.Namespace) -> None:
    loss = LOSSES[options.peak_of]
    heads = problem(options, DTYPES[options.dtype[0]])
    # Libraries load and threads start; what is compiled is compiled for this very size.
    few = heads if options.peak_of == "torch.compile" else Heads(*(x[:64] for x in heads))
    both_ways(loss, Heads(*(x.detach() for x in few)))
    gc.collect()
    print(resident_peak_bytes(lambda: both_ways(loss, heads)))


def gradient_bytes(options: argparse.Namespace, dtype: str, rows: int) -> int:
    return (rows + options.columns) * options.hidden * DTYPES[dtype].itemsize


def races(options: argparse.Namespace, dtype: torch.dtype) -> Iterator[rounds.Race]:
    heads = problem(options, dtype)
    calls = {"products": products(heads)}
    calls |= {name: partial(both_ways, loss, heads) for name, loss in LOSSES.items()}
    yield rounds.Race("forward KL", calls, ("products", "linear_div"), before=calls)


def memory(options: argparse.Namespace, sizes: Sequence[int], losses: Iterable[str]) -> None:
    for dtype in options.dtype:
        for name in losses:
            beyond = (peak(options, name, dtype, n) - gradient_bytes(options, dtype, n) for n in sizes)
            found = ", ".join(f"N = {n}: {size / _MIB:.0f}" for n, size in zip(sizes, beyond, strict=True))
            print(f"{dtype} {name}, MiB beyond inputs and gradients: {found}", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rounds.add_arguments(parser, rows=2048, hidden=512, columns=128256, repeats=3)
    parser.add_argument("--flat", action="store_true", help="ours from 1024 to 16384 rows")
    parser.add_argument("--peak-of", choices=LOSSES, help=argparse.SUPPRESS)


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if options.peak_of:
        rounds.begin(options)
        print_peak(options)
    elif options.flat:
        memory(options, FLAT, ["linear_div"])
    else:
        rounds.hold(options, races)
        memory(options, [options.rows], LOSSES)
    return 0

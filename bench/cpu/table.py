"""The CPU kernels against the machine's own memory, torch.compile and plain PyTorch: README's CPU table.

Counted bytes: value reads both tensors (2 U); value and gradient also writes one (3 U). "memory" is a loop
over the same buffers that does nothing but read them, or read them and write the third with non-temporal
stores: its time × "kernel" is the kernel's share of the memory's speed. "kl_div" is the public call, autograd
and a new gradient buffer included, as the baselines have it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import kl_gpu
from kl_gpu import _native
from kl_gpu.backends import native
from kl_gpu.backends.interface import RowPair

from . import rounds


def per_row(student: Tensor, teacher: Tensor) -> Tensor:
    return kl_gpu.kl_div(student, teacher, reduction="none")


def races(options: argparse.Namespace, dtype: torch.dtype) -> Iterator[rounds.Race]:
    n, v, threads = options.rows, options.columns, options.threads
    student, teacher = rounds.logits(n, v, dtype)
    grad, row_scale = torch.zeros_like(student), torch.full((n,), 1 / n)
    leaf = student.clone().requires_grad_()
    problem = RowPair.of(student[None], teacher[None], None, "forward_kl", 0.0, 1.0, 1.0)
    compiled = torch.compile(rounds.plain, dynamic=False)
    s, t, g = student.data_ptr(), teacher.data_ptr(), grad.data_ptr()

    def value(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return torch.no_grad()(lambda: f(student, teacher))

    def backward(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def run() -> None:
            leaf.grad = None
            f(leaf, teacher).mean().backward()

        return run

    calls: rounds.Runs = {
        "memory": lambda: _native.probe_read(s, t, student.nbytes, threads),
        "kernel": lambda: native.value(problem),
        "kl_div": value(per_row),
        "torch.compile": value(compiled),
        "plain PyTorch": value(rounds.plain),
    }
    yield rounds.Race("value, 2 U", calls, ("kernel", "kl_div"))
    calls = {
        "memory": lambda: _native.probe_write(s, t, g, student.nbytes, threads),
        "kernel": lambda: native.value_and_gradient(problem, row_scale, None, grad[None]),
        "kl_div": backward(kl_gpu.kl_div),
        "torch.compile": backward(compiled),
        "plain PyTorch": backward(rounds.plain),
    }
    yield rounds.Race("value + gradient, 3 U", calls, ("kernel", "kl_div"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rounds.add_arguments(parser, rows=256, columns=128256)


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    return rounds.hold(options, races)

"""What each rank of a `distributed_world.World` does with `vocab_parallel_linear_div`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import kl_gpu
import linear_heads
from distributed_cases import Wire, bits, refused, span
from kl_gpu.distributed import vocab_parallel_linear_div
from linear_heads import Heads, heads
from support import DEVICE


def shared(given: Heads, rank: int, ranks: int, sequence_dim: int | None = None) -> Heads:
    """This rank's rows of the heads, and its share of the hidden states."""
    mine = span(rank, ranks, len(given.student_weight))

    def own(hidden: Tensor) -> Tensor:
        return hidden if sequence_dim is None else hidden.chunk(ranks, sequence_dim)[rank]

    biases = (None if x is None else x[mine].clone() for x in (given.student_bias, given.teacher_bias))
    return Heads(
        own(given.student_hidden).clone(), given.student_weight[mine].clone(),
        own(given.teacher_hidden), given.teacher_weight[mine], *biases,
    ).require_grad()  # fmt: skip


def div(shard: Heads, kind: str, **options: Any) -> Tensor:
    return vocab_parallel_linear_div(
        *shard[:4], kind, student_bias=shard.student_bias, teacher_bias=shard.teacher_bias, **options
    )


def together(
    rank: int, ranks: int, given: Heads, grads: list[Tensor], sequence_dim: int | None = None
) -> list[Tensor]:
    """The whole gradients from the ranks' parts."""
    mine, parts = span(rank, ranks, len(given.student_weight)), []
    for number, (whole, grad) in enumerate(zip(given.leaves, grads, strict=True)):
        full = torch.zeros_like(whole, requires_grad=False)
        if number > 0:
            full[mine] = grad
        elif sequence_dim is None:
            full.copy_(grad / ranks)
        else:
            full.chunk(ranks, sequence_dim)[rank].copy_(grad)
        dist.all_reduce(full)
        parts.append(full)
    return parts


def dense(
    rank: int, ranks: int, kind: str, backend: str, dtype: str = "float32", reduction: str = "mean",
    sequence_dim: int | None = None, masked: bool = False, **options: Any,
) -> bytes:  # fmt: skip
    """Value and gradients within the bounds of the float64 reference through explicit, whole logits."""
    lead = (2, 8)
    given = heads(lead, bias=True, dtype=getattr(torch, dtype))
    counts = torch.rand(lead, device=DEVICE) > 0.3 if masked else torch.ones(lead, dtype=torch.bool)
    shard = shared(given, rank, ranks, sequence_dim)
    value = div(
        shard, kind, backend=backend, reduction=reduction, sequence_dim=sequence_dim,
        mask=counts.to(DEVICE) if masked else None, **options,
    )  # fmt: skip
    grads = together(rank, ranks, given, list(torch.autograd.grad(value.sum(), shard.leaves)), sequence_dim)
    n = {"none": 1.0, "sum": 1.0, "mean": float(counts.sum())}[reduction]
    factor = counts.cpu().numpy() / n
    options.pop("chunk_rows", None)
    want = linear_heads.expected(given, kind, factor, **options)
    linear_heads.check(given, want, value, grads, f"{ranks} ranks, {kind}, {dtype}, {reduction}")
    return bits(value)


def repeats(rank: int, ranks: int, dtype: str) -> bytes:
    """The same bits again and again, a second backward, and what one process makes of the whole heads."""
    given = heads((40,), columns=(900, 900), widths=(32, 16), dtype=getattr(torch, dtype))
    shard = shared(given, rank, ranks)
    seen = set()
    for _ in range(5):
        value = div(shard, "forward_kl", chunk_rows=16)
        grads = torch.autograd.grad(value, shard.leaves, retain_graph=True)
        again = torch.autograd.grad(value, shard.leaves)
        for first, second in zip(grads, again, strict=True):
            torch.testing.assert_close(first, second)
        seen.add(bits(value, *grads))
    assert len(seen) == 1
    alone = kl_gpu.linear_div(*given.require_grad()[:4], chunk_rows=16)
    np.testing.assert_allclose(value.item(), alone.item(), rtol=1e-5)
    for whole, one in zip(
        together(rank, ranks, given, list(grads)), torch.autograd.grad(alone, given.leaves), strict=True
    ):
        # Rounded once more on the way: each rank's share of a gradient in 16 bits.
        close = 1e-5 if dtype == "float32" else 2 * torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(whole, one, rtol=close, atol=close * float(one.abs().max()))
    return bits(value)


def traffic(rank: int, ranks: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    shard = shared(heads((64,)), rank, ranks)
    div(shard, "forward_kl")  # the first call also asks whether the ranks agree
    with Wire() as forward:
        value = div(shard, "forward_kl", chunk_rows=32)
    with Wire() as backward:
        value.backward()
    return forward.calls, backward.calls


def disagreements(rank: int, ranks: int) -> None:
    one = rank == 1
    shard = shared(heads((4,)), rank, ranks)

    def call(shard: Heads = shard, **options: Any) -> None:
        div(shard, "forward_kl", check="always", **options)

    refused(lambda: call(softcap=5.0 if one else 6.0), ValueError, "^softcap")
    refused(lambda: call(chunk_rows=2 if one else 3), ValueError, "^chunk_rows")
    refused(lambda: call(sequence_dim=0 if one else None), ValueError, "^sequence_dim")
    short = shard._replace(student_hidden=shard.student_hidden[:3], teacher_hidden=shard.teacher_hidden[:3])
    refused(lambda: call(short if one else shard), ValueError, "^N, ")
    frozen = shard._replace(student_weight=shard.student_weight.detach())
    refused(lambda: call(frozen if one else shard), ValueError, "what requires a gradient")
    # Wrong alike on every rank: the usual refusal, and no hang.
    refused(lambda: call(sequence_dim=1), ValueError, "sequence_dim must be within")
    refused(lambda: call(colour="red"), TypeError, "colour")
    refused(lambda: call(shard._replace(teacher_weight=shard.student_weight)), ValueError, "teacher_weight")

"""What each rank of a `distributed_world.World` does with entries from hidden states."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from linear_rows import Head, head, teacher, tokens
from torch import Tensor

import kl_gpu
import linear_heads
from distributed_cases import Wire, bits, refused, span
from kl_gpu import distributed
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
    rank: int, ranks: int, given: Heads | Head, grads: list[Tensor], sequence_dim: int | None = None
) -> list[Tensor]:
    """The whole gradients from the ranks' parts."""
    mine, parts = span(rank, ranks, len(given[1])), []
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


def part(given: Head, rank: int, ranks: int, sequence_dim: int | None = None) -> Head:
    """This rank's rows of the head, and its share of the hidden states."""
    mine = span(rank, ranks, len(given.weight))
    own = given.hidden if sequence_dim is None else given.hidden.chunk(ranks, sequence_dim)[rank]
    bias = None if given.bias is None else given.bias[mine].clone()
    return Head(own.clone(), given.weight[mine].clone(), bias).require_grad()


def logprobs(shard: Head, ids: Tensor, **options: Any) -> Any:
    return distributed.vocab_parallel_linear_token_logprobs(
        shard.hidden, shard.weight, ids, bias=shard.bias, **options
    )


def topk(shard: Head, known: tuple[Tensor, ...], kind: str, **options: Any) -> Any:
    return distributed.vocab_parallel_linear_topk_div(
        shard.hidden, shard.weight, *known, kind, student_bias=shard.bias, **options
    )


def _same(
    rank: int, ranks: int, given: Head, shard: Head, got: tuple[Tensor, ...], want: tuple[Tensor, ...],
    sequence_dim: int | None,
) -> bytes:  # fmt: skip
    """Values and gradients are those of the whole head; each row has a factor of its own."""
    wide = given.hidden.dtype == torch.float64
    totals = []
    for found in (got, want):
        differentiable = [x for x in found if x.requires_grad]
        factors = [torch.linspace(0.5, 1.5, x.numel(), device=DEVICE).view(x.shape) for x in differentiable]
        totals.append(sum((f * x).sum() for f, x in zip(factors, differentiable, strict=True)))
    for x, exact in zip(got, want, strict=True):
        assert x.dtype == exact.dtype
        torch.testing.assert_close(x, exact, rtol=1e-11 if wide else 5e-6, atol=1e-12 if wide else 2e-7)
    grads = together(rank, ranks, given, list(torch.autograd.grad(totals[0], shard.leaves)), sequence_dim)
    for grad, exact in zip(grads, torch.autograd.grad(totals[1], given.leaves), strict=True):
        close = 1e-11 if wide else 1e-5
        torch.testing.assert_close(grad, exact, rtol=close, atol=close * float(exact.abs().max()))
        assert exact.abs().max() > 1e-3
    return bits(*(x.reshape(-1) for x in got))


def token_logprobs(
    rank: int, ranks: int, backend: str, dtype: str = "float32", sequence_dim: int | None = None,
    entropy: bool = True, masked: bool = False, bias: bool = True, **options: Any,
) -> bytes:  # fmt: skip
    given = head((2, 8), bias=bias, dtype=getattr(torch, dtype))
    ids = tokens(given, options.get("vocab_size"))
    ids[0, 3] = -100
    if masked:
        options["mask"] = torch.rand(2, 8, device=DEVICE) > 0.3
    shard = part(given, rank, ranks, sequence_dim)
    options |= {"entropy": entropy, "backend": backend}
    got = logprobs(shard, ids, sequence_dim=sequence_dim, **options)
    want = given.require_grad().logprobs(ids, **options)
    got, want = (x if entropy else (x,) for x in (got, want))
    return _same(rank, ranks, given, shard, got, want, sequence_dim)


def topk_div(
    rank: int, ranks: int, backend: str, tail: str, kind: str, dtype: str = "float32",
    sequence_dim: int | None = None, masked: bool = False, rest: bool = False, **options: Any,
) -> bytes:  # fmt: skip
    given = head((2, 8), bias=True, dtype=getattr(torch, dtype))
    log_p, ids, log_rest = teacher((2, 8), options.get("vocab_size", 60), 5)
    ids[0, 0, 3:], ids[1, 4, 3:], log_p[1, 4, 3:] = -1, 0, -torch.inf
    if masked:
        options["mask"] = torch.rand(2, 8, device=DEVICE) > 0.3
    if rest:
        options["teacher_tail_logprob"] = log_rest
    shard = part(given, rank, ranks, sequence_dim)
    options |= {"tail": tail, "return_mass": True, "backend": backend}
    known = log_p.to(given.hidden.dtype), ids
    got = topk(shard, known, kind, sequence_dim=sequence_dim, **options)
    want = given.require_grad().topk(*known, kind, **options)
    return _same(rank, ranks, given, shard, got, want, sequence_dim)


def hard_labels(rank: int, ranks: int, backend: str, **options: Any) -> bytes:
    """The labels' cross-entropy beside the divergence: that of one process, in values and in gradients."""
    given = heads((2, 8), bias=True).require_grad()
    shard = shared(given, rank, ranks)
    columns = options.get("vocab_size", 60)
    labels = torch.randint(0, columns, (2, 8), device=DEVICE)
    # Of the first rank's columns and of the last one's.
    labels[0, :3] = torch.tensor([0, columns - 1, -100])
    options |= {"labels": labels, "temperature": 1.7, "chunk_rows": 3, "backend": backend}
    got = div(shard, "js", hard_weight=0.3, **options)
    biases = {"student_bias": given.student_bias, "teacher_bias": given.teacher_bias}
    want = kl_gpu.linear_div(*given[:4], "js", hard_weight=0.3, **biases, **options)
    soft = div(shard, "js", **options).sum()
    assert got.sum() > soft + 0.1
    torch.testing.assert_close(got, want)
    whole = torch.autograd.grad(want.sum(), given.leaves)
    parts = together(rank, ranks, given, list(torch.autograd.grad(got.sum(), shard.leaves)))
    for part_of, exact in zip(parts, whole, strict=True):
        torch.testing.assert_close(part_of, exact, rtol=2e-5, atol=1e-6)
    refused(
        lambda: div(shard, "js", hard_weight=0.3, **(options | {"labels": labels + columns})),
        ValueError, f"labels must be within.*{columns}",
    )  # fmt: skip
    return bits(got)


def token_stats(
    rank: int, ranks: int, backend: str, dtype: str = "float32", sequence_dim: int | None = None,
    labelled: bool = True, masked: bool = False, **options: Any,
) -> bytes:  # fmt: skip
    given = heads((2, 8), bias=True, dtype=getattr(torch, dtype))
    shard = shared(given, rank, ranks, sequence_dim)
    labels = torch.randint(0, options.get("vocab_size", 60), (2, 8), device=DEVICE) if labelled else None
    if masked:
        options["mask"] = torch.rand(2, 8, device=DEVICE) > 0.3
    found = []
    for entry, one, at in (
        (distributed.vocab_parallel_linear_token_stats, shard, {"sequence_dim": sequence_dim}),
        (kl_gpu.linear_token_stats, given, {}),
    ):
        biases = {"student_bias": one.student_bias, "teacher_bias": one.teacher_bias}
        found.append(entry(*one[:4], labels, backend=backend, **biases, **at, **options))
    got, want = found
    wide = dtype == "float64"
    for name, x, exact in zip(kl_gpu.TokenStats._fields, got, want, strict=True):
        assert x.dtype == exact.dtype
        assert not x.requires_grad
        first_order = 0 if name.endswith("_kl") else 5e-6
        torch.testing.assert_close(
            x, exact, rtol=1e-11 if wide else 1e-5, atol=1e-11 if wide else first_order, equal_nan=True
        )
    assert (want.forward_kl > 1e-3).any()
    return bits(*got)


def row_traffic(rank: int, ranks: int, entry: str, k: int = 5) -> Any:
    """What travels for 64 rows of 6 hidden states, where nothing is left to ask."""
    both, (log_p, ids, _) = heads((64,)), teacher((64,), 60, k)
    shard, one = shared(both, rank, ranks), part(head((64,)), rank, ranks)
    labels = ids[:, 0].contiguous()
    at = {"vocab_start": span(rank, ranks, 60).start, "vocab_size": 60, "chunk_rows": 32}
    calls = {
        "token_logprobs": lambda: logprobs(one, labels, **at).sum(),
        "entropy": lambda: sum(x.sum() for x in logprobs(one, labels, entropy=True, **at)),
        "topk_div": lambda: topk(one, (log_p, ids), "forward_kl", **at),
        "token_stats": lambda: distributed.vocab_parallel_linear_token_stats(*shard[:4], labels, **at),
    }
    calls[entry]()  # the first call also asks whether the ranks agree
    with Wire() as forward:
        value = calls[entry]()
    with Wire() as backward:
        if entry != "token_stats":
            value.backward()
    return forward.calls, backward.calls


def frozen_hidden(rank: int, ranks: int) -> Any:
    """A head whose hidden states ask for no gradient: nothing travels in backward."""
    given = head((8,))
    ids, shard = tokens(given), part(given, rank, ranks)
    shard.hidden.requires_grad_(False)
    value = logprobs(shard, ids).sum()
    with Wire() as backward:
        value.backward()
    return backward.calls


def row_disagreements(rank: int, ranks: int) -> None:
    one = rank == 1
    given = head((4,))
    shard, ids, (log_p, top, _) = part(given, rank, ranks), tokens(given), teacher((4,), 60, 3)
    both = shared(heads((4,)), rank, ranks)

    def of_tokens(given: Head = shard, ids: Tensor = ids, **options: Any) -> None:
        logprobs(given, ids, check="always", **options)

    def of_topk(top: Tensor = top, kind: str = "forward_kl", **options: Any) -> None:
        topk(shard, (log_p, top), kind, check="always", **options)

    def of_stats(**options: Any) -> None:
        distributed.vocab_parallel_linear_token_stats(*both[:4], check="always", **options)

    for call in (of_tokens, of_topk, of_stats):
        for message, options in (
            ("^softcap", {"softcap": 5.0 if one else 6.0}),
            ("^logit_scale", {"logit_scale": 2.0 if one else 1.0}),
            ("^chunk_rows", {"chunk_rows": 2 if one else 3}),
            ("^sequence_dim", {"sequence_dim": 0 if one else None}),
            ("^vocab_size", {"vocab_size": 50 if one else 60}),
            # Wrong alike on every rank: the usual refusal, and no hang.
            ("sequence_dim must be within", {"sequence_dim": 1}),
            ("vocab_size must be within", {"vocab_size": 61}),
            ("backend", {"backend": "cuda"}),
        ):
            refused(partial(call, **options), ValueError, message)
        for name in ("colour", "inplace"):
            refused(partial(call, **{name: True}), TypeError, name)
    refused(lambda: of_tokens(ids=ids + one), ValueError, "^token_ids")
    refused(lambda: of_tokens(entropy=one), ValueError, "^entropy")
    frozen = shard._replace(weight=shard.weight.detach())
    refused(lambda: of_tokens(frozen if one else shard), ValueError, "what requires a gradient")
    refused(lambda: of_topk(kind="js" if one else "forward_kl"), ValueError, "^kind")
    refused(lambda: of_topk(tail="generalized" if one else "bucket"), ValueError, "^tail")
    refused(lambda: of_topk(top=top.flip(-1) if one else top), ValueError, "^teacher_ids")
    refused(lambda: of_stats(labels=ids + one), ValueError, "^labels")
    refused(lambda: of_stats(teacher_logit_scale=2.0 if one else 1.0), ValueError, "^teacher_logit_scale")
    if DEVICE.type == "cpu":
        refused(lambda: of_tokens(ids=ids - ids + 60), ValueError, r"token_ids.*\[0, 60\)")
        refused(lambda: of_topk(top=top - top + 60), ValueError, "teacher_ids")
        refused(lambda: of_stats(labels=ids - ids + 60), ValueError, "labels")

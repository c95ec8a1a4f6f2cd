"""What each rank of a `distributed_world.World` does. Arguments are the same on every rank, inputs too."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_stats import check as check_stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kl_gpu
from kl_gpu import distributed, reference
from kl_gpu.distributed import vocab_parallel_div
from kl_gpu.reference import topk as reference_topk
from realistic import CASES, MODEL_VOCAB, trained
from realistic import realistic as realistic_rows
from support import DEVICE, check_gradients, check_value, expected, normalisers, pair, to_numpy

DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
INF = math.inf


def span(rank: int, ranks: int, columns: int) -> slice:
    """Shards of unequal width: one column, then none, then a few, then the rest."""
    inner = {1: [], 2: [columns // 3], 4: [1, 1, 1 + columns // 3]}[ranks]
    cuts = [0, *inner, columns]
    return slice(cuts[rank], cuts[rank + 1])


def together(shard: Tensor, mine: slice, columns: int) -> Tensor:
    """A gradient of the whole vocabulary from the ranks' parts of it."""
    full = torch.zeros((*shard.shape[:-1], columns), dtype=shard.dtype, device=shard.device)
    full[..., mine] = shard
    dist.all_reduce(full)
    return full


def leaves(rank: int, ranks: int, *sides: Tensor) -> list[Tensor]:
    return [x[..., span(rank, ranks, x.shape[-1])].clone().requires_grad_() for x in sides]


def bits(*tensors: Tensor) -> bytes:
    return b"".join(
        x.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for x in tensors
    )


def dense(
    rank: int, ranks: int, kind: str, backend: str, dtype: str, spread: float, columns: int, **options: float
) -> bytes:
    """Value and both gradients within the promised bounds of the float64 reference on the whole rows."""
    student, teacher = pair(5, columns, spread=spread, dtype=DTYPE[dtype])
    shards = leaves(rank, ranks, student, teacher)
    value = vocab_parallel_div(*shards, kind, reduction="none", backend=backend, **options)
    value.sum().backward()
    mine = span(rank, ranks, columns)
    grads = tuple(together(shard.grad, mine, columns) for shard in shards)
    where = f"{ranks} ranks, {dtype}, spread {spread}"
    check_value(value, student, teacher, kind, backend, where, **options)
    check_gradients(student, teacher, grads, kind, backend, where, **options)
    # A value below the promise's range tells nothing: the case must be within it.
    if dtype != "bfloat16":
        assert expected(student, teacher, kind, **options).max() > 1e-12
    return bits(value)


def realistic(rank: int, ranks: int, kind: str, backend: str, folder: str, rows: int) -> bytes:
    """The promises on rows like a trained model's, whose tops may lie on any rank."""
    model = trained(Path(folder))
    results = []
    for case in CASES:
        student, teacher = realistic_rows(case, rows, MODEL_VOCAB, model)
        shards = leaves(rank, ranks, student, teacher)
        value = vocab_parallel_div(*shards, kind, reduction="none", backend=backend)
        value.sum().backward()
        mine = span(rank, ranks, MODEL_VOCAB)
        grads = tuple(together(shard.grad, mine, MODEL_VOCAB) for shard in shards)
        check_value(value, student, teacher, kind, backend, f"{ranks} ranks, {case}")
        want = expected(student, teacher, kind)
        np.testing.assert_array_equal(np.isinf(to_numpy(value)), np.isinf(want))
        finite = np.isfinite(want)
        if finite.any():
            sides = student[finite], teacher[finite], tuple(grad[finite] for grad in grads)
            check_gradients(*sides, kind, backend, f"{ranks} ranks, {case}")
        results.append(value)
    return bits(*results)


def realistic_tokens(rank: int, ranks: int, backend: str, folder: str, rows: int) -> bytes:
    """`token_stats`, `token_logprobs` and `topk_div` on them; the last against the dense call."""
    model = trained(Path(folder))
    mine = span(rank, ranks, MODEL_VOCAB)
    results = []
    for case in CASES:
        student, teacher = realistic_rows(case, rows, MODEL_VOCAB, model)
        labels = teacher.argmax(-1)
        labels[1::2] = MODEL_VOCAB - 1 - labels[1::2]
        where = f"{ranks} ranks, {case}"
        shards = student[:, mine], teacher[:, mine]
        found = distributed.vocab_parallel_token_stats(*shards, labels, backend=backend)
        check_stats(found, student, teacher, labels, backend, where)
        log_q, entropy = distributed.vocab_parallel_token_logprobs(
            shards[0], labels, entropy=True, backend=backend
        )
        exact = reference_topk.token_logprobs(to_numpy(student), to_numpy(labels).astype(int))
        np.testing.assert_allclose(to_numpy(log_q), exact, rtol=5e-6, atol=1e-30, err_msg=where)
        exact = reference_topk.entropy(to_numpy(student))
        assert (np.abs(to_numpy(entropy) - exact) <= 5e-6 * np.maximum(1, exact)).all(), where
        log_p, ids = teacher.log_softmax(-1).topk(16)
        got, want = (
            call(logits, log_p, ids, reduction="none", backend=backend)
            for call, logits in ((distributed.vocab_parallel_topk_div, shards[0]), (kl_gpu.topk_div, student))
        )
        # What 2e-7 of the rest's mass does to the value, on either side.
        rest = student.scatter(-1, ids, -INF).logsumexp(-1) - student.logsumexp(-1)
        slack = 4e-7 * to_numpy(rest.exp()) + 1e-12
        close = np.abs(to_numpy(got) - to_numpy(want)) <= 1e-5 * to_numpy(want) + slack
        assert (close | (np.isinf(to_numpy(got)) & np.isinf(to_numpy(want)))).all(), where
        results += [*found, log_q, entropy, got]
    return bits(*results)


def edges(rank: int, ranks: int, kind: str, backend: str) -> bytes:
    """Rows whose shards hold nothing, on one side or on both, NaN, and numbers out of all range."""
    columns = 90
    student, teacher = pair(14, columns)
    third = columns // 3 + 1
    student[0, :third] = teacher[0, :third] = -INF
    teacher[1, :third] = -INF
    student[2, :third] = -INF
    teacher[3, :third], student[3, third:] = -INF, -INF
    teacher[4] = -INF
    student[5] = -INF
    student[6, 0] = math.nan
    teacher[7, columns - 1] = INF
    student[8] = teacher[8]
    student[9, :third] = teacher[9, :third] = torch.finfo(torch.float32).min
    student[10] = teacher[10] + 100
    student[11, :third] -= 200
    teacher[12, :third] -= 2000
    student[13] += 3e6
    teacher[13] += 3e6
    shards = leaves(rank, ranks, student, teacher)
    value = vocab_parallel_div(*shards, kind, reduction="none", backend=backend)
    value.sum().backward()
    mine = span(rank, ranks, columns)
    grads = [to_numpy(together(shard.grad, mine, columns)) for shard in shards]
    want = expected(student, teacher, kind)
    np.testing.assert_allclose(to_numpy(value), want, rtol=5e-6, atol=1e-12)
    assert value[8].item() == 0
    assert not grads[0][8].any()
    assert not grads[1][8].any()
    exact = reference.gradients(to_numpy(student), to_numpy(teacher), kind)
    log_q, log_p = normalisers(student, teacher)
    with np.errstate(invalid="ignore"):
        r = np.nan_to_num(np.abs(log_p - log_q), nan=0.0, posinf=0.0)
    r = np.maximum(1, np.maximum(r, np.nan_to_num(want, posinf=0.0)[:, None]))
    for grad, right in zip(grads, exact, strict=True):
        assert (np.isnan(grad) == np.isnan(right)).all(), f"rows {np.isnan(grad).any(-1).nonzero()}"
        wrong = np.nan_to_num(np.abs(grad - right) / (2e-6 * r * np.exp(np.fmax(log_p, log_q)) + 1e-30))
        assert wrong[:13].max() < 1.01, f"row {wrong.max(-1).argmax()}: {wrong.max()} of the bound"
        np.testing.assert_allclose(grad[13], right[13], atol=1e-5)
    return bits(value)


def row_temperatures(rank: int, ranks: int, backend: str) -> bytes:
    """Temperatures of each row's own: within the dense call's bounds, whichever backend merges the shards."""
    columns = 70
    student, teacher = pair(4, columns)
    mine = span(rank, ranks, columns)
    one, other = (torch.tensor(x, device=DEVICE) for x in ((0.7, 1.0, 2.0, 1.3), (1.1, 0.8, 1.0, 2.5)))
    results = []
    for kind, options in (
        ("forward_kl", {"temperature": one}),
        ("js", {"temperature": one, "teacher_temperature": other}),
        ("jeffreys", {"teacher_temperature": other}),
    ):
        shards = leaves(rank, ranks, student, teacher)
        value = vocab_parallel_div(*shards, kind, reduction="none", backend=backend, **options)
        value.sum().backward()
        grads = tuple(together(shard.grad, mine, columns) for shard in shards)
        numbers: Any = {name: to_numpy(x)[:, None] for name, x in options.items()}
        check_value(value, student, teacher, kind, backend, "row temperatures", **numbers)
        check_gradients(student, teacher, grads, kind, backend, "row temperatures", **numbers)
        results.append(value)
    both = {"temperature": one, "teacher_temperature": other, "backend": backend}
    labels = torch.tensor([0, 69, 20, 30], device=DEVICE)
    shards = [x.detach() for x in leaves(rank, ranks, student, teacher)]
    stats = distributed.vocab_parallel_token_stats(*shards, labels, **both)
    torch.testing.assert_close(tuple(stats), tuple(kl_gpu.token_stats(student, teacher, labels, **both)))
    for options in (both, {"backend": backend}):
        _, entropy = vocab_parallel_div(*shards, return_entropy=True, **options)
        torch.testing.assert_close(
            entropy, stats[2] if options is both else kl_gpu.token_stats(student, teacher)[2]
        )
        results.append(entropy)
    hard = {"labels": labels, "hard_weight": 0.3, "backend": backend}
    (shard, whole_rows), other = (x.clone().requires_grad_() for x in (shards[0], student)), teacher
    got, want = vocab_parallel_div(shard, shards[1], **hard), kl_gpu.divergence(whole_rows, other, **hard)
    torch.testing.assert_close(got, want)
    got.backward()
    want.backward()
    torch.testing.assert_close(together(shard.grad, mine, columns), whole_rows.grad)
    assert got > vocab_parallel_div(*shards, labels=labels, backend=backend) + 0.1
    own = {"temperature": one, "entropy": True, "backend": backend}
    logprobs = distributed.vocab_parallel_token_logprobs(shards[0], labels, **own)
    torch.testing.assert_close(logprobs, kl_gpu.token_logprobs(student, labels, **own))
    hidden, weights = (
        student[:, :8].contiguous(),
        (student[:, :columns].t() @ student)[:, :8].contiguous() / 50,
    )
    heads = hidden, weights[mine], hidden.flip(0).contiguous(), weights[mine]
    whole = hidden, weights, hidden.flip(0).contiguous(), weights
    got, entropy = distributed.vocab_parallel_linear_div(
        *heads, "js", chunk_rows=3, return_entropy=True, **both
    )
    want = kl_gpu.linear_div(*whole, "js", return_entropy=True, **both)
    torch.testing.assert_close((got, entropy), want, rtol=1e-4, atol=1e-7)
    assert got > 1e-3
    return bits(*results, *stats, *logprobs, got, entropy)


def reductions(rank: int, ranks: int, kind: str, backend: str) -> bytes:
    student, teacher = pair(3, 5, 70)
    mask, weight = torch.rand(3, 5, device=DEVICE) > 0.4, torch.rand(3, 5, device=DEVICE) - 0.2
    labels = torch.where(torch.rand(3, 5, device=DEVICE) > 0.2, 3, -100)
    counts = to_numpy(mask & (labels != -100))
    rows = expected(student, teacher, kind) * counts * to_numpy(weight)
    n = {"none": 1, "sum": 1, "mean": counts.sum(), "batchmean": 3}
    exact = reference.gradients(to_numpy(student), to_numpy(teacher), kind)[0]
    results = []
    for reduction, denominator in n.items():
        (shard, other) = leaves(rank, ranks, student, teacher)
        got = vocab_parallel_div(
            shard, other.detach(), kind, mask=mask, labels=labels, weight=weight, reduction=reduction,
            backend=backend,
        )  # fmt: skip
        want = rows if reduction == "none" else rows.sum() / denominator
        np.testing.assert_allclose(to_numpy(got), want, rtol=1e-5, atol=1e-7)
        got.sum().backward()
        scale = (counts * to_numpy(weight) / denominator)[..., None]
        grad = to_numpy(together(shard.grad, span(rank, ranks, 70), 70))
        np.testing.assert_allclose(grad, exact * scale, rtol=1e-4, atol=2e-6)
        assert np.abs(grad).max() > 1e-3
        results.append(got)
    return bits(*(x.reshape(-1) for x in results))


def options(rank: int, ranks: int, backend: str) -> None:
    """Everything else of `divergence`, against the dense call, which other tests judge."""
    student, teacher = pair(2, 4, 60)
    mine = span(rank, ranks, 60)
    labels = torch.tensor([[7, 1, -100, 2], [-100, -100, 4, 5]], device=DEVICE)
    for given in (
        {"temperature": 2.0, "t_squared": True},
        {"temperature": 0.5, "teacher_temperature": 2.0},
        {"labels": labels, "shift": True},
        {"normalizer": 17.0},
        {"normalizer": torch.tensor(17, device=DEVICE)},
        {"mask": torch.zeros(2, 4, dtype=torch.bool, device=DEVICE)},
        {"vocab_size": 41},
        {"vocab_size": 1},
        {"vocab_size": 41, "vocab_start": mine.start},
    ):
        for kind in ("forward_kl", "js"):
            whole = [x.clone().requires_grad_() for x in (student, teacher)]
            start = {"vocab_start": given["vocab_start"]} if "vocab_start" in given else {}
            own = {k: v for k, v in given.items() if k != "vocab_start"}
            want = kl_gpu.divergence(*whole, kind, backend=backend, **own)
            want.backward()
            shards = leaves(rank, ranks, student, teacher)
            got = vocab_parallel_div(*shards, kind, backend=backend, **own, **start)
            got.backward(retain_graph=True)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)
            for shard, side in zip(shards, whole, strict=True):
                torch.testing.assert_close(shard.grad, side.grad[..., mine], rtol=2e-5, atol=2e-7)
            first = shards[0].grad.clone()
            got.backward()
            torch.testing.assert_close(shards[0].grad, 2 * first)
    (shard, other) = leaves(rank, ranks, student, teacher)
    (grad,) = torch.autograd.grad(vocab_parallel_div(shard, other, backend=backend), shard, create_graph=True)
    if shard.numel():
        refused(grad.sum().backward, RuntimeError, "second derivative")
    # Vocabularies padded to unequal widths, cut alike where columns count.
    wide = torch.cat((teacher, torch.full((2, 4, 5), 9.0, device=DEVICE)), -1)
    cut = slice(mine.start, 65) if rank == ranks - 1 else mine
    got = vocab_parallel_div(
        student[..., mine], wide[..., cut], vocab_start=mine.start, vocab_size=60, backend=backend
    )
    torch.testing.assert_close(got, kl_gpu.kl_div(student, teacher, backend=backend), rtol=1e-5, atol=0)
    leaf = student[..., mine].clone().requires_grad_()
    inplace = leaf * 1
    vocab_parallel_div(inplace, teacher[..., mine], inplace=True, backend=backend).backward()
    plain = student[..., mine].clone().requires_grad_()
    vocab_parallel_div(plain, teacher[..., mine], backend=backend).backward()
    assert torch.equal(leaf.grad, plain.grad)


def row_arguments(rank: int, ranks: int, backend: str) -> None:
    """What counts and what divides: the same on shards as on whole rows."""
    student, teacher = pair(3, 300)
    mine = span(rank, ranks, 300)
    log_p, ids = teacher.log_softmax(-1).topk(5)
    identity = torch.eye(300, device=DEVICE)[mine]
    entries: list[Callable[..., Tensor]] = [
        lambda x, **o: vocab_parallel_div(x[:, mine], teacher[:, mine], **o),
        lambda x, **o: distributed.vocab_parallel_topk_div(x[:, mine], log_p, ids, **o),
        lambda x, **o: distributed.vocab_parallel_linear_div(x, identity, teacher, identity, **o),
    ]
    nothing = torch.full((3,), -100, device=DEVICE)
    weight = torch.tensor([0.5, 0.0, 2.0], device=DEVICE)
    broken = student.clone()
    broken[1] = math.nan
    for entry in entries:
        leaf = student.clone().requires_grad_()
        loss = entry(leaf, labels=nothing, normalizer=torch.tensor(0, device=DEVICE), backend=backend)
        assert loss.item() == 0
        loss.backward()
        assert not leaf.grad.any()
        if DEVICE.type == "cpu":
            for value in (-3.0, 0.0):
                divisor = torch.tensor(value)
                refused(lambda e=entry, d=divisor: e(student, normalizer=d), ValueError, "^normalizer")
        # 156 is what −100 becomes in eight bits.
        narrow = torch.tensor([156, 5, 255], dtype=torch.uint8, device=DEVICE)
        rows = entry(student, labels=narrow, reduction="none", backend=backend)
        assert (rows > 0).all()
        leaf = broken.clone().requires_grad_()
        loss = entry(leaf, weight=weight, reduction="sum", backend=backend)
        torch.testing.assert_close(loss.detach(), 0.5 * rows[0] + 2 * rows[2], rtol=1e-5, atol=0)
        loss.backward()
        dist.all_reduce(leaf.grad)  # a rank may hold no column
        assert (leaf.grad[1] == 0).all()
        assert leaf.grad[0].any()
        learned = weight.clone().requires_grad_()
        entry(student, weight=learned, reduction="sum", backend=backend).backward()
        torch.testing.assert_close(learned.grad, rows, rtol=1e-5, atol=0)
    for dtype in (torch.uint8, torch.uint16, torch.int16):
        labels = torch.tensor([156, 5, 255], dtype=dtype, device=DEVICE)
        shards = student[:, mine], teacher[:, mine]
        for narrow, wide in zip(
            distributed.vocab_parallel_token_stats(*shards, labels, backend=backend),
            distributed.vocab_parallel_token_stats(*shards, labels.long(), backend=backend), strict=True,
        ):  # fmt: skip
            assert torch.equal(narrow, wide)
        found = distributed.vocab_parallel_token_logprobs(shards[0], labels, backend=backend)
        assert (found < 0).all()


def kinds_of_tensors(rank: int, ranks: int) -> None:
    """Nested tensors and DTensors are refused by name, on every rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    student, teacher = pair(3, 60)
    line = init_device_mesh(DEVICE.type, (ranks,))
    shared = [distribute_tensor(x, line, (Shard(1),)) for x in (student, teacher)]
    log_p, ids = teacher.log_softmax(-1).topk(5)
    heads = torch.ones(5, 60, device=DEVICE)
    whole = {
        "token_stats": lambda: kl_gpu.token_stats(*shared),
        "token_logprobs": lambda: kl_gpu.token_logprobs(shared[0], ids[:, 0]),
        "topk_div": lambda: kl_gpu.topk_div(shared[0], log_p, ids),
        "linear_div": lambda: kl_gpu.linear_div(shared[0], heads, shared[1], heads),
        "linear_token_stats": lambda: kl_gpu.linear_token_stats(shared[0], heads, shared[1], heads),
        "linear_token_logprobs": lambda: kl_gpu.linear_token_logprobs(student, shared[1], ids[:, 0]),
        "linear_topk_div": lambda: kl_gpu.linear_topk_div(shared[0], heads, log_p, ids),
    }
    for name, call in whole.items():
        refused(call, TypeError, f"^{name} must be given plain tensors, got a DTensor.*vocab_parallel_{name}")
    mask = distribute_tensor(torch.ones(3, dtype=torch.bool, device=DEVICE), line, (Replicate(),))
    refused(lambda: kl_gpu.kl_div(student, teacher, mask=mask), TypeError, "^mask.*got a DTensor")
    divisor = distribute_tensor(torch.tensor(7.0, device=DEVICE), line, (Replicate(),))
    refused(lambda: kl_gpu.kl_div(student, teacher, normalizer=divisor), TypeError, "^normalizer.*DTensor")
    want = kl_gpu.kl_div(student, teacher, normalizer=7.0)
    for n in (divisor, torch.tensor(7, device=DEVICE), 7.0):
        for placement in (Shard(0), Shard(1)):
            sides = [distribute_tensor(x, line, (placement,)) for x in (student, teacher)]
            got = kl_gpu.kl_div(*sides, normalizer=n)
            torch.testing.assert_close(got.full_tensor(), want, rtol=1e-5, atol=0)
    labels = distribute_tensor(torch.full((3,), -100, device=DEVICE), line, (Shard(0),))
    rows = [distribute_tensor(x, line, (Shard(0),)).requires_grad_() for x in (student, teacher)]
    loss = kl_gpu.kl_div(*rows, labels=labels, normalizer=torch.tensor(0, device=DEVICE))
    assert loss.full_tensor().item() == 0
    loss.backward()
    assert not rows[0].grad.full_tensor().any()

    with warnings.catch_warnings():  # of nested tensors being a prototype
        warnings.simplefilter("ignore")
        parts = [torch.zeros(2, 60, device=DEVICE), torch.zeros(3, 60, device=DEVICE)]
        nested = [torch.nested.nested_tensor(parts, layout=x) for x in (torch.strided, torch.jagged)]
    for x in (*nested, shared[0]):
        of = "DTensor" if x is shared[0] else "nested"
        shards = {
            "student_shard": lambda x=x: vocab_parallel_div(x, x, check="always"),
            "teacher_shard": lambda x=x: distributed.vocab_parallel_token_stats(student, x, check="always"),
            "logits_shard": lambda x=x: distributed.vocab_parallel_token_logprobs(
                x, ids[:, 0], check="always"
            ),
            "student_weight": lambda x=x: distributed.vocab_parallel_linear_div(
                student, x, teacher, x, check="always"
            ),
            "teacher_hidden": lambda x=x: distributed.vocab_parallel_linear_div(
                student, heads, x, heads, check="always"
            ),
            "hidden": lambda x=x: distributed.vocab_parallel_linear_token_logprobs(
                x, heads, ids[:, 0], check="always"
            ),
            "bias": lambda x=x: distributed.vocab_parallel_linear_token_logprobs(
                student, heads, ids[:, 0], bias=x, check="always"
            ),
            "student_hidden": lambda x=x: distributed.vocab_parallel_linear_topk_div(
                x, heads, log_p, ids, check="always"
            ),
            "teacher_weight": lambda x=x: distributed.vocab_parallel_linear_token_stats(
                student, heads, teacher, x, check="always"
            ),
            "mask": lambda x=x: vocab_parallel_div(student, teacher, mask=x, check="always"),
        }
        for argument, call in shards.items():
            refused(call, TypeError, f"^{argument} .*{of}")
        refused(
            lambda x=x: distributed.vocab_parallel_topk_div(x, log_p, ids, check="always"),
            TypeError, f"^student_shard.*{of}",
        )  # fmt: skip


def nothing_counts(rank: int, ranks: int, kind: str, backend: str) -> None:
    """No rows, rows that do not count and hold anything, a vocabulary of one column, and one rank alone."""
    none = [x.requires_grad_() for x in pair(0, 7)]
    for reduction in ("none", "mean"):
        value = vocab_parallel_div(*none, kind, reduction=reduction, backend=backend)
        assert value.shape == ((0,) if reduction == "none" else ())
        assert not value.sum().item()
        value.sum().backward()

    student, teacher = pair(3, 9)
    student[1], teacher[2] = math.nan, -INF
    shards = leaves(rank, ranks, student, teacher)
    mask = torch.tensor([True, False, False], device=DEVICE)
    value = vocab_parallel_div(*shards, kind, mask=mask, reduction="none", backend=backend)
    value.sum().backward()
    np.testing.assert_allclose(to_numpy(value[:1]), expected(student[:1], teacher[:1], kind), rtol=5e-6)
    assert value[1:].tolist() == [0, 0]
    assert all(not shard.grad[1:].any() for shard in shards)

    student, teacher = pair(3, 1)
    one = slice(0, 1) if rank == 0 else slice(1, 1)
    shards = [x[:, one].clone().requires_grad_() for x in (student, teacher)]
    value = vocab_parallel_div(*shards, kind, reduction="none", backend=backend)
    value.sum().backward()
    assert value.tolist() == [0, 0, 0]
    assert all(shard.grad.abs().sum() < 1e-12 for shard in shards)

    alone = [dist.new_group([other]) for other in range(ranks)][rank]
    student, teacher = pair(3, 40)
    value = vocab_parallel_div(student, teacher, kind, group=alone, reduction="none", backend=backend)
    np.testing.assert_allclose(to_numpy(value), expected(student, teacher, kind), rtol=5e-6)


def repeats(rank: int, ranks: int, kind: str) -> bytes:
    student, teacher = pair(6, 3000)
    seen = set()
    for _ in range(20):
        shards = leaves(rank, ranks, student, teacher)
        value = vocab_parallel_div(*shards, kind, reduction="none")
        value.sum().backward()
        seen.add(bits(value, *(shard.grad for shard in shards)))
    assert len(seen) == 1
    return bits(value)


class Wire(TorchDispatchMode):
    """Bytes this rank puts into collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace in ("c10d", "_c10d_functional"):
            # Both the gathered output and the own input are arguments: the input is the smaller.
            sizes = []
            for x in args:
                held = x if isinstance(x, (list, tuple)) else [x]
                sizes += [y.numel() * y.element_size() for y in held if isinstance(y, Tensor)]
            self.calls.append((str(op), min(sizes, default=0)))
        return op(*args, **(kwargs or {}))


def traffic(rank: int, ranks: int, kind: str) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    shards = leaves(rank, ranks, *pair(64, 200))
    vocab_parallel_div(*shards, kind)  # the first call also asks whether the ranks agree
    with Wire() as forward:
        value = vocab_parallel_div(*shards, kind)
    with Wire() as backward:
        value.backward()
    assert shards[0].grad is not None
    return forward.calls, backward.calls


def refused(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def disagreements(rank: int, ranks: int) -> None:
    one = rank == 1
    student, teacher = pair(4, 10)

    def call(student: Tensor = student, teacher: Tensor = teacher, kind: str = "js", **options: Any) -> None:
        vocab_parallel_div(student, teacher, kind, check="always", **options)

    refused(
        lambda: call(student[: 3 if one else 4], teacher[: 3 if one else 4]), ValueError, r"N, the logits"
    )
    refused(lambda: call(kind="tv" if one else "js"), ValueError, r"^kind must be the same.*rank 1 differs")
    refused(lambda: call(student.double() if one else student), ValueError, "dtype of the student")
    refused(lambda: call(teacher=teacher.bfloat16() if one else teacher), ValueError, "dtype of the teacher")
    refused(lambda: call(beta=0.3 if one else 0.2), ValueError, "^beta")
    refused(lambda: call(temperature=2.0 if one else 1.0), ValueError, "^temperature")
    for out_of_range in (0.0, 9e-7, 1e10):
        refused(lambda t=out_of_range: call(temperature=t), ValueError, "^temperature.*1e-06")
        refused(lambda t=out_of_range: call(teacher_temperature=t), ValueError, "^teacher_temp.*1e-06")
    refused(lambda: call(mask=torch.tensor([True, True, True, one], device=DEVICE)), ValueError, "^mask")
    refused(lambda: call(vocab_size=15 if one else 16), ValueError, "^vocab_size")
    refused(lambda: call(student[:, : 9 if one else 10]), ValueError, "as wide as the teacher's")
    refused(lambda: call(vocab_start=0 if one else None), ValueError, "whether vocab_start is given")
    refused(lambda: call(vocab_start=10 * rank + one), ValueError, r"vocab_start.*got 11 on rank 1.*10")
    refused(lambda: call(backend="eager" if one else None), ValueError, "^backend")
    refused(lambda: call(reduction="sum" if one else "mean"), ValueError, "^reduction")
    # Wrong alike on every rank: the usual refusal, and no hang.
    refused(lambda: call(kind="nonsense"), ValueError, "kind must be one of")
    refused(lambda: call(colour="red"), TypeError, "colour")
    refused(lambda: call(vocab_size=10 * ranks + 1), ValueError, "vocab_size must be within")
    refused(lambda: call(student.long()), TypeError, "student_shard")
    refused(lambda: call(student, teacher[:3]), ValueError, "student_shard and teacher_shard")
    refused(lambda: call(group="all"), TypeError, "group")
    refused(lambda: vocab_parallel_div(student, teacher, check="often"), ValueError, "check")
    # One rank in another function.
    ids = torch.zeros(4, dtype=torch.int64, device=DEVICE)

    def other() -> None:
        if one:
            distributed.vocab_parallel_token_logprobs(student, ids, check="always")
        else:
            call()

    refused(other, ValueError, "the function called")
    # By default the first call asks, and no later one.
    os.environ["KL_GPU_DISTRIBUTED_CHECK"] = "first"
    fresh = dist.new_group(list(range(ranks)))
    try:
        with Wire() as first:
            vocab_parallel_div(student, teacher, group=fresh)
        with Wire() as second:
            vocab_parallel_div(student, teacher, group=fresh)
    finally:
        del os.environ["KL_GPU_DISTRIBUTED_CHECK"]
    assert len(first.calls) == len(second.calls) + 1


def token_stats(rank: int, ranks: int, backend: str, dtype: str) -> bytes:
    columns = 61
    student, teacher = pair(10, columns, dtype=DTYPE[dtype])
    student[0, 2] = student[0, 50] = teacher[0, 50] = 20.0  # a tie: the first column counts
    teacher[1, : columns // 3 + 1] = -INF
    student[2, :] = -INF
    teacher[3, 5] = math.nan
    student[4, : columns // 3 + 1] = teacher[4, : columns // 3 + 1] = -INF
    labels = torch.tensor([0, 1, 2, 3, 4, 20, 21, 22, 60, 40], device=DEVICE)
    mine = span(rank, ranks, columns)
    shards = student[:, mine], teacher[:, mine]
    given = {"temperature": 1.5, "backend": backend}
    got = distributed.vocab_parallel_token_stats(*shards, labels, **given)
    want = reference.token_stats(
        to_numpy(student), to_numpy(teacher), to_numpy(labels).astype(int), temperature=1.5
    )
    for name in ("forward_kl", "reverse_kl"):
        np.testing.assert_allclose(to_numpy(getattr(got, name)), want[name], rtol=5e-6, err_msg=name)
    for name, exact in want.items():
        np.testing.assert_allclose(
            to_numpy(getattr(got, name)), exact, rtol=5e-6, atol=5e-6, equal_nan=True, err_msg=name
        )
    assert got.top1_agree.nansum() < 10
    mask = torch.arange(10, device=DEVICE) % 3 == 0
    some = distributed.vocab_parallel_token_stats(*shards, mask=mask, vocab_size=55, **given)
    dense = kl_gpu.token_stats(student, teacher, mask=mask, vocab_size=55, **given)
    for a, b in zip(some, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-6, equal_nan=True)
    refused(
        lambda: distributed.vocab_parallel_token_stats(*shards, labels + 1, **given),
        ValueError,
        r"labels.*61",
    )
    return bits(*got)


def token_logprobs(rank: int, ranks: int, backend: str) -> bytes:
    columns = 61
    logits, _ = pair(9, columns)
    logits[0, 0] += 40  # log q near 0
    logits[1, : columns // 3 + 1] = -INF
    ids = torch.tensor([0, 60, 2, 30, -100, 20, 21, 59, 1], device=DEVICE)
    mine = span(rank, ranks, columns)
    whole, shard = logits.clone().requires_grad_(), logits[:, mine].clone().requires_grad_()
    log_p, spread = distributed.vocab_parallel_token_logprobs(
        shard, ids, entropy=True, temperature=1.3, backend=backend
    )
    want_log_p, want_spread = kl_gpu.token_logprobs(
        whole, ids, entropy=True, temperature=1.3, backend=backend
    )
    torch.testing.assert_close(log_p, want_log_p, rtol=5e-6, atol=1e-30)
    torch.testing.assert_close(spread, want_spread, rtol=5e-6, atol=1e-9)
    exact = reference.log_softmax(to_numpy(logits), 1.3)
    for row, token in enumerate(ids.tolist()):
        assert (
            log_p[row].item() == (0 if token < 0 else np.float32(exact[row, token]))
            or abs(log_p[row].item() / exact[row, token] - 1) < 5e-6
        )
    w = torch.linspace(0.5, 1.5, 9, device=DEVICE)
    (w * log_p + w.flip(0) * spread).sum().backward()
    (w * want_log_p + w.flip(0) * want_spread).sum().backward()
    assert whole.grad.abs().max() > 0.1
    torch.testing.assert_close(shard.grad, whole.grad[:, mine], rtol=2e-5, atol=2e-7)
    if DEVICE.type == "cpu":
        refused(
            lambda: distributed.vocab_parallel_token_logprobs(shard, ids + 1), ValueError, "token_ids.*61"
        )
    return bits(log_p, spread)


def kept_sets(rank: int, ranks: int, backend: str) -> bytes:
    """`support` and K tokens a row, of whole vocabularies: as one process has them."""
    columns, mine = 61, span(rank, ranks, 61)
    student, teacher = pair(9, columns)
    mask = torch.rand(9, columns, device=DEVICE) < 0.3
    mask[:, 60] = True
    mask[3, : columns // 2] = False  # a row that is kept on some ranks only
    tokens = torch.randint(0, columns, (9, 4), device=DEVICE)
    tokens[:, 0], tokens[2, 1:] = 60, torch.tensor([-1, 7, 7], device=DEVICE)
    ids = torch.full((9, columns), -1, device=DEVICE)
    for row, kept in enumerate(mask):
        found = kept.nonzero()[:, 0]
        ids[row, : len(found)] = found
    w = torch.linspace(0.5, 1.5, 9, device=DEVICE)
    seen = []
    for support in (mask, ids):
        whole, shard = student.clone().requires_grad_(), student[:, mine].clone().requires_grad_()
        shared, alone = distributed.vocab_parallel_div, kl_gpu.divergence
        options: dict[str, Any] = {"kind": "reverse_kl", "reduction": "none", "backend": backend}
        got = shared(shard, teacher[:, mine], support=support, **options)
        want = alone(whole, teacher, support=support, **options)
        torch.testing.assert_close(got, want, rtol=5e-6, atol=0)
        (w * got).sum().backward()
        (w * want).sum().backward()
        torch.testing.assert_close(shard.grad, whole.grad[:, mine], rtol=1e-4, atol=1e-6)
        assert whole.grad.abs().max() > 0.1
        seen.append(got)
    for support in (None, ids):
        whole, shard = student.clone().requires_grad_(), student[:, mine].clone().requires_grad_()
        shared_tokens = distributed.vocab_parallel_token_logprobs
        kept: dict[str, Any] = {"entropy": True, "support": support, "backend": backend}
        found = shared_tokens(shard, tokens, **kept)
        expected = kl_gpu.token_logprobs(whole, tokens, **kept)
        for logprobs, entropy in (found, expected):
            finite = torch.where(logprobs.isneginf(), 0.0, logprobs)
            ((w[:, None] * finite).sum() + (w * entropy).sum()).backward()
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=5e-6, atol=1e-12)
        torch.testing.assert_close(shard.grad, whole.grad[:, mine], rtol=1e-4, atol=1e-6)
        assert whole.grad.abs().max() > 0.1
        seen += found
    refused(
        lambda: distributed.vocab_parallel_div(shard, teacher[:, mine], student_columns=tokens[0]),
        ValueError, "student_columns must be None where the vocabulary is shared",
    )  # fmt: skip
    return bits(*seen)


def topk(
    rank: int, ranks: int, tail: str, kind: str, backend: str, outside_logprob: float | None = None
) -> bytes:
    columns = 61
    student, teacher = pair(6, columns)
    log_p, ids = teacher.log_softmax(-1).topk(8)
    ids[0, 5:] = -1
    ids[1, 4:], log_p[1, 4:] = 0, -torch.inf  # padding, as other programs write it
    mine = span(rank, ranks, columns)
    mask = torch.arange(6, device=DEVICE) != 3
    whole, shard = student.clone().requires_grad_(), student[:, mine].clone().requires_grad_()
    given = {
        "tail": tail, "mask": mask, "return_mass": True, "backend": backend,
        "outside_logprob": outside_logprob,
    }  # fmt: skip
    got = distributed.vocab_parallel_topk_div(shard, log_p, ids, kind, **given)
    want = kl_gpu.topk_div(whole, log_p, ids, kind, **given)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-6, atol=1e-9)
    got[0].backward()
    want[0].backward()
    assert whole.grad.abs().max() > 1e-3
    torch.testing.assert_close(shard.grad, whole.grad[:, mine], rtol=2e-5, atol=2e-7)
    return bits(*(x.reshape(-1) for x in got))


def means(rank: int, ranks: int) -> None:
    """The documented recipe: DDP over ranks with different numbers of rows gives one process's gradient."""
    rows = 3 + 4 * ranks
    teacher = pair(rows, 40)[1]
    mask = torch.rand(rows, device=DEVICE) > 0.3
    inputs = torch.randn(rows, 8, device=DEVICE)
    torch.manual_seed(1)
    alone = torch.nn.Linear(8, 40).to(DEVICE)
    wrapped = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Linear(8, 40).to(DEVICE), device_ids=[rank] if DEVICE.type == "cuda" else None
    )
    wrapped.module.load_state_dict(alone.state_dict())
    loss = kl_gpu.kl_div(alone(inputs), teacher, mask=mask)
    loss.backward()

    first = 0 if rank == 0 else 4 * rank + 3
    mine = slice(first, 4 * rank + 7)  # 7 rows on the first rank, 4 on the others
    pending = distributed.global_count(mask[mine], async_op=True)
    logits = wrapped(inputs[mine])
    count = pending.wait()
    assert count.item() == mask.sum().item()
    # DDP divides the summed gradients by the number of ranks.
    own = kl_gpu.kl_div(logits, teacher[mine], mask=mask[mine], normalizer=count / ranks)
    own.backward()
    torch.testing.assert_close(wrapped.module.weight.grad, alone.weight.grad, rtol=1e-5, atol=1e-8)
    assert alone.weight.grad.abs().max() > 1e-3
    total = own.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total / ranks, loss.detach())
    nothing = distributed.global_count(torch.zeros(3, dtype=torch.bool, device=DEVICE))
    assert nothing.item() == 1
    weights = distributed.global_count(torch.full((2,), 0.25, device=DEVICE))
    assert weights.item() == 0.5 * ranks


def penalties_of_dtensors(rank: int, ranks: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    policy, ref = (-3 * torch.rand(6, 5, device=DEVICE) for _ in range(2))
    mask = torch.rand(6, 5, device=DEVICE) > 0.3
    line = init_device_mesh(DEVICE.type, (ranks,))
    for place in (Shard(0), Replicate()):
        for given in ({}, {"mask": mask}, {"clamp": 0.5}, {"straight_through": True}):
            for estimator in kl_gpu.rl.ESTIMATORS:
                whole = policy.clone().requires_grad_()
                want = kl_gpu.kl_penalty(whole, ref, estimator, **given)
                want.sum().backward()
                shared = [distribute_tensor(x, line, (place,)) for x in (policy, ref)]
                shared[0].requires_grad_()
                own = {
                    k: distribute_tensor(v, line, (place,)) if k == "mask" else v for k, v in given.items()
                }
                got = kl_gpu.kl_penalty(*shared, estimator, **own)
                assert isinstance(got, DTensor)
                torch.testing.assert_close(got.full_tensor(), want)
                got.sum().backward()
                torch.testing.assert_close(shared[0].grad.full_tensor(), whole.grad)
    logits = distribute_tensor(policy, line, (Shard(1),))
    refused(lambda: kl_gpu.topk_logprobs(logits, 2), TypeError, "^logits.*DTensor.*full_tensor")


def dtensors(rank: int, ranks: int, kind: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    columns = 61
    student, teacher = pair(6, 5, columns)
    mask = torch.rand(6, 5, device=DEVICE) > 0.3
    line = init_device_mesh(DEVICE.type, (ranks,))
    cases = [(line, (Shard(2),)), (line, (Shard(0),)), (line, (Shard(1),)), (line, (Replicate(),))]
    if ranks == 4:
        plane = init_device_mesh(DEVICE.type, (2, 2))
        cases += [(plane, (Shard(0), Shard(2))), (plane, (Replicate(), Shard(2)))]
    for mesh, placements in cases:
        rows_of = tuple(Replicate() if p == Shard(2) else p for p in placements)
        for given in ({}, {"mask": mask}, {"reduction": "none"}, {"vocab_size": 41, "reduction": "sum"}):
            whole = [x.clone().requires_grad_() for x in (student, teacher)]
            want = kl_gpu.divergence(*whole, kind, **given)
            want.sum().backward()
            shared = [distribute_tensor(x, mesh, placements).requires_grad_() for x in (student, teacher)]
            own = {k: distribute_tensor(v, mesh, rows_of) if k == "mask" else v for k, v in given.items()}
            with Wire() as wire:
                got = kl_gpu.divergence(*shared, kind, **own)
            # A state of at most 40 bytes a row, or a count; never logits.
            assert all(size <= 40 * 30 for _, size in wire.calls), wire.calls
            assert isinstance(got, DTensor)
            torch.testing.assert_close(got.full_tensor(), want, rtol=1e-5, atol=1e-8)
            got.sum().backward()
            for a, b in zip(shared, whole, strict=True):
                torch.testing.assert_close(a.grad.full_tensor(), b.grad, rtol=2e-5, atol=2e-7)
    vocabulary, batch = (
        [distribute_tensor(x, line, (place,)) for x in (student, teacher)] for place in (Shard(2), Shard(0))
    )
    refused(lambda: kl_gpu.kl_div(vocabulary[0], teacher), TypeError, "teacher_logits must be a DTensor")
    refused(lambda: kl_gpu.kl_div(vocabulary[0], batch[1]), ValueError, "same placements.*redistribute")
    refused(lambda: kl_gpu.kl_div(*batch, mask=mask), ValueError, "mask must be a DTensor")
    partial = [DTensor.from_local(x, line, (Partial(),)) for x in (student, teacher)]
    refused(lambda: kl_gpu.kl_div(*partial), ValueError, "redistribute")
    time = [distribute_tensor(x, line, (Shard(1),)) for x in (student, teacher)]
    refused(lambda: kl_gpu.kl_div(*time, shift=True), ValueError, "shift")

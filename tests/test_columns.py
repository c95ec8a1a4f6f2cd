"""Kept sets and column maps: against the calls on the columns themselves, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kl_gpu
from kl_gpu import columns as columns_
from realistic_rows import tops_on_a_floor
from support import DEVICE, FIRST_ORDER, RELATIVE, to_numpy

INF = float("inf")


def both_ways(function: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    leaves = tuple(x.detach().clone().requires_grad_() for x in leaves)
    value = function(*leaves)
    flow = torch.linspace(1, 2, value.numel(), device=value.device).view(value.shape)
    return value.detach(), *torch.autograd.grad((value * flow).sum(), leaves)


def sides(student_columns: int = 400, teacher_columns: int = 400) -> tuple[Tensor, Tensor]:
    wide = tops_on_a_floor(10, max(student_columns, teacher_columns), torch.Generator().manual_seed(3))
    return wide[0][:, :student_columns].to(DEVICE).view(2, 5, -1), wide[1][:, :teacher_columns].to(
        DEVICE
    ).view(2, 5, -1)


def kept_sets(share: float) -> Tensor:
    mask = torch.rand(2, 5, 400, device=DEVICE) < share
    mask[..., 7] = True
    return mask


@pytest.mark.parametrize("share", [0.04, 0.6])
@pytest.mark.parametrize("form", ["mask", "ids"])
def test_support_is_logits_of_minus_infinity_outside(
    backend: str, kind: str, form: str, share: float
) -> None:
    student, teacher = sides()
    mask = kept_sets(share)
    support = mask if form == "mask" else columns_.support_ids(mask, mask.shape[:-1], 400, None)
    options = {"kind": kind, "reduction": "none", "backend": backend}
    got = both_ways(lambda s, t: kl_gpu.divergence(s, t, support=support, **options), student, teacher)
    cut = (x.masked_fill(~mask, -INF) for x in (student, teacher))
    want = both_ways(lambda s, t: kl_gpu.divergence(s, t, **options), *cut)
    np.testing.assert_allclose(
        to_numpy(got[0]), to_numpy(want[0]), rtol=2 * RELATIVE, atol=1e-7 * (kind in FIRST_ORDER)
    )
    for grad, exact in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(to_numpy(grad), to_numpy(exact), rtol=1e-4, atol=1e-5)
        assert (grad[~mask] == 0).all()
        assert exact.abs().max() > 0.01


def test_ids_are_a_mask(backend: str) -> None:
    student, teacher = sides()
    mask = kept_sets(0.1)
    ids = columns_.support_ids(mask, mask.shape[:-1], 400, None)
    assert ids.shape[-1] == mask.sum(-1).max()
    again = torch.zeros(2, 5, 401, dtype=torch.bool, device=DEVICE).scatter_(
        -1, ids.where(ids >= 0, 400), True
    )
    assert torch.equal(again[..., :400], mask)
    order = torch.randperm(ids.shape[-1], device=DEVICE)
    for given in (ids[..., order], ids.int()):
        torch.testing.assert_close(
            kl_gpu.kl_div(student, teacher, support=given, backend=backend),
            kl_gpu.kl_div(student, teacher, support=mask, backend=backend), rtol=1e-6, atol=0,
        )  # fmt: skip


@pytest.mark.parametrize("entry", ["logits", "heads"])
@pytest.mark.parametrize("several", [False, True])
def test_log_probabilities_under_a_kept_set(backend: str, entry: str, several: bool) -> None:
    hidden, weight = torch.randn(2, 5, 16, device=DEVICE), torch.randn(400, 16, device=DEVICE)
    mask, counts = kept_sets(0.1), torch.rand(2, 5, device=DEVICE) > 0.2
    tokens = torch.randint(0, 400, (2, 5, 3), device=DEVICE)
    tokens[..., 0], tokens[..., 2] = 7, 7  # kept, and given twice
    tokens = tokens if several else tokens[..., 0]
    options: dict[str, Any] = {"entropy": True, "mask": counts, "temperature": 0.8}
    flows = torch.randn(tokens.shape, device=DEVICE), torch.randn(2, 5, device=DEVICE)

    def total(found: tuple[Tensor, Tensor]) -> Tensor:
        logprobs = torch.where(found[0].isneginf(), 0.0, found[0])
        return (logprobs * flows[0]).sum() + (found[1] * flows[1]).sum()

    def ours(h: Tensor) -> tuple[Tensor, Tensor]:
        kept: dict[str, Any] = {**options, "support": mask, "backend": backend}
        if entry == "heads":
            return kl_gpu.linear_token_logprobs(h, weight, tokens, chunk_rows=4, **kept)
        return kl_gpu.token_logprobs(h @ weight.t(), tokens, **kept)

    def exact(h: Tensor) -> tuple[Tensor, Tensor]:
        log_q = ((h.double() @ weight.double().t()) / 0.8).masked_fill(~mask, -INF).log_softmax(-1)
        at = log_q.gather(-1, tokens.view(2, 5, -1)).view(tokens.shape)
        entropy = -(log_q.exp() * log_q.masked_fill(~mask, 0)).sum(-1)
        rows = counts if tokens.dim() == 2 else counts[..., None]
        return torch.where(rows, at, 0.0), torch.where(counts, entropy, 0.0)

    results = []
    for function in (ours, exact):
        leaf = hidden.clone().requires_grad_()
        found = function(leaf)
        results.append((*found, *torch.autograd.grad(total(found), leaf)))
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(to_numpy(got), to_numpy(want), rtol=1e-4, atol=1e-4)
    assert results[1][2].abs().max() > 0.05
    assert several == bool(results[0][0].isneginf().any())


def test_a_kept_set_alone_is_read(backend: str) -> None:
    """What lies outside may be NaN."""
    student, teacher = sides()
    ids = torch.stack([torch.randperm(400, device=DEVICE)[:20] for _ in range(10)]).view(2, 5, 20)
    ids[0, 0, 3:] = -1
    broken = [
        torch.full_like(x, torch.nan).scatter(-1, ids.clamp_min(0), x.gather(-1, ids.clamp_min(0)))
        for x in (student, teacher)
    ]
    for function in (
        lambda s, t: kl_gpu.kl_div(s, t, support=ids, backend=backend),
        lambda s, t: kl_gpu.token_logprobs(s, ids[..., 0], support=ids, backend=backend),
    ):
        assert torch.equal(function(*broken), function(student, teacher))


@pytest.mark.parametrize("entry", ["divergence", "linear_div", "token_stats"])
def test_column_maps(backend: str, entry: str) -> None:
    """A draft model's columns beside its target's: the calls on the columns taken one by one."""
    maps = torch.randperm(300, device=DEVICE)[:120], torch.randperm(400, device=DEVICE)[:120]
    named = dict(zip(("student_columns", "teacher_columns"), maps, strict=True))
    if entry == "linear_div":
        hidden = [torch.randn(6, 16, device=DEVICE) for _ in range(2)]
        weights = [torch.randn(v, 16, device=DEVICE) for v in (300, 400)]
        biases = [torch.randn(v, device=DEVICE) for v in (300, 400)]

        def div(h: Tensor, w: Tensor, b: Tensor, of: tuple[Tensor, ...], **options: Any) -> Tensor:
            return kl_gpu.linear_div(
                h, w, hidden[1], of[0], student_bias=b, teacher_bias=of[1], backend=backend, **options
            )

        of = weights[1], biases[1]
        got = both_ways(lambda *x: div(*x, of, **named), hidden[0], weights[0], biases[0])
        taken = weights[1][maps[1]], biases[1][maps[1]]
        want = both_ways(
            lambda h, w, b: div(h, w[maps[0]], b[maps[0]], taken), hidden[0], weights[0], biases[0]
        )
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x, y)
        assert want[2].abs().max() > 1e-4
        return
    student, teacher = sides(300, 400)
    if entry == "token_stats":
        labels = torch.randint(0, 120, (2, 5), device=DEVICE)
        got_stats = kl_gpu.token_stats(student, teacher, labels, backend=backend, **named)
        want_stats = kl_gpu.token_stats(student[..., maps[0]], teacher[..., maps[1]], labels, backend=backend)
        for x, y in zip(got_stats, want_stats, strict=True):
            assert torch.equal(x, y)
        return
    for kind in ("forward_kl", "js"):
        got = both_ways(
            lambda s, t, kind=kind: kl_gpu.divergence(s, t, kind, backend=backend, **named), student, teacher
        )
        want = both_ways(
            lambda s, t, kind=kind: kl_gpu.divergence(
                s[..., maps[0]], t[..., maps[1]], kind, backend=backend
            ),
            student, teacher,
        )  # fmt: skip
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x, y)
        assert want[1].abs().max() > 1e-4


def test_the_module_takes_maps_and_kept_sets(backend: str) -> None:
    """The maps go where the module goes, and into no checkpoint."""
    student, teacher = sides(120, 400)
    columns = torch.randperm(400, device=DEVICE)[:120]
    module = kl_gpu.DivergenceLoss("js", teacher_columns=columns, backend=backend)
    support = torch.stack([torch.randperm(120, device=DEVICE)[:9] for _ in range(10)]).view(2, 5, 9)
    options: dict[str, Any] = {"teacher_columns": columns, "backend": backend}
    assert torch.equal(module(student, teacher), kl_gpu.js_div(student, teacher, **options))
    assert torch.equal(
        module(student, teacher, support=support), kl_gpu.js_div(student, teacher, support=support, **options)
    )
    eyes = torch.eye(120, device=DEVICE), torch.eye(400, device=DEVICE)
    from_heads = module.linear(student, eyes[0], teacher, eyes[1])
    torch.testing.assert_close(from_heads, kl_gpu.js_div(student, teacher, **options), rtol=1e-6, atol=0)
    assert [name for name, _ in module.named_buffers()] == ["teacher_columns"]
    assert not module.state_dict()


def test_one_map_where_the_other_side_is_the_draft(backend: str) -> None:
    student, teacher = sides(120, 400)
    columns = torch.randperm(400, device=DEVICE)[:120].int()
    got = kl_gpu.kl_div(student, teacher, teacher_columns=columns, backend=backend)
    assert torch.equal(got, kl_gpu.kl_div(student, teacher[..., columns.long()], backend=backend))


def test_kept_columns_of_a_map(backend: str) -> None:
    student, teacher = sides(300, 400)
    maps = torch.randperm(300, device=DEVICE)[:120], torch.randperm(400, device=DEVICE)[:120]
    ids = torch.stack([torch.randperm(120, device=DEVICE)[:9] for _ in range(10)]).view(2, 5, 9)
    named = dict(zip(("student_columns", "teacher_columns"), maps, strict=True))
    got = kl_gpu.kl_div(student, teacher, support=ids, backend=backend, **named)
    taken = (x[..., of] for x, of in zip((student, teacher), maps, strict=True))
    assert torch.equal(got, kl_gpu.kl_div(*taken, support=ids, backend=backend))


def test_compiled(backend: str) -> None:
    student, teacher = sides()
    ids = torch.stack([torch.randperm(400, device=DEVICE)[:20] for _ in range(10)]).view(2, 5, 20)
    columns = torch.randperm(400, device=DEVICE)[:120]
    for options in ({"support": ids}, {"student_columns": columns, "teacher_columns": columns}):

        def loss(s: Tensor, t: Tensor, options: dict[str, Tensor] = options) -> Tensor:
            return kl_gpu.kl_div(s, t, backend=backend, **options)

        plain = both_ways(loss, student, teacher)
        traced = both_ways(torch.compile(loss, fullgraph=True, backend="aot_eager"), student, teacher)
        for x, y in zip(traced, plain, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)


S, T = torch.randn(2, 3, 8), torch.randn(2, 3, 9)
FIVE = torch.arange(5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "vocab_size must be given"),
        ({"student_columns": FIVE}, ValueError, "as many columns on both sides, got 5.*9"),
        (
            {"student_columns": FIVE + 4, "teacher_columns": FIVE},
            ValueError,
            r"student_columns.*\[0, 8\), got 8",
        ),
        ({"student_columns": FIVE - 1, "teacher_columns": FIVE}, ValueError, "student_columns.*got -1"),
        ({"student_columns": FIVE, "teacher_columns": FIVE // 2}, ValueError, "teacher_columns.*once, got 0"),
        ({"student_columns": FIVE.float(), "teacher_columns": FIVE}, TypeError, "student_columns.*float32"),
        ({"student_columns": FIVE[None], "teacher_columns": FIVE}, ValueError, r"student_columns.*\(1, 5\)"),
        (
            {"student_columns": FIVE.to("meta"), "teacher_columns": FIVE},
            ValueError,
            "student_columns.*cpu.*meta",
        ),
        (
            {"student_columns": FIVE, "teacher_columns": FIVE, "vocab_size": 4},
            ValueError,
            "vocab_size.*None.*4",
        ),
        ({"vocab_size": 8, "support": torch.ones(2, 3, 9).bool()}, ValueError, r"support.*8.*\(2, 3, 9\)"),
        ({"vocab_size": 8, "support": torch.ones(2, 3)}, TypeError, "support.*bool.*float32"),
        (
            {"vocab_size": 8, "support": torch.zeros(2, 3, 2).long()},
            ValueError,
            "support.*different.*0 twice",
        ),
        ({"vocab_size": 8, "support": torch.full((2, 3, 1), 8)}, ValueError, r"support.*\[0, 8\).*8"),
        ({"vocab_size": 8, "support": torch.zeros(3, 2).long()}, ValueError, r"support.*\(2, 3\).*\(3, 2\)"),
    ],
)
def test_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kl_gpu.kl_div(S, T, **options)


def test_a_map_is_looked_at_again_once_it_was_changed() -> None:
    columns = torch.arange(5)
    kl_gpu.kl_div(S, T, student_columns=columns, teacher_columns=columns)
    columns[3] = 0
    with pytest.raises(ValueError, match=r"student_columns.*0 twice"):
        kl_gpu.kl_div(S, T, student_columns=columns, teacher_columns=columns)

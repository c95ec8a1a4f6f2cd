"""sparse_div: against the definitions, below the full divergence, gradients, absent entries, refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kl_gpu
from kl_gpu.topk.sparse import SPARSE_TAILS
from realistic_rows import tops_on_a_floor

PAIRS = [(tail, kind) for tail, kinds in SPARSE_TAILS.items() for kind in kinds]


def models(rows: int = 6, columns: int = 300) -> tuple[Tensor, Tensor]:
    return tuple(x.double() for x in tops_on_a_floor(rows, columns, torch.Generator().manual_seed(8)))


def by_definition(log_q: dict[int, float], log_p: dict[int, float], kind: str, tail: str, t: float) -> float:
    common = [i for i in log_p if i in log_q]
    p, q = ([math.exp(x[i]) for i in common] for x in (log_p, log_q))
    if tail == "bucket":
        p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
    if tail == "renormalize":
        p, q = ([x ** (1 / t) for x in side] for side in (p, q))
        p, q = ([x / sum(side) for x in side] for side in (p, q))
    if tail == "truncate":
        return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) - x + y if x else y for x, y in zip(a, b, strict=True))

    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jeffreys": (kl(p, q) + kl(q, p)) / 2,
        "js": (kl(p, middle) + kl(q, middle)) / 2,
    }[kind]


@pytest.mark.parametrize(("tail", "kind"), PAIRS)
def test_values(tail: str, kind: str) -> None:
    student, teacher = models()
    (log_q, ids_q), (log_p, ids_p) = (x.log_softmax(-1).topk(k) for x, k in ((student, 40), (teacher, 25)))
    t = 2.0 if tail == "renormalize" else 1.0
    got, teacher_mass, student_mass = kl_gpu.sparse_div(
        log_q, ids_q, log_p, ids_p, kind, tail=tail, temperature=t, reduction="none", return_mass=True
    )
    seen: list[int] = []
    for row in range(len(got)):
        known = [
            dict(zip(ids[row].tolist(), x[row].tolist(), strict=True))
            for x, ids in ((log_q, ids_q), (log_p, ids_p))
        ]
        assert got[row].item() == pytest.approx(by_definition(*known, kind, tail, t), rel=1e-9, abs=1e-12)
        common = set(known[0]) & set(known[1])
        assert common
        seen.append(len(common))
        for mass, side in ((student_mass, known[0]), (teacher_mass, known[1])):
            assert mass[row].item() == pytest.approx(sum(math.exp(side[i]) for i in common))
    assert min(seen) < 25
    assert got.abs().max() > 1e-3


@pytest.mark.parametrize("kind", SPARSE_TAILS["bucket"])
def test_never_more_than_the_full_divergence_and_equal_where_all_is_known(kind: str) -> None:
    student, teacher = models()
    full = kl_gpu.divergence(student, teacher, kind, reduction="none")
    for k in (3, 30, 300):
        sides = [x for side in (student, teacher) for x in side.log_softmax(-1).topk(k)]
        got = kl_gpu.sparse_div(*sides, kind, reduction="none")
        assert (got <= full * (1 + 1e-9)).all()
    np.testing.assert_allclose(got, full, rtol=1e-7)


def test_a_given_tail() -> None:
    """The tails that `topk_logprobs` gives: digits that 1 − Σ p of rounded numbers does not have."""
    student, teacher = (x.float() for x in models())
    q, p = kl_gpu.topk_logprobs(student, 20), kl_gpu.topk_logprobs(teacher, 20)
    got = kl_gpu.sparse_div(
        q.logprobs, q.ids, p.logprobs, p.ids, reduction="none", student_tail_logprob=q.tail_logprob,
        teacher_tail_logprob=p.tail_logprob,
    )  # fmt: skip
    wide = [x for side in (student, teacher) for x in side.double().log_softmax(-1).topk(20)]
    np.testing.assert_allclose(got, kl_gpu.sparse_div(*wide, reduction="none"), rtol=2e-5)


@pytest.mark.parametrize(("tail", "kind"), PAIRS)
def test_gradients(tail: str, kind: str) -> None:
    student, teacher = models(2, 12)
    log_p, ids_p = teacher.log_softmax(-1).topk(6)
    ids_q = student.topk(7).indices
    # Away from the full mass, where what is left of 1 is cut off.
    logits = (student / 4).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        log_q = x.log_softmax(-1).gather(-1, ids_q)
        return kl_gpu.sparse_div(log_q, ids_q, log_p, ids_p, kind, tail=tail, reduction="sum")

    (grad,) = torch.autograd.grad(loss(logits), logits)
    step = 1e-5
    for row, column in ((0, 0), (1, 3), (0, int(ids_q[0, 0])), (1, int(ids_p[1, 0]))):
        moved = torch.zeros_like(logits)
        moved[row, column] = step
        with torch.no_grad():
            want = (loss(logits + moved) - loss(logits - moved)) / (2 * step)
        assert grad[row, column].item() == pytest.approx(want.item(), rel=1e-4, abs=1e-8)
    assert grad.abs().max() > 1e-3


def test_absent_entries_and_rows() -> None:
    student, teacher = models()
    (log_q, ids_q), (log_p, ids_p) = (x.log_softmax(-1).topk(20) for x in (student, teacher))
    want = kl_gpu.sparse_div(log_q[:, :15], ids_q[:, :15], log_p[:, :12], ids_p[:, :12], reduction="none")
    ids_q, ids_p = ids_q.clone(), ids_p.clone()
    ids_q[:, 15:], ids_p[:, 12:16] = -1, -100
    log_q, log_p = log_q.clone(), log_p.clone()
    log_q[:, 15:] = math.nan
    # Padding with (0, −inf).
    ids_p[:, 16:], log_p[:, 16:] = 0, -math.inf
    keep = ~(ids_p[:, :12] == 0).any(-1)
    got = kl_gpu.sparse_div(log_q, ids_q, log_p, ids_p, reduction="none", mask=keep.long())
    np.testing.assert_allclose(got[keep], want[keep], rtol=1e-9)
    assert (got[~keep] == 0).all()
    assert keep.sum() > 2


def test_nothing_in_common() -> None:
    ids = torch.arange(4).expand(2, 4)
    logprobs = torch.full((2, 4), math.log(0.2))
    got, *masses = kl_gpu.sparse_div(logprobs, ids, logprobs, ids + 10, reduction="none", return_mass=True)
    assert (got == 0).all()
    assert all((x == 0).all() for x in masses)
    assert kl_gpu.sparse_div(logprobs, ids, logprobs, ids + 10, tail="renormalize").isnan()


IDS, LOGPROBS = torch.arange(4).expand(2, 4), torch.full((2, 4), math.log(0.2))
GOOD = {
    "student_logprobs": LOGPROBS, "student_ids": IDS, "teacher_logprobs": LOGPROBS, "teacher_ids": IDS,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student_ids": IDS[0]}, ValueError, "student_ids"),
        ({"student_ids": IDS // 2}, ValueError, "student_ids.*different.*0 twice"),
        ({"teacher_ids": IDS // 2}, ValueError, "teacher_ids.*different.*0 twice"),
        ({"student_logprobs": LOGPROBS + 1}, ValueError, "student_logprobs.*student's full softmax.*2.17"),
        ({"teacher_logprobs": LOGPROBS + 1}, ValueError, "teacher_logprobs.*teacher's full softmax.*2.17"),
        ({"teacher_logprobs": LOGPROBS.clone().requires_grad_()}, ValueError, "teacher_logprobs.*detach"),
        ({"tail": "student_full"}, ValueError, "tail.*'bucket'.*'student_full'"),
        ({"kind": "tv"}, ValueError, "kind.*tv"),
        ({"temperature": 2.0}, ValueError, "temperature.*renormalize.*2.0"),
        (
            {"tail": "truncate", "student_tail_logprob": LOGPROBS[:, 0]},
            ValueError,
            "student_tail_logprob.*bucket",
        ),
        ({"mask": torch.ones(3)}, TypeError, "mask"),
        ({"return_mass": 1}, TypeError, "return_mass"),
    ],
)
def test_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kl_gpu.sparse_div(**{**GOOD, **change})

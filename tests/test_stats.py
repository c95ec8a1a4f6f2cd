"""token_stats against the float64 reference, on every backend; its rows, its summary, its refusals."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from test_eager import peak_extra_bytes
from test_views import VIEWS
from torch import Tensor

import kl_gpu
from kl_gpu import TokenStats, reference, token_stats
from kl_gpu.backends import native
from kl_gpu.ops import pair as ops
from realistic_rows import raised_token
from support import DEVICE, DTYPES, check_value, pair, record, to_numpy

INF, NAN = math.inf, math.nan
NAMES = TokenStats._fields[:7]
# Of max(1, |x|): entropies and log-probabilities, which are of first order in the logits.
FIRST_ORDER = 5e-6


def interpreted(backend: str) -> bool:
    return backend == "triton" and DEVICE.type == "cpu"


def tokens_of(logits: Tensor) -> Tensor:
    return torch.randint(0, logits.shape[-1], logits.shape[:-1], device=logits.device)


def check(found: TokenStats, student: Tensor, teacher: Tensor, labels: Tensor | None, backend: str,
          where: str, **options: float) -> None:  # fmt: skip
    """Every field of rows that all count, against the reference on the very inputs given."""
    known = None if labels is None else labels.cpu().numpy()
    want = reference.token_stats(to_numpy(student), to_numpy(teacher), known, **options)
    both_double = student.dtype == teacher.dtype == torch.float64
    for name in NAMES:
        got, exact = getattr(found, name), want[name]
        assert got.dtype == (torch.float64 if both_double else torch.float32), name
        assert not got.requires_grad
        got = to_numpy(got)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(exact), err_msg=f"{name} {where}")
        np.testing.assert_array_equal(np.isinf(got), np.isinf(exact), err_msg=f"{name} {where}")
        finite = np.isfinite(exact)
        if name == "top1_agree":
            np.testing.assert_array_equal(got[finite], exact[finite], err_msg=where)
        elif name.endswith("_kl"):
            rows = torch.as_tensor(finite, device=student.device)
            check_value(getattr(found, name)[rows], student[rows], teacher[rows], name, backend,
                        f"token_stats {where}", **options)  # fmt: skip
        elif finite.any():
            bound = FIRST_ORDER * np.maximum(1, np.abs(exact[finite]))
            share = float((np.abs(got[finite] - exact[finite]) / bound).max())
            record("stats", backend, name, share, where)
            assert share <= 1, f"{name}: {share} of the bound at {where}"
            assert (got[finite] >= 0).all() if "entropy" in name else (got[finite] <= 0).all()


# -- accuracy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [7, 1000, 40001, 151936])
@pytest.mark.parametrize("shift", [0.0, 0.7])
@pytest.mark.usefixtures("wide_programs")
def test_every_field(backend: str, vocab: int, shift: float) -> None:
    n = {7: 64, 1000: 16}.get(vocab, 2)
    spreads = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]
    if interpreted(backend):
        n, spreads = max(1, n // 16), spreads if vocab < 40000 else spreads[1::3]
    for spread in spreads:
        student, teacher = pair(n, vocab, spread=spread, shift=shift)
        labels = tokens_of(student)
        where = f"V={vocab} ε={spread:g} shift={shift}"
        check(
            token_stats(student, teacher, labels, backend=backend), student, teacher, labels, backend, where
        )


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_dtypes(backend: str, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    for spread in (1e-3, 1.0):
        student, teacher = pair(2, 1003, spread=spread)
        student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
        found = token_stats(student, teacher, tokens_of(student), backend=backend)
        assert found.student_logprob.dtype == found.forward_kl.dtype
        found = token_stats(student, teacher, backend=backend)
        check(found, student, teacher, None, backend, f"{student_dtype}/{teacher_dtype} ε={spread:g}")


@pytest.mark.parametrize("temperatures", [(0.5, 0.5), (1.7, 1.7), (2.0, 1.0), (0.8, 1.3)])
def test_temperatures(backend: str, temperatures: tuple[float, float]) -> None:
    options = {"temperature": temperatures[0], "teacher_temperature": temperatures[1]}
    for spread in (1e-5, 1.0):
        student, teacher = pair(3, 1003, spread=spread, shift=0.7)
        labels = tokens_of(student)
        found = token_stats(student, teacher, labels, backend=backend, **options)
        check(found, student, teacher, labels, backend, f"T={temperatures} ε={spread:g}", **options)


@pytest.mark.parametrize("temperatures", [(1e-6, 1e-6), (1e-6, 1.0), (1.0, 1e-6), (1e9, 1e-6), (1e9, 1e9)])
def test_the_ends_of_the_range_of_temperatures(backend: str, temperatures: tuple[float, float]) -> None:
    options = {"temperature": temperatures[0], "teacher_temperature": temperatures[1]}
    student, teacher = pair(5, 70)
    labels = tokens_of(student)
    found = token_stats(student, teacher, labels, backend=backend, **options)
    check(found, student, teacher, labels, backend, f"T={temperatures}", **options)


@pytest.mark.parametrize("temperatures", [(1e-6, 1.0), (1.0, 1e-6), (1e-6, 1e-6)])
def test_scaled_logits_past_2_to_the_31(backend: str, temperatures: tuple[float, float]) -> None:
    options = {"temperature": temperatures[0], "teacher_temperature": temperatures[1]}
    student, teacher = (
        logits * (300.0 if t < 1 else 1.0) for logits, t in zip(pair(4, 70), temperatures, strict=True)
    )
    student[1, 7], teacher[1, 7] = (4000.0 if t < 1 else 10.0 for t in temperatures)
    student[2, 9] = student[2, 60] = student[2].max() * 2  # a tie
    labels = tokens_of(student)
    found = token_stats(student, teacher, labels, backend=backend, **options)
    check(found, student, teacher, labels, backend, f"vast T={temperatures}", **options)


@pytest.mark.parametrize("offset", [100.0, 1000.0, -1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_far_from_zero(backend: str, offset: float, dtype: torch.dtype) -> None:
    student, teacher = pair(2, 2055, spread=0.1)
    student, teacher = (student + offset).to(dtype), (teacher - offset / 2).to(dtype)
    labels = tokens_of(student)
    found = token_stats(student, teacher, labels, backend=backend)
    check(found, student, teacher, labels, backend, f"offset {offset}")


@pytest.mark.usefixtures("wide_programs")
def test_peaked_rows(backend: str) -> None:
    """Most mass on one token of a late tile; on two tokens, one a side; a student without tail."""
    student, teacher = pair(5, 20011, spread=2.0, scale=2.0)
    for row, column in enumerate((0, 3000, 19999)):
        teacher[row, column], student[row, column] = 18.0 + row, 18.3 + row
    teacher[3, 4000], student[3, 15000] = 20.0, 25.0
    student[4, 100:] -= 40.0
    labels = student.argmax(-1)
    found = token_stats(student, teacher, labels, backend=backend)
    assert (found.student_entropy[:4] < 0.2).all()
    check(found, student, teacher, labels, backend, "peaked")


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.usefixtures("wide_programs")
def test_sorted_rows(backend: str, descending: bool) -> None:
    # Ascending rows move the running reference at every tile.
    student, teacher = pair(2, 32000, spread=0.3)
    order = teacher.argsort(-1, descending=descending)
    student, teacher = student.gather(-1, order), teacher.gather(-1, order)
    check(token_stats(student, teacher, backend=backend), student, teacher, None, backend, "sorted")


def test_identical_logits(backend: str) -> None:
    for dtype in DTYPES:
        for vocab in (1, 7, 2055):
            logits = (5 * torch.randn(2, vocab, device=DEVICE)).to(dtype)
            found = token_stats(logits, logits.clone(), backend=backend)
            assert (found.forward_kl == 0).all()
            assert (found.reverse_kl == 0).all()
            assert (found.top1_agree == 1).all()
            assert torch.equal(found.student_entropy, found.teacher_entropy)
            assert ((found.student_entropy > 1e-6) == (vocab > 1)).all()


def test_uniform_rows(backend: str) -> None:
    logits = torch.full((2, 3001), 4.25, device=DEVICE)
    found = token_stats(logits, logits.clone(), torch.tensor([0, 3000], device=DEVICE), backend=backend)
    for entropy in (found.student_entropy, found.teacher_entropy):
        np.testing.assert_allclose(to_numpy(entropy), math.log(3001), rtol=1e-6)
    np.testing.assert_allclose(to_numpy(found.student_logprob), -math.log(3001), rtol=1e-6)


# -- edges ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [7, 2055])
@pytest.mark.parametrize("level", [1.0, -200.0])
def test_holes_and_rows_without_a_distribution(backend: str, vocab: int, level: float) -> None:
    student, teacher = pair(10, vocab)
    teacher[1, 3] = teacher[3, 3] = teacher[4, 2:4] = teacher[5, : vocab - 1] = -INF
    student[2, 5] = student[3, 5] = student[4, 3:5] = student[5, 1:] = -INF
    # At level −200 the probability opposite a hole underflows to 0 in float32; it still is not 0.
    student[1, 3] = teacher[2, 5] = level
    student[6], teacher[7], student[8, 4], teacher[9, 4] = -INF, -INF, NAN, INF
    labels = torch.full((10,), 3, device=DEVICE)
    found = token_stats(student, teacher, labels, backend=backend)
    assert found.teacher_logprob[1] == -INF
    assert found.reverse_kl[1] == INF
    assert found.forward_kl[2] == INF
    # What one side says alone stays.
    assert torch.isfinite(found.teacher_entropy[[6, 8]]).all()
    assert found.student_entropy[[6, 8]].isnan().all()
    assert found.top1_agree[6:].isnan().all()
    check(found, student, teacher, labels, backend, "holes")


def test_one_column(backend: str) -> None:
    student, teacher = torch.full((1, 1), 3.3, device=DEVICE), torch.full((1, 1), -7.1, device=DEVICE)
    labels = torch.zeros(1, dtype=torch.long, device=DEVICE)
    found = token_stats(student, teacher, labels, temperature=1.3, backend=backend)
    assert (found.forward_kl, found.reverse_kl, found.top1_agree) == (0, 0, 1)
    for name in ("student_entropy", "teacher_entropy", "student_logprob", "teacher_logprob"):
        assert abs(getattr(found, name).item()) < 1e-6


def test_of_equal_logits_the_first_counts(backend: str) -> None:
    student, teacher = torch.zeros(6, 3000, device=DEVICE), torch.zeros(6, 3000, device=DEVICE)
    columns = [((5,), (5, 9)), ((5, 9), (9,)), ((2500, 2990), (2500,)), ((7, 2990), (2990,)), ((0,), ()),
               ((31, 1030), (31, 2054))]  # fmt: skip
    for row, (of_student, of_teacher) in enumerate(columns):
        student[row, list(of_student)] = 3.0
        teacher[row, list(of_teacher)] = 2.0
    for dtype in (torch.float32, torch.bfloat16):
        found = token_stats(student.to(dtype), teacher.to(dtype), backend=backend)
        assert found.top1_agree.tolist() == [1, 0, 1, 0, 1, 1]
    # On both sides of zero, 0 is one number; with a hole, the slow path decides.
    student[4, 2], student[4, 0] = -0.0, 0.0
    student[:, 2999] = teacher[:, 2999] = -INF
    assert token_stats(student, teacher, backend=backend).top1_agree.tolist() == [1, 0, 1, 0, 1, 1]


def test_agreement_is_argmax(backend: str) -> None:
    student, teacher = pair(4 if interpreted(backend) else 64, 3001, scale=1.0)
    student, teacher = (8 * student).round() / 8, (8 * teacher).round() / 8  # ties are common
    for a, b in ((student, teacher), (student, student.flip(0)), (student, student - 0.125)):
        found = token_stats(a, b, backend=backend).top1_agree
        assert torch.equal(found, (a.argmax(-1) == b.argmax(-1)).float())


# -- rows ----------------------------------------------------------------------------------------------------


def test_rows_that_do_not_count(backend: str) -> None:
    student, teacher = pair(2, 3, 130)
    labels = torch.tensor([[5, -1, 7], [0, 129, -1]], device=DEVICE)
    mask = torch.tensor([[True, True, False], [True, True, True]], device=DEVICE)
    counts = [[True, False, False], [True, True, False]]
    student[0, 1:] = NAN
    teacher[1, 2] = INF
    found = token_stats(student, teacher, labels, mask=mask, ignore_index=-1, backend=backend)
    assert found.counts.tolist() == counts
    for name in NAMES:
        assert (getattr(found, name)[found.counts == 0] == 0).all(), name
    keep = found.counts == 1
    check(TokenStats(*(x[keep] for x in found)), student[keep], teacher[keep], labels[keep], backend, "rows")
    # Without labels, or without a mask.
    only_mask = token_stats(student[1:], teacher[1:], mask=~labels[1:].eq(-1), backend=backend)
    assert torch.equal(only_mask.reverse_kl, found.reverse_kl[1:])
    assert only_mask.student_logprob[0, :2].isnan().all()
    assert only_mask.student_logprob[0, 2] == 0
    assert found.summary()["count"] == 3
    assert all(math.isfinite(x) for x in found.summary().values())


def test_shift_and_vocab_size(backend: str) -> None:
    student, teacher = pair(2, 5, 90)
    wide = torch.cat((student, torch.full((2, 5, 6), 50.0, device=DEVICE)), -1)
    labels = torch.tensor([[-100, 4, 17, 89, -100], [-100, -100, 3, 60, 5]], device=DEVICE)
    mask = torch.rand(2, 5, device=DEVICE) > 0.3
    got = token_stats(wide, teacher, labels, mask=mask, shift=True, vocab_size=90, backend=backend)
    want = token_stats(
        student[:, :-1], teacher[:, :-1], labels[:, 1:], mask=mask[:, 1:], backend=backend
    )  # fmt: skip
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert got.forward_kl.shape == (2, 4)
    assert (got.forward_kl > 0).sum() == got.counts.sum() > 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_other_integers(backend: str, dtype: torch.dtype) -> None:
    student, teacher = pair(4, 90)
    labels = torch.tensor([0, 89, 7, 7], device=DEVICE)
    found = token_stats(student, teacher, labels.to(dtype), backend=backend)
    assert torch.equal(found.student_logprob, token_stats(student, teacher, labels, backend=backend)[4])


@pytest.mark.parametrize("shape", [(0, 90), (3, 0, 90), (90,)])
def test_no_rows_and_one(backend: str, shape: tuple[int, ...]) -> None:
    student, teacher = pair(*shape)
    found = token_stats(student, teacher, backend=backend)
    assert all(x.shape == shape[:-1] for x in found)
    assert found.counts.all()
    if len(shape) == 1:
        check(TokenStats(*(x[None] for x in found)), student[None], teacher[None], None, backend, "0-d")


@pytest.mark.parametrize("make", VIEWS)
def test_a_view_gives_the_bits_of_its_copy(backend: str, make) -> None:
    student, teacher = pair(2, 3, 1030)
    labels, mask = tokens_of(student), torch.tensor([[True, True, False], [True] * 3], device=DEVICE)
    want = token_stats(student, teacher, labels, mask=mask, backend=backend)
    strided = labels.T.contiguous().T, mask.T.contiguous().T
    got = token_stats(make(student), make(teacher), strided[0], mask=strided[1], backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    one = teacher[:1, :1]
    expanded = token_stats(student, one.expand(2, 3, 1030), labels, backend=backend)
    repeated = token_stats(student, one.repeat(2, 3, 1), labels, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(expanded, repeated, strict=True))


def test_leading_dimensions_that_two_strides_cannot_walk(backend: str) -> None:
    student, teacher = (x.permute(3, 1, 0, 2, 4) for x in pair(2, 3, 2, 4, 60))
    labels = tokens_of(student)
    got = token_stats(student, teacher, labels, backend=backend)
    want = token_stats(student.contiguous(), teacher.contiguous(), labels, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.usefixtures("wide_programs")
def test_same_bits_every_time_and_among_others(backend: str) -> None:
    n, vocab = (3, 40001) if interpreted(backend) else (41, 70001)
    student, teacher = pair(n, vocab, spread=0.3)
    teacher[n - 1, 7] = -INF
    labels = tokens_of(student)
    all_rows = token_stats(student, teacher, labels, backend=backend)
    again = token_stats(student, teacher, labels, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(all_rows[:7], again[:7], strict=True))
    for row in (0, n // 2, n - 1):
        only = slice(row, row + 1)
        alone = token_stats(student[only], teacher[only], labels[only], backend=backend)
        assert all(torch.equal(x[only], y) for x, y in zip(all_rows, alone, strict=True))


@pytest.mark.skipif(not native.available(), reason="installed without compiled kernels")
def test_native_bits_do_not_depend_on_the_threads() -> None:
    student, teacher = pair(2, 100001, spread=0.3)
    student, teacher = student.cpu(), teacher.cpu()
    labels, threads = torch.tensor([0, 100000]), torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(token_stats(student, teacher, labels, backend="native"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts the CPU allocator")
@pytest.mark.parametrize("other_backend", ["eager", "native"])
def test_extra_memory_is_bounded(other_backend: str) -> None:
    if other_backend == "native" and not native.available():
        pytest.skip("installed without compiled kernels")
    student, teacher = pair(64, 128256)
    peak = peak_extra_bytes(lambda: token_stats(student, teacher, backend=other_backend))
    assert peak < 64 * 2**20, f"{peak / 2**20:.1f} MiB"


# -- operator ------------------------------------------------------------------------------------------------


def test_opcheck(backend: str) -> None:
    student, teacher = pair(2, 3, 40)
    rows, labels = torch.rand(2, 3, device=DEVICE) > 0.5, tokens_of(student)
    # Without labels there are NaNs, which opcheck does not take for equal.
    for optional in ((None, labels), (rows, labels)):
        arguments = (student, teacher, *optional, 1.0, 0.5, backend)
        torch.library.opcheck(torch.ops.kl_gpu.token_stats.default, arguments)


def test_a_token_that_is_no_column_is_nan_where_nobody_looks(backend: str) -> None:
    student, teacher = pair(1, 4, 40)
    labels = torch.tensor([[-1, 40, 2**40, 39]], device=DEVICE)
    found = ops.token_stats(student, teacher, None, labels, 1.0, 1.0, backend)
    assert found[4:6, 0].isnan().all(1).tolist() == [False, False]
    assert found[4:6, 0].isnan()[:, :3].all()
    assert not found[4:6, 0, 3].isnan().any()


def test_one_graph(backend: str) -> None:
    def statistics(student, teacher, labels):
        return token_stats(student, teacher, labels, shift=True, temperature=2.0, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(statistics, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, time in ((2, 5), (3, 7)):
        student, teacher = pair(batch, time, 90)
        labels = torch.randint(-1, 90, (batch, time), device=DEVICE)
        labels[labels < 0] = -100
        student.requires_grad_()
        plain, traced = statistics(student, teacher, labels), compiled(student, teacher, labels)
        assert all(torch.equal(x, y) for x, y in zip(plain, traced, strict=True))
        assert not any(x.requires_grad for x in (*plain, *traced))
        assert plain.forward_kl.max() > 1e-3


# -- summary -------------------------------------------------------------------------------------------------


def test_summary_by_hand() -> None:
    def row(*numbers: float) -> Tensor:
        return torch.tensor(numbers)

    kl = row(0.3, 0.0, 0.1, 0.2, 0.9)
    log_q, log_p = row(0.5, 1.0, 0.25, 1.0, 1.0).log(), row(0.25, 1.0, 0.5, 0.5, 1.0).log()
    counts = row(1, 0, 1, 1, 0)
    overlap = kl / 2, kl / 3, 1 - kl / 3
    agree = row(1, 0, 0, 1, 0)
    found = TokenStats(kl, 2 * kl, kl + 1, kl + 2, log_q, log_p, agree, counts, *overlap).summary()
    assert all(type(x) is float for x in found.values())
    want = {
        "count": 3, "forward_kl_mean": 0.2, "forward_kl_mean_se": 0.1 / math.sqrt(3),
        "forward_kl_median": 0.2, "forward_kl_max": 0.3, "forward_kl_p1": 0.102, "forward_kl_p99.9": 0.2998,
        "reverse_kl_mean": 0.4, "student_entropy_mean": 1.2, "teacher_entropy_mean": 2.2,
        "js_mean": 0.1, "js_mean_se": 0.05 / math.sqrt(3), "tv_mean": 0.2 / 3, "acceptance_mean": 1 - 0.2 / 3,
        "top1_agree": 2 / 3, "top1_agree_se": math.sqrt(2 / 9 / 2),
        "student_ppl": 2.0, "teacher_ppl": 16 ** (1 / 3), "ppl_ratio": 2 / 16 ** (1 / 3),
        "log_ppl_ratio": -math.log(2) / 3, "delta_p_mean": 0.5 / 3, "delta_p_rms": math.sqrt(0.375 / 3),
        "forward_kl_min": 0.1, "ppl_difference": 2 - 16 ** (1 / 3), "delta_p_min": -0.25, "delta_p_max": 0.5,
        "delta_p_median": 0.25, "delta_p_p25": 0.0, "delta_p_p75": 0.375, "delta_p_p0.1": -0.249,
        "log_ppl_correlation": float(np.corrcoef(np.log([0.5, 0.25, 1]), np.log([0.25, 0.5, 0.5]))[0, 1]),
    }  # fmt: skip
    for name, value in want.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


def test_batches_and_means() -> None:
    student, teacher = pair(4, 6, 50)
    labels = torch.randint(0, 50, (4, 6), device=DEVICE)
    mask = torch.rand(4, 6, device=DEVICE) > 0.3
    whole = token_stats(student, teacher, labels, mask=mask)
    keep = mask.cpu()
    parts = (token_stats(*x[:3], mask=x[3]) for x in zip(student, teacher, labels, mask, strict=True))
    joined = TokenStats.cat(parts)
    assert all(torch.equal(x, y.cpu()[keep]) for x, y in zip(joined, whole, strict=True))
    assert joined.summary() == whole.summary()
    means = whole.mean()
    assert int(whole.count) == int(mask.sum()) == joined.forward_kl.numel()
    for name in ("forward_kl", "student_logprob", "acceptance"):
        rows = getattr(whole, name)
        torch.testing.assert_close(getattr(means, name), rows[mask].mean())
        assert getattr(means, name) != rows.mean()
    assert token_stats(student, teacher, mask=mask & False).mean().forward_kl.isnan()
    with pytest.raises(ValueError, match="at least one TokenStats"):
        TokenStats.cat([])


def test_summary_without_labels_without_rows_and_with_infinities() -> None:
    student, teacher = pair(6, 50)
    plain = token_stats(student, teacher).summary()
    assert "student_ppl" not in plain
    assert plain["count"] == 6
    none = token_stats(student, teacher, mask=torch.zeros(6, dtype=torch.bool, device=DEVICE)).summary()
    assert none.pop("count") == 0
    assert all(math.isnan(x) for x in none.values())
    one = token_stats(student[:1], teacher[:1]).summary()
    assert one["forward_kl_median"] == one["forward_kl_mean"] == one["forward_kl_p99"] > 0
    assert math.isnan(one["forward_kl_mean_se"])
    student[:3, 4] = -INF
    some = token_stats(student, teacher, torch.full((6,), 4, device=DEVICE)).summary()
    assert some["forward_kl_mean"] == some["forward_kl_max"] == some["student_ppl"] == INF
    assert 0 < some["forward_kl_p10"] < INF
    assert 0 < some["reverse_kl_mean"] < INF
    student[0, 0] = NAN
    worse = token_stats(student, teacher).summary()
    assert all(math.isnan(worse[f"forward_kl_{name}"]) for name in ("mean", "median", "p1", "max"))
    assert worse["teacher_entropy_mean"] > 0
    same = token_stats(teacher, teacher, torch.zeros(6, dtype=torch.long, device=DEVICE)).summary()
    assert (same["delta_p_rms"], same["delta_p_rms_se"], same["ppl_ratio"]) == (0, 0, 1)


# -- refusals ------------------------------------------------------------------------------------------------

S, T = torch.zeros(2, 3, 8), torch.ones(2, 3, 8)
LABELS = torch.zeros(2, 3, dtype=torch.long)

CASES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("student a list", {"student_logits": [[0.0]]}, TypeError, "student_logits.*tensor.*list"),
    ("integer teacher", {"teacher_logits": T.long()}, TypeError, "teacher_logits.*float16.*int64"),
    ("no columns", {"student_logits": S[..., :0], "teacher_logits": T[..., :0]}, ValueError, "student.*0"),
    ("another N", {"teacher_logits": T[:1]}, ValueError, r"leading shape.*\(1, 3, 8\)"),
    ("another device", {"teacher_logits": T.to("meta")}, ValueError, "one device.*cpu.*meta"),
    ("V differs", {"teacher_logits": torch.ones(2, 3, 9)}, ValueError, "vocab_size.*8.*9"),
    ("vocab_size past V", {"vocab_size": 9}, ValueError, r"vocab_size.*\[1, 8\].*9"),
    ("vocab_size float", {"vocab_size": 8.0}, TypeError, "vocab_size.*int.*float"),
    ("temperature 0", {"temperature": 0.0}, ValueError, "temperature.*> 0.*0.0"),
    ("temperature a string", {"temperature": "1"}, TypeError, "temperature.*float.*str"),
    ("teacher_temperature NaN", {"teacher_temperature": NAN}, ValueError, "teacher_temperature.*nan"),
    ("mask float", {"mask": torch.ones(2, 3)}, TypeError, "mask.*bool.*float32"),
    ("mask of the wrong shape", {"mask": torch.ones(3).bool()}, ValueError, r"mask.*\(2, 3\).*\(3,\)"),
    ("labels float", {"labels": torch.ones(2, 3)}, TypeError, "labels.*integer.*float32"),
    ("labels of the wrong shape", {"labels": LABELS.T}, ValueError, r"labels.*\(2, 3\).*\(3, 2\)"),
    ("labels elsewhere", {"labels": LABELS.to("meta")}, ValueError, "labels.*cpu.*meta"),
    ("a label past V", {"labels": LABELS + 8}, ValueError, r"labels.*\[0, 8\).*ignore_index.*8"),
    ("a label past vocab_size", {"labels": LABELS + 7, "vocab_size": 7}, ValueError, r"labels.*\[0, 7\).*7"),
    ("a label below 0", {"labels": LABELS - 1}, ValueError, r"labels.*\[0, 8\).*-1"),
    ("ignore_index float", {"ignore_index": -100.0}, TypeError, "ignore_index.*int.*float"),
    ("shift an int", {"shift": 1}, TypeError, "shift.*True or False"),
    ("shift of 2-D", {"shift": True, "student_logits": S[0], "teacher_logits": T[0]}, ValueError, "shift"),
    ("backend unknown", {"backend": "cuda"}, ValueError, "backend.*triton.*eager.*cuda"),
    ("backend an int", {"backend": 1}, TypeError, "backend.*string.*int"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_refused(
    arguments: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a kernel was started")

    monkeypatch.setattr(ops, "token_stats", refuse)
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        kl_gpu.token_stats(**({"student_logits": S, "teacher_logits": T} | arguments))


def test_a_label_outside_does_not_matter_where_the_row_does_not_count() -> None:
    mask = torch.tensor([[True, False, True], [True, True, True]])
    labels = LABELS.clone()
    labels[0, 1] = 99
    assert token_stats(S, T, labels, mask=mask).student_logprob[0, 1] == 0


# -- rows of a trained model: few tops above a floor, and not the same on both sides -------------------------


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    "tops",
    [
        ((10, 13, 0), (260, 12, 14), (500, 8, -17)),
        ((3758, 15, -2), (3291, -18, -4), (2692, 10, -22)),
    ],
)
def test_tops_in_different_tiles(backend: str, tops: tuple[tuple[int, int, int], ...], swapped: bool) -> None:
    """Columns seen from where one side's top lies lose the other's sum when that side's top comes."""
    student, teacher = torch.full((2, 1, 4096), -20.0, device=DEVICE)
    for column, s, t in tops:
        student[0, column], teacher[0, column] = s, t
    if swapped:
        student, teacher = teacher, student
    check(token_stats(student, teacher, backend=backend), student, teacher, None, backend, f"tops {tops[0]}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tops_anywhere(backend: str, dtype: torch.dtype) -> None:
    """Single tokens of both sides drawn one by one, as the rows of two trained models have them."""
    n = 6 if interpreted(backend) else 400
    generator = torch.Generator().manual_seed(9)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    teacher = uniform(n, 1) * 4 * torch.randn(n, 4096, generator=generator, dtype=torch.float64) - 12
    student = teacher + uniform(n, 1) * torch.randn(n, 4096, generator=generator, dtype=torch.float64)
    for _ in range(5):
        column = torch.where(uniform(n, 1) < 0.4, 64, 4096) * uniform(n, 1)
        for side in (student, teacher):
            side.scatter_(1, column.long(), uniform(n, 1, low=-22.0, high=18.0))
    student, teacher = student.to(DEVICE, dtype), teacher.to(DEVICE, dtype)
    labels = torch.where(torch.arange(n, device=DEVICE) % 2 == 0, student.argmax(-1), teacher.argmax(-1))
    found = token_stats(student, teacher, labels, backend=backend)
    check(found, student, teacher, labels, backend, f"few tops {dtype}")


@pytest.mark.parametrize("temperatures", [(0.5, 0.5), (1.0, 1.0), (0.5, 1.3), (1e-6, 1e-6)])
@pytest.mark.parametrize("masked", ["student", "teacher"])
def test_columns_at_the_lowest_number(backend: str, temperatures: tuple[float, float], masked: str) -> None:
    options = {"temperature": temperatures[0], "teacher_temperature": temperatures[1]}
    student, teacher = pair(3, 300)
    low, other = (student, teacher) if masked == "student" else (teacher, student)
    low[:, 100:] = torch.finfo(torch.float32).min
    other[:, 100:] = -200.0  # no mass opposite, or one of the KLs would be vast
    other[:, 7] = low[:, 7] = 20.0
    labels = torch.tensor([7, 3, 7], device=DEVICE)
    found = token_stats(student, teacher, labels, backend=backend, **options)
    for name in NAMES[2:]:
        assert torch.isfinite(getattr(found, name)).all(), name
    check(found, student, teacher, labels, backend, f"lowest {masked} T={temperatures}", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overlap(backend: str, dtype: torch.dtype) -> None:
    """js, tv and α: near to each other, apart, of an α of 1e-13, of columns that one side lacks."""
    student, teacher = pair(6, 700)
    student[0] = teacher[0] + 1e-3 * torch.randn(700, device=DEVICE)
    student[1, 17] += 35
    teacher[1, 600] += 35
    teacher[1, 17] -= 12
    student[2, 5] = teacher[3, :300] = -INF
    student[4] = teacher[4]
    student[5, 3] = NAN
    student, teacher = student.to(dtype), teacher.to(dtype)
    found = kl_gpu.token_stats(student, teacher, backend=backend)
    want = reference.token_stats(to_numpy(student), to_numpy(teacher))
    assert want["acceptance"][1] < 1e-11
    for name in ("js", "tv", "acceptance"):
        got, exact = to_numpy(getattr(found, name)), want[name]
        assert np.isnan(got[5])
        exact = np.where(exact < 1e-15, 0, exact)
        error = np.abs(got - exact)[:5]
        slack = 5e-7 * np.array([1, 0, 1, 1, 0]) * (name != "js")
        assert (error <= 5e-6 * exact[:5] + slack).all(), (name, got, exact)
    assert found.js[4] == found.tv[4] == 0
    assert found.acceptance[4] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_overlap_of_peaked_rows(backend: str, dtype: torch.dtype) -> None:
    """Tokens that hold nearly all the mass, a js of 1e-13 to 0.1, and sides that lie far apart."""
    student, teacher = raised_token(4, 900, torch.Generator().manual_seed(7))
    student[0] = teacher[0] + 1e-2 * (student[0] - teacher[0])
    for side in (student, teacher):
        side[:2, 17] = teacher[:2].amax(-1) + 18
    student, teacher = (x.to(DEVICE, dtype) for x in (student + 30, teacher))
    found = kl_gpu.token_stats(student, teacher, temperature=1.3, backend=backend)
    want = reference.token_stats(to_numpy(student), to_numpy(teacher), temperature=1.3)
    assert (want["js"][:2] < 1e-5).all()
    assert (want["js"][2:] > 1e-4).all()
    for name, slack in (("js", 0), ("tv", 6e-6), ("acceptance", 0)):
        np.testing.assert_allclose(to_numpy(getattr(found, name)), want[name], rtol=5e-6, atol=slack)


def test_overlap_where_one_logit_towers(backend: str) -> None:
    """A column far above the others on one side alone: KLs of tens or thousands of nats, an ordinary js."""
    rows = [[0.0, 89.7343, -897.831], [0.0, 7780.0, -800.0], [5000.0, 5000.5, 5001.0], [0.0, -0.36, 89.7]]
    student = torch.tensor(rows, device=DEVICE)
    teacher = torch.tensor([[0.0, 0.0, -0.36186]] * 3 + [[0.0, 89.7, -0.3]], device=DEVICE)
    for s, t in ((student, teacher), (teacher, student)):
        found = kl_gpu.token_stats(s, t, backend=backend)
        want = reference.token_stats(to_numpy(s), to_numpy(t))
        assert (np.maximum(want["forward_kl"], want["reverse_kl"])[:2] > 10).all()
        for name, slack in (("js", 0), ("tv", 1e-6), ("acceptance", 0)):
            np.testing.assert_allclose(to_numpy(getattr(found, name)), want[name], rtol=5e-6, atol=slack)


def test_without_overlap(backend: str) -> None:
    student, teacher = pair(3, 70)
    mask = torch.tensor([True, False, True], device=DEVICE)
    full = kl_gpu.token_stats(student, teacher, mask=mask, backend=backend)
    assert all(x[1] == 0 for x in full[:-3] if not x[0].isnan())
    assert full.js[1] == full.tv[1] == full.acceptance[1] == 0
    less = kl_gpu.token_stats(student, teacher, mask=mask, backend=backend, overlap=False)
    for x, y in zip(less[:4], full[:4], strict=True):
        assert torch.equal(x, y)
    for x in less[8:]:
        assert x[[0, 2]].isnan().all()
        assert x[1] == 0
    assert full.summary()["acceptance_mean"] == pytest.approx(full.acceptance[[0, 2]].mean().item())


def test_the_fields_keep_their_places() -> None:
    fields = kl_gpu.TokenStats._fields
    assert fields[:3] == ("forward_kl", "reverse_kl", "student_entropy")
    assert fields[6:] == ("top1_agree", "counts", "js", "tv", "acceptance")

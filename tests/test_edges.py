"""Every row of the edge table, for every backend, kind and direction of gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import kl_gpu
from kl_gpu import reference
from kl_gpu.kinds import KINDS
from support import DEVICE, check_gradients, check_value, expected, normalisers, pair, to_numpy

INF = math.inf
# Widths that are one masked tile, and whole tiles with a tail.
WIDTHS = (7, 2055)


def evaluate(student, teacher, kind, backend, **options):
    """Per-row values and both gradients of their sum."""
    student, teacher = student.detach().clone().requires_grad_(), teacher.detach().clone().requires_grad_()
    value = kl_gpu.divergence(student, teacher, kind, reduction="none", backend=backend, **options)
    value.sum().backward()
    return value.detach(), student.grad, teacher.grad


KLS = ("forward_kl", "reverse_kl")


def sides(kind: str, weights, other):
    """(student, teacher) where `weights` plays a of KL(a‖b); its own inverse."""
    return (
        KINDS[kind].as_ab(weights, other) if KINDS[kind].expectation_under == "student" else (other, weights)
    )


def by_weights(kind: str, grad_student, grad_teacher):
    return (
        (grad_student, grad_teacher)
        if KINDS[kind].expectation_under == "student"
        else (grad_teacher, grad_student)
    )


@pytest.mark.parametrize("kind", KLS)
@pytest.mark.parametrize("vocab", WIDTHS)
def test_zero_probability_on_the_weights_side(backend: str, kind: str, vocab: int) -> None:
    other, weights = pair(4, vocab)
    weights[1, 3] = -INF
    weights[2, vocab // 2 :] = -INF
    weights[3, : vocab - 1] = -INF
    student, teacher = sides(kind, weights, other)
    value, *grads = evaluate(student, teacher, kind, backend)
    assert torch.isfinite(value).all()
    assert all(torch.isfinite(g).all() for g in grads)
    check_value(value, student, teacher, kind, backend, "a = 0")
    finite_s, finite_t = student.clamp_min(-1e4), teacher.clamp_min(-1e4)
    check_gradients(finite_s, finite_t, tuple(grads), kind, backend, "a = 0")
    assert (by_weights(kind, *grads)[0][weights == -INF] == 0).all()


@pytest.mark.parametrize("kind", KLS)
@pytest.mark.parametrize("vocab", WIDTHS)
@pytest.mark.parametrize("level", [0.0, -200.0])
def test_zero_probability_on_the_other_side(backend: str, kind: str, vocab: int, level: float) -> None:
    # At level −200 the weight underflows to 0 in float32; it still is not 0.
    other, weights = pair(3, vocab)
    other[1, 3] = -INF
    weights[1, 3] = level
    student, teacher = sides(kind, weights, other)
    value, *grads = evaluate(student, teacher, kind, backend)
    assert value[1] == INF
    check_value(value[::2], student[::2], teacher[::2], kind, backend, "b = 0")
    to_weights, to_other = by_weights(kind, *grads)
    assert torch.isnan(to_weights[1]).all(), "an infinite divergence must not train silently"
    b_minus_a = other.double().softmax(-1) - weights.double().softmax(-1)
    torch.testing.assert_close(to_other.double(), b_minus_a, rtol=0, atol=2e-6)
    assert to_other[1].abs().max() > 1e-3
    assert all(torch.isfinite(g[::2]).all() for g in grads)


@pytest.mark.parametrize("kind", KLS)
def test_an_infinite_value_leaves_the_other_gradient_exact(backend: str, kind: str) -> None:
    # The other side's mass lies where the weights have next to none: its normaliser must not be summed
    # from large ratios times small weights.
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(64, 33, generator=generator).to(DEVICE)
    other = 20 * torch.randn(64, 33, generator=generator).to(DEVICE)
    other[:, 3] = -INF
    student, teacher = sides(kind, weights, other)
    value, *grads = evaluate(student, teacher, kind, backend)
    assert (value == INF).all()
    p, q = weights.double().softmax(-1), other.double().softmax(-1)
    error = (by_weights(kind, *grads)[1].double() - (q - p)).abs()
    assert (error <= (2e-6 + 6e-8) * torch.maximum(p, q)).all()


@pytest.mark.pairs
@pytest.mark.parametrize("vocab", WIDTHS)
@pytest.mark.parametrize("level", [1.0, -200.0])
def test_zero_probabilities_as_the_reference_has_them(
    backend: str, kind: str, vocab: int, level: float
) -> None:
    """Holes in the teacher, in the student, in both at different columns and at the same: row by row."""
    student, teacher = pair(6, vocab)
    teacher[1, 3] = teacher[3, 3] = teacher[4, 2:4] = teacher[5, : vocab - 1] = -INF
    student[2, 5] = student[3, 5] = student[4, 3:5] = student[5, 1:] = -INF
    # At level −200 the probability opposite a hole underflows to 0 in float32; it still is not 0.
    student[1, 3] = teacher[2, 5] = level
    value, *grads = evaluate(student, teacher, kind, backend)
    s, t = to_numpy(student), to_numpy(teacher)
    want, want_grads = reference.divergence(s, t, kind), reference.gradients(s, t, kind)
    infinite = np.isinf(want)
    np.testing.assert_array_equal(np.isinf(to_numpy(value)), infinite)
    keep = torch.as_tensor(~infinite, device=DEVICE)
    check_value(value[keep], student[keep], teacher[keep], kind, backend, "holes")
    log_q, log_p = normalisers(student, teacher)
    with np.errstate(invalid="ignore"):
        r = np.nan_to_num(np.abs(log_p - log_q), nan=0.0, posinf=1.0)
    ratio = np.maximum(np.maximum(1.0, r), np.where(infinite, 1.0, want)[:, None])
    bound = 2e-6 * np.exp(np.maximum(log_p, log_q)) * ratio + 1e-38
    for grad, exact in zip(grads, want_grads, strict=True):
        np.testing.assert_array_equal(np.isnan(to_numpy(grad)), np.isnan(exact))
        assert (np.abs(to_numpy(grad) - exact) <= bound)[~np.isnan(exact)].all()


@pytest.mark.parametrize("vocab", WIDTHS)
def test_a_column_excluded_on_both_sides_does_not_exist(backend: str, kind: str, vocab: int) -> None:
    student, teacher = pair(4, vocab, spread=0.1)
    keep = torch.rand(vocab, device=DEVICE) > 0.4
    keep[0] = True
    student[:, ~keep] = -INF
    teacher[:, ~keep] = -INF
    value, *grads = evaluate(student, teacher, kind, backend)
    _, *want_grads = evaluate(student[:, keep], teacher[:, keep], kind, "eager")
    check_value(value, student[:, keep], teacher[:, keep], kind, backend, "both −inf")
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert (grad[:, ~keep] == 0).all()
        torch.testing.assert_close(grad[:, keep], want_grad, rtol=1e-4, atol=2e-7)
    identical = evaluate(student, student, kind, backend)
    assert all((x == 0).all() for x in identical)


@pytest.mark.pairs
@pytest.mark.parametrize("vocab", WIDTHS)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_row_without_a_distribution(backend: str, kind: str, side: str, vocab: int) -> None:
    logits = dict(zip(("student", "teacher"), pair(9, vocab), strict=True))
    clean = evaluate(*logits.values(), kind, backend)
    bad = logits[side]
    bad[1], bad[3, 0], bad[4, -1], bad[5, 0], bad[7, -1] = -INF, math.nan, math.nan, INF, INF
    spoilt = evaluate(*logits.values(), kind, backend)
    for x, y in zip(spoilt, clean, strict=True):
        for row in range(9):
            if row in (1, 3, 4, 5, 7):
                assert torch.isnan(x[row]).all(), row
            else:
                assert torch.equal(x[row], y[row]), f"row {row} noticed another"


def test_nan_opposite_a_zero(backend: str, kind: str) -> None:
    student, teacher = pair(1, 50)
    for nan_side, zero_side in ((student, teacher), (teacher, student)):
        nan, zero = nan_side.clone(), zero_side.clone()
        nan[0, 5], zero[0, 5] = math.nan, -INF
        s, t = (nan, zero) if nan_side is student else (zero, nan)
        assert all(torch.isnan(x).all() for x in evaluate(s, t, kind, backend))


@pytest.mark.parametrize("vocab", WIDTHS)
def test_masked_rows_are_not_read(backend: str, kind: str, vocab: int) -> None:
    student, teacher = pair(4, vocab)
    mask = torch.tensor([True, False, True, False], device=DEVICE)
    clean = evaluate(student, teacher, kind, backend)
    student[1], teacher[3] = math.nan, INF
    masked = evaluate(student, teacher, kind, backend, mask=mask)
    for x, y in zip(masked, clean, strict=True):
        assert (x[~mask] == 0).all()
        assert torch.equal(x[mask], y[mask])


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
def test_no_row_counts(backend: str, kind: str, reduction: str) -> None:
    student, teacher = pair(3, 40)
    student.requires_grad_()
    student.data[0] = math.nan
    labels = torch.full((3,), -100, device=DEVICE)
    loss = kl_gpu.divergence(student, teacher, kind, labels=labels, reduction=reduction, backend=backend)
    assert loss.item() == 0
    loss.backward()
    assert (student.grad == 0).all()


def test_no_rows(backend: str, kind: str) -> None:
    for shape in ((0, 9), (2, 0, 9)):
        student = torch.zeros(shape, device=DEVICE, requires_grad=True)
        teacher = torch.zeros(shape, device=DEVICE)
        rows = kl_gpu.divergence(student, teacher, kind, reduction="none", backend=backend)
        assert rows.shape == shape[:-1]
        for reduction in ("sum", "mean", "batchmean"):
            loss = kl_gpu.divergence(student, teacher, kind, reduction=reduction, backend=backend)
            assert loss.item() == 0
            loss.backward()
        assert student.grad.shape == shape


def test_one_column(backend: str, kind: str) -> None:
    student, teacher = pair(5, 1)
    assert all((x == 0).all() for x in evaluate(student, teacher, kind, backend))


def test_one_distribution_without_leading_shape(backend: str, kind: str) -> None:
    student, teacher = pair(33)
    for reduction in ("none", "sum", "mean", "batchmean"):
        got = kl_gpu.divergence(student, teacher, kind, reduction=reduction, backend=backend)
        assert got.shape == ()
        check_value(got, student, teacher, kind, backend, "no leading shape")


def test_a_uniform_teacher_as_an_expanded_scalar(backend: str, kind: str) -> None:
    student = 2 * torch.randn(6, 3000, device=DEVICE)
    teacher = torch.zeros((), device=DEVICE).expand(6, 3000)
    got = kl_gpu.divergence(student, teacher, kind, reduction="none", backend=backend)
    check_value(got, student, teacher, kind, backend, "uniform teacher")


@pytest.mark.pairs
@pytest.mark.parametrize(
    ("dtype", "low"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, -1e9)]
)
@pytest.mark.parametrize("masked", ["student", "teacher", "both", "each its own"])
def test_columns_masked_with_a_number(backend: str, kind: str, dtype, low: float | None, masked: str) -> None:
    """None is the dtype's lowest. A divergence that needs the missing mass is vast then, and never NaN."""
    student, teacher = (x.to(dtype) for x in pair(3, 2055))
    low = torch.finfo(dtype).min if low is None else low
    if masked != "teacher":
        student[:, 3] = student[:, 2000:] = low
    if masked not in ("student", "each its own"):
        teacher[:, 3] = teacher[:, 2000:] = low
    if masked == "each its own":
        teacher[:, 5] = low
    value, *grads = evaluate(student, teacher, kind, backend)
    want = expected(student, teacher, kind)
    check_value(value, student, teacher, kind, backend, f"masked {masked} {low}")
    vast = want > 1e2
    got = to_numpy(value)[vast]
    assert (np.isinf(got) | (np.abs(got / want[vast] - 1) < 1e-3)).all()
    if not vast.any():
        check_gradients(student, teacher, tuple(grads), kind, backend, f"masked {masked} {low}")


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperatures", [(0.5, 0.5), (0.5, 1.3)])
@pytest.mark.parametrize("masked", ["student", "teacher"])
def test_the_lowest_number_over_a_temperature_below_1(
    backend: str, kind: str, dtype: torch.dtype, temperatures: tuple[float, float], masked: str
) -> None:
    """The scaled logit is −inf in float32; the column exists, and what has no weight there is finite."""
    options = {"temperature": temperatures[0], "teacher_temperature": temperatures[1]}
    logits = dict(zip(("student", "teacher"), (x.to(dtype) for x in pair(3, 1030)), strict=True))
    other = logits["teacher" if masked == "student" else "student"]
    low, high = logits[masked], other
    low[0, 3] = low[1, 700:] = torch.finfo(dtype).min
    high[1, 700:] = -1000.0  # no mass opposite: every divergence is finite there
    value, *grads = evaluate(**logits, kind=kind, backend=backend, **options)
    want = expected(logits["student"], logits["teacher"], kind, **options)
    fine = want <= 1e2
    assert fine[1:].all()
    rows = torch.as_tensor(fine, device=DEVICE)
    student, teacher = logits["student"][rows], logits["teacher"][rows]
    where = f"lowest {masked} T={temperatures}"
    check_value(value[rows], student, teacher, kind, backend, where, **options)
    check_gradients(student, teacher, tuple(g[rows] for g in grads), kind, backend, where, **options)
    assert (value[~rows] > 1e2).all()


@pytest.mark.parametrize("temperatures", [(1e-6, 1e-6), (1e-3, 1e-3), (1.0, 1e-6), (1e-5, 1.0)])
def test_temperatures_near_0(backend: str, kind: str, temperatures: tuple[float, float]) -> None:
    """Most rows are one column a side then; tops that agree, that differ, and that are nearly equal."""
    options = {"temperature": temperatures[0], "teacher_temperature": temperatures[1]}
    student, teacher = pair(5, 300)
    student[1, 7], teacher[1, 7] = 20.0, 21.0
    student[2, 250], teacher[2, 7] = 20.0, 21.0
    # Opposite two columns of much the same probability in a soft teacher lies one of a hard student.
    student[3, [9, 200]] = torch.tensor((20.8, 20.75), device=DEVICE)
    teacher[3, [9, 200]] = torch.tensor((9.0, 9.1), device=DEVICE)
    student[4], teacher[4] = teacher[4], teacher[4].clone()
    value, *grads = evaluate(student, teacher, kind, backend, **options)
    want = expected(student, teacher, kind, **options)
    check_value(value, student, teacher, kind, backend, f"T={temperatures}", **options)
    vast = to_numpy(value)[want > 1e2]
    assert (vast > 1e2).all()
    assert temperatures[0] != temperatures[1] or value[4] == 0
    fine = torch.as_tensor(want <= 1e2, device=DEVICE)
    if fine.any():
        check_gradients(
            student[fine], teacher[fine], tuple(g[fine] for g in grads), kind, backend, f"T={temperatures}",
            **options,
        )  # fmt: skip


@pytest.mark.pairs
@pytest.mark.parametrize("temperatures", [(0.5, 0.5), (2.0, 0.3), (2.0, 2.0), (1.0, 0.3)])
@pytest.mark.parametrize("lowest", [torch.finfo(torch.float64).min, -5e307])
def test_the_lowest_float64_over_a_temperature(
    backend: str, kind: str, lowest: float, temperatures: tuple[float, float]
) -> None:
    # A product of −inf would be a column that does not exist, and 0 · −inf NaN.
    options = dict(zip(("temperature", "teacher_temperature"), temperatures, strict=True))
    student, teacher = torch.randn(2, 9, device=DEVICE).double(), torch.randn(2, 9, device=DEVICE).double()
    student[0, 2] = teacher[1, 4] = lowest
    for s, t in ((student, teacher), (teacher, student)):
        got = kl_gpu.divergence(s, t, kind, reduction="none", backend=backend, **options)
        want = expected(s, t, kind, **options)
        inside = want < 1e2  # elsewhere the divergence is as large as the logit
        assert inside.any() == (kind != "jeffreys")
        np.testing.assert_allclose(to_numpy(got)[inside], want[inside], rtol=5e-6)
        assert (to_numpy(got)[~inside] > 1e2).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("large", [1e302, 1e308])
def test_the_largest_float64_logits_are_told_apart(
    backend: str, kind: str, large: float, temperature: float
) -> None:
    if large == 1e302:
        student, teacher = [large, 2 * large, 0.0], [large, 0.0, 2 * large]
    else:
        student, teacher = [1e302, large, 0.0], [1e302, 0.0, large]
    s, t = (torch.tensor([x], dtype=torch.float64, device=DEVICE) for x in (student, teacher))
    value, *grads = evaluate(s, t, kind, backend, temperature=temperature)
    # One token each, and not the same: js is ln 2, tv 1, a skew divergence −ln of its β.
    want = {"js": math.log(2), "tv": 1.0, "skew_forward_kl": math.log(10), "skew_reverse_kl": math.log(10)}
    if kind in want:
        np.testing.assert_allclose(value.item(), want[kind], rtol=5e-6)
        assert all((g == 0).all() for g in grads)
    elif kind in KLS and large == 1e302:
        np.testing.assert_allclose(value.item(), 2 * large / temperature, rtol=5e-6)
    else:
        assert value.item() > 1e100  # past 2^1022 a size is all that is kept of a product


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_entropies_of_the_largest_float64_logits(backend: str, temperature: float) -> None:
    if backend == "triton":
        pytest.skip("its statistics take the difference of products")
    student = torch.tensor([[1e302, 1e308, 0.0]], dtype=torch.float64, device=DEVICE)
    teacher = torch.tensor([[1e302, 0.0, 1e308]], dtype=torch.float64, device=DEVICE)
    labels = torch.tensor([1], device=DEVICE)
    found = kl_gpu.token_stats(student, teacher, labels, temperature=temperature, backend=backend)
    for entropy in (found.student_entropy, found.teacher_entropy):
        assert entropy.item() < 1e-290
    assert found.student_logprob.item() == 0
    assert found.teacher_logprob.item() < -1e307
    assert found.top1_agree.item() == 0


@pytest.mark.parametrize(("size", "dtype"), [(1e20, torch.float64), (1e30, torch.float32)])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_statistics_of_equal_logits_far_out(
    backend: str, size: float, dtype: torch.dtype, temperature: float
) -> None:
    if backend == "triton":
        pytest.skip("its statistics take the difference of products")
    logits = torch.full((2, 8), size, dtype=dtype, device=DEVICE)
    logits[1, 2:] /= 2
    labels = torch.tensor([1, 1], device=DEVICE)
    found = kl_gpu.token_stats(logits, logits.clone(), labels, temperature=temperature, backend=backend)
    want = [math.log(8), math.log(2)]
    for entropy in (found.student_entropy, found.teacher_entropy):
        np.testing.assert_allclose(to_numpy(entropy), want, rtol=5e-6)
    for log_p in (found.student_logprob, found.teacher_logprob):
        np.testing.assert_allclose(to_numpy(log_p), np.negative(want), rtol=5e-6)
    for kl in (found.forward_kl, found.reverse_kl):
        assert (kl == 0).all()


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperatures", [(1e-6, 1.0), (1.0, 1e-6), (1e-6, 1e-6)])
def test_scaled_logits_past_2_to_the_31(
    backend: str, kind: str, dtype: torch.dtype, temperatures: tuple[float, float]
) -> None:
    """Scaled to 4e9, where float32 numbers lie 256 apart; such a side is one column, or those that tie."""
    options = {"temperature": temperatures[0], "teacher_temperature": temperatures[1]}
    student, teacher = (
        logits * (300.0 if t < 1 else 1.0)
        for logits, t in zip(pair(4, 70, dtype=dtype), temperatures, strict=True)
    )
    student[1, 7], teacher[1, 7] = (4000.0 if t < 1 else 10.0 for t in temperatures)
    student[2, 9] = student[2, 60] = student[2].max() * 1.5  # a tie on both sides
    teacher[2, 9] = teacher[2, 60] = teacher[2].max() * 1.5
    value, *grads = evaluate(student, teacher, kind, backend, **options)
    want = expected(student, teacher, kind, **options)
    where = f"vast T={temperatures}"
    check_value(value, student, teacher, kind, backend, where, **options)
    far = want > 1e2
    np.testing.assert_allclose(to_numpy(value)[far], want[far], rtol=5e-6)
    near = torch.as_tensor(~far, device=DEVICE)
    if near.any():
        check_gradients(
            student[near], teacher[near], tuple(g[near] for g in grads), kind, backend, where, **options
        )

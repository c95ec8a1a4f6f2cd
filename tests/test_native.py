"""The compiled kernels against float64, per instruction set and dtype."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch

from kl_gpu import native

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without compiled kernels")

KINDS = ["forward_kl", "reverse_kl"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INF = float("inf")
NAN = float("nan")


# -- the judge --------------------------------------------------------------------------------------


def small_g(x: np.ndarray) -> np.ndarray:
    """expm1(x) - x without cancellation, in long double."""
    series, term = np.zeros_like(x), np.ones_like(x)
    for n in range(1, 24):
        term = term * x / n
        if n >= 2:
            series = series + term
    with np.errstate(over="ignore"):
        return np.where(np.abs(x) < 0.5, series, np.expm1(x) - x)


def reference(student, teacher, kind="forward_kl", student_scale=1.0, teacher_scale=1.0):
    """Value [..], gradient of the student and of the teacher, all rows at once, by the edge table."""
    s = np.asarray(student.detach().double().numpy() * student_scale, dtype=np.longdouble)
    t = np.asarray(teacher.detach().double().numpy() * teacher_scale, dtype=np.longdouble)
    a, b = (t, s) if kind == "forward_kl" else (s, t)
    shape = a.shape
    a, b = a.reshape(-1, shape[-1]), b.reshape(-1, shape[-1])
    value = np.full(len(a), NAN, np.longdouble)
    grad_a, grad_b = np.full(a.shape, NAN, np.longdouble), np.full(b.shape, NAN, np.longdouble)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if np.isnan(x).any() or np.isnan(y).any() or (x == INF).any() or (y == INF).any():
            continue
        if (x == -INF).all() or (y == -INF).all():
            continue
        if len(x) == 1:
            value[i], grad_a[i], grad_b[i] = 0, 0, 0
            continue
        in_a, in_b = x > -INF, y > -INF
        lse_a = x.max() + np.log(np.exp(x - x.max()).sum())
        lse_b = y.max() + np.log(np.exp(y - y.max()).sum())
        p, q = np.exp(x - lse_a), np.exp(y - lse_b)
        if (in_a & ~in_b).any():
            value[i] = INF
            grad_b[i] = q - p
            continue
        d = np.where(in_a, y - np.where(in_a, x, 0), 0)
        c = (p * d).sum()
        u = np.where(in_a, d - c, 0)
        hidden = np.exp(y[~in_a] - c - lse_a).sum()
        if np.abs(u).max() < 5000:
            mean_g, mean_x = (p * small_g(u)).sum() + hidden, (p * u).sum()
            e = mean_g + mean_x
            value[i] = mean_g - small_log_gap(e) if e < 0.5 else np.log1p(e) - mean_x
            shift = c + np.log1p(e)
        else:
            shift = lse_b - lse_a
            value[i] = shift - c
        r = np.where(in_a & in_b, np.where(in_a & in_b, d, 0) - shift, 0)
        grad_a[i] = np.where(in_a, -p * (r + value[i]), 0)
        with np.errstate(over="ignore"):
            grad_b[i] = np.where(in_a & in_b, np.where(r < 0, p * np.expm1(r), -q * np.expm1(-r)), q)
    grad_s, grad_t = (grad_b, grad_a) if kind == "forward_kl" else (grad_a, grad_b)
    return value, (grad_s * student_scale).reshape(shape), (grad_t * teacher_scale).reshape(shape)


def small_log_gap(y):
    """y - log1p(y) without cancellation."""
    if abs(y) > 0.05:
        return y - np.log1p(y)
    return sum((-1) ** n * y**n / n for n in range(2, 30))


# -- helpers ----------------------------------------------------------------------------------------


def evaluate(
    student, teacher, kind="forward_kl", rows=None, student_scale=1.0, teacher_scale=1.0, row_scale=None
):
    """Value and both gradients, by the separate calls."""
    value, stats = native.value(student, teacher, rows, kind, student_scale, teacher_scale)
    scale = torch.ones_like(value) if row_scale is None else row_scale
    grad_s, grad_t = torch.full_like(student, 7), torch.full_like(teacher, 7)
    native.gradient(student, teacher, rows, stats, scale, kind, student_scale, teacher_scale, grad_s, grad_t)
    return value, grad_s, grad_t


def as_np(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def pair(rows, columns, eps, shift=0.0, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    t = 3 * torch.randn(1, rows, columns, generator=g)
    s = t + shift + eps * torch.randn(1, rows, columns, generator=g)
    return s.to(dtype), t.to(dtype)


def half_ulp(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def assert_value(value, expected, where=""):
    value, expected = as_np(value).ravel(), np.asarray(expected, dtype=np.float64).ravel()
    np.testing.assert_array_equal(np.isnan(value), np.isnan(expected), err_msg=where)
    np.testing.assert_array_equal(np.isinf(value), np.isinf(expected), err_msg=where)
    assert not (value < 0).any(), where
    judged = (expected >= 1e-12) & (expected <= 1e2)
    error = np.abs(value - expected)[judged] / expected[judged]
    assert error.size == 0 or error.max() <= 5e-6, f"{where} {error.max():.3g}"
    tiny = expected < 1e-12
    assert (np.abs(value - expected)[tiny] <= 1e-17 + 1e-2 * expected[tiny]).all(), where


def assert_gradient(grad, expected, student, teacher, scale, weights_side, value):
    """The design's bound, then the rounding to the output's dtype."""
    s, t = as_np(student), as_np(teacher)
    with np.errstate(invalid="ignore", over="ignore"):
        log_p = t - np.logaddexp.reduce(t, -1, keepdims=True)
        log_q = s - np.logaddexp.reduce(s, -1, keepdims=True)
        bound = 2e-6 * np.exp(np.maximum(log_p, log_q)) * scale
        if weights_side:
            spread = np.where(np.isfinite(log_p - log_q), np.abs(log_p - log_q), 1)
            value = np.nan_to_num(np.asarray(value, np.float64), posinf=1.0)
            bound = bound * np.maximum(np.maximum(1, spread), value[..., None])
    grad, expected = as_np(grad), np.asarray(expected, np.float64)
    np.testing.assert_array_equal(np.isnan(grad), np.isnan(expected))
    smallest = torch.finfo(student.dtype).smallest_normal * torch.finfo(student.dtype).eps
    bound = bound + half_ulp(student.dtype) * np.abs(expected) + smallest + 1e-36
    excess = np.nanmax(np.where(np.isnan(expected), 0, np.abs(grad - expected) / bound))
    assert excess <= 1, f"{excess:.3g} times the bound"


# -- accuracy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [7, 1000, 32000])
@pytest.mark.parametrize("shift", [0.0, 0.7, -20.0])
def test_accuracy(kind, dtype, columns, shift):
    for eps in [0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 3.0, 10.0]:
        s, t = pair(3, columns, eps, shift, dtype, seed=columns)
        value, grad_s, grad_t = evaluate(s, t, kind)
        expected, want_s, want_t = reference(s, t, kind)
        assert_value(value, expected, f"eps={eps}")
        by_row = expected.reshape(1, -1)
        assert_gradient(grad_s, want_s, s, t, 1.0, kind == "reverse_kl", by_row)
        assert_gradient(grad_t, want_t, t, s, 1.0, kind == "forward_kl", by_row)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_logits_give_exact_zeros(kind, dtype):
    _, t = pair(4, 40000, 0, dtype=dtype)
    t[0, 1, 5:70] = -INF
    value, grad_s, grad_t = evaluate(t.clone(), t, kind)
    assert (value == 0).all()
    assert (grad_s == 0).all()
    assert (grad_t == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_peaked_teachers(kind, dtype):
    """Most mass on one token late in the row: the first tile's frame does not suit the row."""
    g = torch.Generator().manual_seed(1)
    t = torch.randn(1, 16, 70001, generator=g)
    t[0, torch.arange(16), torch.randint(20000, 70001, (16,), generator=g)] = 18.0
    for eps in [1e-4, 1e-2, 0.3]:
        s = (t + 2.5 + eps * torch.randn(t.shape, generator=g)).to(dtype)
        u = t.to(dtype)
        value, grad_s, _ = evaluate(s, u, kind)
        expected, want_s, _ = reference(s, u, kind)
        assert_value(value, expected, f"eps={eps}")
        assert_gradient(grad_s, want_s, s, u, 1.0, kind == "reverse_kl", expected.reshape(1, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_sorted_rows(kind):
    for descending in [False, True]:
        s, t = pair(4, 50257, 0.05, 0.7)
        t, order = t.sort(-1, descending=descending)
        s = s.gather(-1, order)
        value, _, _ = evaluate(s, t, kind)
        assert_value(value, reference(s, t, kind)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_the_weights_all_but_exclude(kind):
    """2^(a-m) underflows in fp32 where 2^x is enormous."""
    for t, s in [
        ([0.0, -95.0], [0.0, -15.0]),
        ([0.0, -200.0, 1.0], [0.0, 60.0, 1.0]),
        ([0.0, -60.0, 1.0], [0.0, -30.0, 1.0]),
    ]:
        t, s = torch.tensor([[t]]), torch.tensor([[s]])
        if kind == "reverse_kl":
            s, t = t, s
        value, grad_s, grad_t = evaluate(s, t, kind)
        expected, want_s, want_t = reference(s, t, kind)
        assert_value(value, expected)
        assert_gradient(grad_s, want_s, s, t, 1.0, kind == "reverse_kl", expected.reshape(1, -1))
        assert_gradient(grad_t, want_t, t, s, 1.0, kind == "forward_kl", expected.reshape(1, -1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scales", [(0.5, 0.5), (1 / 3, 1 / 3), (0.5, 1.0), (1 / 3, 0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperatures(kind, scales, dtype):
    for eps in [1e-3, 0.5]:
        s, t = pair(3, 5000, eps, 0.3, dtype)
        if scales[0] != scales[1]:
            s = (s.double() * scales[1] / scales[0]).to(dtype)
        value, grad_s, grad_t = evaluate(s, t, kind, None, *scales)
        expected, want_s, want_t = reference(s, t, kind, *scales)
        assert_value(value, expected)
        by_row = expected.reshape(1, -1)
        u, w = s.double() * scales[0], t.double() * scales[1]
        for grad, want, mine, other, scale, weighs in [
            (grad_s, want_s, u, w, scales[0], kind == "reverse_kl"),
            (grad_t, want_t, w, u, scales[1], kind == "forward_kl"),
        ]:
            slack = half_ulp(dtype) * torch.from_numpy(np.abs(np.asarray(want, np.float64)))
            close = torch.from_numpy(np.abs(as_np(grad) - np.asarray(want, np.float64))) <= slack + 1e-40
            judged = torch.where(close, torch.from_numpy(np.asarray(want, np.float64)), grad.double())
            assert_gradient(judged, want, mine, other, scale, weighs, by_row)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("student", DTYPES)
@pytest.mark.parametrize("teacher", DTYPES)
def test_mixed_dtypes(kind, student, teacher):
    s, t = pair(3, 5003, 0.2, 0.7)
    s, t = s.to(student), t.to(teacher)
    value, grad_s, grad_t = evaluate(s, t, kind)
    assert value.dtype == (torch.float64 if torch.float64 in (student, teacher) else torch.float32)
    expected, want_s, want_t = reference(s, t, kind)
    assert_value(value, expected)
    assert_gradient(grad_s, want_s, s, t, 1.0, kind == "reverse_kl", expected.reshape(1, -1))
    assert_gradient(grad_t, want_t, t, s, 1.0, kind == "forward_kl", expected.reshape(1, -1))


def test_fp64_is_accurate_to_fp64():
    s, t = pair(3, 3000, 0.1, 0.7, torch.float64)
    value, grad_s, _ = evaluate(s, t)
    expected, want_s, _ = reference(s, t)
    np.testing.assert_allclose(as_np(value), np.asarray(expected, float), rtol=1e-12)
    np.testing.assert_allclose(as_np(grad_s), np.asarray(want_s, float), rtol=1e-9, atol=1e-18)


# -- edges ------------------------------------------------------------------------------------------

EDGES = {
    "teacher excludes": ([-INF, 1, 2, 0.5], [0.3, 1, 1, 1]),
    "student excludes": ([0.3, 1, 2, 0.5], [-INF, 1, 1, 1]),
    "both exclude": ([-INF, 1, 2, 0.5], [-INF, 1, 1, 1]),
    "each excludes another": ([-INF, 1, 2, 0.5], [0.3, -INF, 1, 1]),
    "teacher excludes all": ([-INF] * 4, [0.3, 1, 1, 1]),
    "student excludes all": ([0.3, 1, 2, 0.5], [-INF] * 4),
    "both exclude all": ([-INF] * 4, [-INF] * 4),
    "one column left": ([-INF, 1, -INF, -INF], [-INF, 5, -INF, -INF]),
    "teacher NaN": ([NAN, 1, 2, 0.5], [0.3, 1, 1, 1]),
    "student NaN": ([0.3, 1, 2, 0.5], [0.3, NAN, 1, 1]),
    "teacher +inf": ([INF, 1, 2, 0.5], [0.3, 1, 1, 1]),
    "student +inf": ([0.3, 1, 2, 0.5], [0.3, 1, 1, INF]),
    "+inf and -inf": ([INF, 1, -INF, 0.5], [0.3, -INF, 1, INF]),
    "disjoint": ([0, 0, -INF, -INF], [-INF, -INF, 0, 0]),
    "most mass excluded": ([15, 0, 0, 0.5], [-INF, 1, 1, 1]),
}


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [4, 40, 6000])
def test_edges(name, kind, dtype, columns):
    """The case in one row, at both ends of it, between two plain rows that must not notice."""
    s, t = pair(5, columns, 0.3, 0.7, dtype)
    teacher, student = (torch.tensor(x, dtype=torch.float64).to(dtype) for x in EDGES[name])
    for row, first in [(1, 0), (3, columns - 4)]:
        if name.endswith("all") or name == "one column left" or name == "disjoint":
            t[0, row], s[0, row] = -INF, -INF
        t[0, row, first : first + 4], s[0, row, first : first + 4] = teacher, student
    value, grad_s, grad_t = evaluate(s, t, kind)
    expected, want_s, want_t = reference(s, t, kind)
    assert_value(value, expected)
    assert_gradient(grad_s, want_s, s, t, 1.0, kind == "reverse_kl", expected.reshape(1, -1))
    assert_gradient(grad_t, want_t, t, s, 1.0, kind == "forward_kl", expected.reshape(1, -1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_column(kind, dtype):
    s, t = torch.tensor([[[3.0], [NAN], [-INF]]]).to(dtype), torch.tensor([[[1.0], [1.0], [0.0]]]).to(dtype)
    value, grad_s, grad_t = evaluate(s, t, kind)
    assert value[0] == 0
    assert grad_s[0, 0] == 0
    assert grad_t[0, 0] == 0
    assert value[1:].isnan().all()
    assert grad_s[0, 1:].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["-inf", "lowest", "-1e9"])
def test_masked_vocabulary(kind, dtype, mask):
    """Padding columns and top-k filters, with each of the numbers that people use for them."""
    low = {"-inf": -INF, "lowest": torch.finfo(dtype).min, "-1e9": -1e9}[mask]
    s, t = pair(4, 9000, 0.2, 0.7, dtype)
    t[0, 0, 8000:], s[0, 0, 8000:] = low, low
    t[0, 1, :8900], s[0, 1, :8900] = low, low
    (t if kind == "forward_kl" else s)[0, 2, ::3] = low
    value, grad_s, grad_t = evaluate(s, t, kind)
    expected, want_s, want_t = reference(s, t, kind)
    assert_value(value, expected)
    assert_gradient(grad_s, want_s, s, t, 1.0, kind == "reverse_kl", expected.reshape(1, -1))
    assert_gradient(grad_t, want_t, t, s, 1.0, kind == "forward_kl", expected.reshape(1, -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_rows_are_not_read(dtype):
    s, t = pair(6, 300, 0.2, dtype=dtype)
    rows = torch.tensor([[True, False, True, False, False, True]])
    full, full_s, _ = evaluate(s, t)
    s[~rows], t[~rows] = NAN, NAN
    value, grad_s, grad_t = evaluate(s, t, rows=rows)
    assert (value[~rows[0]] == 0).all()
    assert (grad_s[~rows] == 0).all()
    assert (grad_t[~rows] == 0).all()
    assert torch.equal(value[rows[0]], full[rows[0]])
    assert torch.equal(grad_s[rows], full_s[rows])


# -- layout, determinism, threads ---------------------------------------------------------------------


def bits(x: torch.Tensor) -> bytes:
    return x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [33, 50257])
def test_views_are_read_as_they_lie(dtype, columns):
    s, t = pair(24, columns + 3, 0.2, 0.7, dtype)
    s = s.view(4, 6, -1)[:, :-1, 1 : columns + 1]
    t = t.view(4, 6, -1)[:1, 1:, 2 : columns + 2].expand(4, 5, columns)
    rows = (torch.arange(24) % 3 > 0).view(4, 6)[:, 1:]
    strided = evaluate(s, t, rows=rows)
    plain = evaluate(s.contiguous(), t.contiguous(), rows=rows.contiguous())
    for got, want in zip(strided, plain, strict=True):
        assert bits(got) == bits(want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariance_over_rows_and_threads(kind, dtype):
    s, t = pair(40, 100003, 0.2, 0.7, dtype)
    before = torch.get_num_threads()
    seen = set()
    try:
        for threads in [1, 2, 3, 8]:
            torch.set_num_threads(threads)
            for first, last in [(7, 8), (7, 9), (0, 40), (3, 20)]:
                value, grad_s, grad_t = evaluate(s[:, first:last], t[:, first:last], kind)
                i = 7 - first
                seen.add(bits(value[i]) + bits(grad_s[0, i]) + bits(grad_t[0, i]))
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 1


def test_repeats_are_bitwise_equal():
    s, t = pair(9, 70000, 0.2, 0.7)
    assert len({b"".join(map(bits, evaluate(s, t))) for _ in range(50)}) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3, 70001), (2, 30, 2000), (1, 64, 40000)])
def test_fused_and_in_place_give_the_bits_of_the_separate_calls(kind, dtype, shape):
    s, t = pair(shape[0] * shape[1], shape[2], 0.2, 0.7, dtype)
    s, t = s.view(shape), t.view(shape)
    scale = torch.linspace(-1, 2, s.shape[0] * s.shape[1]).to(torch.promote_types(dtype, torch.float32))
    value, grad_s, grad_t = evaluate(s, t, kind, row_scale=scale)
    to_s, to_t = torch.empty_like(s), torch.empty_like(t)
    fused, _ = native.value_and_gradient(s, t, None, scale, kind, 1.0, 1.0, to_s, to_t)
    assert bits(fused) == bits(value)
    assert bits(to_s) == bits(grad_s)
    assert bits(to_t) == bits(grad_t)
    for only_s in [True, False]:
        native.value_and_gradient(
            s, t, None, scale, kind, 1.0, 1.0, *((to_s.fill_(9), None) if only_s else (None, to_t.fill_(9)))
        )
    assert bits(to_s) == bits(grad_s)
    assert bits(to_t) == bits(grad_t)
    u, w = s.clone(), t.clone()
    native.value_and_gradient(u, w, None, scale, kind, 1.0, 1.0, u, w)
    assert bits(u) == bits(grad_s)
    assert bits(w) == bits(grad_t)


def test_row_scale_reaches_the_gradient():
    s, t = pair(3, 5000, 0.3)
    _, one, _ = evaluate(s, t)
    _, scaled, _ = evaluate(s, t, row_scale=torch.tensor([4.0, 0.0, -0.5]))
    assert torch.equal(scaled[0, 0], 4 * one[0, 0])
    assert (scaled[0, 1] == 0).all()
    assert torch.equal(scaled[0, 2], -0.5 * one[0, 2])
    assert evaluate(s, t, row_scale=torch.tensor([1.0, NAN, 1.0]))[1][0, 1].isnan().all()


def test_empty():
    s = torch.empty(0, 3, 8)
    value, stats = native.value(s, s, None, "forward_kl", 1.0, 1.0)
    assert value.shape == (0,)
    assert stats.shape == (0, native.STATS)


def test_offsets_past_int32():
    """Row strides that only 64 bits hold; the pages between the rows are never touched."""
    storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    s = storage.as_strided((1, 2, 1000), (0, 2**31, 1))
    want, t = pair(2, 1000, 0.2, dtype=torch.bfloat16)
    s.copy_(want)
    for got, expected in zip(evaluate(s, t), evaluate(want, t), strict=True):
        assert bits(got) == bits(expected)


def test_several_python_threads_at_once():
    s, t = pair(64, 40000, 0.2, 0.7)
    expected = b"".join(map(bits, evaluate(s, t)))
    wrong = []

    def work():
        for _ in range(5):
            if b"".join(map(bits, evaluate(s, t))) != expected:
                wrong.append(threading.current_thread().name)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_fork():
    """In a fresh interpreter, because pytest's own threads have no business in the child."""
    code = """
        import os, signal, torch
        from kl_gpu import native
        torch.set_num_threads(4)
        s, t = torch.randn(1, 64, 40000), torch.randn(1, 64, 40000)

        def bits():
            return native.value(s, t, None, "forward_kl", 1.0, 1.0)[0].numpy().tobytes()

        want = bits()
        for generation in range(3):
            pid = os.fork()
            if pid == 0:
                signal.alarm(60)
                os._exit(0 if bits() == want else 1)
            assert os.waitpid(pid, 0)[1] == 0, "the child hung or differed"
        assert bits() == want
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=240)


# -- elementary functions and instruction sets ---------------------------------------------------------


def run_with_isa(isa: str, code: str) -> str:
    env = {**os.environ, "KL_GPU_ISA": isa}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


ULP = """
    import numpy as np
    from kl_gpu import _native

    def ulps(which, x, exact):
        x = np.ascontiguousarray(x[: len(x) // 16 * 16], dtype=np.float32)
        y = np.empty_like(x)
        _native.elementary(which, x.ctypes.data, y.ctypes.data, len(x))
        want = exact(x.astype(np.longdouble))
        ulp = np.exp2(np.floor(np.log2(np.maximum(np.abs(want.astype(np.float64)), 1e-300))) - 23)
        assert (y[want == 0] == 0).all()
        return float((np.abs(y.astype(np.longdouble) - want) / ulp).max())

    ln2 = np.log(np.longdouble(2))

    def g2(x):
        z = x * ln2
        series, term = 0 * z, 0 * z + 1
        for n in range(1, 26):
            term = term * z / n
            if n >= 2:
                series = series + term
        return np.where(np.abs(z) < 0.7, series, np.expm1(z) - z) / ln2

    every = np.linspace(-125, 126, 8_000_001)
    tiny = np.exp2(np.linspace(-30, 0, 200_001))
    points = np.concatenate([every, np.linspace(-1.6, 1.6, 3_000_001), tiny, -tiny])
    assert len(points) > 10**7
    print(ulps(0, points, np.exp2))
    print(ulps(1, np.concatenate([points, -np.exp2(np.linspace(7, 100, 100_001))]), g2))
    print(ulps(2, points, lambda x: np.expm1(x * ln2)))
"""


@pytest.mark.parametrize("isa", native.supported_isas() if native.available() else [])
def test_elementary_functions_keep_their_documented_error(isa):
    exp2, g2, exp2m1 = map(float, run_with_isa(isa, ULP).split())
    assert exp2 <= 2.5
    assert g2 <= 8
    assert exp2m1 <= 3


def test_forcing_an_instruction_set():
    for isa in native.supported_isas():
        assert run_with_isa(isa, "from kl_gpu import native; print(native.isa())").strip() == isa
    with pytest.raises(AssertionError, match="KL_GPU_ISA=v9: expected one of"):
        run_with_isa("v9", "from kl_gpu import native; print(native.isa())")


FUZZ = """
    import numpy as np, torch
    from kl_gpu import native
    g = torch.Generator().manual_seed(0)
    out, slack = [], []
    for dtype, raw in [
        (torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float16, torch.int16)
    ]:
        ends = torch.iinfo(raw)
        for columns in COLUMNS:
            shape = (1, 100_000 // columns + 2, columns)
            s, t = torch.randint(ends.min, ends.max + 1, (2, *shape), dtype=raw, generator=g).view(dtype)
            # Half the rows: any bits but NaN and +inf, so that something finite comes out.
            for x in (s, t):
                tame = x[:, ::2]
                tame[tame.isnan() | (tame == float("inf"))] = 1.0
            for kind in ["forward_kl", "reverse_kl"]:
                value, stats = native.value(s, t, None, kind, 1.0, 1.0)
                grads = torch.empty_like(s), torch.empty_like(t)
                # The bound on the weights' side grows with the row's divergence; without this fp16 overflows.
                scale = 1 / value.nan_to_num(posinf=1.0).clamp(min=1.0)
                native.gradient(s, t, None, stats, scale, kind, 1.0, 1.0, *grads)
                out += [value.double().numpy(), *(g.double().numpy().ravel() for g in grads)]
                # Two results within the bound may still round to neighbouring 16-bit numbers.
                slack += [np.full(len(x), r) for x, r in zip(out[-3:], [0, *2 * [torch.finfo(dtype).eps]])]
    np.save(PATH, np.stack([np.concatenate(out), np.concatenate(slack)]))
"""


def test_instruction_sets_agree_on_any_bits(tmp_path):
    columns = [1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 127, 1000, 5000]
    results = {}
    for isa in native.supported_isas():
        path = str(tmp_path / f"{isa}.npy")
        run_with_isa(isa, FUZZ.replace("COLUMNS", repr(columns)).replace("PATH", repr(path)))
        results[isa], slack = np.load(path)
    first, *others = results.values()
    for other in others:
        np.testing.assert_array_equal(np.isnan(first), np.isnan(other))
        np.testing.assert_array_equal(np.isinf(first), np.isinf(other))
        finite = np.isfinite(first)
        apart = np.abs(first[finite] - other[finite])
        assert (apart <= 5e-6 + (1e-5 + slack[finite]) * np.abs(first[finite])).all()

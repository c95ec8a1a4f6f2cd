"""The compiled kernels against float64, per instruction set and dtype."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from kl_gpu import reference as specification
from kl_gpu.backends import native
from kl_gpu.backends.interface import STATS, RowPair
from kl_gpu.kinds import KINDS

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without compiled kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INF = float("inf")
NAN = float("nan")


class Divergence(NamedTuple):
    """A kind at a value of its parameter."""

    kind: str
    beta: float

    def __str__(self) -> str:
        return self.kind if KINDS[self.kind].beta is None else f"{self.kind}-{self.beta}"

    @property
    def formula(self) -> str:
        return KINDS[self.kind].formula

    def as_ab(self, student, teacher):
        return KINDS[self.kind].as_ab(student, teacher)


DEFAULTS = [Divergence(*kind.at(None)) for kind in KINDS.values()]
MORE = [
    Divergence(kind.name, beta)
    for kind in KINDS.values()
    if kind.beta is not None
    for beta in [0.001, 0.9, 0.999]
]
FORWARD = DEFAULTS[0]


def every_kind(of=DEFAULTS):
    return pytest.mark.parametrize("of", of, ids=str)


# -- the judge --------------------------------------------------------------------------------------


def reference(student, teacher, of=FORWARD, student_scale=1.0, teacher_scale=1.0):
    """Value [..], gradient of the student and of the teacher, in long double, by the edge table."""
    s, t = (x.detach().double().numpy().astype(np.longdouble) for x in (student, teacher))
    options = {
        "beta": of.beta or None,
        "temperature": 1 / student_scale,
        "teacher_temperature": 1 / teacher_scale,
    }
    with np.errstate(all="ignore"):
        value = specification.divergence(s, t, of.kind, **options)
        gradients = specification.gradients(s, t, of.kind, **options)
    nowhere = [np.isnan(x).any(-1) | (x == INF).any(-1) | (x == -INF).all(-1) for x in (s, t)]
    nowhere = nowhere[0] | nowhere[1]
    grad_s, grad_t = (np.where(nowhere[..., None], NAN, grad) for grad in gradients)
    return np.where(nowhere, NAN, value).ravel(), grad_s, grad_t


# -- helpers ----------------------------------------------------------------------------------------


def problem(student, teacher, of=FORWARD, rows=None, student_scale=1.0, teacher_scale=1.0):
    return RowPair.of(student, teacher, rows, of.kind, of.beta, student_scale, teacher_scale)


def evaluate(student, teacher, of=FORWARD, rows=None, student_scale=1.0, teacher_scale=1.0, row_scale=None):
    """Value and both gradients, by the separate calls."""
    p = problem(student, teacher, of, rows, student_scale, teacher_scale)
    value, stats = native.value(p)
    scale = torch.ones_like(value) if row_scale is None else row_scale
    grad_s, grad_t = torch.full_like(student, 7), torch.full_like(teacher, 7)
    native.gradient(p, stats, scale, *of.as_ab(grad_s, grad_t))
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


def log_probabilities(logits: torch.Tensor, scale: float) -> np.ndarray:
    z = as_np(logits) * scale
    with np.errstate(invalid="ignore"):
        return z - np.logaddexp.reduce(z, -1, keepdims=True)


def assert_value(value, expected, where="", slack=0.0):
    """`slack`: what is allowed beyond 5e-6 D; without any, D < 1e-12 is held to 1 %."""
    value, expected = as_np(value).ravel(), np.asarray(expected, dtype=np.float64).ravel()
    slack = np.broadcast_to(slack, value.shape)
    np.testing.assert_array_equal(np.isnan(value), np.isnan(expected), err_msg=where)
    np.testing.assert_array_equal(np.isinf(value), np.isinf(expected), err_msg=where)
    assert not (value < 0).any(), where
    with np.errstate(invalid="ignore"):
        error = np.maximum(np.abs(value - expected) - slack, 0)
    judged = (expected >= 1e-12) & (expected <= 1e2)
    worst = (error[judged] / expected[judged]).max(initial=0)
    assert worst <= 5e-6, f"{where} {worst:.3g}"
    tiny = expected < 1e-12
    assert (error[tiny] <= 1e-17 + 1e-2 * expected[tiny]).all(), where


def with_rounding(bound, expected, dtype: torch.dtype) -> np.ndarray:
    """A bound on a gradient, with what its own dtype takes of it."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return np.nan_to_num(bound) + half_ulp(dtype) * np.abs(np.asarray(expected, float)) + smallest + 1e-36


def assert_gradient(grad, expected, bound):
    """Within `bound`, then the rounding to the output's dtype."""
    bound = with_rounding(bound, expected, grad.dtype)
    grad, expected = as_np(grad), np.asarray(expected, np.float64)
    np.testing.assert_array_equal(np.isnan(grad), np.isnan(expected))
    excess = np.nanmax(np.where(np.isnan(expected), 0, np.abs(grad - expected) / bound))
    assert excess <= 1, f"{excess:.3g} times the bound"


class Judged(NamedTuple):
    """What a pair of sides should give, and how far off it may be: of the value what is allowed beside 5e-6
    of itself, of the gradients all but their rounding."""

    value: np.ndarray
    grads: tuple[np.ndarray, np.ndarray]
    slack: np.ndarray | float
    bounds: tuple[np.ndarray, np.ndarray]


def judged(s, t, of, student_scale=1.0, teacher_scale=1.0) -> Judged:
    """By the promises of DESIGN.md."""
    expected, *grads = reference(s, t, of, student_scale, teacher_scale)
    log_s, log_t = log_probabilities(s, student_scale), log_probabilities(t, teacher_scale)
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(log_s - log_t)
        apart = np.where(np.isfinite(apart), apart, 1)
        bound = 2e-6 * np.exp(np.maximum(log_s, log_t))
        size = np.nan_to_num(np.asarray(expected, np.float64).reshape(s.shape[:-1]), posinf=1.0)
    steep = np.maximum(np.maximum(1, apart), size[..., None])
    slack = 0.0
    first_order = of.formula in ("tv", "nla", "lk")
    if first_order:
        with np.errstate(invalid="ignore"):
            lse = [np.logaddexp.reduce(as_np(x) * k, -1) for x, k in [(s, student_scale), (t, teacher_scale)]]
            slack = np.nan_to_num(2e-7 * (1 + np.abs(lse[0] - lse[1]))).ravel()
        # At a tie the sign is rounding's to choose: the token's own gradient, and its share of the mean.
        tied = (apart < 1e-5) & np.isfinite(log_s + log_t)
        mass = np.where(tied, np.exp(np.maximum(log_s, log_t)), 0)
        if of.formula != "lk":
            steep = np.ones_like(steep)
        if of.formula == "nla":  # tv's gradient over alpha
            with np.errstate(over="ignore"):
                amplified = np.exp(np.asarray(expected, np.float64).reshape(s.shape[:-1]))[..., None]
            steep, mass = steep * amplified, mass * amplified
    _, plays_b = of.as_ab("student", "teacher")
    bounds = []
    for side, scale, log_p in [("student", student_scale, log_s), ("teacher", teacher_scale, log_t)]:
        # KL(a||b) has the one gradient that stays of the order of the probabilities.
        allowed = bound * scale * (1.0 if of.formula == "kl" and side == plays_b else steep)
        if first_order:
            allowed = allowed + scale * (mass + np.exp(log_p) * mass.sum(-1, keepdims=True))
        bounds.append(allowed)
    return Judged(expected, tuple(grads), slack, tuple(bounds))


def check(s, t, of, student_scale=1.0, teacher_scale=1.0, where=""):
    """Value and gradients within the promises of DESIGN.md; returns what came out."""
    value, grad_s, grad_t = evaluate(s, t, of, None, student_scale, teacher_scale)
    want = judged(s, t, of, student_scale, teacher_scale)
    assert_value(value, want.value, where, want.slack)
    for grad, exact, bound in zip((grad_s, grad_t), want.grads, want.bounds, strict=True):
        assert_gradient(grad, exact, bound)
    return value, grad_s, grad_t


# -- accuracy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [7, 1000])
@pytest.mark.parametrize("shift", [0.0, 0.7, -20.0])
@every_kind(DEFAULTS + MORE)
def test_accuracy(of, dtype, columns, shift):
    for eps in [0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 3.0, 10.0]:
        check(*pair(3, columns, eps, shift, dtype, seed=columns), of, where=f"eps={eps}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind()
def test_accuracy_over_a_large_vocabulary(of, dtype):
    for eps, shift in [(1e-6, 0.7), (1e-3, -20.0), (0.1, 0.0), (3.0, 0.7)]:
        check(*pair(1, 70001, eps, shift, dtype), of, where=f"eps={eps}")


@pytest.mark.parametrize("beta", [1e-30, 1e-9, 1 - 1e-9])
@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.beta is not None])
def test_a_beta_next_to_an_end(kind, beta):
    """Its terms of second order underflow in fp32."""
    for eps in [1e-3, 1.0]:
        s, t = pair(3, 1000, eps, 0.7)
        t[0, 1, ::7] = -INF
        of = Divergence(kind, beta)
        value, _, _ = evaluate(s, t, of)
        np.testing.assert_allclose(as_np(value), np.asarray(reference(s, t, of)[0], float), rtol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@every_kind(DEFAULTS + MORE)
def test_identical_logits_give_exact_zeros(of, dtype):
    _, t = pair(3, 9000, 0, dtype=dtype)
    t[0, 1, 5:70] = -INF
    value, grad_s, grad_t = evaluate(t.clone(), t, of)
    assert (value == 0).all()
    assert (grad_s == 0).all()
    assert (grad_t == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind()
def test_peaked_teachers(of, dtype):
    """Most mass on one token late in the row: the first tile's frame does not suit the row."""
    g = torch.Generator().manual_seed(1)
    t = torch.randn(1, 2, 70001, generator=g)
    t[0, torch.arange(2), torch.randint(20000, 70001, (2,), generator=g)] = 18.0
    for eps in [1e-4, 1e-2, 0.3]:
        s = (t + 2.5 + eps * torch.randn(t.shape, generator=g)).to(dtype)
        check(s, t.to(dtype), of, where=f"eps={eps}")


@every_kind()
def test_sorted_rows(of):
    for descending in [False, True]:
        s, t = pair(2, 50257, 0.05, 0.7)
        t, order = t.sort(-1, descending=descending)
        check(s.gather(-1, order), t, of)


@every_kind(DEFAULTS + MORE)
def test_a_token_the_weights_all_but_exclude(of):
    """2^(a-m) underflows in fp32 where 2^x is enormous."""
    for a, b in [
        ([0.0, -95.0], [0.0, -15.0]),
        ([0.0, -200.0, 1.0], [0.0, 60.0, 1.0]),
        ([0.0, -60.0, 1.0], [0.0, -30.0, 1.0]),
    ]:
        a, b = torch.tensor([[a]]), torch.tensor([[b]])
        for s, t in [(a, b), (b, a)]:
            check(s, t, of)


@pytest.mark.parametrize("scales", [(0.5, 0.5), (1 / 3, 1 / 3), (0.5, 1.0), (1 / 3, 0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind()
def test_temperatures(of, scales, dtype):
    for eps in [1e-3, 0.5]:
        s, t = pair(3, 5000, eps, 0.3, dtype)
        if scales[0] != scales[1]:
            s = (s.double() * scales[1] / scales[0]).to(dtype)
        check(s, t, of, *scales)


@pytest.mark.parametrize("student", DTYPES)
@pytest.mark.parametrize("teacher", DTYPES)
@every_kind()
def test_mixed_dtypes(of, student, teacher):
    s, t = pair(3, 5003, 0.2, 0.7)
    value, _, _ = check(s.to(student), t.to(teacher), of)
    assert value.dtype == (torch.float64 if torch.float64 in (student, teacher) else torch.float32)


@every_kind(DEFAULTS + MORE)
def test_fp64_is_accurate_to_fp64(of):
    s, t = pair(3, 3000, 0.1, 0.7, torch.float64)
    value, grad_s, grad_t = evaluate(s, t, of)
    expected, want_s, want_t = reference(s, t, of)
    np.testing.assert_allclose(as_np(value), np.asarray(expected, float), rtol=1e-12)
    for grad, want in [(grad_s, want_s), (grad_t, want_t)]:
        np.testing.assert_allclose(as_np(grad), np.asarray(want, float), rtol=1e-9, atol=1e-16)


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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [4, 40, 3000])
@every_kind()
def test_edges(of, name, dtype, columns):
    """The case in one row, at both ends of it, between two plain rows that must not notice."""
    s, t = pair(5, columns, 0.3, 0.7, dtype)
    teacher, student = (torch.tensor(x, dtype=torch.float64).to(dtype) for x in EDGES[name])
    for row, first in [(1, 0), (3, columns - 4)]:
        if name.endswith("all") or name == "one column left" or name == "disjoint":
            t[0, row], s[0, row] = -INF, -INF
        t[0, row, first : first + 4], s[0, row, first : first + 4] = teacher, student
    check(s, t, of)


@pytest.mark.parametrize("name", EDGES)
@every_kind(MORE)
def test_edges_at_other_betas(of, name):
    teacher, student = (torch.tensor([[x]]) for x in EDGES[name])
    check(student, teacher, of)


@pytest.mark.parametrize("dtype", DTYPES)
@every_kind()
def test_an_excluded_token_of_hardly_any_probability_still_counts(of, dtype):
    """2^(logit - lse) is 0 in fp32; what the kinds make infinite is infinite all the same."""
    low = torch.tensor([[[-200.0, 0.0, 1.0, 0.5]]]).to(dtype)
    none = torch.tensor([[[-INF, 0.3, 1.0, 1.0]]]).to(dtype)
    for s, t in [(low, none), (none, low)]:
        value, grad_s, grad_t = check(s, t, of)
        a_alone = of.as_ab(s, t)[0] is low
        infinite = {"kl": a_alone, "lk": a_alone, "jeffreys": True}.get(of.formula, False)
        assert bool(value.isinf()) == infinite
        grad_a, grad_b = of.as_ab(grad_s, grad_t)
        assert bool(grad_a.isnan().all()) == (infinite and a_alone)
        assert bool(grad_b.isnan().all()) == (infinite and not a_alone)
        assert (grad_a if infinite and not a_alone else grad_b).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@every_kind()
def test_one_column(of, dtype):
    s, t = torch.tensor([[[3.0], [NAN], [-INF]]]).to(dtype), torch.tensor([[[1.0], [1.0], [0.0]]]).to(dtype)
    value, grad_s, grad_t = evaluate(s, t, of)
    assert value[0] == 0
    assert grad_s[0, 0] == 0
    assert grad_t[0, 0] == 0
    assert value[1:].isnan().all()
    assert grad_s[0, 1:].isnan().all()
    assert grad_t[0, 1:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["-inf", "lowest", "-1e9"])
@every_kind()
def test_masked_vocabulary(of, dtype, mask):
    """Padding columns and top-k filters, with each of the numbers that people use for them."""
    low = {"-inf": -INF, "lowest": torch.finfo(dtype).min, "-1e9": -1e9}[mask]
    s, t = pair(4, 9000, 0.2, 0.7, dtype)
    t[0, 0, 8000:], s[0, 0, 8000:] = low, low
    t[0, 1, :8900], s[0, 1, :8900] = low, low
    of.as_ab(s, t)[0][0, 2, ::3] = low
    check(s, t, of)


@pytest.mark.parametrize("dtype", DTYPES)
@every_kind()
def test_masked_rows_are_not_read(of, dtype):
    s, t = pair(6, 300, 0.2, dtype=dtype)
    rows = torch.tensor([[True, False, True, False, False, True]])
    full, full_s, _ = evaluate(s, t, of)
    s[~rows], t[~rows] = NAN, NAN
    value, grad_s, grad_t = evaluate(s, t, of, rows)
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
@every_kind([FORWARD, Divergence("js", 0.5)])
def test_views_are_read_as_they_lie(of, dtype, columns):
    s, t = pair(24, columns + 3, 0.2, 0.7, dtype)
    s = s.view(4, 6, -1)[:, :-1, 1 : columns + 1]
    t = t.view(4, 6, -1)[:1, 1:, 2 : columns + 2].expand(4, 5, columns)
    rows = (torch.arange(24) % 3 > 0).view(4, 6)[:, 1:]
    strided = evaluate(s, t, of, rows)
    plain = evaluate(s.contiguous(), t.contiguous(), of, rows.contiguous())
    for got, want in zip(strided, plain, strict=True):
        assert bits(got) == bits(want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind()
def test_batch_invariance_over_rows_and_threads(of, dtype):
    s, t = pair(40, 100003, 0.2, 0.7, dtype)
    before = torch.get_num_threads()
    seen = set()
    try:
        for threads in [1, 2, 3, 8]:
            torch.set_num_threads(threads)
            for first, last in [(7, 8), (7, 9), (0, 40), (3, 20)]:
                value, grad_s, grad_t = evaluate(s[:, first:last], t[:, first:last], of)
                i = 7 - first
                seen.add(bits(value[i]) + bits(grad_s[0, i]) + bits(grad_t[0, i]))
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 1


@every_kind()
def test_repeats_are_bitwise_equal(of):
    s, t = pair(9, 70000, 0.2, 0.7)
    assert len({b"".join(map(bits, evaluate(s, t, of))) for _ in range(20)}) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3, 70001), (2, 30, 2000), (1, 64, 40000)])
@every_kind()
def test_fused_and_in_place_give_the_bits_of_the_separate_calls(of, dtype, shape):
    s, t = pair(shape[0] * shape[1], shape[2], 0.2, 0.7, dtype)
    s, t = s.view(shape), t.view(shape)
    scale = torch.linspace(-1, 2, s.shape[0] * s.shape[1]).to(torch.promote_types(dtype, torch.float32))
    value, grad_s, grad_t = evaluate(s, t, of, row_scale=scale)
    to_s, to_t = torch.empty_like(s), torch.empty_like(t)
    fused, _ = native.value_and_gradient(problem(s, t, of), scale, *of.as_ab(to_s, to_t))
    assert bits(fused) == bits(value)
    assert bits(to_s) == bits(grad_s)
    assert bits(to_t) == bits(grad_t)
    for only_s in [True, False]:
        only = (to_s.fill_(9), None) if only_s else (None, to_t.fill_(9))
        native.value_and_gradient(problem(s, t, of), scale, *of.as_ab(*only))
    assert bits(to_s) == bits(grad_s)
    assert bits(to_t) == bits(grad_t)
    u, w = s.clone(), t.clone()
    native.value_and_gradient(problem(u, w, of), scale, *of.as_ab(u, w))
    assert bits(u) == bits(grad_s)
    assert bits(w) == bits(grad_t)


@every_kind()
def test_row_scale_reaches_the_gradient(of):
    s, t = pair(3, 5000, 0.3)
    _, one, _ = evaluate(s, t, of)
    _, scaled, _ = evaluate(s, t, of, row_scale=torch.tensor([4.0, 0.0, -0.5]))
    assert torch.equal(scaled[0, 0], 4 * one[0, 0])
    assert (scaled[0, 1] == 0).all()
    assert torch.equal(scaled[0, 2], -0.5 * one[0, 2])
    assert evaluate(s, t, of, row_scale=torch.tensor([1.0, NAN, 1.0]))[1][0, 1].isnan().all()


@pytest.mark.parametrize("height", [20.0, 45.0, 80.0])
def test_a_late_top_leaves_its_row_an_exact_normaliser(height):
    # A weight of 2^17, seen from the first tile's top, errs by 1e-6, and every p of the row with it.
    s, t = pair(16, 20011, 1.0)
    t[0, :, 12345] = height + torch.rand(16)
    _, stats = native.value(problem(s, t))
    k = float(np.float32(np.log2(np.e)))  # the kernels' own factor
    exact = (t.double() * (k * math.log(2))).logsumexp(-1) / math.log(2)
    assert (stats[:, 0].double() + stats[:, 1].double() - exact).abs().max() < 7e-7


@every_kind()
def test_empty(of):
    s = torch.empty(0, 3, 8)
    value, stats = native.value(problem(s, s, of))
    assert value.shape == (0,)
    assert stats.shape == (0, STATS)


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
        from kl_gpu.backends import native
        from kl_gpu.backends.interface import RowPair
        torch.set_num_threads(4)
        s, t = torch.randn(1, 64, 40000), torch.randn(1, 64, 40000)

        def bits():
            return native.value(RowPair.of(s, t, None, "js", 0.5, 1.0, 1.0))[0].numpy().tobytes()

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
    tests = Path(__file__).parent
    env = {**os.environ, "KL_GPU_ISA": isa, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


ULP = """
    import numpy as np
    from elementary import elementary
    from kl_gpu import _native

    for which, of in enumerate(elementary(8_000_000)):
        assert len(of.points) > 10**7
        y = np.empty_like(of.points)
        _native.elementary(which, of.points.ctypes.data, y.ctypes.data, len(y))
        want, ulp = of.expected()
        assert (y[want == 0] == 0).all(), of.name
        worst = np.max(np.abs(y - want) / ulp)
        assert worst <= of.allowed, f"{of.name}: {worst}"
        print(of.name, worst)
"""


@pytest.mark.parametrize("isa", native.supported_isas() if native.available() else [])
def test_elementary_functions_keep_their_documented_error(isa):
    assert len(run_with_isa(isa, ULP).splitlines()) == 12


ROUNDING = """
    import numpy as np, torch
    from elementary import rounded_points
    from kl_gpu import _native

    x = rounded_points()
    for which, dtype in [(12, torch.bfloat16), (13, torch.float16)]:
        y = np.empty_like(x)
        _native.elementary(which, x.ctypes.data, y.ctypes.data, len(x))
        want = torch.from_numpy(x).to(dtype).float().numpy()
        assert np.array_equal(y.view(np.uint32), want.view(np.uint32)), dtype
        print((x != want).sum() > len(x) // 2)
"""


@pytest.mark.parametrize("isa", native.supported_isas() if native.available() else [])
def test_stores_round_to_nearest_even(isa):
    assert run_with_isa(isa, ROUNDING).split() == ["True", "True"]


def test_forcing_an_instruction_set():
    for isa in native.supported_isas():
        assert run_with_isa(isa, "from kl_gpu.backends import native; print(native.isa())").strip() == isa
    with pytest.raises(AssertionError, match="KL_GPU_ISA=v9: expected one of"):
        run_with_isa("v9", "from kl_gpu.backends import native; print(native.isa())")


FUZZ = """
    import numpy as np, torch
    from kl_gpu.backends import native
    from kl_gpu.kinds import KINDS
    from kl_gpu.backends.interface import RowPair
    g = torch.Generator().manual_seed(SEED)
    out, slack = [], []
    for dtype, raw in [
        (torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float16, torch.int16)
    ]:
        ends = torch.iinfo(raw)
        for columns in COLUMNS:
            shape = (1, 30_000 // columns + 2, columns)
            s, t = torch.randint(ends.min, ends.max + 1, (2, *shape), dtype=raw, generator=g).view(dtype)
            # Half the rows: any bits but NaN and +inf, so that something finite comes out.
            for x in (s, t):
                tame = x[:, ::2]
                tame[tame.isnan() | (tame == float("inf"))] = 1.0
            for kind in KINDS.values():
                p = RowPair.of(s, t, None, *kind.at(None), 1.0, 1.0)
                value, stats = native.value(p)
                grads = torch.empty_like(s), torch.empty_like(t)
                # The bound on the weights' side grows with the row's divergence; without this fp16 overflows.
                scale = 1 / value.nan_to_num(posinf=1.0).clamp(min=1.0)
                native.gradient(p, stats, scale, *kind.as_ab(*grads))
                if kind.formula in ("tv", "nla", "lk"):
                    # At a tie the gradient jumps, and rounding decides where to.
                    logs = (x.double().log_softmax(-1) for x in (s, t))
                    tied = (next(logs) - next(logs)).abs().lt(1e-5).any(-1)
                    for grad in grads:
                        grad[tied] = 0
                out += [value.double().numpy(), *(g.double().numpy().ravel() for g in grads)]
                # Two results within the bound may still round to neighbouring 16-bit numbers.
                slack += [np.full(len(x), r) for x, r in zip(out[-3:], [0, *2 * [torch.finfo(dtype).eps]])]
    np.save(PATH, np.stack([np.concatenate(out), np.concatenate(slack)]))
"""


# The long profile's rows are of random width, more than 10⁶ of them in all.
@pytest.mark.parametrize("seed", range(9 if os.environ.get("KL_GPU_HYPOTHESIS") == "long" else 1))
def test_instruction_sets_agree_on_any_bits(tmp_path, seed):
    columns = [1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 127, 1000, 5000]
    if seed > 0:
        columns = np.exp(np.random.default_rng(seed).uniform(0, np.log(5001), 13)).astype(int).tolist()
    results = {}
    for isa in native.supported_isas():
        path = str(tmp_path / f"{isa}.npy")
        code = FUZZ.replace("COLUMNS", repr(columns)).replace("PATH", repr(path)).replace("SEED", str(seed))
        run_with_isa(isa, code)
        results[isa], slack = np.load(path)
    first, *others = results.values()
    for other in others:
        np.testing.assert_array_equal(np.isnan(first), np.isnan(other))
        np.testing.assert_array_equal(np.isinf(first), np.isinf(other))
        finite = np.isfinite(first)
        apart = np.abs(first[finite] - other[finite])
        assert (apart <= 5e-6 + (1e-5 + slack[finite]) * np.abs(first[finite])).all()

"""The promises about numbers, for every backend and kind."""

from __future__ import annotations

import math

import pytest
import torch

import kl_gpu
from kl_gpu.kinds import KINDS
from support import DEVICE, DTYPES, check_gradients, check_value, expected, pair


def rows(student, teacher, kind, backend, **options):
    return kl_gpu.divergence(student, teacher, kind, reduction="none", backend=backend, **options)


def gradients(student, teacher, kind, backend, scale=1.0, **options):
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    value = rows(student, teacher, kind, backend, **options)
    value.backward(torch.as_tensor(scale, dtype=value.dtype, device=DEVICE).expand_as(value))
    return student.grad, teacher.grad


@pytest.mark.pairs
@pytest.mark.parametrize("vocab", [7, 1000, 32000, 128256])
@pytest.mark.parametrize("shift", [0.0, 0.7])
@pytest.mark.usefixtures("wide_programs")
def test_value_and_gradients(backend: str, kind: str, vocab: int, shift: float) -> None:
    n = {7: 64, 1000: 16}.get(vocab, 2)
    if backend == "triton" and DEVICE.type == "cpu":
        n = max(2, n // 8)  # the interpreter takes some 50 ms a row
    for spread in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0):
        student, teacher = pair(n, vocab, spread=spread, shift=shift)
        where = f"V={vocab} ε={spread:g} shift={shift}"
        got = rows(student, teacher, kind, backend)
        check_value(got, student, teacher, kind, backend, where)
        if spread in (1e-4, 1.0, 10.0):
            grads = gradients(student, teacher, kind, backend)
            check_gradients(student, teacher, grads, kind, backend, where)


@pytest.mark.pairs
@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_dtypes(backend: str, kind: str, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    for spread in (1e-3, 1.0):
        student, teacher = pair(4, 1003, spread=spread)
        student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
        where = f"{student_dtype}/{teacher_dtype} ε={spread:g}"
        got = rows(student, teacher, kind, backend)
        both_double = student_dtype == teacher_dtype == torch.float64
        assert got.dtype == (torch.float64 if both_double else torch.float32)
        check_value(got, student, teacher, kind, backend, where)
        grads = gradients(student, teacher, kind, backend)
        assert (grads[0].dtype, grads[1].dtype) == (student_dtype, teacher_dtype)
        check_gradients(student, teacher, grads, kind, backend, where)


@pytest.mark.parametrize("beta", [0.001, 0.1, 0.9, 0.999])
@pytest.mark.parametrize("with_beta", [kind.name for kind in KINDS.values() if kind.beta is not None])
def test_beta(backend: str, with_beta: str, beta: float) -> None:
    for spread in (1e-4, 1e-2, 1.0, 10.0):
        student, teacher = pair(3, 1003, spread=spread, shift=0.7)
        where = f"β={beta} ε={spread:g}"
        got = rows(student, teacher, with_beta, backend, beta=beta)
        check_value(got, student, teacher, with_beta, backend, where, beta=beta)
        grads = gradients(student, teacher, with_beta, backend, beta=beta)
        check_gradients(student, teacher, grads, with_beta, backend, where, beta=beta)


@pytest.mark.parametrize(
    ("with_beta", "beta", "equal"),
    [(k.name, float(i), end) for k in KINDS.values() for i, end in enumerate(k.limits) if end is not None],
)
def test_the_ends_of_beta_are_the_kls_to_the_bit(
    backend: str, with_beta: str, beta: float, equal: str
) -> None:
    student, teacher = pair(3, 1003)
    ours = rows(student, teacher, with_beta, backend, beta=beta)
    assert torch.equal(ours, rows(student, teacher, equal, backend))


def test_bfloat16_differences_that_float32_cannot_hold(backend: str, kind: str) -> None:
    # 0.75 − 4e-6 needs 26 bits: taken as exact, D ~ 2e-12 would be off by parts in ten thousand.
    teacher = (2e-6 * torch.randn(2, 2055, device=DEVICE)).bfloat16()
    student = torch.full_like(teacher, 0.75)
    for s, t in ((student, teacher), (teacher, student)):
        check_value(rows(s, t, kind, backend), s, t, kind, backend, "0.75 − 4e-6")


@pytest.mark.parametrize("temperatures", [(0.5, 0.5), (3.0, 3.0), (1.7, 1.7), (2.0, 1.0), (0.8, 1.3)])
def test_temperatures(backend: str, kind: str, temperatures: tuple[float, float]) -> None:
    options = {"temperature": temperatures[0], "teacher_temperature": temperatures[1]}
    # 1/T is rounded to a 2^25th or so: of sides 300 apart that is 1e-5.
    for spread, shift in ((1e-5, 0.7), (1e-2, 0.7), (1.0, 0.7), (0.3, -300.0)):
        student, teacher = pair(4, 1003, spread=spread, shift=shift)
        got = rows(student, teacher, kind, backend, **options)
        where = f"T={temperatures} ε={spread:g} shift={shift}"
        check_value(got, student, teacher, kind, backend, where, **options)
        grads = gradients(student, teacher, kind, backend, scale=-2.5, **options)
        check_gradients(student, teacher, grads, kind, backend, where, scale=-2.5, **options)


def test_unequal_temperatures_that_make_the_two_sides_equal(backend: str, kind: str) -> None:
    # s/1.3 ≈ t/0.65: float32 products s·(1/1.3) would be off by more than the difference measured here.
    teacher = 3 * torch.randn(4, 1003, device=DEVICE)
    student = 2 * teacher + 1e-5 * torch.randn_like(teacher)
    options = {"temperature": 1.3, "teacher_temperature": 0.65}
    got = rows(student, teacher, kind, backend, **options)
    check_value(got, student, teacher, kind, backend, "s/1.3 ≈ t/0.65", **options)


@pytest.mark.usefixtures("wide_programs")
def test_a_peaked_teacher_whose_top_token_is_not_in_the_first_tile(backend: str, kind: str) -> None:
    # What trained models give: most mass on one token, and student and teacher far apart in the tail.
    student, teacher = pair(6, 20011, spread=2.0, scale=2.0)
    for row, column in enumerate((0, 3000, 9999, 12345, 18000, 20010)):
        teacher[row, column] = 18.0 + row
        student[row, column] = 18.3 + row
    where = "peaked"
    check_value(rows(student, teacher, kind, backend), student, teacher, kind, backend, where)
    grads = gradients(student, teacher, kind, backend)
    check_gradients(student, teacher, grads, kind, backend, where)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.usefixtures("wide_programs")
def test_sorted_rows(backend: str, kind: str, descending: bool) -> None:
    # Ascending rows move the running reference at every tile.
    student, teacher = pair(2, 32000, spread=0.3)
    order = teacher.argsort(-1, descending=descending)
    student, teacher = student.gather(-1, order), teacher.gather(-1, order)
    check_value(rows(student, teacher, kind, backend), student, teacher, kind, backend, "sorted")


def test_mass_that_the_weights_underflow_on(backend: str, kind: str) -> None:
    # The weight e^-95 is 0 in float32, yet the other side's mass there is the whole divergence.
    student = torch.tensor([[0.0, -15.0], [0.0, -26.0], [0.0, -19.0], [100.0, 0.0]], device=DEVICE)
    teacher = torch.tensor([[0.0, -95.0], [0.0, -25.0], [0.0, -20.0], [0.0, 60.0]], device=DEVICE)
    for s, t in ((student, teacher), (teacher, student)):
        check_value(rows(s, t, kind, backend), s, t, kind, backend, "underflow")
        check_gradients(s, t, gradients(s, t, kind, backend), kind, backend, "underflow")


def test_a_first_column_far_from_the_mean(backend: str, kind: str) -> None:
    # A reference taken there measures from 50 nats away, where exponents are rounded by 2e-6.
    teacher = torch.tensor(
        [-5.03219, -3.54334, -2.20487, 6.266675, 1.57605, 0.522530, 2.06185], device=DEVICE
    )
    student = torch.tensor(
        [-19.5943, -15.1598, -3.88986, 29.317718, 13.5713, -12.3070, -2.10458], device=DEVICE
    )
    for repeats in (1, 100, 300):
        for shift in (0.0, 16.0, 23.5):
            s, t = (student - shift).repeat(2, repeats), teacher.repeat(2, repeats)
            check_value(rows(s, t, kind, backend), s, t, kind, backend, "far first column")


@pytest.mark.parametrize("offset", [100.0, 1000.0, -1000.0])
def test_logits_far_from_zero(backend: str, kind: str, offset: float) -> None:
    student, teacher = pair(2, 2055, spread=0.1)
    student, teacher = student + offset, teacher - offset / 2
    check_value(rows(student, teacher, kind, backend), student, teacher, kind, backend, "offset")
    grads = gradients(student, teacher, kind, backend)
    check_gradients(student, teacher, grads, kind, backend, f"offset {offset}")


@pytest.mark.parametrize("log2_z", [-4095.9, -8191.9, 16383.9, -524287.9])
def test_normalisers_just_short_of_a_power_of_two(backend: str, kind: str, log2_z: float) -> None:
    # An lse with all of float32's digits has none to spare for the token's own exponent: past the power of
    # two their sum loses its last one, which is 7e-4 of the gradient at 2^13 and 2 % at 2^19.
    _, teacher = pair(3, 777)
    teacher = teacher - teacher.logsumexp(-1, keepdim=True) + log2_z * math.log(2)
    student = teacher + torch.randn_like(teacher)
    grads = gradients(student, teacher, kind, backend)
    check_gradients(student, teacher, grads, kind, backend, f"log2 Z = {log2_z}")


def test_identical_logits_give_exactly_zero(backend: str, kind: str) -> None:
    for dtype in DTYPES:
        for vocab in (1, 7, 2055):
            logits = (5 * torch.randn(2, vocab, device=DEVICE)).to(dtype)
            assert (rows(logits, logits.clone(), kind, backend) == 0).all()
            assert all((g == 0).all() for g in gradients(logits, logits.clone(), kind, backend))


def test_the_plain_formula_fails_where_ours_must_not() -> None:
    # The reason for the arithmetic: if this ever passes with F.kl_div, the bound above tests nothing.
    student, teacher = pair(64, 32000, spread=1e-5)
    plain = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    want = torch.as_tensor(expected(student, teacher, "forward_kl"), device=DEVICE)
    assert ((plain - want).abs() / want).max() > 0.1
    assert plain.min() < 0

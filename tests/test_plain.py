"""The formulas on the fast path, with logarithms and exponentials as bad as NVIDIA's may be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import kl_gpu
from kl_gpu import reference
from kl_gpu.backends.triton.device_math import INTERPRETED
from kl_gpu.backends.triton.fast_formulas import NEAR, near_coefficients
from kl_gpu.kinds import KINDS
from support import DEVICE, ROUNDING, check_gradients, check_value, normalisers, pair, to_numpy

BETAS = {
    "js": (0.0101, 0.05, 0.15, 0.34, 0.5, 0.66, 0.85, 0.95, 0.9899),
    "skew": (1e-30, 1e-3, 0.1, 0.2, 0.339),
    "jeffreys": (1e-30, 0.1, 0.5, 0.9, 1 - 1e-16),
}


@pytest.mark.parametrize(("family", "beta"), [(name, beta) for name in BETAS for beta in BETAS[name]])
def test_terms_near_0_are_the_definition(family: str, beta: float) -> None:
    r = np.linspace(-NEAR, NEAR, 1001)
    r = r[np.abs(r) > 0.05]
    want = reference.column_terms(r, family, beta)
    got = (beta if family == "js" else 1.0) * r**2 * np.polyval(near_coefficients(family, beta), r)
    assert np.abs(got / want - 1).max() < 7e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["js", "skew_forward_kl", "skew_reverse_kl", "tv", "jeffreys"])
def test_logits_masked_by_the_lowest_number(kind: str, dtype: torch.dtype) -> None:
    # Their distance from a usual logit is next to the largest float32, and their probability is 0.
    student, teacher = pair(3, 40, dtype=dtype)
    lowest = torch.finfo(dtype).min
    student[2, 7] = teacher[2, 7] = lowest
    if kind != "jeffreys":  # past float32 where one side alone is masked
        (student if KINDS[kind].expectation_under == "student" else teacher)[:2, 3] = lowest
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    value = kl_gpu.divergence(student, teacher, kind, reduction="none", backend="triton")
    value.sum().backward()
    check_value(value, student, teacher, kind, "triton", "masked by finfo.min")
    assert torch.isfinite(student.grad).all()
    assert torch.isfinite(teacher.grad).all()


@pytest.mark.skipif(not INTERPRETED.value, reason="the compiled kernel has the logarithm that it has")
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("kind", "beta"), [("js", 0.5), ("js", 0.34), ("js", 0.1), ("js", 0.98), ("skew_forward_kl", 0.33)]
)
def test_logarithms_off_by_the_most_there_may_be(
    monkeypatch: pytest.MonkeyPatch, kind: str, beta: float, sign: int
) -> None:
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    asked = []

    def log2(_: object, x: TensorHandle) -> TensorHandle:
        y = np.log2(x.data)
        error = 2.0**-22 * np.where((x.data > 0.5) & (x.data < 2), 1, np.abs(y))
        asked.append(x.data.size)
        # 1 has no logarithm but 0, also on the hardware.
        return TensorHandle(np.where(x.data == 1, 0, y + sign * error).astype(np.float32), x.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_log2", log2)
    for spread in (1e-4, 0.5, 1.0, 1.5, 3.0):
        teacher = 2 * torch.randn(4, 3)
        student = teacher + spread * torch.randn(4, 3)
        got = kl_gpu.divergence(student, teacher, kind, beta=beta, reduction="none", backend="triton")
        where = f"log2 off by {sign} · 2^-22, β={beta} ε={spread:g}"
        check_value(got, student, teacher, kind, "triton", where, beta=beta)
    assert asked


def _kl_gradients(
    student: torch.Tensor, teacher: torch.Tensor, scale: float, **options: float
) -> tuple[torch.Tensor, ...]:
    leaves = student.requires_grad_(), teacher.requires_grad_()
    value = kl_gpu.divergence(*leaves, "forward_kl", reduction="none", backend="triton", **options)
    return torch.autograd.grad(value.sum() * scale, leaves)


@pytest.mark.skipif(not INTERPRETED.value, reason="the compiled kernel has the exponential that it has")
@pytest.mark.parametrize(
    "temperature",
    [
        1.0,
        pytest.param(
            0.7,
            marks=pytest.mark.xfail(
                reason="one factor per side in place of a shared one: up to 1.5 of the bound", strict=True
            ),
        ),
    ],
)
def test_b_minus_a_of_exponentials_off_by_the_most_there_may_be(
    monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    # Nearly all columns have b = a, down to e^-44, where the gradient's own rounding hides nothing.
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    random = np.random.default_rng(0)
    asked = []

    def exp2(_: object, x: TensorHandle) -> TensorHandle:
        with np.errstate(over="ignore"):
            y = np.exp2(x.data)
        if y.dtype == np.float32:
            # With what its rounding adds, 2^-22. Powers of whole numbers are exact, also on the hardware.
            error = 3 * 2.0**-24 * random.choice((-1.0, 1.0), y.shape) * (x.data != np.floor(x.data))
            y = (y * (1 + error)).astype(np.float32)
            asked.append(y.size)
        return TensorHandle(y, x.dtype.scalar)

    # Quarters up to 64 are exact in bfloat16. What is exchanged leaves both normalisers as they are.
    logits = (temperature * torch.linspace(-100, 56, 3000)[torch.randperm(3000)]).round() / 4
    low, high = torch.full((36,), 10.0), torch.full((36,), 13.0)
    teacher = torch.cat((logits, low, high)).expand(4, -1).bfloat16()
    shifts = torch.tensor([[0.0], [4.0], [-8.0], [16.0]])
    student = (torch.cat((logits, high, low)) + shifts).bfloat16()
    monkeypatch.setattr(InterpreterBuilder, "create_exp2", exp2)
    options = {"temperature": temperature, "teacher_temperature": temperature}
    grads = _kl_gradients(student, teacher, 1.0, **options)
    where = f"exp2 off by 2^-22, T={temperature}"
    check_gradients(student, teacher, grads, "forward_kl", "triton", where, **options)
    assert asked


def test_gradients_of_nearly_equal_rows_are_good_to_their_own_dtype() -> None:
    # Two exponentials' difference would be off by a hundred times as much.
    teacher = torch.randn(4, 1003, device=DEVICE).half()
    away = 2.0**-10 * torch.randint(-3, 4, teacher.shape, device=DEVICE)
    student = (teacher.float() * (1 + away)).half()
    scale = 2.0**20  # out of float16's subnormals
    grad, _ = _kl_gradients(student, teacher, scale)
    q, p = (np.exp(log) for log in normalisers(student, teacher))
    want = (q - p) * scale
    assert np.median(np.abs(want)) > 0.1
    bound = ROUNDING[grad.dtype] * np.abs(want) + 1e-8 * p * scale
    assert (np.abs(to_numpy(grad) - want) <= bound).all()

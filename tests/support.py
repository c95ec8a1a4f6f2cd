"""What the tests share: device, inputs, the reference on the very inputs given, the promised bounds."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kl_gpu import reference
from kl_gpu.kinds import KINDS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

RELATIVE = 5e-6
GRADIENT = 2e-6
# Relative rounding of the gradient's own dtype, half an ulp, and the smallest number it can round to.
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24, torch.float64: 2**-53}
TINY = {torch.float16: 2**-24, torch.bfloat16: 1e-38, torch.float32: 1e-38, torch.float64: 0.0}

# The worst error seen per (what, backend, kind), as a share of its bound; printed after the run.
WORST: dict[tuple[str, str, str], tuple[float, str]] = {}


def pair(*shape: int, scale: float = 3.0, spread: float = 1.0, shift: float = 0.0, dtype=torch.float32):
    """Teacher logits scale·N(0,1), and student logits = teacher + shift + spread·N(0,1)."""
    teacher = scale * torch.randn(shape, device=DEVICE)
    student = teacher + shift + spread * torch.randn(shape, device=DEVICE)
    return student.to(dtype), teacher.to(dtype)


def to_numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def expected(student: Tensor, teacher: Tensor, kind: str, **options: float) -> np.ndarray:
    return reference.divergence(to_numpy(student), to_numpy(teacher), kind, **options)


def record(what: str, backend: str, kind: str, share: float, where: str) -> None:
    key = (what, backend, kind)
    if share > WORST.get(key, (-1.0, ""))[0]:
        WORST[key] = (share, where)


def check_value(got: Tensor, want: np.ndarray, backend: str, kind: str, where: str) -> None:
    """The promise: relative 5e-6 for 1e-12 ≤ D ≤ 1e2, never negative, and small where D is smaller still."""
    got = to_numpy(got)
    assert (got >= 0).all(), f"negative: {got.min()} at {where}"
    inside = (want >= 1e-12) & (want <= 1e2)
    if inside.any():
        share = (np.abs(got - want)[inside] / (RELATIVE * want[inside])).max()
        record("value", backend, kind, float(share), where)
        assert share <= 1, f"{share} of the bound at {where}"
    assert (got[want < 1e-12] < 2e-12).all(), where


def check_gradients(
    student: Tensor, teacher: Tensor, grads: tuple[Tensor, Tensor], kind: str, backend: str, where: str,
    scale: np.ndarray | float = 1.0, **options: float,
) -> None:  # fmt: skip
    """The promise: 2e-6·max(p, q)·|scale|, on the weights' side times max(1, |log p − log q|, KL)."""
    s, t = to_numpy(student), to_numpy(teacher)
    temperature = options.get("temperature", 1.0)
    teacher_temperature = options.get("teacher_temperature", temperature)
    log_q, log_p = reference.log_softmax(s, temperature), reference.log_softmax(t, teacher_temperature)
    want = reference.gradients(s, t, kind, **options)
    kl = reference.divergence(s, t, kind, **options)[..., None]
    scale = np.asarray(scale, np.float64)[..., None]
    largest = np.exp(np.maximum(log_p, log_q))
    ratio = np.maximum(1.0, np.maximum(np.abs(log_p - log_q), kl))
    for side, grad, exact, t_side in zip(
        ("student", "teacher"), grads, want, (temperature, teacher_temperature), strict=True
    ):
        exact = exact * scale
        bound = GRADIENT * largest * np.abs(scale) / t_side * (ratio if KINDS[kind].weights == side else 1.0)
        slack = np.abs(exact) * ROUNDING[grad.dtype] + TINY[grad.dtype]
        share = ((np.abs(to_numpy(grad) - exact) - slack) / bound).max()
        record("gradient", backend, kind, float(share), f"{where} {side}")
        assert share <= 1, f"{side}: {share} of the bound at {where}"

"""What the tests share: device, inputs, the reference on the very inputs given, the promised bounds."""

from __future__ import annotations

import math

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

# Kinds of first order in the logits, whose gradients have a step where p = q.
FIRST_ORDER = ("tv", "nla", "lk")

# The worst error seen per (what, backend, kind), as a share of its bound; printed after the run.
WORST: dict[tuple[str, str, str], tuple[float, str]] = {}


def is_slow(backend: str) -> bool:
    """Triton's interpreter takes some 50 ms a tile."""
    return backend == "triton" and DEVICE.type == "cpu"


def pair(*shape: int, scale: float = 3.0, spread: float = 1.0, shift: float = 0.0, dtype=torch.float32):
    """Teacher logits scale·N(0,1), and student logits = teacher + shift + spread·N(0,1)."""
    teacher = scale * torch.randn(shape, device=DEVICE)
    student = teacher + shift + spread * torch.randn(shape, device=DEVICE)
    return student.to(dtype), teacher.to(dtype)


def to_numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def expected(student: Tensor, teacher: Tensor, kind: str, **options: float | None) -> np.ndarray:
    return reference.divergence(to_numpy(student), to_numpy(teacher), kind, **options)


def record(what: str, backend: str, kind: str, share: float, where: str) -> None:
    key = (what, backend, kind)
    if share > WORST.get(key, (-1.0, ""))[0]:
        WORST[key] = (share, where)


def normalisers(student: Tensor, teacher: Tensor, **options: float) -> tuple[np.ndarray, np.ndarray]:
    """log q and log p."""
    temperature = options.get("temperature", 1.0)
    teacher_temperature = options.get("teacher_temperature", temperature)
    return (
        reference.log_softmax(to_numpy(student), temperature),
        reference.log_softmax(to_numpy(teacher), teacher_temperature),
    )


def _total_variation_slack(student: Tensor, teacher: Tensor, **options: float) -> np.ndarray:
    """The part 2e-7·(1 + |lse(s) − lse(t)|) that does not shrink with D, of tv, nla and lk."""
    log_q, log_p = normalisers(student, teacher, **options)
    temperature = options.get("temperature", 1.0)
    t_scale = options.get("teacher_temperature", temperature)

    def lse(logits: np.ndarray, log_softmax: np.ndarray) -> np.ndarray:
        # Any column gives scaled logit − log probability; the one with most mass loses least.
        column = np.argmax(log_softmax, -1)[..., None]
        return np.take_along_axis(logits - log_softmax, column, -1)[..., 0]

    lse_s, lse_t = lse(to_numpy(student) / temperature, log_q), lse(to_numpy(teacher) / t_scale, log_p)
    return 2e-7 * (1 + np.abs(lse_s - lse_t))


def check_value(
    got: Tensor, student: Tensor, teacher: Tensor, kind: str, backend: str, where: str,
    want: np.ndarray | None = None, **options: float,
) -> None:  # fmt: skip
    """The promise: relative 5e-6 for 1e-12 ≤ D ≤ 1e2, never negative, and small where D is smaller still.

    `want` is the reference's answer where a test has it already.
    """
    want = expected(student, teacher, kind, **options) if want is None else want
    got = to_numpy(got)
    assert got.shape == want.shape, where
    assert (got >= 0).all(), f"negative: {got.min()} at {where}"
    inside = (want >= 1e-12) & (want <= 1e2)
    bound = RELATIVE * want
    if kind in FIRST_ORDER:
        options.pop("beta", None)
        bound = bound + _total_variation_slack(student, teacher, **options)
    if inside.any():
        share = (np.abs(got - want)[inside] / bound[inside]).max()
        record("value", backend, kind, float(share), where)
        assert share <= 1, f"{share} of the bound at {where}"
    assert (got[want < 1e-12] < 2e-12 + (bound[want < 1e-12] if kind in FIRST_ORDER else 0)).all(), where


def check_gradients(
    student: Tensor, teacher: Tensor, grads: tuple[Tensor, Tensor], kind: str, backend: str, where: str,
    scale: np.ndarray | float = 1.0, **options: float,
) -> None:  # fmt: skip
    """The promise: 2e-6·max(p, q)·|scale|, times max(1, |log p − log q|, D) where logarithms weigh a term.

    That is the weights' side of a KL, and both sides of the other kinds; of nla, and of tv within lk, it is
    relative to 1/α and has no logarithm. Where tv has its step, at p = q, columns are left out, and the mass
    they can move elsewhere is allowed for.
    """
    log_q, log_p = normalisers(student, teacher, **{k: v for k, v in options.items() if k != "beta"})
    temperature = options.get("temperature", 1.0)
    teacher_temperature = options.get("teacher_temperature", temperature)
    want = reference.gradients(to_numpy(student), to_numpy(teacher), kind, **options)
    value = expected(student, teacher, kind, **options)[..., None]
    scale = np.asarray(scale, np.float64)[..., None]
    largest = np.exp(np.maximum(log_p, log_q))
    with np.errstate(invalid="ignore"):
        r = np.abs(log_p - log_q)
    name, beta = KINDS[kind].at(options.get("beta"))
    of = KINDS[name]
    # Where one side lacks a column, a mixture is as far from the other as its share of it says; what else is
    # finite there has no logarithm.
    lacking = -math.log(min(beta, 1 - beta)) if of.formula in ("js", "skew") else 0.0
    ratio = np.maximum(1.0, np.maximum(np.nan_to_num(r, nan=0.0, posinf=lacking), value))
    tie = (r < 1e-5) if name in FIRST_ORDER else np.zeros(r.shape, bool)
    moved = (largest * tie).sum(-1, keepdims=True)
    if name == "nla":  # past the promise on values α may be 0
        tie = tie | (value > 1e2)
    for side, grad, exact, t_side in zip(
        ("student", "teacher"), grads, want, (temperature, teacher_temperature), strict=True
    ):
        exact = exact * scale
        plain = of.name in ("tv", "nla") or (of.formula == "kl" and of.expectation_under != side)
        own = GRADIENT * (1.0 if plain else ratio) + moved
        if name == "nla":
            own = own * np.exp(np.minimum(value, 700.0))
        bound = largest * np.abs(scale) / t_side * own
        slack = np.abs(exact) * ROUNDING[grad.dtype] + TINY[grad.dtype]
        with np.errstate(divide="ignore"):  # a column that neither side has: no error but 0 is allowed
            share = np.where(tie, 0, (np.abs(to_numpy(grad) - exact) - slack) / bound).max()
        record("gradient", backend, kind, float(share), f"{where} {side}")
        assert share <= 1, f"{side}: {share} of the bound at {where}"

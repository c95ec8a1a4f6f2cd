"""The specification: divergences of two categorical distributions given by logits, in NumPy float64.

Written to be read beside the formulas; every backend is tested against it. Shapes are `[..., V]`, rows
are independent, values are in nats. p = softmax(teacher / T_t), q = softmax(student / T_s).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .kinds import KINDS

Array = NDArray[np.float64]


def g(x: ArrayLike) -> Array:
    """g(x) = eˣ − 1 − x ≥ 0, to a few ulp for every x."""
    x = np.asarray(x, np.float64)
    near = np.clip(x, -0.25, 0.25)
    # Below 1/4 the subtraction expm1(x) − x would lose digits; 14 terms of the series reach 1e-19 there.
    series = np.zeros_like(near)
    for n in range(15, 1, -1):
        series = series * near + 1.0 / math.factorial(n)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(np.abs(x) < 0.25, series * near * near, np.expm1(x) - x)


def log_softmax(logits: ArrayLike, temperature: float = 1.0) -> Array:
    """log softmax(logits / T) over the last axis; a row with NaN, +inf or only −inf is NaN throughout."""
    z = np.asarray(logits, np.float64) / temperature
    m = z.max(axis=-1, keepdims=True)
    m = np.where(np.isfinite(m), m, np.nan)
    return (z - m) - np.log(np.exp(z - m).sum(axis=-1, keepdims=True))


def _kl_terms(log_a: Array, log_b: Array) -> Array:
    """The terms of KL(a‖b) = Σ (a·g(r)), r = log b − log a: every one non-negative, so nothing cancels.

    a·g(r) = b − a − a·r, and Σ (b − a) = 0 makes the sum the usual Σ a (log a − log b).
    """
    with np.errstate(invalid="ignore", over="ignore"):
        a, b, r = np.exp(log_a), np.exp(log_b), log_b - log_a
        terms = np.where(np.abs(r) < 1.0, a * g(r), b - a - a * r)
    terms = np.where(np.isneginf(log_b), np.inf, terms)  # a > 0 where b = 0, even if a underflows
    return np.where(np.isneginf(log_a), b, terms)  # a = 0: the limit of a·g(log b/a), also where b = 0


def _sides(
    student: ArrayLike, teacher: ArrayLike, kind: str, temperature: float, teacher_temperature: float | None
) -> tuple[Array, Array]:
    log_q = log_softmax(student, temperature)
    log_p = log_softmax(teacher, temperature if teacher_temperature is None else teacher_temperature)
    return KINDS[kind].order(log_q, log_p)


def divergence(
    student: ArrayLike,
    teacher: ArrayLike,
    kind: str = "forward_kl",
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
) -> Array:
    """Per-row divergence in nats, `[...]`, of logits `[..., V]`."""
    return _kl_terms(*_sides(student, teacher, kind, temperature, teacher_temperature)).sum(axis=-1)


def gradients(
    student: ArrayLike,
    teacher: ArrayLike,
    kind: str = "forward_kl",
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
) -> tuple[Array, Array]:
    """∂divergence/∂student and ∂divergence/∂teacher, `[..., V]` each.

    For KL(a‖b): ∂/∂(logits of b) = (b − a)/T_b and ∂/∂(logits of a) = a·(log a − log b − KL)/T_a. Where KL is
    infinite the second is NaN in the whole row; a column that is −inf on its own side has gradient 0.
    """
    log_a, log_b = _sides(student, teacher, kind, temperature, teacher_temperature)
    kl = _kl_terms(log_a, log_b).sum(axis=-1, keepdims=True)
    a, b = np.exp(log_a), np.exp(log_b)
    with np.errstate(invalid="ignore", over="ignore"):
        r = log_b - log_a
        to_b = np.where(np.abs(r) < 1.0, a * np.expm1(r), b - a)
        to_a = np.where(np.isneginf(log_a), 0.0, -a * (r + kl))
    to_a = np.where(np.isinf(kl), np.nan, to_a)
    # The order of (student, teacher) is its own inverse: the same swap brings (a, b) back.
    to_student, to_teacher = KINDS[kind].order(to_a, to_b)
    return to_student / temperature, to_teacher / (teacher_temperature or temperature)

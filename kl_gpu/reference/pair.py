"""The specification: divergences of two categorical distributions given by logits, in NumPy float64.

Written to be read beside the formulas; every backend is tested against it. Shapes are `[..., V]`, rows
are independent, values are in nats. p = softmax(teacher / T_t), q = softmax(student / T_s). Logits wider
than float64 are computed with as they are: that is how float64 kernels get a judge.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..kinds import KINDS, Kind

Array = NDArray[np.floating[Any]]


def _wide(x: ArrayLike) -> Array:
    x = np.asarray(x)
    return x.astype(np.result_type(x, np.float64), copy=False)


def g(x: ArrayLike) -> Array:
    """g(x) = eˣ − 1 − x ≥ 0, to a few ulp for every x."""
    x = _wide(x)
    near = np.clip(x, -0.25, 0.25)
    # Below 1/4 the subtraction expm1(x) − x would lose digits; 14 terms of the series reach 1e-19 there.
    series = np.zeros_like(near)
    for n in range(15, 1, -1):
        series = series * near + 1.0 / math.factorial(n)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(np.abs(x) < 0.25, series * near * near, np.expm1(x) - x)


def log_softmax(logits: ArrayLike, temperature: float | Array = 1.0) -> Array:
    """log softmax(logits / T) over the last axis; a row with NaN, +inf or only −inf is NaN throughout."""
    z = _wide(logits) / temperature
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


def _kl(log_a: Array, log_b: Array) -> Array:
    return _kl_terms(log_a, log_b).sum(axis=-1, keepdims=True)


def _log_mixture(log_a: Array, log_b: Array, beta: float) -> Array:
    """log m, m = βa + (1−β)b."""
    return np.logaddexp(log_a + math.log(beta), log_b + math.log1p(-beta))


def _overlap(log_a: Array, log_b: Array) -> Array:
    """α = Σ min(a, b): what speculative sampling accepts of b's tokens, and 1 − TV."""
    return np.exp(np.minimum(log_a, log_b)).sum(axis=-1, keepdims=True)


def _lk_weight(log_a: Array, log_b: Array, eta: float) -> Array:
    """λ = exp(−η α) of the hybrid LK loss λ KL(p‖q) + (1−λ) TV (Samarin et al. 2026, arXiv 2602.23881).

    No gradient flows through λ. η = 3 is the paper's best setting.
    """
    return np.exp(-eta * _overlap(log_a, log_b))


def _value(log_a: Array, log_b: Array, formula: str, beta: float) -> Array:
    if formula == "kl":
        return _kl(log_a, log_b)
    if formula == "jeffreys":
        return (1 - beta) * _kl(log_a, log_b) + beta * _kl(log_b, log_a)
    if formula == "tv":
        return 0.5 * np.abs(np.exp(log_a) - np.exp(log_b)).sum(axis=-1, keepdims=True)
    if formula == "nla":
        tv = _value(log_a, log_b, "tv", beta)
        with np.errstate(divide="ignore"):
            return np.where(tv < 0.5, -np.log1p(-np.minimum(tv, 0.5)), -np.log(_overlap(log_a, log_b)))
    if formula == "lk":
        weight = _lk_weight(log_a, log_b, beta)
        return weight * _kl(log_a, log_b) + (1 - weight) * _value(log_a, log_b, "tv", beta)
    log_m = _log_mixture(log_a, log_b, beta)
    if formula == "skew":
        return _kl(log_a, log_m)
    if formula == "js":
        return beta * _kl(log_a, log_m) + (1 - beta) * _kl(log_b, log_m)
    raise NotImplementedError(f"the specification has no formula {formula!r}")


def column_terms(r: ArrayLike, formula: str, beta: float) -> Array:
    """The term ≥ 0 that a column with a = 1 and b = eʳ adds to a formula's divergence."""
    r = _wide(r)[..., None]
    return _value(np.zeros_like(r), r, formula, beta)[..., 0]


def _kl_gradients(log_a: Array, log_b: Array) -> tuple[Array, Array]:
    """∂KL(a‖b) to the logits of a, a·(log a − log b − KL), NaN where KL is infinite, and of b, b − a."""
    kl = _kl(log_a, log_b)
    a, b = np.exp(log_a), np.exp(log_b)
    with np.errstate(invalid="ignore", over="ignore"):
        r = log_b - log_a
        to_b = np.where(np.abs(r) < 1.0, a * np.expm1(r), b - a)
        to_a = np.where(np.isneginf(log_a), 0.0, -a * (r + kl))
    return np.where(np.isinf(kl), np.nan, to_a), np.where(np.isneginf(log_a) & np.isneginf(log_b), 0.0, to_b)


def _gradients(log_a: Array, log_b: Array, formula: str, beta: float) -> tuple[Array, Array]:
    if formula == "kl":
        return _kl_gradients(log_a, log_b)
    if formula == "jeffreys":
        forward, reverse = _kl_gradients(log_a, log_b), _kl_gradients(log_b, log_a)
        to_a, to_b = ((1 - beta) * f + beta * r for f, r in zip(forward, reversed(reverse), strict=True))
        return to_a, to_b
    if formula == "lk":
        weight = _lk_weight(log_a, log_b, beta)
        kl, tv = _kl_gradients(log_a, log_b), _gradients(log_a, log_b, "tv", beta)
        to_a, to_b = (weight * k + (1 - weight) * t for k, t in zip(kl, tv, strict=True))
        return to_a, to_b
    a, b = np.exp(log_a), np.exp(log_b)
    # Partial derivatives of D in a and in b, up to a constant, which the projection below removes.
    if formula == "tv":
        d_a, d_b = np.sign(a - b) / 2, np.sign(b - a) / 2
    elif formula == "nla":
        # tv's over α; where they differ by 1 and α is small, about the larger side's.
        alpha, sign = _overlap(log_a, log_b), np.sign(a - b)
        from_top = np.where(alpha < 0.5, 1.0, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            d_a, d_b = (sign - from_top) / (2 * alpha), (-sign - from_top) / (2 * alpha)
        d_a, d_b = (np.where(alpha == 0, np.nan, d) for d in (d_a, d_b))
    else:
        log_m = _log_mixture(log_a, log_b, beta)
        with np.errstate(invalid="ignore"):
            if formula == "skew":
                a_over_m = np.exp(log_a - log_m)
                d_a, d_b = log_a - log_m - beta * a_over_m, -(1 - beta) * a_over_m
            elif formula == "js":
                d_a, d_b = beta * (log_a - log_m), (1 - beta) * (log_b - log_m)
            else:
                raise NotImplementedError(f"the specification has no formula {formula!r}")
    return _through_softmax(a, d_a), _through_softmax(b, d_b)


def _through_softmax(p: Array, d: Array) -> Array:
    """∂D/∂logits = p·(∂D/∂p − E_p[∂D/∂p]); a token of probability 0 has gradient 0."""
    with np.errstate(invalid="ignore"):
        pd = np.where(p == 0, 0.0, p * d)
    return pd - p * pd.sum(axis=-1, keepdims=True)


def _sides(
    student: ArrayLike,
    teacher: ArrayLike,
    kind: str,
    beta: float | None,
    temperature: float | Array,
    teacher_temperature: float | Array | None,
) -> tuple[Kind, Array, Array, float]:
    log_q = log_softmax(student, temperature)
    log_p = log_softmax(teacher, temperature if teacher_temperature is None else teacher_temperature)
    name, beta = KINDS[kind].at(beta)
    return KINDS[name], *KINDS[name].as_ab(log_q, log_p), beta


def divergence(
    student: ArrayLike,
    teacher: ArrayLike,
    kind: str = "forward_kl",
    *,
    beta: float | None = None,
    temperature: float | Array = 1.0,
    teacher_temperature: float | Array | None = None,
) -> Array:
    """Per-row divergence in nats, `[...]`, of logits `[..., V]`."""
    of, log_a, log_b, beta = _sides(student, teacher, kind, beta, temperature, teacher_temperature)
    return _value(log_a, log_b, of.formula, beta)[..., 0]


def gradients(
    student: ArrayLike,
    teacher: ArrayLike,
    kind: str = "forward_kl",
    *,
    beta: float | None = None,
    temperature: float | Array = 1.0,
    teacher_temperature: float | Array | None = None,
) -> tuple[Array, Array]:
    """∂divergence/∂student and ∂divergence/∂teacher, `[..., V]` each.

    Where a KL is infinite its gradient to the side that weighs its terms is NaN in the whole row.
    """
    of, log_a, log_b, beta = _sides(student, teacher, kind, beta, temperature, teacher_temperature)
    to_student, to_teacher = of.as_ab(*_gradients(log_a, log_b, of.formula, beta))
    other = temperature if teacher_temperature is None else teacher_temperature
    return to_student / temperature, to_teacher / other


def _entropy(log_p: Array) -> Array:
    """−Σ p log p, where a token of probability 0 adds nothing."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(log_p), 0.0, -np.exp(log_p) * log_p).sum(axis=-1)


def token_stats(
    student: ArrayLike,
    teacher: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    temperature: float | Array = 1.0,
    teacher_temperature: float | Array | None = None,
) -> dict[str, Array]:
    """What `kl_gpu.token_stats` gives for rows that all count, `[...]` each; labels lie within [0, V).

    Of what one side says alone only that side's NaN makes a NaN. The largest logit of a tie is the first.
    """
    log_q = log_softmax(student, temperature)
    log_p = log_softmax(teacher, temperature if teacher_temperature is None else teacher_temperature)

    def log_probability(log_softmax: Array) -> Array:
        if labels is None:
            return np.full(log_softmax.shape[:-1], np.nan)
        return np.take_along_axis(log_softmax, np.asarray(labels)[..., None], axis=-1)[..., 0]

    agree = np.argmax(_wide(student), axis=-1) == np.argmax(_wide(teacher), axis=-1)
    values = {
        "js": _value(log_p, log_q, "js", 0.5),
        "tv": _value(log_p, log_q, "tv", 0.0),
        "acceptance": _overlap(log_p, log_q),
    }
    return {
        "forward_kl": _kl(log_p, log_q)[..., 0],
        "reverse_kl": _kl(log_q, log_p)[..., 0],
        "student_entropy": _entropy(log_q),
        "teacher_entropy": _entropy(log_p),
        "student_logprob": log_probability(log_q),
        "teacher_logprob": log_probability(log_p),
        "top1_agree": np.where(np.isnan(log_p + log_q).all(axis=-1), np.nan, agree),
        **{name: value[..., 0] for name, value in values.items()},
    }

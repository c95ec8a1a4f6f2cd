"""The specification itself: against mpmath at 50 digits, scipy, and finite differences."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from kl_gpu import reference
from kl_gpu.kinds import KINDS, Kind


def exact(of: Kind, a: np.ndarray, b: np.ndarray) -> mpmath.mpf:
    """The divergence of softmax a and softmax b by its definition, in 60 digits."""

    def kl(x: list, y: list) -> mpmath.mpf:
        return mpmath.fsum(u * (mpmath.log(u) - mpmath.log(v)) for u, v in zip(x, y, strict=True))

    with mpmath.workdps(60):
        ea, eb = [mpmath.exp(mpmath.mpf(float(x))) for x in a], [mpmath.exp(mpmath.mpf(float(x))) for x in b]
        p, q = [x / mpmath.fsum(ea) for x in ea], [x / mpmath.fsum(eb) for x in eb]
        beta = mpmath.mpf(of.beta or 0)
        m = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
        alpha = mpmath.fsum(min(x, y) for x, y in zip(p, q, strict=True))
        weight = mpmath.exp(-beta * alpha)
        return {
            "kl": lambda: kl(p, q),
            "jeffreys": lambda: (1 - beta) * kl(p, q) + beta * kl(q, p),
            "js": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
            "skew": lambda: kl(p, m),
            "tv": lambda: mpmath.fsum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
            "nla": lambda: -mpmath.log(alpha),
            "lk": lambda: weight * kl(p, q) + (1 - weight) * (1 - alpha),
        }[of.formula]()


@pytest.mark.parametrize("spread", [1e-7, 1e-6, 1e-3, 0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("shift", [0.0, 0.7, -300.0])
def test_values_against_mpmath(kind: str, spread: float, shift: float) -> None:
    rng = np.random.default_rng(1)
    teacher = 3 * rng.standard_normal(9)
    student = teacher + shift + spread * rng.standard_normal(9)
    want = exact(KINDS[kind], *KINDS[kind].as_ab(student, teacher))
    got = reference.divergence(student, teacher, kind)
    # float64 log-probabilities of size |shift| carry an error of |shift|·2⁻⁵³, against a spread of `spread`.
    tolerance = 1e-13 + 2e-16 * (30 + abs(shift)) / min(spread, 1.0) * 10
    assert abs(got - want) / want < tolerance


@pytest.mark.parametrize("x", [0.0, 1e-150, -1e-9, 1e-4, -0.2499, 0.2501, -0.7, 3.0, -40.0, 600.0])
def test_g_against_mpmath(x: float) -> None:
    with mpmath.workdps(400):
        want = mpmath.expm1(mpmath.mpf(x)) - mpmath.mpf(x)
        assert abs(mpmath.mpf(float(reference.g(x))) - want) <= 2e-15 * want


def test_values_against_rel_entr(kind: str) -> None:
    rng = np.random.default_rng(2)
    teacher, student = 3 * rng.standard_normal((4, 500)), 3 * rng.standard_normal((4, 500))
    teacher[0, :9] = -np.inf
    student[0, :9] = -np.inf
    a, b = KINDS[kind].as_ab(softmax(student / 2, axis=-1), softmax(teacher / 0.5, axis=-1))
    got = reference.divergence(student, teacher, kind, temperature=2.0, teacher_temperature=0.5)
    beta = KINDS[kind].beta or 0.0
    m = beta * a + (1 - beta) * b
    want = {
        "kl": rel_entr(a, b),
        "jeffreys": (1 - beta) * rel_entr(a, b) + beta * rel_entr(b, a),
        "js": beta * rel_entr(a, m) + (1 - beta) * rel_entr(b, m),
        "skew": rel_entr(a, m),
        "tv": np.abs(a - b) / 2,
    }
    alpha = np.minimum(a, b).sum(-1)
    want = {name: terms.sum(-1) for name, terms in want.items()}
    with np.errstate(invalid="ignore"):
        want["lk"] = np.exp(-beta * alpha) * want["kl"] + (1 - np.exp(-beta * alpha)) * (1 - alpha)
    want = {**want, "nla": -np.log(alpha)}[KINDS[kind].formula]
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_gradients_against_finite_differences(kind: str) -> None:
    if kind == "lk":
        pytest.skip("no gradient flows through its weight")
    rng = np.random.default_rng(3)
    sides = [rng.standard_normal(6), 2 * rng.standard_normal(6)]
    options = {"temperature": 1.7, "teacher_temperature": 0.6}
    analytic = reference.gradients(*sides, kind, **options)
    step = 1e-6
    for side in (0, 1):
        for i in range(6):
            bump = [np.zeros(6), np.zeros(6)]
            bump[side][i] = step
            up = reference.divergence(sides[0] + bump[0], sides[1] + bump[1], kind, **options)
            down = reference.divergence(sides[0] - bump[0], sides[1] - bump[1], kind, **options)
            assert analytic[side][i] == pytest.approx((up - down) / (2 * step), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("bad", [[np.nan, 0.0, 1.0], [np.inf, 0.0, 1.0], [-np.inf] * 3])
def test_a_row_without_a_distribution_is_nan(kind: str, bad: list[float]) -> None:
    good = np.array([0.0, 1.0, 2.0])
    for student, teacher in ((bad, good), (good, bad)):
        assert np.isnan(reference.divergence(student, teacher, kind))
        assert all(np.isnan(g).all() for g in reference.gradients(student, teacher, kind))

"""The specification itself: against mpmath at 50 digits, scipy, and finite differences."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from kl_gpu import reference
from kl_gpu.kinds import KINDS


def exact_kl(a: np.ndarray, b: np.ndarray) -> mpmath.mpf:
    """KL(softmax a ‖ softmax b) by its definition, in 60 digits."""
    with mpmath.workdps(60):
        ea, eb = [mpmath.exp(mpmath.mpf(float(x))) for x in a], [mpmath.exp(mpmath.mpf(float(x))) for x in b]
        za, zb = mpmath.fsum(ea), mpmath.fsum(eb)
        return mpmath.fsum(
            x / za * (mpmath.log(x / za) - mpmath.log(y / zb)) for x, y in zip(ea, eb, strict=True)
        )


@pytest.mark.parametrize("spread", [1e-7, 1e-6, 1e-3, 0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("shift", [0.0, 0.7, -300.0])
def test_values_against_mpmath(kind: str, spread: float, shift: float) -> None:
    rng = np.random.default_rng(1)
    teacher = 3 * rng.standard_normal(9)
    student = teacher + shift + spread * rng.standard_normal(9)
    want = exact_kl(*KINDS[kind].order(student, teacher))
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
    a, b = KINDS[kind].order(softmax(student / 2, axis=-1), softmax(teacher / 0.5, axis=-1))
    got = reference.divergence(student, teacher, kind, temperature=2.0, teacher_temperature=0.5)
    np.testing.assert_allclose(got, rel_entr(a, b).sum(-1), rtol=1e-12)


def test_gradients_against_finite_differences(kind: str) -> None:
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

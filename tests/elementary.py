"""The elementary functions of kernels/simd as testing/probes-inl.h numbers them: documented errors, points.

float64 is 29 bits ahead of the fp32 that it judges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Exact = Callable[[Points], Points]
LN2 = np.log(2)


class Elementary(NamedTuple):
    """A function on points that all are fp32, and how many ulps of its result it may be off."""

    name: str
    points: NDArray[np.float32]
    exact: Exact
    allowed: float

    def expected(self) -> tuple[Points, Points]:
        """What comes out, and an ulp of each."""
        want = self.exact(self.points.astype(np.float64))
        return want, np.exp2(np.floor(np.log2(np.maximum(np.abs(want), 1e-300))) - 23)


def _near_or_far(x: Points, limit: float, near: Exact, far: Exact) -> Points:
    y = np.empty_like(x)
    small = np.abs(x) < limit
    y[small], y[~small] = near(x[small]), far(x[~small])
    return y


def _g_series(z: Points) -> Points:
    total = np.zeros_like(z)
    for n in range(16, 1, -1):
        total = (total + 1) * z / n
    return total * z


def _g2(x: Points) -> Points:
    return _near_or_far(x * LN2, 0.4, _g_series, lambda z: np.expm1(z) - z) / LN2


def _h_series(z: Points) -> Points:  # sum of (n - 1) / n! z^n
    total, power = np.zeros_like(z), np.ones_like(z)
    for n in range(1, 20):
        power = power * z / n
        total += (n - 1) * power
    return total


def _h2(x: Points) -> Points:
    return _near_or_far(x * LN2, 0.4, _h_series, lambda z: 1 + (z - 1) * np.exp(z)) / LN2


def _gap_series(z: Points) -> Points:
    s = z / (2 + z)
    total = np.zeros_like(z)
    for n in range(12, 0, -1):
        total = (total + 1 / (2 * n + 1)) * s * s
    return (z - 2 * total) * s


def _gap(z: Points) -> Points:
    return _near_or_far(z, 0.5, _gap_series, lambda z: z - np.log1p(z))


def elementary(size: int) -> list[Elementary]:
    """Every function in its probe's place, on some 1.4 `size` points each."""
    every = np.linspace(-125, 126, size)
    tiny = np.exp2(np.linspace(-30, 0, size // 40))
    points = np.concatenate([every, np.linspace(-1.6, 1.6, size * 3 // 8), tiny, -tiny])
    low = -np.exp2(np.linspace(7, 100, size // 80))
    held, both = np.clip(points, -120, 120), np.clip(points, -125, 119)  # past 119 h leaves the format
    # log(1 + z) by the z that is precise: from -1/4 on. What is below comes from y.
    near, high = np.exp2(np.linspace(-60, -2, size // 8)), np.exp2(np.linspace(-60, 120, size * 3 // 8))
    z = np.concatenate([np.linspace(-0.25, 4, size), high, -near])
    y = np.concatenate([np.exp2(np.linspace(-125, 120, size)), np.linspace(0.25, 4, size * 3 // 8)])

    def of(name: str, x: Points, exact: Exact, allowed: float) -> Elementary:
        return Elementary(name, x[: len(x) // 16 * 16].astype(np.float32), exact, allowed)

    return [
        of("exp2", points, np.exp2, 2.5),
        of("g2", np.concatenate([points, low]), _g2, 8),
        of("exp2m1", points, lambda x: np.expm1(x * LN2), 3),
        of("whole", held, np.exp2, 1.5),
        of("less_one", held, lambda x: np.expm1(x * LN2), 3),
        of("log of 1 + z", z, np.log1p, 2.5),
        of("gap", z, _gap, 10),
        of("log of y", y, np.log, 2.5),
        of("power", both, np.exp2, 2.5),
        of("g, both ways", both, _g2, 8),
        of("h", both, _h2, 20),
        of("a third of exp2", held, lambda x: np.exp2(x) / 3, 3.5),
    ]


def rounded_points() -> NDArray[np.float32]:
    """Any bits but NaN's, and the ties of bf16 and fp16 with their neighbours."""
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 2**22, dtype=np.uint32)
    ties = generator.integers(0, 2**16, 2**16, dtype=np.uint32) << 16 | 0x8000
    ties16 = (generator.integers(0, 2**19, 2**16, dtype=np.uint32) << 13) | 0x1000
    x = np.concatenate([bits, ties, ties - 1, ties + 1, ties16, ties16 - 1, ties16 + 1]).view(np.float32)
    return np.where(np.isnan(x), np.float32(0), x)

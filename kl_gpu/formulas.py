"""The formulas of all divergences, column by column, in float64 torch.

With a and b the two probabilities of a column and r = log b/a (−inf where b has no mass, +inf where a has
none, 0 in a column without either), a formula gives the divergence's term, which is never negative, and the
two flows a·∂D/∂a and b·∂D/∂b up to a multiple of a and of b, which softmax takes off again
(docs/numerics.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

# The divergence's term and the flows of a and of b.
Terms = tuple[Tensor, Tensor, Tensor]


def kl_terms(x: Tensor, w: Tensor, q: Tensor, no_weight: Tensor, no_other: Tensor) -> Tensor:
    """w·g(x) ≥ 0, the terms of KL(a‖b) for w = a, q = b, x = log b/a, also where a probability is 0."""
    terms = torch.where(x.abs() < 1, torch.expm1(x).sub_(x).mul_(w), q - w - w * x)
    terms = torch.where(no_other, torch.inf, terms)
    return torch.where(no_weight, q, terms)


def _mixture(x: Tensor, o: Tensor, r: Tensor, own: float, other: float) -> tuple[Tensor, Tensor]:
    """Terms of KL(x‖m) and log m/x, for m = own·x + other·o and r = log o/x."""
    r = r.clamp_max(700)
    z = torch.expm1(r).mul_(other)
    # Near −1 what own adds must not be lost: own = 1e-17 is the difference between a finite D and +inf.
    u = torch.where(z < -0.5, torch.log(own + other * torch.exp(r)), torch.log1p(z))
    return torch.where(r < 1, (z - u).mul_(x), other * (o - x) - x * u), u


def _jeffreys(a: Tensor, b: Tensor, r: Tensor, beta: float) -> Terms:
    no_a, no_b = torch.isposinf(r), torch.isneginf(r)
    forward, reverse = kl_terms(r, a, b, no_a, no_b), kl_terms(-r, b, a, no_b, no_a)
    d = torch.where(r.abs() < 1, a * torch.expm1(r), b - a)
    ar, br = torch.where(no_a, 0, a * r), torch.where(no_b, 0, b * r)
    w = 1 - beta
    return w * forward + beta * reverse, -w * ar - beta * d, w * d + beta * br


def _js(a: Tensor, b: Tensor, r: Tensor, beta: float) -> Terms:
    (to_a, u), (to_b, v) = _mixture(a, b, r, beta, 1 - beta), _mixture(b, a, -r, 1 - beta, beta)
    return beta * to_a + (1 - beta) * to_b, -beta * a * u, (beta - 1) * b * v


def _skew(a: Tensor, b: Tensor, r: Tensor, beta: float) -> Terms:
    terms, u = _mixture(a, b, r, beta, 1 - beta)
    n = -torch.expm1(-u)  # 1 − a/m
    return terms, a * (beta * n - u), (1 - beta) * b * n


def _tv(a: Tensor, b: Tensor, r: Tensor, beta: float) -> Terms:
    half = torch.sign(r) / 2
    return torch.where(r.abs() < 1, a * torch.expm1(r), b - a) * half, -a * half, b * half


def _kl(a: Tensor, b: Tensor, r: Tensor, beta: float) -> Terms:
    no_a, no_b = torch.isposinf(r), torch.isneginf(r)
    to_b = torch.where(r.abs() < 1, a * torch.expm1(r), b - a)
    return kl_terms(r, a, b, no_a, no_b), torch.where(no_a, 0, -a * r), to_b


_FORMULAS = {"kl": _kl, "jeffreys": _jeffreys, "js": _js, "skew": _skew, "tv": _tv}


def column_terms(formula: str, probabilities: tuple[Tensor, Tensor], r: Tensor, beta: float) -> Terms:
    """The terms and flows of any formula. With KL's the sums of a and of b need not be 1."""
    return _FORMULAS[formula](*probabilities, r, beta)

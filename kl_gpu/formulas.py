"""The formulas of all divergences, column by column, in float64 torch.

With a and b the two probabilities of a column and r = log b/a (−inf where b has no mass, +inf where a has
none, 0 in a column without either), a formula gives the divergence's term, which is never negative, and the
two flows a·∂D/∂a and b·∂D/∂b up to a multiple of a and of b, which softmax takes off again
(docs/numerics.md).

Where a divergence is not a sum over columns, a row's sums are those of the formula that `SUMMED` names, and
`finish` makes the row's numbers of them: the value, what the flows sum to, and a β for the flows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def _smaller(a: Tensor, b: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """min(a, b), each side's where it is the smaller: half of both where they are equal."""
    return a * (torch.sign(r) + 1) / 2, b * (1 - torch.sign(r)) / 2


def _overlap(a: Tensor, b: Tensor, r: Tensor, beta: float) -> Terms:
    """tv's term, and the two halves of α = Σ min(a, b)."""
    return (_tv(a, b, r, beta)[0], *_smaller(a, b, r))


def _nla(a: Tensor, b: Tensor, r: Tensor, beta: Tensor) -> Terms:
    """The gradient of −log α, for β = −1/(α·NLA_SCALE)."""
    of_a, of_b = _smaller(a, b, r)
    scale = beta * NLA_SCALE
    return torch.zeros_like(a), of_a * scale, of_b * scale


def _lk(a: Tensor, b: Tensor, r: Tensor, beta: Tensor) -> Terms:
    """The gradient of β of kl and 1 − β of tv."""
    kl, tv = _kl(a, b, r, 0.0), _tv(a, b, r, 0.0)
    to_a, to_b = (beta * k + (1 - beta) * t for k, t in zip(kl[1:], tv[1:], strict=True))
    return torch.zeros_like(a), to_a, to_b


def _comparison(a: Tensor, b: Tensor, r: Tensor, beta: float) -> Terms:
    """The terms of js at 1/2 and of tv, and min(a, b): three numbers of `token_stats`."""
    of_a, of_b = _smaller(a, b, r)
    return _js(a, b, r, 0.5)[0], _tv(a, b, r, beta)[0], of_a + of_b


_FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor, Any], Terms]] = {
    "kl": _kl, "jeffreys": _jeffreys, "js": _js, "skew": _skew, "tv": _tv, "nla": _nla, "lk": _lk,
}  # fmt: skip
# Of no kind, for their sums.
_FOR_SUMS = {"overlap": _overlap, "comparison": _comparison}
# What is summed over a row's columns where it is not the formula itself.
SUMMED = {"nla": "overlap", "lk": "tv"}
# nla's β of a row is −1/α over this, so that float32 holds it wherever −log α < 100.
NLA_SCALE = 2.0**64


def finish(formula: str, beta: float, kl: Tensor, sums: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A row's value, what its flows to a and to b sum to, and the β of its flows, all of the shape of `kl`.

    Args:
        beta: the formula's parameter.
        kl: KL(a‖b), of which only lk is made.
        sums: of `SUMMED`, in float64.
    """
    value, mean_a, mean_b = sums
    if formula == "nla":
        # −log α: from 1 − α where α is near 1, and from α where it is small (docs/numerics.md).
        alpha = mean_a + mean_b
        near = value <= 0.5
        inverse = torch.where(value == 0, 0.0, 1 / alpha)
        value = torch.where(near, -torch.log1p(-torch.where(near, value, 0.0)), -torch.log(alpha))
        return value, -mean_a * inverse, -mean_b * inverse, -inverse / NLA_SCALE
    if formula == "lk":
        weight = torch.exp(-beta * (1 - value).clamp_min(0.0))
        rest = 1 - weight
        return weight * kl + rest * value, weight * kl + rest * mean_a, rest * mean_b, weight
    return value, mean_a, mean_b, torch.full_like(value, beta)


def column_terms(
    formula: str, probabilities: tuple[Tensor, Tensor], r: Tensor, beta: float | Tensor
) -> Terms:
    """The terms and flows of any formula. With KL's the sums of a and of b need not be 1."""
    formulas: dict[str, Callable[[Tensor, Tensor, Tensor, Any], Terms]] = _FORMULAS | _FOR_SUMS
    return formulas[formula](*probabilities, r, beta)

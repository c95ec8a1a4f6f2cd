"""The kinds of divergence: names, parameters, definitions. No torch here.

A *formula* is one divergence of two distributions a and b; a kind says which side plays a. Each backend holds
one small function per formula (docs/numerics.md) over sweeps that all formulas share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """One divergence D(student, teacher).

    Attributes:
        name: what callers say.
        formula: the name of the formula that backends implement.
        expectation_under: the side, "student" or "teacher", that plays a in the formula.
        definition: in symbols, p being the teacher and q the student.
        beta: default of the parameter β, or None where there is none.
        limits: the kinds that this one equals at β = 0 and at β = 1; None at 1 means that 1 is not allowed.
        beta_most: the largest β of a kind whose range does not end at 1.
    """

    name: str
    formula: str
    expectation_under: str
    definition: str
    beta: float | None = None
    limits: tuple[str | None, str | None] = (None, None)
    beta_most: float | None = None

    def as_ab(self, student: T, teacher: T) -> tuple[T, T]:
        """(a, b) from the two sides; the swap is its own inverse."""
        return (teacher, student) if self.expectation_under == "teacher" else (student, teacher)

    def at(self, beta: float | None) -> tuple[str, float]:
        """The kind and β to evaluate: at an end of β's range, the kind that it equals there."""
        beta = self.beta if beta is None else float(beta)
        if beta is None:
            return self.name, 0.0
        # Not a table nor `==`, and never a plain 0.0: each would tie torch.compile's graph to this β.
        if self.limits[0] is not None and beta <= 0:
            return self.limits[0], beta
        if self.limits[1] is not None and beta >= 1:
            return self.limits[1], 1.0 - beta
        return self.name, beta


_KLS = ("forward_kl", "reverse_kl")

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("forward_kl", "kl", "teacher", "KL(p‖q) = Σ p (log p − log q)"),
        Kind("reverse_kl", "kl", "student", "KL(q‖p) = Σ q (log q − log p)"),
        Kind("jeffreys", "jeffreys", "teacher", "(1−β) KL(p‖q) + β KL(q‖p)", 0.5, _KLS),
        Kind("js", "js", "teacher", "β KL(p‖m) + (1−β) KL(q‖m), m = βp + (1−β)q", 0.5, _KLS),
        Kind("skew_forward_kl", "skew", "teacher", "KL(p‖βp + (1−β)q)", 0.1, ("forward_kl", None)),
        Kind("skew_reverse_kl", "skew", "student", "KL(q‖βq + (1−β)p)", 0.1, ("reverse_kl", None)),
        Kind("tv", "tv", "teacher", "½ Σ |p − q|"),
        Kind("nla", "nla", "teacher", "−log α, α = Σ min(p, q)"),
        Kind(
            "lk",
            "lk",
            "teacher",
            "λ KL(p‖q) + (1−λ) ½ Σ |p − q|, λ = exp(−β α) detached",
            3.0,
            ("forward_kl", None),
            1e6,
        ),
    )
}

"""The family of divergences: names, parameters, definitions. No torch here.

A *family* is one formula in two distributions a and b; a kind says which side plays a. Each backend holds one
small formula per family (docs/numerics.md) over sweeps that all families share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# Numbers kept per row between value and gradient. What they mean is each backend's own affair.
STATS = 12


@dataclass(frozen=True)
class Kind:
    """One divergence D(student, teacher).

    Attributes:
        name: what callers say.
        family: the formula backends implement.
        weights: the side, "student" or "teacher", that plays a in the family's formula.
        formula: the definition, p being the teacher and q the student.
        beta: default of the parameter β in [0, 1], or None where there is none.
        ends: the kinds that this one equals at β = 0 and at β = 1; None at 1 means that 1 is not allowed.
    """

    name: str
    family: str
    weights: str
    formula: str
    beta: float | None = None
    ends: tuple[str | None, str | None] = (None, None)

    def order(self, student: T, teacher: T) -> tuple[T, T]:
        """(a, b) from the two sides; the swap is its own inverse."""
        return (teacher, student) if self.weights == "teacher" else (student, teacher)

    def at(self, beta: float | None) -> tuple[str, float]:
        """The kind and β to evaluate: at an end of β's range, the kind that it equals there."""
        beta = self.beta if beta is None else float(beta)
        if beta is None:
            return self.name, 0.0
        # Not a table nor `==`, and never a plain 0.0: each would tie torch.compile's graph to this β.
        if beta <= 0 and self.ends[0] is not None:
            return self.ends[0], beta
        if beta >= 1 and self.ends[1] is not None:
            return self.ends[1], 1.0 - beta
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
    )
}

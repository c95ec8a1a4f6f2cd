"""The family of divergences: names and which side carries the weights. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# Numbers kept per row between value and gradient. What they mean is each backend's own affair.
STATS = 8


@dataclass(frozen=True)
class Kind:
    """One divergence D(student, teacher).

    Every kind so far is KL(a‖b) = Σ a (log a − log b) with the two sides in one order or the other;
    `weights` names the side that plays a.
    """

    name: str
    weights: str
    formula: str

    def order(self, student: T, teacher: T) -> tuple[T, T]:
        """(a, b) of KL(a‖b) from the two sides."""
        return (teacher, student) if self.weights == "teacher" else (student, teacher)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("forward_kl", weights="teacher", formula="KL(p‖q) = Σ p (log p − log q)"),
        Kind("reverse_kl", weights="student", formula="KL(q‖p) = Σ q (log q − log p)"),
    )
}

"""Which of a test's parameter sets to run where each takes seconds: few that still hold every pair of values.

A fault that one parameter shows, or two together, is found as by all sets; `make test-all` runs all.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations

Set = Sequence[Hashable]


def pairs_of(one: Set) -> set[Hashable]:
    """The pairs of values in a set, each value with its place; of a single value, that."""
    placed = tuple(enumerate(one))
    return set(combinations(placed, min(2, len(placed))))


def covering(sets: Sequence[Set]) -> list[int]:
    """The places of a few sets that hold every pair of values that is in any."""
    held = [pairs_of(one) for one in sets]
    order = random.Random(0)
    return min((_greedy(held, order.sample(range(len(sets)), len(sets))) for _ in range(20)), key=len)


def _greedy(held: Sequence[set[Hashable]], places: Sequence[int]) -> list[int]:
    """The most missing pairs first, and of equals the first of `places`."""
    missing = set().union(*held)
    chosen: list[int] = []
    while missing:
        best = max(places, key=lambda place: len(held[place] & missing))
        chosen.append(best)
        missing -= held[best]
    return sorted(chosen)


def left_out(sets: Sequence[Set]) -> Iterable[int]:
    return sorted(set(range(len(sets))) - set(covering(sets)))

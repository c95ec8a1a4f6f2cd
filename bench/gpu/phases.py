"""A session's time, shared out to phases so that the whole ends when it said it would."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

DONE, SKIPPED, CUT_SHORT, FAILED = "done", "skipped", "cut short", "failed"


class Budget:
    """Seconds that only ever get fewer."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self._end = now() + seconds

    def left(self) -> float:
        return max(0.0, self._end - self.now())


@dataclass(frozen=True)
class Ending:
    """How a phase ended, and why if not simply done."""

    outcome: str = DONE
    why: str = ""


@dataclass(frozen=True)
class Phase:
    """A part of the session.

    `share` is its weight among the phases still to come, which divide what is left: what one does not use
    the later ones have. `least` is how many seconds it needs to be of any use. `run` is given the seconds
    it may take, and must keep to them. `skip` says why it cannot run at all.
    """

    name: str
    share: float
    least: float
    run: Callable[[float], Ending]
    skip: str = ""


@dataclass(frozen=True)
class Outcome:
    """One line of the session's record."""

    name: str
    outcome: str
    why: str
    seconds: float


def run_phases(phases: Sequence[Phase], budget: Budget) -> Iterator[Outcome]:
    """Runs one phase after the other. A phase that raises has failed; the ones after it run."""
    for number, phase in enumerate(phases):
        if phase.skip:
            yield Outcome(phase.name, SKIPPED, phase.skip, 0.0)
            continue
        left = budget.left()
        if left < phase.least:
            why = f"no time: {left:.0f} s were left, it needs {phase.least:.0f}"
            yield Outcome(phase.name, SKIPPED, why, 0.0)
            continue
        shares = sum(later.share for later in phases[number:] if not later.skip)
        limit = max(left * phase.share / shares, phase.least)
        start = budget.now()
        try:
            ending = phase.run(limit)
        except Exception as error:  # the session outlives whatever befalls one of its parts
            ending = Ending(FAILED, f"{type(error).__name__}: {error}".strip().partition("\n")[0])
        yield Outcome(phase.name, ending.outcome, ending.why, budget.now() - start)

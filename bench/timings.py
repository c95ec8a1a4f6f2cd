"""Times the points of a journal's plan that nobody began yet, until its seconds are over.

    python -m bench.timings --journal FILE --seconds S

A process of its own, started by `python -m bench.gpu`, and started again where a point broke it. Exit status
0: nothing is left that fits the time; 3: the device no longer answers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import machine, watchdog
from .budget import Budget
from .cases import DTYPES, Case
from .check import WrongOutput
from .journal import Journal, points_of, report_of
from .measure import Measured, measure_case
from .plan import OURS, Point
from .systems import System, absent, available

BROKEN = 3

# A point that takes longer hangs: a program waiting for another that never runs, say.
_HANGS = 75.0


class Pace:
    """How long the next point may take: as long as the slowest one so far with the same systems."""

    _UNKNOWN = 8.0  # seconds per system, compilation included

    def __init__(self) -> None:
        self._slowest: dict[tuple[str, ...], float] = {}

    def expected(self, point: Point) -> float:
        return self._slowest.get(point.systems, self._UNKNOWN * len(point.systems))

    def saw(self, point: Point, seconds: float) -> None:
        self._slowest[point.systems] = max(seconds, self._slowest.get(point.systems, 0.0))


def rows_of(point: Point, device: torch.device) -> int:
    if device.type != "cuda":
        return point.rows
    itemsize = DTYPES[point.dtype].itemsize
    # Plain fp32 temporaries alive at once: five for a KL; a mixture adds shifted copies, itself and terms.
    plain = 0 if point.systems == OURS else 5 if point.kind in ("forward_kl", "reverse_kl") else 10
    return machine.rows_that_fit(point.rows, point.vocab, itemsize, device, plain)


def measure_point(
    case: Case,
    works: Sequence[str],
    systems: Sequence[System],
    measure: Callable[[Case, Sequence[System], Sequence[str]], dict[str, Measured]],
    wrong: Callable[[str], None],
) -> dict[str, Measured]:
    """`measure`, again without each system that turned out wrong: it has no time to speak of."""
    systems = list(systems)
    while systems:
        try:
            return measure(case, systems, works)
        except WrongOutput as error:
            wrong(str(error))
            systems = [system for system in systems if system.name != error.system]
    return {}


def time_points(journal: Journal, seconds: float, now: Callable[[], float] | None = None) -> int:
    budget = Budget(seconds, now) if now else Budget(seconds)
    events = journal.read()
    device, repeats = torch.device(events[0]["device"]), events[0]["repeats"]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    known, cache, pace = available(device), machine.cache_bytes(device), Pace()
    wanted = {name for point in points_of(events) for name in point.systems}
    why_not = {name: why for name, why in absent(device).items() if name in wanted}
    journal.add("absent", left_out=why_not)
    begun = {event["point"] for event in events if event["event"] == "start"}

    def measure(case: Case, systems: Sequence[System], works: Sequence[str]) -> dict[str, Measured]:
        return measure_case(case, systems, works, device, cache, repeats)

    for number, point in enumerate(points_of(events)):
        if number in begun or pace.expected(point) > budget.left():
            continue
        journal.add("start", point=number)
        start = budget.now()
        watchdog.end_after(_HANGS)
        try:
            case = Case(point.kind, point.dtype, rows_of(point, device), point.vocab)
            systems = [known[name] for name in point.systems if name in known]
            results = measure_point(
                case, point.works, systems, measure, lambda what: journal.add("wrong", what=what)
            )
        except Exception as error:  # one point's failure is not the others'
            why = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
            journal.add("failed", point=number, why=why)
            if not _answers(device):
                return BROKEN
            continue
        finally:
            watchdog.off()
        journal.measured(results)
        journal.add("done", point=number, seconds=budget.now() - start)
        pace.saw(point, budget.now() - start)
        report_of(journal.read()).save(journal.path.parent, complete=False)
    return 0


def _answers(device: torch.device) -> bool:
    """After some errors every further call on a device fails, until the process ends."""
    try:
        (torch.zeros(1, device=device) + 1).item()
    except RuntimeError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.timings", description=__doc__)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args(arguments)
    return time_points(Journal(options.journal), options.seconds)


if __name__ == "__main__":
    raise SystemExit(main())

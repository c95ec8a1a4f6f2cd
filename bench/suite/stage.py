"""The stage holds the logits of one point, and its contestants made ready, until the next point."""

from __future__ import annotations

import gc
import itertools

import torch

from ..harness import machine
from ..harness.cases import Case, Problem
from ..harness.check import check
from ..harness.clock import cover_launch
from ..harness.memory import peak_extra_bytes
from ..harness.options import DTYPES
from ..harness.report import COPY
from ..harness.systems import WORKLOADS, Entry, Output, absent, available
from .plan import OURS, Point


class LeftOut(Exception):
    """A system cannot be timed here; the message says why."""


def rows_of(point: Point, device: torch.device) -> int:
    """The rows that a point wants, or as many as the GPU's memory holds."""
    if device.type != "cuda":
        return point.rows
    itemsize = DTYPES[point.dtype].itemsize
    # Plain fp32 temporaries alive at once: five for a KL; a mixture adds shifted copies, itself and terms.
    plain = 0 if point.systems == OURS else 5 if point.kind in ("forward_kl", "reverse_kl") else 10
    return machine.rows_that_fit(point.rows, point.vocab, itemsize, device, plain)


class Stage:
    """What is timed now: the logits of a point, whose turn it is, and who failed at it before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.turns = itertools.count()
        self._known = available(device)
        self._point: Point | None = None
        self._problem: Problem | None = None
        self._entries: dict[str, Entry] = {}
        self.failed: dict[tuple[str, str], str] = {}  # workload and system: why

    def problem(self, point: Point) -> Problem:
        if point != self._point or self._problem is None:
            self._problem = None
            self._entries.clear()
            self.failed.clear()
            gc.collect()  # an earlier point's logits may hang in a reference cycle
            torch.cuda.empty_cache()
            case = Case(point.kind, point.dtype, rows_of(point, self.device), point.vocab)
            self._problem = Problem(case, self.device, machine.cache_bytes(self.device))
            self._point = point
        return self._problem

    def contestant(self, point: Point, workload: str, name: str) -> Contestant:
        """Raises LeftOut where the system does not run here, or failed at this point in an earlier pass."""
        if name != COPY and name not in self._known:
            raise LeftOut(absent(self.device).get(name, "it does not run here"))
        problem = self.problem(point)
        if (workload, name) in self.failed:
            raise LeftOut(self.failed[workload, name])
        if name != COPY and name not in self._entries:
            self._entries[name] = self._known[name].enter(point.kind)
        return Contestant(self, problem, workload, self._entries.get(name))


class Contestant:
    """A system at a workload, or the copy. Every output is checked before the next run, the clock stopped."""

    def __init__(self, stage: Stage, problem: Problem, workload: str, entry: Entry | None) -> None:
        self.problem = problem
        self.peak_extra_bytes = 0
        self.max_rel_error = 0.0
        self.required = entry is None or entry.system.required
        self._stage = stage
        self._workload = workload
        self._entry = entry
        self._last: tuple[int, Output] | None = None

    def rehearse(self) -> None:
        """Compiles, if anything is to be compiled, and finds the peak of memory."""
        if (entry := self._entry) is not None:
            self.run(next(self._stage.turns))
            self.check_last()
            turn = next(self._stage.turns)
            self.peak_extra_bytes = peak_extra_bytes(lambda: self._output(entry, turn), self._stage.device)

    def set_up(self) -> tuple[tuple[int], dict[str, object]]:
        """The next run's arguments."""
        self.check_last()
        cover_launch(self._stage.device)
        return (next(self._stage.turns),), {}

    def run(self, turn: int) -> None:
        """What is timed. The output is kept here, not returned: nobody else must hold its memory."""
        if self._entry is None:
            self.problem.copy(turn)
        else:
            self._last = turn, self._output(self._entry, turn)

    def _output(self, entry: Entry, turn: int) -> Output:
        student, teacher, _ = self.problem.turn(turn)
        return WORKLOADS[self._workload](entry, student, teacher, self.problem.row_gradient)

    def check_last(self) -> None:
        if self._entry is not None and self._last is not None:
            error = check(self._entry, self._workload, self.problem, *self._last)
            self.max_rel_error = max(self.max_rel_error, error)
            self._last = None

"""Whether a session fits into the minutes for which a machine is lent: `python -m bench gpu --dry-run`.

Every variant of a kernel that the plan needs is compiled for an H200, and one core's seconds are counted. A
timing takes the bytes that it must move at a stated bandwidth, times a factor for its system. What cannot be
counted without a GPU is stated below, on the safe side.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from ..audit.compiled import compile_entry
from ..audit.kernels import Entry
from ..harness.cases import DISTINCT
from ..harness.report import COPY
from ..harness.traffic import COPY_PASSES
from ..harness.traffic import PASSES as TENSORS
from ..suite.plan import PLANS, REPEATS, Point, passes_of
from .calls import CALLS, calls_of
from .variants import Variant, variants

_ARCH = "sm_90"
_CORES = 16
_LENT = 15 * 60.0  # seconds, from asking for the machine until it is given back
_PER_COMMAND = 10 * 60.0
_ARRIVAL = 120.0  # seconds until it is there, and the files are

_BANDWIDTH = 3.5e12  # bytes a second, read and written; a copy on an H200 moves 4.3e12
# How much longer than its least traffic takes, at most, a system is at work.
_FACTOR = {COPY: 1.2, "kl_gpu": 2.5, "torch": 20.0, "torch.compile": 8.0, "liger": 20.0}
_PROCESS = 10.0  # seconds until a process has imported PyTorch and opened the device
_PROCESSES = 20.0  # the same of several at once
_TEST = 0.02  # of pytest, around a timing
_RUN = 2.5e-3  # around a run: the device asleep for a millisecond, the check of its output
_REFERENCE = 4e-7  # of NumPy in float64, for each logit of the distinct rows
_TORCH_COMPILE = 6.0  # of a workload
_UNEVEN = 1.3  # how much longer the last of several processes takes than they do on average


@dataclass(frozen=True)
class Line:
    """A phase and what it needs. Where `seconds` is None it takes what it is given, and is cut short."""

    phase: str
    given: float
    what: str
    seconds: float | None

    @property
    def fits(self) -> bool:
        return self.seconds is None or self.seconds <= self.given


def _class_of(variant: Variant) -> str:
    """The audit's class of V that takes as long to compile."""
    itemsize = {"fp32": 4}.get(variant.dtype, 2)
    return "aligned" if variant.vocab * itemsize % 16 == 0 else "odd"


def _processor_seconds(entry: Entry, dtype: str, V_class: str) -> float:
    def now() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in used)

    start = now()
    compile_entry(entry, dtype, _ARCH, V_class)
    return now() - start


def counted(wanted: Sequence[Variant]) -> dict[Variant, float]:
    """Seconds of one core for each variant. Variants that differ in a number alone are compiled here once."""
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # not from the cache of an earlier count
    jobs = {variant: (variant.entry, variant.dtype, _class_of(variant)) for variant in wanted}
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        begun = {job: pool.submit(_processor_seconds, *job) for job in dict.fromkeys(jobs.values())}
        found = {job: future.result() for job, future in begun.items()}
    return {variant: found[job] for variant, job in jobs.items()}


def _compiled(name: str, seconds: Mapping[Variant, float]) -> tuple[str, float]:
    calls = list(CALLS[name]())
    mine = {variant: seconds[variant] for call in calls for variant in variants(call)}
    reference = sum(_REFERENCE * DISTINCT * call.vocab for call in calls)
    needed = _PROCESSES + max(max(mine.values()), _UNEVEN * (sum(mine.values()) + reference) / _CORES)
    return f"{len(mine)} kernels of {sum(mine.values()):.0f} s in {_CORES} processes", needed


def seconds_of(point: Point, repeats: int) -> float:
    """What a point takes, its kernels compiled."""
    passes, rounds = passes_of(repeats)
    total = _REFERENCE * DISTINCT * point.vocab
    for workload in point.workloads:
        for system in (COPY, *point.systems):
            tensors = COPY_PASSES if system == COPY else TENSORS[workload]
            run = _RUN + _FACTOR[system] * tensors * point.tensor_bytes / _BANDWIDTH
            total += passes * (_TEST + (rounds + 3) * run)  # one warms up, two find the peak of memory
        total += _TORCH_COMPILE * ("torch.compile" in point.systems)
    return total


def _lines(phases: Mapping[str, float], seconds: Mapping[Variant, float]) -> Iterator[Line]:
    for phase, given in phases.items():
        name = phase.removeprefix("time ")
        if name != phase:
            points = PLANS[name]()
            needed = _PROCESS + sum(seconds_of(point, REPEATS[name]) for point in points)
            yield Line(phase, given, f"{len(points)} points", needed)
        elif calls_of(phase) in CALLS:
            yield Line(phase, given, *_compiled(calls_of(phase), seconds))
        else:
            yield Line(phase, given, "as far as its time goes", None)


@dataclass(frozen=True)
class Command:
    """A command on the lent machine: its phases, and its limit, of which `reserve` seconds are no phase's."""

    name: str
    limit: float
    reserve: float
    phases: Mapping[str, float]


def show(commands: Sequence[Command]) -> int:
    """Prints the timetable of the commands, one after the other. Status 1 where something does not fit."""
    names = dict.fromkeys(calls_of(phase) for command in commands for phase in command.phases)
    calls = [call for name in names if name in CALLS for call in CALLS[name]()]
    seconds = counted(list(dict.fromkeys(variant for call in calls for variant in variants(call))))
    fits = True
    for command in commands:
        print(f"{command.name}, {command.limit:.0f} s:")
        at = 0.0
        for line in _lines(command.phases, seconds):
            needed = "" if line.seconds is None else f"{line.seconds:.0f} s"
            late = "" if line.fits else "  DOES NOT FIT"
            print(
                f"  at {at:4.0f} s  {line.phase:15} {line.given:4.0f} s  needs {needed:>6}  {line.what}{late}"
            )
            at += line.given
            fits &= line.fits
        if command.limit > _PER_COMMAND or at + command.reserve > command.limit:
            print(f"  {at:.0f} s in all, and {command.reserve:.0f} s around them: DOES NOT FIT")
            fits = False
    whole = _ARRIVAL + sum(command.limit for command in commands)
    print(f"{whole:.0f} s of {_LENT:.0f} s, {_ARRIVAL:.0f} s of them until the machine is there")
    fits &= whole <= _LENT
    print("it fits" if fits else "it does not fit")
    return int(not fits)

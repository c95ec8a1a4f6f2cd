"""A case, measured: a row of the JSON for every system and work."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from .cases import Case, Problem
from .check import WrongOutput, check
from .memory import peak_extra_bytes
from .systems import WORKS, Entry, Output, System
from .timing import clock_of, interleave
from .traffic import COPY_PASSES, PASSES, gbps

COPY = "copy"


@dataclass(frozen=True)
class Row:
    """One line of the JSON."""

    system: str
    kind: str
    work: str
    dtype: str
    N: int
    V: int
    ms: float
    bytes: int
    gbps: float
    share_of_copy: float
    peak_extra_bytes: int
    max_rel_error: float


@dataclass(frozen=True)
class Measured:
    rows: list[Row]
    copy_gbps: float
    spread: dict[str, float]  # ms, of the copy too: the median distance of a run from the median run
    left_out: dict[str, str]  # system: why


def run_of(entry: Entry, work: str, problem: Problem) -> Callable[[int], Output]:
    """The timed call: `work` by one system, on the logits whose turn it is."""

    def run(turn: int) -> Output:
        student, teacher, _ = problem.turn(turn)
        return WORKS[work](entry, student, teacher, problem.row_gradient)

    return run


def measure(
    work: str, entries: Sequence[Entry], problem: Problem, device: torch.device, repeats: int
) -> Measured:
    """Raises WrongOutput, be it of a first run or of a timed one."""
    entry_of: dict[str, Entry] = {}
    peaks: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for entry in entries:
        name, run = entry.system.name, run_of(entry, work, problem)
        try:
            check(entry, work, problem, 0, run(0))  # compiles, if anything is to be compiled
            peaks[name] = peak_extra_bytes(partial(run, 1), device)
            entry_of[name] = entry
        except torch.OutOfMemoryError:
            left_out[name] = "out of memory"
        except WrongOutput:
            raise
        except Exception as error:  # a peer may fail in its own ways, and not only with RuntimeError
            if entry.system.required:
                raise
            left_out[name] = str(error).strip().partition("\n")[0] or type(error).__name__

    errors = dict.fromkeys(entry_of, 0.0)

    def judge(name: str, turn: int, output: Output | None) -> None:
        if output is not None:
            errors[name] = max(errors[name], check(entry_of[name], work, problem, turn, output))

    runs: dict[str, Callable[[int], Output | None]] = {COPY: problem.copy}
    runs.update((name, run_of(entry, work, problem)) for name, entry in entry_of.items())
    times = interleave(clock_of(device), runs, repeats, judge)
    typical = {name: median(each) for name, each in times.items()}
    spread = {name: median(abs(ms - typical[name]) for ms in each) for name, each in times.items()}
    case = problem.case
    copy_gbps = gbps(COPY_PASSES * case.tensor_bytes, typical.pop(COPY))
    required = PASSES[work] * case.tensor_bytes
    rows = []
    for name, ms in typical.items():
        speed = gbps(required, ms)
        rows.append(
            Row(
                system=name,
                kind=case.kind,
                work=work,
                dtype=case.dtype,
                N=case.rows,
                V=case.vocab,
                ms=ms,
                bytes=required,
                gbps=speed,
                share_of_copy=speed / copy_gbps,
                peak_extra_bytes=peaks[name],
                max_rel_error=errors[name],
            )
        )
    return Measured(rows, copy_gbps, spread, left_out)


def measure_case(
    case: Case,
    systems: Sequence[System],
    works: Sequence[str],
    device: torch.device,
    cache: int,
    repeats: int,
) -> dict[str, Measured]:
    """Every work on one case, by the systems that do it. All memory it took is free again when it returns."""
    gc.collect()  # an earlier case's logits may hang in a reference cycle
    torch.cuda.empty_cache()
    problem = Problem(case, device, cache)
    entries = [system.enter(case.kind) for system in systems if system.does(case.kind)]
    return {
        work: measure(work, [e for e in entries if e.system.does(case.kind, work)], problem, device, repeats)
        for work in works
    }

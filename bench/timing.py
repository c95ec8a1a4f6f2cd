"""The clock: one call at a time, the systems interleaved."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")


class Clock(Protocol):
    def __call__(self, call: Callable[[int], T], turn: int) -> tuple[float, T]:
        """Milliseconds that `call(turn)` took, and its result."""


def cpu_clock(call: Callable[[int], T], turn: int) -> tuple[float, T]:
    start = time.perf_counter_ns()
    result = call(turn)
    return (time.perf_counter_ns() - start) / 1e6, result


# About a millisecond, in which the host queues a whole call behind the sleeping device: what is measured is
# the work and not the gaps between launches. A call that waits for the device halfway gets no such cover.
_SLEEP_CYCLES = 2_000_000


def cuda_clock(call: Callable[[int], T], turn: int) -> tuple[float, T]:
    """Device time between two events on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(_SLEEP_CYCLES)
    start.record()
    result = call(turn)
    end.record()
    end.synchronize()
    return start.elapsed_time(end), result


def clock_of(device: torch.device) -> Clock:
    return cuda_clock if device.type == "cuda" else cpu_clock


def interleave(
    clock: Clock,
    calls: Mapping[str, Callable[[int], T]],
    rounds: int,
    after: Callable[[str, int, T], None],
) -> dict[str, list[float]]:
    """Milliseconds of every call, `rounds` times: in rounds, so that a slow spell of the machine hits all.

    Each round has an order of its own, lest one call always runs in the wake of the same neighbour. Every
    run has the next turn number, by which it picks its buffers. `after` sees each result with the clock
    stopped. The round before the first is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    turn = 0
    with _no_garbage_collection():
        for counted in [False] + [True] * rounds:
            shuffle(order)
            for name in order:
                ms, result = clock(calls[name], turn)
                after(name, turn, result)
                del result  # lest its memory be held during the next call
                turn += 1
                if counted:
                    times[name].append(ms)
    return times


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection amid a call would be charged to whoever runs just then."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

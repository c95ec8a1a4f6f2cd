"""The timer that pytest-benchmark uses on a GPU, and rounds in which contestants take turns.

pytest-benchmark is the timer of record of the suite. It finishes one contestant before the next begins, which
is too far apart for what `interleaved` times: shares of the memory's own speed, on cores that others use too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

# About a millisecond, in which the host queues a whole call behind the sleeping device: what is measured is
# the work and not the gaps between launches. A call that waits for the device halfway gets no such cover.
_SLEEP_CYCLES = 2_000_000


class CudaInstant:
    """A point on the current stream. Two of them differ by seconds of the device's own time."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: CudaInstant) -> float:
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


def timer_of(device: torch.device) -> Callable[[], Any]:
    """What to call before and after a run; the difference of the two is seconds."""
    return CudaInstant if device.type == "cuda" else time.perf_counter


def cover_launch(device: torch.device) -> None:
    """Keeps a GPU asleep while the host queues the run that is timed next."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda._sleep(_SLEEP_CYCLES)


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    before: Mapping[str, Callable[[], object]] | None = None,
    device: torch.device | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call, round by round; what must happen before some of them is not timed.

    Every call takes its turn in every round, so that a slow spell of the machine hits all alike. A first
    round warms up and is not counted.
    """
    device = device or torch.device("cpu")
    timer = timer_of(device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    prepare = {name: (before or {}).get(name, partial(cover_launch, device)) for name in calls}
    for name, call in calls.items():
        prepare[name]()
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            prepare[name]()
            start = timer()
            result = call()
            times[name].append(timer() - start)
            del result  # its memory must not be held during the next call
    return times


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median over the rounds of one call's time divided by another's."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))

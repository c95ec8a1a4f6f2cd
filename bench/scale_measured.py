"""Gloo processes on this machine: the gather beside its prediction, two of them beside two threads."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kl_gpu import divergence
from kl_gpu.distributed import vocab_parallel_div

from .scale import Link

_ROWS = (16, 256, 4096, 65536)
_REPEATS = 25
_N, _V = 256, 128256


def _join(rank: int, ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)


def _median(run: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _gathers(rank: int, ranks: int, port: int, found: Any) -> None:
    _join(rank, ranks, port)
    from kl_gpu.distributed.collectives import gather

    for rows in _ROWS:
        state = torch.zeros(3, rows, dtype=torch.float64)
        seconds = _median(lambda state=state: gather(state, dist.group.WORLD, "states"), 40)  # type: ignore[misc]
        if rank == 0:
            found[rows] = seconds
    dist.destroy_process_group()


class _Turn(NamedTuple):
    """One way to share a divergence's work among this machine's two cores."""

    call: Callable[..., torch.Tensor]
    threads: int
    halves: bool  # each rank its own half of the columns; else rank 0 does it all

    def seconds(self, rank: int, sides: list[torch.Tensor], gradient: bool) -> float:
        """Until both ranks are done."""
        leaf = sides[0].detach().requires_grad_(gradient)
        torch.set_num_threads(self.threads)
        dist.barrier()
        start = time.perf_counter()
        if self.halves or rank == 0:
            value = self.call(leaf, sides[1], reduction="none")
            if gradient:
                value.sum().backward()
        dist.barrier()
        return time.perf_counter() - start


_TURNS = {
    "one process, two threads": _Turn(divergence, 2, False),
    "two processes": _Turn(vocab_parallel_div, 1, True),
    # What no exchange between them could get below.
    "two that do not talk": _Turn(divergence, 1, True),
}


def _race(rank: int, ranks: int, port: int, found: Any) -> None:
    """The same work on the same cores, by one process and by two, in turn."""
    _join(rank, ranks, port)
    torch.manual_seed(0)
    half = slice(0, _V // 2) if rank == 0 else slice(_V // 2, _V)
    for dtype in (torch.float32, torch.bfloat16):
        teacher = (3 * torch.randn(_N, _V)).to(dtype)
        student = (teacher.float() + 0.5 * torch.randn(_N, _V)).to(dtype)
        sides = {False: [student, teacher], True: [x[:, half].contiguous() for x in (student, teacher)]}
        for work in ("value", "value and gradient"):
            times: dict[str, list[float]] = {name: [] for name in _TURNS}
            for turn in range(_REPEATS + 1):
                for name, way in _TURNS.items():
                    seconds = way.seconds(rank, sides[way.halves], work != "value")
                    if turn:
                        times[name].append(seconds)
            if rank == 0:
                found[str(dtype).removeprefix("torch."), work] = times
    dist.destroy_process_group()


def _started(target: Callable[..., None], ranks: int) -> dict[Any, Any]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(target, (ranks, port, found), nprocs=ranks)
        return dict(found)


def measure() -> None:
    two = _started(_gathers, 2)
    few, many = _ROWS[0], _ROWS[-1]
    # α and β from the two ends of the two processes' line; everything else is held against them.
    per_byte = (two[many] - two[few]) / (24 * (many - few))
    link = Link(two[few] - 24 * few * per_byte, 1 / per_byte)
    print(
        f"\nmeasured here: Gloo, α = {link.latency * 1e6:.0f} µs, β = {link.bandwidth:.2g} bytes/s, "
        "from 2 processes"
    )
    for ranks, found in ((2, two), (4, _started(_gathers, 4))):
        for rows in _ROWS:
            guess = link.all_gather(ranks, 24 * rows)
            print(
                f"  {ranks} processes, N = {rows}: measured {found[rows] * 1e3:.3f} ms, "
                f"predicted {guess * 1e3:.3f} ms"
            )
    for (dtype, work), times in _started(_race, 2).items():
        alone = times.pop("one process, two threads")
        print(
            f"  {dtype} {work}, {_N} × {_V}: one process, two threads {statistics.median(alone) * 1e3:.1f} ms"
        )
        for name, seconds in times.items():
            ratio = statistics.median(b / a for a, b in zip(alone, seconds, strict=True))
            print(f"    {name}: {statistics.median(seconds) * 1e3:.1f} ms, {ratio:.2f} ×")

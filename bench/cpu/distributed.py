"""What sharing a vocabulary costs on this machine: Gloo processes, and two of them beside two threads."""

from __future__ import annotations

import argparse
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

_GATHERED = (16, 256, 4096, 65536)  # rows
_REPEATS = 25
_N, _V = 256, 128256


def _join(rank: int, ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)


def _gathers(rank: int, ranks: int, port: int, found: Any) -> None:
    from kl_gpu.distributed.collectives import gather

    _join(rank, ranks, port)
    for rows in _GATHERED:
        state = torch.zeros(3, rows, dtype=torch.float64)
        times = []
        for _ in range(40):
            dist.barrier()
            start = time.perf_counter()
            gather(state, dist.group.WORLD, "states")
            times.append(time.perf_counter() - start)
        if rank == 0:
            found[rows] = statistics.median(times[1:])
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


_ALONE = "one process, two threads"
_TURNS = {
    _ALONE: _Turn(divergence, 2, False),
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
            for _ in range(_REPEATS + 1):
                for name, way in _TURNS.items():
                    times[name].append(way.seconds(rank, sides[way.halves], work != "value"))
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There is nothing to choose."""


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    for ranks in (2, 4):
        for rows, seconds in _started(_gathers, ranks).items():
            print(f"{ranks} processes gather the states of {rows} rows in {seconds * 1e3:.3f} ms")
    for (dtype, work), times in _started(_race, 2).items():
        alone = times.pop(_ALONE)[1:]
        print(f"{dtype} {work}, {_N} × {_V}: {_ALONE} {statistics.median(alone) * 1e3:.1f} ms")
        for name, seconds in times.items():
            ratio = statistics.median(b / a for a, b in zip(alone, seconds[1:], strict=True))
            print(f"  {name}: {statistics.median(seconds[1:]) * 1e3:.1f} ms, {ratio:.2f} ×")
    return 0

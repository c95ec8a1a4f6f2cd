"""Real processes in one process group, kept for many cases: starting one costs seconds.

Over NCCL where there is a GPU for each, else over Gloo on the CPU.
"""

from __future__ import annotations

import os
import socket
import traceback
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from frames import with_room


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def join(rank: int, ranks: int, port: int, seconds: float = 180) -> None:
    torch.set_num_threads(1)
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if on_gpus else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks,
        timeout=timedelta(seconds=seconds),
    )  # fmt: skip


def _serve(rank: int, ranks: int, port: int, orders: Any) -> None:
    join(rank, ranks, port)
    import distributed_linear

    import distributed_cases

    if os.environ.get("TRITON_INTERPRET") == "1":
        import quick_interpreter

        quick_interpreter.quicken()
    cases = {"linear": distributed_linear}
    while (order := orders.recv()) is not None:
        name, arguments = order
        torch.manual_seed(0)
        try:
            # "dense", or "linear.dense".
            module, _, case = name.rpartition(".")
            run = getattr(cases.get(module, distributed_cases), case)
            orders.send((True, with_room(run, rank, ranks, **arguments)))
        except BaseException:
            orders.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class World:
    """So many ranks that run cases by name, with the same arguments, and hand back what each returned."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        context, port = mp.get_context("spawn"), free_port()
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        if torch.cuda.device_count() < ranks:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._pipes, self._processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, ranks, port, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        if shown is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = shown

    def run(self, case: str, **arguments: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((case, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(300), f"rank {rank} of {self.ranks} did not answer {case}"
            answers.append(pipe.recv())
        wrong = [f"rank {rank}: {said}" for rank, (good, said) in enumerate(answers) if not good]
        assert not wrong, "\n".join(wrong)
        return [said for _, said in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                process.kill()

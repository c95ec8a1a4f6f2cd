"""The processes that torchrun started, of which each takes its share of the windows."""

from __future__ import annotations

import os

import torch


def rank_and_world() -> tuple[int, int]:
    """This process among those that torchrun started."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return (torch.distributed.get_rank(), world) if world > 1 else (0, 1)


def wait() -> None:
    """Until all processes are here."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()

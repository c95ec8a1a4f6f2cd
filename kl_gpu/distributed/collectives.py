"""The one collective that everything here is made of: what each rank holds, gathered on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def resolve(group: Any) -> Any:
    """The process group meant: the one given, or the default one.

    Raises:
        ValueError: there is none, or this process is no member of it.
        TypeError: `group` is no process group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "group needs torch.distributed with a process group: call torch.distributed.init_process_group"
        )
    if group is None:
        return dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must contain this process, got a group it is no member of")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a process group or None, got {type(group).__name__}")
    return group


def named(collective: Callable[[], T], what: str) -> T:
    """The collective's result, or an error that says which one failed."""
    try:
        return collective()
    except RuntimeError as error:
        raise RuntimeError(
            f"kl_gpu: the {what} failed on rank {dist.get_rank()}: another rank died, fell behind the "
            f"group's timeout, or called with other shapes ({error})"
        ) from error


def gather(local: Tensor, group: Any, what: str) -> Tensor:
    """`[ranks, *local.shape]`: every rank's tensor, in the order of the ranks.

    Ranks add what they gathered themselves, each in this order: a reduction inside the collective may
    take another order on another rank, and the ranks' losses would drift apart by single bits.

    Raises:
        RuntimeError: the collective failed; the message names it and `what` it carried.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return local[None]
    local = local.contiguous()
    gathered = torch.empty((size, *local.shape), dtype=local.dtype, device=local.device)
    if local.numel() == 0:
        return gathered
    # One dimension: Gloo wants the output to be the inputs laid end to end.
    flat = gathered.view(-1), local.view(-1)
    # Its name since PyTorch 2.13, which warns of the older one.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    named(lambda: all_gather(*flat, group=group), f"all_gather of {what}")
    return gathered

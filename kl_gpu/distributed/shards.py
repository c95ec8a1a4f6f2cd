"""Which columns of the vocabulary a rank holds, and how many of those count."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..arguments import validation
from ..ops.views import two_at_least
from . import collectives


class Shard(NamedTuple):
    """Where a rank's columns lie.

    Attributes:
        start: the first column, as the whole vocabulary counts them; 0 where nobody asks.
        columns: how many columns count here.
        total: how many count in the whole vocabulary; 0 where nobody asks.
    """

    start: int
    columns: int
    total: int

    def of(self, logits: Tensor) -> Tensor:
        """The columns that count; two at least, as `two_at_least` has it."""
        if logits.shape[-1] != self.columns:
            logits = logits[..., : self.columns]
        return two_at_least(logits)

    def own(self, ids: Tensor) -> Tensor:
        """Column numbers as this rank counts them; −1 where another rank holds the column, or none."""
        here = (ids >= self.start) & (ids < self.start + self.columns)
        return torch.where(here, ids - self.start, -1)


def _layout(width: int, device: torch.device, group: Any) -> tuple[int, int]:
    """This rank's first column and the vocabulary's size, from the widths of all. Waits for the device."""
    local = torch.tensor([width], dtype=torch.int64, device=device)
    widths = collectives.gather(local, group, "the widths of the shards").flatten().tolist()
    return sum(widths[: dist.get_rank(group)]), sum(widths)


def locate(
    sides: dict[str, Tensor], vocab_start: Any, vocab_size: Any, group: Any, whole: bool = False
) -> Shard:
    """Check what says where a shard lies, and find out what is not said.

    Args:
        sides: the shards by argument name.
        whole: whether columns are told by their numbers; `vocab_size` needs that, too.
    """
    widths = {name: x.shape[-1] for name, x in sides.items()}
    for name, value, low in (("vocab_start", vocab_start, 0), ("vocab_size", vocab_size, 1)):
        if value is not None:
            validation.whole(name, value, low)
    narrow = min(widths.values())
    if len(set(widths.values())) > 1 and (vocab_start is None or vocab_size is None):
        shown = " and ".join(f"{name} {width}" for name, width in widths.items())
        raise ValueError(
            f"vocab_start and vocab_size must be given where the two shards differ in width: {shown} columns"
        )
    if vocab_size is None and not whole:
        return Shard(0, narrow, 0)
    total = vocab_size
    if vocab_start is None or vocab_size is None:
        start, width = _layout(narrow, next(iter(sides.values())).device, group)
        vocab_start = start if vocab_start is None else vocab_start
        total = width if vocab_size is None else vocab_size
        if total > width:
            raise ValueError(f"vocab_size must be within [1, {width}], got {vocab_size}")
    columns = max(0, min(total - vocab_start, narrow))
    if columns < total - vocab_start and columns < max(widths.values()):
        raise ValueError(
            f"vocab_size={total} needs columns past {vocab_start + columns} that only one of "
            f"{' and '.join(sides)} holds"
        )
    return Shard(vocab_start, columns, total)

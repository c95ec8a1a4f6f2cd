"""How many rows count over a group: the denominator that makes averages over ranks those of one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import collectives


class GlobalCount:
    """A sum over a group, under way. `wait` returns it.

    Example:
        >>> # on every rank of a process group
        >>> pending = global_count(mask, group=dp_group, async_op=True)  # doctest: +SKIP
        >>> total = pending.wait()  # doctest: +SKIP
    """

    def __init__(self, total: Tensor, work: Any, what: str) -> None:
        self._total, self._work, self._what = total, work, what

    def wait(self) -> Tensor:
        """The sum, 0-d: int64 and at least 1 where it counts rows, float64 where it sums weights.

        Raises:
            RuntimeError: The collective failed; the message names it.
        """
        if self._work is not None:
            collectives.named(self._work.wait, self._what)
            self._work = None
        return self._total if self._total.is_floating_point() else self._total.clamp_min(1)


def global_count(counts: Tensor, *, group: Any = None, async_op: bool = False) -> Tensor | GlobalCount:
    """The sum of `counts` over all ranks of a group: the `normalizer` of a mean over every rank's rows.

    A data-parallel wrapper averages gradients. Over R ranks, losses with `normalizer=count / R` then give the
    gradient of one process that holds all rows. Where gradients are summed, use `normalizer=count`.

    Args:
        counts: bool (rows that count), integer or floating-point (weights), of any shape. It is summed here
            first.
        group: The process group that shares the rows; None is the default group.
        async_op: Return at once, with a :class:`GlobalCount` whose `wait()` returns the sum.

    Returns:
        0-d: int64 and at least 1, or float64 where `counts` is floating-point; on the device of `counts`.

    Raises:
        TypeError: `counts` is no real tensor, or `group` no process group.
        ValueError: There is no process group.
        RuntimeError: The collective failed; the message names it.

    Example:
        >>> # on every rank of a process group
        >>> count = global_count(labels[:, 1:] != -100, group=dp_group)  # doctest: +SKIP
        >>> loss = kl_gpu.kl_div(  # doctest: +SKIP
        ...     student, teacher, labels=labels, shift=True, normalizer=count / dp_size
        ... )
    """
    if not isinstance(counts, Tensor) or counts.dtype.is_complex:
        raise TypeError(
            f"counts must be a real tensor, got {getattr(counts, 'dtype', type(counts).__name__)}"
        )
    group = collectives.resolve(group)
    dtype = torch.float64 if counts.is_floating_point() else torch.int64
    total, what = counts.detach().sum(dtype=dtype), "all_reduce of the rows that count"
    work = collectives.named(lambda: dist.all_reduce(total, group=group, async_op=True), what)
    pending = GlobalCount(total, work, what)
    return pending if async_op else pending.wait()

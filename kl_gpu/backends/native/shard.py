"""Backend "native" of rows whose columns lie in several shards."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..interface import Scale
from . import extension
from .extension import CPU


class _Units:
    """The nats in a unit of the statistics' exponents: ln 2, but for how the kernels round log2(e)/T.

    `given` is what the extension takes: one of all rows, or the address of each row's.
    """

    def __init__(self, dtype: torch.dtype, a_scale: Scale, b_scale: Scale) -> None:
        ln2, self.given = math.log(2), (math.log(2), 0)
        if not (isinstance(a_scale, Tensor) or isinstance(b_scale, Tensor)):
            k = a_scale * math.log2(math.e)
            rounds = dtype == torch.float32 and a_scale == b_scale  # as Row::fits_fp32
            self.given = (ln2 * (k / float(np.float32(k)) if rounds else 1.0), 0)
        elif dtype == torch.float32:
            exact = torch.as_tensor(a_scale, dtype=torch.float64, device=CPU) * math.log2(math.e)
            same = torch.as_tensor(a_scale == b_scale, device=CPU)
            # A reference: the extension gets a raw address.
            self.of_rows = ln2 * torch.where(same, exact / exact.float().double(), 1.0).contiguous()
            self.given = (0.0, self.of_rows.data_ptr())


def shard_states(
    stats: Tensor, inside: Sequence[Tensor], a_scale: Scale, b_scale: Scale
) -> tuple[Tensor, bool]:
    """As `Backend.shard_states` has it."""
    # Keep references: the extension gets raw addresses.
    inside = [value.to(stats.dtype).contiguous() for value in inside]
    units = _Units(stats.dtype, a_scale, b_scale)
    out = torch.empty((2 + len(inside), *stats.shape[:-1]), dtype=torch.float64, device=CPU)
    finite = extension._native.shard_states(
        stats.data_ptr(), stats.dtype == torch.float64, units.given, out[0].numel(),
        [value.data_ptr() for value in inside], out.data_ptr(),
    )  # fmt: skip
    return out, finite


def merge_shards(found: Tensor) -> tuple[Tensor, bool]:
    """As `Backend.merge_shards` has it."""
    out = torch.empty(found.shape[1:], dtype=torch.float64, device=CPU)
    ranks, numbers = found.shape[:2]
    fit = extension._native.merge_shards(found.data_ptr(), ranks, out[0].numel(), numbers - 2, out.data_ptr())
    return out, fit


def statistics(
    local: Tensor, a_scale: Scale, b_scale: Scale, formula: str, log_a: Tensor, ratio: Tensor, sums: Tensor
) -> Tensor:
    """As `Backend.statistics` has it, in the order of kernels/api.h."""
    out, units = torch.empty_like(local), _Units(local.dtype, a_scale, b_scale)
    # Keep references: the extension gets raw addresses.
    log_a, ratio, sums = log_a.contiguous(), ratio.contiguous(), sums.contiguous()
    extension._native.whole_row_stats(
        local.data_ptr(), local.dtype == torch.float64, units.given, log_a.numel(),
        formula, log_a.data_ptr(), ratio.data_ptr(), sums.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out

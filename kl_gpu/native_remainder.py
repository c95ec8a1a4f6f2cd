"""Backend "native" of `remainder.py`: the compiled CPU kernels of `kernels/complement/`."""

from __future__ import annotations

import torch
from torch import Tensor

from .native import _ALL_ROWS, _CPU, _native, _Rows, _Side, _side, _Sizes, _target
from .remainder import STATS, Part


def _arguments(part: Part) -> tuple[_Side, _Rows, _Sizes, int, int]:
    """What both entries of the extension begin with."""
    rows = part.rows
    counts = _ALL_ROWS if rows is None else (rows.data_ptr(), rows.stride(0), rows.stride(1))
    size_a, size_b, columns = part.logits.shape
    sizes = (size_a, size_b, columns, torch.get_num_threads())
    return _side(part.logits, part.scale), counts, sizes, part.ids.data_ptr(), part.ids.shape[1]


def remainder(part: Part, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """u and the entropy of the columns not given, `[A*B]` each, and row statistics `[A*B, STATS]`."""
    # zeros: what the kernels leave unused must be the same on every run too.
    u, spread = (torch.empty(part.n_rows, dtype=torch.float64, device=_CPU) for _ in range(2))
    stats = torch.zeros((part.n_rows, STATS), dtype=torch.float64, device=_CPU)
    _native.complement(_arguments(part), entropy, u.data_ptr(), spread.data_ptr(), stats.data_ptr())
    return u, spread, stats


def gradient(
    part: Part, stats: Tensor, to_given: Tensor, to_rest: Tensor, to_entropy: Tensor | None, grad: Tensor
) -> None:
    """Write scale · (what flows to each logit) into the `[A, B, V]` buffer."""
    turns = 0 if to_entropy is None else to_entropy.data_ptr()
    _native.complement_gradient(
        _arguments(part), stats.data_ptr(), to_given.data_ptr(), to_rest.data_ptr(), turns, _target(grad)
    )

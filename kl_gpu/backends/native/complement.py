"""Backend "native" of picked columns and their complement."""

from __future__ import annotations

import torch
from torch import Tensor

from ..interface import COMPLEMENT_STATS, ComplementArgs
from . import extension
from .extension import ALL_VALID, CPU, Scales, Side, Sizes, Valid, row_scales, side, target


def _arguments(args: ComplementArgs) -> tuple[Side, Valid, Sizes, int, int, Scales]:
    """What both entries of the extension begin with."""
    valid = args.valid
    counts = ALL_VALID if valid is None else (valid.data_ptr(), valid.stride(0), valid.stride(1))
    size_a, size_b, columns = args.logits.shape
    sizes = (size_a, size_b, columns, torch.get_num_threads())
    ids, scales = args.ids, row_scales(args.scales)
    return side(args.logits, args.scale), counts, sizes, ids.data_ptr(), ids.shape[1], scales


def complement(args: ComplementArgs, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `Backend.complement` has it."""
    # zeros: what the kernels leave unused must be the same on every run too.
    rest_lse, rest_entropy = (torch.empty(args.n_rows, dtype=torch.float64, device=CPU) for _ in range(2))
    stats = torch.zeros((args.n_rows, COMPLEMENT_STATS), dtype=torch.float64, device=CPU)
    extension._native.complement(
        _arguments(args), entropy, rest_lse.data_ptr(), rest_entropy.data_ptr(), stats.data_ptr()
    )
    return rest_lse, rest_entropy, stats


def complement_gradient(
    args: ComplementArgs,
    stats: Tensor,
    grad_picked: Tensor,
    grad_rest: Tensor,
    grad_entropy: Tensor | None,
    grad: Tensor,
) -> None:
    """Write scale · (what flows to each logit) into the `[A, B, V]` buffer."""
    entropies = 0 if grad_entropy is None else grad_entropy.data_ptr()
    extension._native.complement_gradient(
        _arguments(args),
        stats.data_ptr(),
        grad_picked.data_ptr(),
        grad_rest.data_ptr(),
        entropies,
        target(grad),
    )

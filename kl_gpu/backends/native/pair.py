"""Backend "native" of two sides of logits: tensors in, tensors out, checked before anything gets here."""

from __future__ import annotations

import torch
from torch import Tensor

from ..interface import COMPARISON, STATS, TOKEN_STATS, Beside, Found, RowPair
from . import extension
from .extension import CPU, pair_arguments, target


def _outputs(p: RowPair) -> tuple[Tensor, Tensor]:
    n_rows, dtype = p.n_rows, p.dtype
    return (
        torch.empty(n_rows, dtype=dtype, device=CPU),
        torch.empty(n_rows, STATS, dtype=dtype, device=CPU),
    )


def value(p: RowPair) -> tuple[Tensor, Tensor]:
    """Per-row divergence `[A*B]` and the row statistics `[A*B, STATS]` that `gradient` needs."""
    value, stats = _outputs(p)
    extension._native.value(pair_arguments(p), value.data_ptr(), stats.data_ptr())
    return value, stats


def divergence(p: RowPair) -> Tensor:
    """`value` without the statistics."""
    value = torch.empty(p.n_rows, dtype=p.dtype, device=CPU)
    extension._native.value(pair_arguments(p), value.data_ptr(), 0)
    return value


def formula_sums(p: RowPair, stats: Tensor) -> Tensor:
    """The formula's terms and its two flows, summed over the columns: float64 `[A*B, 3]`."""
    out = torch.empty(p.n_rows, 3, dtype=torch.float64, device=CPU)
    extension._native.formula_sums(pair_arguments(p), stats.contiguous().data_ptr(), out.data_ptr())
    return out


def gradient(
    p: RowPair,
    stats: Tensor,
    row_scale: Tensor,
    grad_a: Tensor | None,
    grad_b: Tensor | None,
    incoming: Tensor | None = None,
) -> None:
    """Write incoming · row_scale · ∂value/∂logits. A gradient may lie over the very logits it belongs to.

    With an incoming gradient (0-d) of 1 the buffers stay as they are: `value_and_gradient` filled them.
    """
    if incoming is not None:
        if incoming.item() == 1:
            return
        row_scale = row_scale * incoming
    extension._native.gradient(
        pair_arguments(p), stats.data_ptr(), row_scale.data_ptr(), target(grad_a), target(grad_b)
    )


def value_and_gradient(
    p: RowPair, row_scale: Tensor, grad_a: Tensor | None, grad_b: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`value` and `gradient` in one visit of each row, for callers who know row_scale beforehand.

    3 U of memory traffic where the two calls take 5 U; the bits are those of the two calls.
    """
    value, stats = _outputs(p)
    extension._native.value_and_gradient(
        pair_arguments(p), row_scale.data_ptr(), value.data_ptr(), stats.data_ptr(), target(grad_a),
        target(grad_b),
    )  # fmt: skip
    return value, stats


def _beside(
    p: RowPair, of: Beside, surprises: Tensor | None = None, label_row_scale: Tensor | None = None
) -> tuple[Found, tuple[bool, int, int, int, int, int]]:
    """Memory for what is asked for, and the extension's arguments. A caller keeps both until it returns."""
    entropies = torch.empty(p.n_rows, dtype=torch.float64, device=CPU) if of.entropy else None
    if of.labels is not None and surprises is None:
        surprises = torch.empty(p.n_rows, dtype=torch.float64, device=CPU)
    given = entropies, of.labels, of.label_scales, surprises, label_row_scale
    addresses = [0 if x is None else x.data_ptr() for x in given]
    return (entropies, surprises), (of.of_a, *addresses)  # type: ignore[return-value]


def value_and_beside(p: RowPair, beside: Beside) -> tuple[Tensor, Tensor, Found]:
    """As `Joining.value_and_beside` has it."""
    (value, stats), (found, more) = _outputs(p), _beside(p, beside)
    extension._native.value_and_beside(pair_arguments(p), more, value.data_ptr(), stats.data_ptr())
    return value, stats, found


def value_and_gradient_and_beside(
    p: RowPair, beside: Beside, row_scale: Tensor, label_row_scale: Tensor | None, grad_a: Tensor | None,
    grad_b: Tensor | None,
) -> tuple[Tensor, Tensor, Found]:  # fmt: skip
    """As `Joining.value_and_gradient_and_beside` has it."""
    (value, stats), (found, more) = _outputs(p), _beside(p, beside, None, label_row_scale)
    extension._native.value_and_gradient_and_beside(
        pair_arguments(p), more, row_scale.data_ptr(), value.data_ptr(), stats.data_ptr(), target(grad_a),
        target(grad_b),
    )  # fmt: skip
    return value, stats, found


def gradient_with_labels(
    p: RowPair, beside: Beside, stats: Tensor, surprises: Tensor, row_scale: Tensor, label_row_scale: Tensor,
    grad_a: Tensor | None, grad_b: Tensor | None,
) -> None:  # fmt: skip
    """As `Joining.gradient_with_labels` has it."""
    _, more = _beside(p, beside._replace(entropy=False), surprises, label_row_scale)
    extension._native.gradient_with_labels(
        pair_arguments(p), more, stats.data_ptr(), row_scale.data_ptr(), target(grad_a), target(grad_b)
    )


def token_stats(p: RowPair, tokens: Tensor | None) -> Tensor:
    """As `Backend.token_stats` has it."""
    return _token_stats(p, tokens, None)


def token_stats_and_comparison(p: RowPair, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `Joining.token_stats_and_comparison` has it."""
    sums = torch.empty(COMPARISON, p.n_rows, dtype=torch.float64, device=CPU)
    return _token_stats(p, tokens, sums), sums


def _token_stats(p: RowPair, tokens: Tensor | None, sums: Tensor | None) -> Tensor:
    out = torch.empty(TOKEN_STATS, p.n_rows, dtype=p.dtype, device=CPU)
    # Keep a reference: the extension gets raw addresses, and a temporary would be freed during the call.
    tokens = None if tokens is None else tokens.contiguous()
    extension._native.token_stats(
        pair_arguments(p), 0 if tokens is None else tokens.data_ptr(), out.data_ptr(),
        0 if sums is None else sums.data_ptr(),
    )  # fmt: skip
    return out

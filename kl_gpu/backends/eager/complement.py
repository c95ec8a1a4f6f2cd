"""Plain PyTorch backend of picked columns and their complement: any device, in float64, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...arguments.reduction import wide_dtype
from ..interface import COMPLEMENT_STATS, ComplementArgs
from .pair import CHUNK, blocks_of, columns_of, row_sum, worker_for

# Row statistics: log-sum-exp and entropy of the complement; the others stay 0.


def _chunks(
    rows: Tensor, ids: Tensor, scale: float | Tensor, buffer: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Scaled logits of a run of rows in float64, −inf at the picked columns, chunk by chunk of columns."""
    width = buffer.shape[-1] - 1
    for columns in columns_of(rows.shape[-1], width):
        chunk = buffer[: rows.shape[0]]
        here = chunk[:, : columns.stop - columns.start]
        here.copy_(rows[:, columns]).mul_(scale)
        inside = (ids >= columns.start) & (ids < columns.stop)
        # The buffer's last column takes what is not in this chunk.
        chunk.scatter_(-1, torch.where(inside, ids - columns.start, width), -torch.inf)
        yield columns, here


def _scale_of(args: ComplementArgs, rows: slice, like: Tensor) -> float | Tensor:
    """What multiplies the logits of some rows: a number, or `[R, 1]`."""
    return args.scale if args.scales is None else args.scales[rows].to(like)


def _buffer(args: ComplementArgs, worker: torch.device) -> Tensor:
    columns = args.logits.shape[-1]
    rows = min(args.logits.shape[1], max(1, CHUNK // columns))
    return torch.empty((rows, min(columns, CHUNK) + 1), dtype=torch.float64, device=worker)


def complement(args: ComplementArgs, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `Backend.complement` has it."""
    device, worker = args.logits.device, worker_for(args.logits.device)
    found = torch.zeros((args.n_rows, COMPLEMENT_STATS), dtype=torch.float64, device=worker)
    buffer = _buffer(args, worker)
    for i, j, flat in blocks_of(args.logits, CHUNK):
        block = args.logits[i, j], args.ids[flat].to(worker), _scale_of(args, flat, buffer), buffer
        top = torch.cat([x.amax(-1, keepdim=True) for _, x in _chunks(*block)], -1).amax(-1, keepdim=True)
        nothing = torch.isneginf(top)
        # NaN where a logit is NaN or +inf; amax hands a NaN on.
        m = torch.where(torch.isfinite(top), top, torch.where(nothing, 0.0, torch.nan))
        z, t = torch.zeros_like(m), torch.zeros_like(m)
        for _, x in _chunks(*block):
            y = x.sub_(m)
            w = torch.exp(y)
            z += row_sum(w)
            if entropy:
                t += row_sum(w.mul_(y.clamp_min_(-1e4)))  # 0 · −inf has no place in the sum
        found[flat, :1] = torch.where(nothing, -torch.inf, m + torch.log(z))
        if entropy:
            # Σ π (log z − y): the two parts are ≥ 0 each.
            found[flat, 1:2] = torch.where(nothing, 0.0, torch.log(z) - t / z)
    stats = found.to(device, wide_dtype(device))
    return stats[:, 0].clone(), stats[:, 1].clone(), stats


def complement_gradient(
    args: ComplementArgs,
    stats: Tensor,
    grad_picked: Tensor,
    grad_rest: Tensor,
    grad_entropy: Tensor | None,
    grad: Tensor,
) -> None:
    """As `Backend.complement_gradient` has it."""
    worker = worker_for(args.logits.device)
    buffer = _buffer(args, worker)
    for i, j, flat in blocks_of(args.logits, CHUNK):
        rest_lse, rest_entropy = (x.to(worker, torch.float64) for x in stats[flat, :2].split(1, -1))
        flow = grad_rest[flat, None].to(worker, torch.float64)
        turn = torch.zeros_like(flow) if grad_entropy is None else grad_entropy[flat, None].to(flow)
        keep = None if args.valid is None else args.valid[i, j, None].to(worker)
        still = ((flow == 0) & (turn == 0)) | torch.isneginf(rest_lse)
        ids = args.ids[flat].to(worker)
        scale = _scale_of(args, flat, buffer)
        picked = grad_picked[flat].to(worker, torch.float64) * scale
        for columns, x in _chunks(args.logits[i, j], ids, scale, buffer):
            y = x.sub_(torch.where(still, 0.0, rest_lse))
            share = torch.exp(y)
            log_share = 0.0 if grad_entropy is None else y.clamp_min_(-1e4) + rest_entropy
            out = torch.where(still, 0.0, share.mul_((flow - turn * log_share) * scale))
            inside = (ids >= columns.start) & (ids < columns.stop)
            at = torch.where(inside, ids - columns.start, out.shape[-1])
            out = torch.nn.functional.pad(out, (0, 1)).scatter_(-1, at, picked)[:, :-1]
            grad[i, j, columns] = (out if keep is None else torch.where(keep, out, 0)).to(grad.dtype)

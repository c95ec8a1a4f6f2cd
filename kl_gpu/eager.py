"""Plain PyTorch backend: any device, chunked so that its extra memory stays small whatever N and V are.

Works in float64 where the device has it, which makes the plain formulas accurate enough for the library's
promises; elsewhere in float32 with the series and the correction of docs/numerics.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .kinds import KINDS

# 128 Ki float64 elements are 1 MiB: the handful of temporaries a chunk needs stays near the cache.
_CHUNK = 1 << 17
_COLUMNS = 1 << 18
_NO_FLOAT64 = frozenset({"mps"})


def _work_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type in _NO_FLOAT64 else torch.float64


def _g(x: Tensor) -> Tensor:
    """expm1(x) − x. In float32 by series below ½, where the subtraction would cancel."""
    direct = torch.expm1(x) - x
    if x.dtype == torch.float64:
        return direct
    series = torch.full_like(x, 1 / 40320)
    for coefficient in (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2):
        series = series * x + coefficient
    return torch.where(x.abs() < 0.5, series * x * x, direct)


def _blocks(shape: torch.Size) -> Iterator[tuple[int, slice]]:
    """Row blocks of `[A, B, V]`: an outer index and a run of inner rows, about `_CHUNK` elements each."""
    outer, inner, columns = shape
    step = max(1, _CHUNK // columns)
    for i in range(outer):
        for j in range(0, inner, step):
            yield i, slice(j, min(j + step, inner))


def _columns(n: int) -> Iterator[slice]:
    for start in range(0, n, _COLUMNS):
        yield slice(start, min(start + _COLUMNS, n))


def _log_normalizer(rows: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """logsumexp of `rows * scale`, `[R, 1]`; NaN where the row has no distribution."""
    parts = [
        torch.logsumexp(rows[:, c].to(dtype).mul(scale), -1, keepdim=True) for c in _columns(rows.shape[-1])
    ]
    lse = parts[0] if len(parts) == 1 else torch.logsumexp(torch.cat(parts, -1), -1, keepdim=True)
    return torch.where(torch.isfinite(lse), lse, torch.nan)


def _kl_sums(a: Tensor, b: Tensor, lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Σ w g(x) and Σ w expm1(x) over columns, `[R, 1]` each: w = softmax weights of a, x = log b/a."""
    x = (b - a).sub_(lse_b - lse_a)
    w = torch.exp(a - lse_a)
    small = _g(x).mul_(w)
    if a.device.type == "cpu" and a.dtype == torch.float64 and bool(torch.isfinite(small.sum())):
        return small.sum(-1, keepdim=True), torch.zeros_like(lse_a)
    # Something is −inf, NaN or overflowed: decide column by column. w·g(x) = q − w − w·x where x is large.
    q = torch.exp(b - lse_b)
    near = x.abs() < 1
    terms = torch.where(near, small, q - w - w * x)
    terms = torch.where(torch.isneginf(b), torch.inf, terms)
    terms = torch.where(torch.isneginf(a), q, terms)
    slack = torch.where(near, torch.expm1(x) * w, q - w)
    return terms.sum(-1, keepdim=True), slack.sum(-1, keepdim=True)


def _split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x as a sum of two numbers of `dtype`, so that float32 statistics keep float64 precision."""
    high = x.to(dtype)
    return high, torch.where(torch.isfinite(high), x - high.to(x.dtype), 0).to(dtype)


def value(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    kind: str,
    student_scale: float,
    teacher_scale: float,
    n_stats: int,
) -> tuple[Tensor, Tensor]:
    """Per-row divergence `[A*B]` and row statistics `[A*B, n_stats]` of logits `[A, B, V]`."""
    out_dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    work = _work_dtype(student.device)
    order = KINDS[kind].order
    a_all, b_all = order(student, teacher)
    a_scale, b_scale = order(student_scale, teacher_scale)
    shape = student.shape[:2]
    result = torch.empty(shape, dtype=out_dtype, device=student.device)
    stats = torch.zeros((*shape, n_stats), dtype=out_dtype, device=student.device)
    for i, j in _blocks(student.shape):
        a_rows, b_rows = a_all[i, j], b_all[i, j]
        lse_a = _log_normalizer(a_rows, a_scale, work)
        lse_b = _log_normalizer(b_rows, b_scale, work)
        total = slack = torch.zeros_like(lse_a)
        for c in _columns(a_rows.shape[-1]):
            a, b = a_rows[:, c].to(work).mul(a_scale), b_rows[:, c].to(work).mul(b_scale)
            terms, rest = _kl_sums(a, b, lse_a, lse_b)
            total, slack = total + terms, slack + rest
        if work == torch.float32:
            # log1p(y) − y for the y that rounding of the normalisers left
            total = total - slack * slack * (0.5 - slack / 3)
        # Times 0: a row without a distribution is NaN also where its columns summed to +inf.
        kl = (total + (lse_a + lse_b) * 0).clamp_min(0)
        result[i, j] = kl[:, 0].to(out_dtype)
        pairs = [half for x in (lse_a, lse_b, kl) for half in _split(x, out_dtype)]
        stats[i, j, : len(pairs)] = torch.cat(pairs, -1)
    if rows is not None:
        result = torch.where(rows, result, 0)
    return result.view(-1), stats.view(-1, n_stats)


def gradient(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    stats: Tensor,
    row_scale: Tensor,
    kind: str,
    student_scale: float,
    teacher_scale: float,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
) -> None:
    """Write row_scale · ∂divergence/∂logits into the given `[A, B, V]` buffers; either may be None."""
    work = _work_dtype(student.device)
    order = KINDS[kind].order
    a_all, b_all = order(student, teacher)
    a_scale, b_scale = order(student_scale, teacher_scale)
    grad_a, grad_b = order(grad_student, grad_teacher)
    inner = student.shape[1]
    for i, j in _blocks(student.shape):
        flat = slice(i * inner + j.start, i * inner + j.stop)
        pairs = stats[flat, :6].to(work)
        lse_a, lse_b, kl = (pairs[:, k : k + 1] + pairs[:, k + 1 : k + 2] for k in (0, 2, 4))
        scale = row_scale[flat, None].to(work)
        keep = None if rows is None else rows[i, j, None]
        for c in _columns(student.shape[-1]):
            a, b = a_all[i, j, c].to(work).mul(a_scale), b_all[i, j, c].to(work).mul(b_scale)
            p = torch.exp(a - lse_a)
            to_a = to_b = None
            if grad_b is not None:
                to_b = (torch.exp(b - lse_b) - p).mul_(scale * b_scale)
                if work == torch.float32:
                    x = (b - a) - (lse_b - lse_a)
                    to_b = torch.where(x.abs() < 1, p * torch.expm1(x) * (scale * b_scale), to_b)
            if grad_a is not None:
                to_a = (a - b).sub_(lse_a - lse_b).sub_(kl).mul_(p)
                to_a = torch.where(torch.isneginf(a), kl * 0, to_a).mul_(scale * a_scale)  # NaN rows stay NaN
                to_a = torch.where(torch.isinf(kl), torch.nan, to_a)
            # Both are ready before either is stored: a buffer may be the very memory a or b was read from.
            for out, grad in ((grad_a, to_a), (grad_b, to_b)):
                if out is not None and grad is not None:
                    out[i, j, c] = grad if keep is None else torch.where(keep, grad, 0)

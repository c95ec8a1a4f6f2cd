"""Plain PyTorch backend: any device, chunked so that its extra memory stays small whatever N and V are.

Works in float64, which makes the plain formulas accurate enough for the library's promises; where the device
has none, the chunks visit the CPU. Logits are held in units of log2: exp2 is the faster exponential.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .kinds import KINDS, STATS

# 256 Ki float64 elements are 2 MiB: the handful of temporaries that a chunk needs stays in the last cache.
_CHUNK = 1 << 18
_NO_FLOAT64 = frozenset({"mps"})
_LOG2E = 1 / math.log(2)


def _blocks(shape: torch.Size) -> Iterator[tuple[int, slice]]:
    """Row blocks of `[A, B, V]`: an outer index and a run of inner rows, about `_CHUNK` elements each."""
    outer, inner, columns = shape
    step = max(1, _CHUNK // columns)
    for i in range(outer):
        for j in range(0, inner, step):
            yield i, slice(j, min(j + step, inner))


def _columns(n: int) -> Iterator[slice]:
    for start in range(0, n, _CHUNK):
        yield slice(start, min(start + _CHUNK, n))


def _worker(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type in _NO_FLOAT64 else device


def _log2(logits: Tensor, scale: float) -> Tensor:
    """A float64 copy of the logits, scaled, in units of log2."""
    return logits.to(_worker(logits.device), torch.float64, copy=True).mul_(scale * _LOG2E)


def _sum(x: Tensor) -> Tensor:
    """Σ over columns, `[R, 1]`.

    A row alone goes twice: PyTorch would split one long sum over its threads, and the row's bits would differ
    from those it has among others.
    """
    total = (x.expand(2, -1) if x.shape[0] == 1 else x).sum(-1, keepdim=True)
    return total[: x.shape[0]]


def _log_normalizer(rows: Tensor, scale: float) -> Tensor:
    """log2 Σ exp(logit · scale), `[R, 1]`; NaN where the row has no distribution."""
    blocks = list(_columns(rows.shape[-1]))
    tops = [_log2(rows[:, c].amax(-1, keepdim=True), scale) for c in blocks]
    top = torch.cat(tops, -1).amax(-1, keepdim=True)
    total = torch.zeros_like(top)
    for c in blocks:
        total += _sum(_log2(rows[:, c], scale).sub_(top).exp2_())
    return top + total.log2()


def _kl_sum(a: Tensor, b: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a‖b) over columns, `[R, 1]`, as a sum of terms w·g(x) ≥ 0: w = softmax weights of a, x = log b/a.

    Takes log2-logits and their normalisers; overwrites the logits.
    """
    # The difference first, so that equal logits give exactly 0.
    x = (b - a).sub_(log_b - log_a).div_(_LOG2E)
    w, q = a.sub_(log_a).exp2(), b.sub_(log_b).exp2()
    far = (q - w).sub_(w * x)  # the same number as w·g(x), but for cancellation where x is small
    plain_total = _sum(far)
    # float64 cancels to some 1e-16, so far more is exact enough. On a GPU the question would wait for the
    # device; and the answer must be each row's own, or its bits would depend on its neighbours.
    plain = (plain_total > 1e-8) & torch.isfinite(plain_total)
    if a.device.type == "cpu" and bool(plain.all()):
        return plain_total
    near = x.abs() < 1
    terms = torch.where(near, torch.expm1(x).sub_(x).mul_(w), far)
    terms = torch.where(torch.isneginf(b), torch.inf, terms)
    terms = torch.where(torch.isneginf(a), q, terms)
    return torch.where(plain, plain_total, _sum(terms))


def _split(x: Tensor, n: int, dtype: torch.dtype) -> list[Tensor]:
    """x as a sum of n numbers of `dtype`: three float32 hold all of a float64."""
    parts = []
    for _ in range(n):
        part = x.to(dtype)
        parts.append(part)
        x = torch.where(torch.isfinite(part), x - part.to(x.dtype), 0)
    return parts


def value(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    kind: str,
    student_scale: float,
    teacher_scale: float,
) -> tuple[Tensor, Tensor]:
    """Per-row divergence `[A*B]` and row statistics `[A*B, STATS]` of logits `[A, B, V]`."""
    out_dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    order = KINDS[kind].order
    a_all, b_all = order(student, teacher)
    a_scale, b_scale = order(student_scale, teacher_scale)
    shape = student.shape[:2]
    result = torch.empty(shape, dtype=out_dtype, device=student.device)
    stats = torch.zeros((*shape, STATS), dtype=out_dtype, device=student.device)
    for i, j in _blocks(student.shape):
        a_rows, b_rows = a_all[i, j], b_all[i, j]
        log_a = _log_normalizer(a_rows, a_scale)
        log_b = _log_normalizer(b_rows, b_scale)
        total = torch.zeros_like(log_a)
        for c in _columns(a_rows.shape[-1]):
            a, b = _log2(a_rows[:, c], a_scale), _log2(b_rows[:, c], b_scale)
            total += _kl_sum(a, b, log_a, log_b)
        # Times 0: a row without a distribution is NaN also where its columns summed to +inf.
        kl = (total + (log_a + log_b) * 0).clamp_min(0)
        result[i, j] = kl[:, 0].to(out_dtype)
        parts = [part for x, n in ((log_a, 3), (log_b, 3), (kl, 2)) for part in _split(x, n, out_dtype)]
        stats[i, j] = torch.cat(parts, -1)
    if rows is not None:
        result = torch.where(rows, result, 0)
    return result.view(-1), stats.view(-1, STATS)


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
    order = KINDS[kind].order
    a_all, b_all = order(student, teacher)
    a_scale, b_scale = order(student_scale, teacher_scale)
    grad_a, grad_b = order(grad_student, grad_teacher)
    worker = _worker(student.device)
    inner = student.shape[1]
    for i, j in _blocks(student.shape):
        flat = slice(i * inner + j.start, i * inner + j.stop)
        parts = stats[flat].to(worker, torch.float64)
        log_a, log_b, kl = (part.sum(-1, keepdim=True) for part in parts.split((3, 3, 2), -1))
        scale = row_scale[flat, None].to(worker, torch.float64)
        keep = None if rows is None else rows[i, j, None].to(worker)
        for c in _columns(student.shape[-1]):
            a, b = _log2(a_all[i, j, c], a_scale), _log2(b_all[i, j, c], b_scale)
            x = (b - a).sub_(log_b - log_a).div_(_LOG2E)
            p = a.sub_(log_a).exp2()
            to_a = to_b = None
            if grad_b is not None:
                to_b = b.sub_(log_b).exp2_().sub_(p).mul_(scale * b_scale)
            if grad_a is not None:
                to_a = x.add_(kl).neg_().mul_(p)
                to_a = torch.where(torch.isneginf(a), kl * 0, to_a).mul_(scale * a_scale)  # NaN rows stay NaN
                to_a = torch.where(torch.isinf(kl), torch.nan, to_a)
            # Both are ready before either is stored: a buffer may be the very memory a or b was read from.
            for out, grad in ((grad_a, to_a), (grad_b, to_b)):
                if out is not None and grad is not None:
                    out[i, j, c] = grad if keep is None else torch.where(keep, grad, 0)

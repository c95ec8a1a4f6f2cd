"""Plain PyTorch backend: any device, chunked so that its extra memory stays small whatever N and V are.

Works in float64, which makes the plain formulas accurate enough for the library's promises; where the device
has none, the chunks visit the CPU. Exponentials are powers of 2: PyTorch computes those three times as fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .kinds import KINDS

# 512 Ki float64 elements are 4 MiB: the few buffers a chunk needs stay in a last cache of 32 MiB, and each
# operation is long enough to hide what starting it costs.
_CHUNK = 1 << 19
# Below this the plain sum of terms w·x, good to some 1e-15 in float64, gives way to one that does not cancel.
_CANCELS = 1e-6
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


def _sum(x: Tensor) -> Tensor:
    """Σ over columns, `[R, 1]`.

    A row alone goes twice: PyTorch would split one long sum over its threads, and the row's bits would
    differ from those it has among others.
    """
    total = (x.expand(2, -1) if x.shape[0] == 1 else x).sum(-1, keepdim=True)
    return total[: x.shape[0]]


class _Side:
    """One side of a chunk of rows: its logits in float64, and 2^(scaled logit − top) beside them."""

    def __init__(self, rows: Tensor, scale: float, buffers: Tensor) -> None:
        self.rows, self.scale, self.buffers = rows, scale, buffers
        tops = [rows[:, c].amax(-1, keepdim=True) for c in _columns(rows.shape[-1])]
        top = torch.cat(tops, -1).amax(-1, keepdim=True).to(buffers)
        # NaN where the row has no distribution: the largest logit is NaN or infinite.
        self.top = torch.where(torch.isfinite(top), top, torch.nan) * scale * _LOG2E
        self.total = torch.zeros_like(self.top)
        for c in _columns(rows.shape[-1]):
            self.total += _sum(self.load(c)[1])

    def load(self, columns: slice) -> tuple[Tensor, Tensor]:
        logits, powers = self.buffers[:, : self.rows.shape[0], : columns.stop - columns.start]
        logits.copy_(self.rows[:, columns])
        torch.add(-self.top, logits, alpha=self.scale * _LOG2E, out=powers)
        return logits, powers.exp2_()

    def log_normalizer(self) -> Tensor:
        """ln Σ exp(scaled logit), `[R, 1]`."""
        return (self.top + self.total.log2()) / _LOG2E


def _log_ratio(a: Tensor, b: Tensor, shift: Tensor, a_scale: float, b_scale: float) -> Tensor:
    """(scaled b − scaled a) − shift, over the memory of a; exactly 0 for equal logits."""
    torch.sub(b, a, alpha=a_scale / b_scale, out=a)
    return torch.add(-shift, a, alpha=b_scale, out=a)


def _terms(x: Tensor, w: Tensor, q: Tensor, no_weight: Tensor, no_other: Tensor) -> Tensor:
    """w·g(x) ≥ 0, the terms of KL(a‖b) for w = a, q = b, x = log b/a, also where a probability is 0."""
    terms = torch.where(x.abs() < 1, torch.expm1(x).sub_(x).mul_(w), q - w - w * x)
    terms = torch.where(no_other, torch.inf, terms)
    return torch.where(no_weight, q, terms)


def _kl(a: _Side, b: _Side) -> Tensor:
    """KL(a‖b) of a chunk of rows, `[R, 1]`."""
    shift = b.log_normalizer() - a.log_normalizer()
    blocks = list(_columns(a.rows.shape[-1]))
    again = len(blocks) > 1  # the buffers still hold a row's only block
    plain = torch.zeros_like(shift)
    for c in blocks:
        (logits_a, powers_a), (logits_b, _) = (
            (side.load(c) if again else side.buffers[:, : shift.shape[0], : c.stop]) for side in (a, b)
        )
        x = _log_ratio(logits_a, logits_b, shift, a.scale, b.scale)
        plain -= _sum(torch.mul(powers_a, x, out=logits_b))
    plain /= a.total
    # On a GPU the question would wait for the device. And the answer must be each row's own, or its bits
    # would depend on its neighbours.
    enough = (plain > _CANCELS) & torch.isfinite(plain)
    if plain.device.type == "cpu" and bool(enough.all()):
        return plain
    careful = torch.zeros_like(shift)
    for c in blocks:
        (logits_a, w), (logits_b, q) = a.load(c), b.load(c)
        no_weight, no_other = torch.isneginf(logits_a), torch.isneginf(logits_b)
        x = _log_ratio(logits_a, logits_b, shift, a.scale, b.scale)
        careful += _sum(_terms(x, w.div_(a.total), q.div_(b.total), no_weight, no_other))
    # Times 0: a row without a distribution is NaN also where its columns summed to +inf.
    return torch.where(enough, plain, careful + shift * 0)


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
    worker = _worker(student.device)
    found = torch.empty((*shape, 3), dtype=torch.float64, device=worker)  # both normalisers, the divergence
    rows_at_once = max((block.stop - block.start for _, block in _blocks(student.shape)), default=0)
    columns = min(student.shape[2], _CHUNK)
    buffers = torch.empty((2, 2, rows_at_once, columns), dtype=torch.float64, device=worker)
    for i, j in _blocks(student.shape):
        a, b = _Side(a_all[i, j], a_scale, buffers[0]), _Side(b_all[i, j], b_scale, buffers[1])
        found[i, j] = torch.cat((a.log_normalizer(), b.log_normalizer(), _kl(a, b)), -1)
    kl = found[..., 2:].clamp_min_(0)
    if student.shape[-1] == 1:
        kl.mul_(0)  # as below, and NaN where there is no distribution
    found = found.view(-1, 3)
    parts = [part for k, n in enumerate((3, 3, 2)) for part in _split(found[:, k : k + 1], n, out_dtype)]
    result = parts[6][:, 0]
    if rows is not None:
        result = torch.where(rows.reshape(-1).to(worker), result, 0)
    return result.to(student.device), torch.cat(parts, -1).to(student.device)


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
    buffers: dict[torch.Size, Tensor] = {}
    for i, j in _blocks(student.shape):
        flat = slice(i * inner + j.start, i * inner + j.stop)
        parts = stats[flat].to(worker, torch.float64)
        log_a, log_b, kl = (part.sum(-1, keepdim=True) for part in parts.split((3, 3, 2), -1))
        scale = row_scale[flat, None].to(worker, torch.float64)
        keep = None if rows is None else rows[i, j, None].to(worker)
        for c in _columns(student.shape[-1]):
            a_rows, b_rows = a_all[i, j, c], b_all[i, j, c]
            if a_rows.shape not in buffers:
                buffers[a_rows.shape] = torch.empty((2, *a_rows.shape), dtype=torch.float64, device=worker)
            a, b = buffers[a_rows.shape]
            a.copy_(a_rows)
            b.copy_(b_rows)
            to_a = to_b = None
            if grad_a is not None:
                x = _log_ratio(a.clone(), b, log_b - log_a, a_scale, b_scale)
                to_a = x.add_(kl).neg_()
                # Times 0: a NaN row stays NaN. Nothing flows to a logit of −inf.
                to_a = torch.where(torch.isneginf(a), kl * 0, to_a)
            p = torch.add(log_a * -_LOG2E, a, alpha=a_scale * _LOG2E, out=a).exp2_()
            if to_a is not None:
                to_a = to_a.mul_(p).mul_(scale * a_scale)
                to_a = torch.where(torch.isinf(kl), torch.nan, to_a)
            if grad_b is not None:
                q = torch.add(log_b * -_LOG2E, b, alpha=b_scale * _LOG2E, out=b).exp2_()
                to_b = q.sub_(p).mul_(scale * b_scale)
            if student.shape[-1] == 1:
                to_a = to_b = kl * 0  # a probability of 1 that two exponentials would round
            # Both are ready before either is stored: a buffer may be the very memory a or b was read from.
            for out, grad in ((grad_a, to_a), (grad_b, to_b)):
                if out is not None and grad is not None:
                    out[i, j, c] = grad if keep is None else torch.where(keep, grad, 0)

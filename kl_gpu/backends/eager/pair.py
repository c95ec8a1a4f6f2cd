"""Plain PyTorch backend: any device, chunked so that its extra memory stays small whatever N and V are.

Works in float64, which makes the plain formulas accurate enough for the library's promises; where the device
has none, the chunks visit the CPU. Exponentials are powers of 2: PyTorch computes those three times as fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...arguments.reduction import has_float64
from ...formulas import SUMMED, Terms, column_terms, finish, kl_terms
from ..interface import TOKEN_STATS, RowPair, Scale

# 512 Ki float64 elements are 4 MiB: the few buffers a chunk needs stay in a last cache of 32 MiB, and each
# operation is long enough to hide what starting it costs.
CHUNK = 1 << 19
# A formula holds a dozen of them at once.
_FORMULA_CHUNK = CHUNK // 4
# Below this the plain sum of terms w·x, good to some 1e-15 in float64, gives way to one that does not cancel.
_CANCELS = 1e-6
_LOG2E = 1 / math.log(2)


def _chunk(p: RowPair) -> int:
    return CHUNK if p.formula == "kl" else _FORMULA_CHUNK


def blocks_of(logits: Tensor, chunk: int) -> Iterator[tuple[int, slice, slice]]:
    """Row blocks of `[A, B, V]`, about a chunk each: an outer index and a run of inner rows, and the same as
    flat row numbers."""
    outer, inner, columns = logits.shape
    step = max(1, chunk // columns)
    for i in range(outer):
        for j in range(0, inner, step):
            stop = min(j + step, inner)
            yield i, slice(j, stop), slice(i * inner + j, i * inner + stop)


def columns_of(n: int, chunk: int) -> Iterator[slice]:
    for start in range(0, n, chunk):
        yield slice(start, min(start + chunk, n))


def worker_for(device: torch.device) -> torch.device:
    return device if has_float64(device) else torch.device("cpu")


def row_sum(x: Tensor) -> Tensor:
    """Σ over columns, `[R, 1]`.

    A row alone goes twice: PyTorch would split one long sum over its threads, and the row's bits would
    differ from those it has among others.
    """
    total = (x.expand(2, -1) if x.shape[0] == 1 else x).sum(-1, keepdim=True)
    return total[: x.shape[0]]


# A number of all rows, or `[R, 1]` of each.
_Number = float | Tensor


def _largest(a_scale: _Number, b_scale: _Number) -> _Number:
    """The size up to which logits are told apart: past it what they are multiplied by, or the difference of
    two such products, might be infinite, a column that does not exist."""
    ratio = a_scale / b_scale
    limits = 1.0, a_scale * _LOG2E, b_scale * _LOG2E, ratio, 1 / ratio
    if not isinstance(ratio, Tensor):
        return 2.0**1022 / max(limits)
    return 2.0**1022 / torch.stack(
        [torch.as_tensor(x, device=ratio.device).to(ratio).expand_as(ratio) for x in limits]
    ).amax(0)


def _clamped(x: Tensor, largest: _Number) -> Tensor:
    return x.clamp(-largest, largest)  # type: ignore[arg-type]


def _widen(out: Tensor, logits: Tensor, largest: _Number) -> Tensor:
    """Logits in float64, over `out`; a finite one is `largest` at most, as `_largest` has it."""
    out.copy_(logits)
    if logits.dtype == torch.float64:
        finite = torch.isfinite(out)
        torch.where(finite, _clamped(out, largest), out, out=out)
    return out


class _Side:
    """One side of a chunk of rows: its logits in float64, and 2^(scaled logit − top) beside them."""

    def __init__(self, rows: Tensor, scale: _Number, buffers: Tensor, largest: _Number) -> None:
        self.rows, self.scale, self.buffers, self.largest = rows, scale, buffers, largest
        tops = [rows[:, c].amax(-1, keepdim=True) for c in self.columns()]
        top = torch.cat(tops, -1).amax(-1, keepdim=True).to(buffers)
        # NaN where the row has no distribution: the largest logit is NaN or infinite.
        self.peak = torch.where(torch.isfinite(top), _clamped(top, largest), torch.nan)
        self.top = self.peak * scale * _LOG2E
        self.total = torch.zeros_like(self.top)
        for c in self.columns():
            self.total += row_sum(self.load(c)[1])

    def columns(self) -> Iterator[slice]:
        return columns_of(self.rows.shape[-1], self.buffers.shape[-1])

    def load(self, columns: slice) -> tuple[Tensor, Tensor]:
        logits, powers = self.buffers[:, : self.rows.shape[0], : columns.stop - columns.start]
        _widen(logits, self.rows[:, columns], self.largest)
        # The difference first: of products of 1e20 the rounding alone is an exponent of thousands.
        torch.sub(logits, self.peak, out=powers)
        return logits, powers.mul_(self.scale * _LOG2E).exp2_()

    def log_normalizer(self) -> Tensor:
        """ln Σ exp(scaled logit), `[R, 1]`."""
        return (self.top + self.total.log2()) / _LOG2E


def _sides(p: RowPair) -> Iterator[tuple[slice, _Side, _Side]]:
    """Both sides of each block of rows, over one memory, and its flat row numbers."""
    blocks, columns = list(blocks_of(p.a, _chunk(p))), min(p.a.shape[-1], _chunk(p))
    at_once = max((rows.stop - rows.start for *_, rows in blocks), default=0)
    shape, worker = (2, 2, at_once, columns), worker_for(p.a.device)
    buffers = torch.empty(shape, dtype=torch.float64, device=worker)
    for i, j, rows in blocks:
        a_scale, b_scale = p.scales_at(rows, buffers)
        largest = _largest(a_scale, b_scale)
        a = _Side(p.a[i, j], a_scale, buffers[0], largest)
        yield rows, a, _Side(p.b[i, j], b_scale, buffers[1], largest)


def _multiply_add(c: Tensor, x: Tensor, factor: _Number, out: Tensor) -> Tensor:
    """c + factor·x, by one fused operation either way: a row has the same bits."""
    if isinstance(factor, Tensor):
        return torch.addcmul(c, x, factor, out=out)
    return torch.add(c, x, alpha=factor, out=out)


def _log_ratio(a: Tensor, b: Tensor, shift: Tensor, a_scale: _Number, b_scale: _Number) -> Tensor:
    """(scaled b − scaled a) − shift, over the memory of a; exactly 0 for equal logits."""
    _multiply_add(b, a, -(a_scale / b_scale), out=a)
    return _multiply_add(-shift, a, b_scale, out=a)


def _kl(a: _Side, b: _Side) -> Tensor:
    """KL(a‖b) of a chunk of rows, `[R, 1]`."""
    shift = b.log_normalizer() - a.log_normalizer()
    blocks = list(a.columns())
    again = len(blocks) > 1  # the buffers still hold a row's only block
    plain = torch.zeros_like(shift)
    for c in blocks:
        (logits_a, powers_a), (logits_b, _) = (
            (side.load(c) if again else side.buffers[:, : shift.shape[0], : c.stop]) for side in (a, b)
        )
        x = _log_ratio(logits_a, logits_b, shift, a.scale, b.scale)
        plain -= row_sum(torch.mul(powers_a, x, out=logits_b))
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
        careful += row_sum(kl_terms(x, w.div_(a.total), q.div_(b.total), no_weight, no_other))
    # Times 0: a row without a distribution is NaN also where its columns summed to +inf.
    return torch.where(enough, plain, careful + shift * 0)


def _formula(
    p: RowPair, formula: str, beta: float | Tensor, scales: tuple[_Number, _Number],
    logits: tuple[Tensor, Tensor], probabilities: tuple[Tensor, Tensor], shift: Tensor,
) -> Terms:  # fmt: skip
    """A formula's terms and flows on a chunk; takes over the memory of the logits."""
    neither = torch.isneginf(logits[0]) & torch.isneginf(logits[1])
    r = torch.where(neither, 0, _log_ratio(*logits, shift, *scales))
    return column_terms(formula, probabilities, r, beta)


def _formula_totals(p: RowPair, formula: str, a: _Side, b: _Side) -> tuple[Tensor, Tensor, Tensor]:
    """The row sums of a formula's three parts, `[R, 1]` each."""
    shift = b.log_normalizer() - a.log_normalizer()
    totals = [torch.zeros_like(shift) for _ in range(3)]
    for c in a.columns():
        (logits_a, w), (logits_b, q) = a.load(c), b.load(c)
        sides = w.div_(a.total), q.div_(b.total)
        parts = _formula(p, formula, p.beta, (a.scale, b.scale), (logits_a, logits_b), sides, shift)
        for total, part in zip(totals, parts, strict=True):
            total += row_sum(part)
    # Times 0: sign(NaN) is 0, and a row without a distribution must be NaN in every sum.
    return totals[0] + shift * 0, totals[1] + shift * 0, totals[2] + shift * 0


def _split(x: Tensor, n: int, dtype: torch.dtype) -> list[Tensor]:
    """x as a sum of n numbers of `dtype`: three float32 hold all of a float64."""
    parts = []
    for _ in range(n):
        part = x.to(dtype)
        parts.append(part)
        x = torch.where(torch.isfinite(part), x - part.to(x.dtype), 0)
    return parts


# Row statistics: log normaliser of a and of b, then what `finish` gives: the divergence, what the flows sum
# to and their β, each as a sum of so many numbers.
_STATS = (3, 3, 2, 1, 1, 2)


def _stored(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """The row statistics that hold these six, `[*, 6]`."""
    parts = [part for k, n in enumerate(_STATS) for part in _split(numbers[..., k], n, dtype)]
    return torch.stack(parts, -1)


def _numbers(stats: Tensor) -> tuple[Tensor, ...]:
    """The six in float64, `[*, 1]` each."""
    return tuple(part.sum(-1, keepdim=True) for part in stats.double().split(_STATS, -1))


def _row_numbers(p: RowPair, a: _Side, b: _Side) -> tuple[Tensor, ...]:
    """What `finish` gives of a chunk of rows, `[R, 1]` each; of KL the value alone."""
    if p.formula == "kl":
        return (_kl(a, b),)
    sums = _formula_totals(p, SUMMED.get(p.formula, p.formula), a, b)
    kl = sums[0]
    if p.formula == "lk":
        for side in (a, b):
            side.load(next(side.columns()))  # `_kl` finds a row's only block in the buffers
        kl = _kl(a, b).clamp_min_(0)
    return finish(p.formula, p.beta, kl, sums)


def value(p: RowPair) -> tuple[Tensor, Tensor]:
    """Per-row divergence `[A*B]` and row statistics `[A*B, STATS]`."""
    worker = worker_for(p.a.device)
    found = torch.zeros((p.n_rows, len(_STATS)), dtype=torch.float64, device=worker)
    for rows, a, b in _sides(p):
        parts = _row_numbers(p, a, b)
        found[rows, : 2 + len(parts)] = torch.cat((a.log_normalizer(), b.log_normalizer(), *parts), -1)
    found[:, 2].clamp_min_(0)
    if p.a.shape[-1] == 1:
        found[:, 2:].mul_(0)  # as in `gradient`, and NaN where there is no distribution
    result = found[:, 2].to(p.dtype, copy=True)
    if p.valid is not None:
        result = torch.where(p.valid.reshape(-1).to(worker), result, 0)
    return result.to(p.a.device), _stored(found, p.dtype).to(p.a.device)


def divergence(p: RowPair) -> Tensor:
    """`value` without the statistics."""
    return value(p)[0]


def value_and_gradient(
    p: RowPair, row_scale: Tensor, grad_a: Tensor | None, grad_b: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`value`, then `gradient`."""
    found, stats = value(p)
    gradient(p, stats, row_scale, grad_a, grad_b)
    return found, stats


def normalisers(stats: Tensor, a_scale: Scale, b_scale: Scale) -> tuple[Tensor, Tensor]:
    """Of rows whose statistics these are, in float64 nats: log Σ e^a, and log Σ e^b less that."""
    log_a, log_b, *_ = (number[..., 0] for number in _numbers(stats))
    return log_a, log_b - log_a


def statistics(
    local: Tensor, a_scale: Scale, b_scale: Scale, formula: str, log_a: Tensor, ratio: Tensor, sums: Tensor
) -> Tensor:
    """What `gradient` and `formula_sums` need of a part of a row whose other columns lie elsewhere.

    Args:
        local: the statistics of the part.
        log_a, ratio: the whole row's normalisers, as `normalisers` has them.
        sums: float64 `[N, 4]`, the whole row's numbers of `formulas.finish`.
    """
    numbers = torch.cat((torch.stack((log_a, log_a + ratio), -1), sums), -1)
    return _stored(numbers, local.dtype)


def formula_sums(p: RowPair, stats: Tensor) -> Tensor:
    """The formula's terms and its two flows, summed over the columns: float64 `[A*B, 3]`."""
    worker = worker_for(p.a.device)
    found = torch.zeros((p.n_rows, 3), dtype=torch.float64, device=worker)
    for i, j, flat in blocks_of(p.a, _FORMULA_CHUNK):
        log_a, log_b = _numbers(stats[flat].to(worker))[:2]
        scales = p.scales_at(flat, found)
        for c in columns_of(p.a.shape[-1], _FORMULA_CHUNK):
            a, b = (
                _widen(torch.empty_like(x, dtype=torch.float64, device=worker), x, _largest(*scales))
                for x in (p.a[i, j, c], p.b[i, j, c])
            )
            sides = _normalised(a.clone(), log_a, scales[0]), _normalised(b.clone(), log_b, scales[1])
            parts = _formula(
                p, SUMMED.get(p.formula, p.formula), p.beta, scales, (a, b), sides, log_b - log_a
            )
            found[flat] += torch.cat([row_sum(part) for part in parts], -1)
    if p.valid is not None:
        found = torch.where(p.valid.reshape(-1, 1).to(worker), found, 0)
    return found.to(p.a.device)


def _kl_gradients(
    scales: tuple[_Number, _Number], a: Tensor, b: Tensor, sums: tuple[Tensor, ...], needs_a: bool
) -> tuple[Tensor | None, Tensor]:
    """∂KL/∂(scaled logits) of a chunk, over the memory of a and b."""
    log_a, log_b, kl = sums[:3]
    to_a = None
    if needs_a:
        to_a = _log_ratio(a.clone(), b, log_b - log_a, *scales).add_(kl).neg_()
        # Times 0: a NaN row stays NaN. Nothing flows to a logit of −inf.
        to_a = torch.where(torch.isneginf(a), kl * 0, to_a)
    w, q = _normalised(a, log_a, scales[0]), _normalised(b, log_b, scales[1])
    if to_a is not None:
        to_a = torch.where(torch.isinf(kl), torch.nan, to_a.mul_(w))
    return to_a, q.sub_(w)


def _normalised(logits: Tensor, log_normalizer: Tensor, scale: _Number) -> Tensor:
    """Probabilities, over the memory of the logits."""
    return _multiply_add(log_normalizer * -_LOG2E, logits, scale * _LOG2E, out=logits).exp2_()


def _formula_gradients(
    p: RowPair, scales: tuple[_Number, _Number], a: Tensor, b: Tensor, sums: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """∂D/∂(scaled logits) of a chunk: each side's part of the formula less its own share of the row's sum."""
    log_a, log_b, _, *means, beta = sums
    sides = _normalised(a.clone(), log_a, scales[0]), _normalised(b.clone(), log_b, scales[1])
    own = beta if p.formula in SUMMED else p.beta
    _, *flows = _formula(p, p.formula, own, scales, (a, b), sides, log_b - log_a)
    # An infinite divergence has no gradient to the side whose mean is infinite: NaN, never a silent 0.
    grads = [
        torch.where(torch.isfinite(mean), flow.sub_(side * mean), torch.nan)
        for side, flow, mean in zip(sides, flows, means, strict=True)
    ]
    return grads[0], grads[1]


def gradient(
    p: RowPair,
    stats: Tensor,
    row_scale: Tensor,
    grad_a: Tensor | None,
    grad_b: Tensor | None,
    incoming: Tensor | None = None,
) -> None:
    """As `Backend.gradient` has it; the buffers are written whatever the incoming gradient is."""
    if incoming is not None:
        row_scale = row_scale * incoming
    worker = worker_for(p.a.device)
    buffers: dict[torch.Size, Tensor] = {}
    for i, j, flat in blocks_of(p.a, _chunk(p)):
        sums = _numbers(stats[flat].to(worker))
        scale = row_scale[flat, None].to(worker, torch.float64)
        scales = p.scales_at(flat, scale)
        keep = None if p.valid is None else p.valid[i, j, None].to(worker)
        for c in columns_of(p.a.shape[-1], _chunk(p)):
            a_rows, b_rows = p.a[i, j, c], p.b[i, j, c]
            if a_rows.shape not in buffers:
                buffers[a_rows.shape] = torch.empty((2, *a_rows.shape), dtype=torch.float64, device=worker)
            a, b = buffers[a_rows.shape]
            _widen(a, a_rows, _largest(*scales))
            _widen(b, b_rows, _largest(*scales))
            if p.formula == "kl":
                grads = _kl_gradients(scales, a, b, sums, grad_a is not None)
            else:
                grads = _formula_gradients(p, scales, a, b, sums)
            # Both are ready before either is stored: a buffer may be the very memory a or b was read from.
            for out, grad, side_scale in zip((grad_a, grad_b), grads, scales, strict=True):
                if out is not None and grad is not None:
                    if p.a.shape[-1] == 1:
                        grad = sums[2] * 0  # a probability of 1 that two exponentials would round
                    grad = grad * (scale * side_scale)
                    out[i, j, c] = grad if keep is None else torch.where(keep, grad, 0)


def _entropy(side: _Side) -> Tensor:
    """−Σ p ln p of a chunk of rows, `[R, 1]`."""
    weighted = torch.zeros_like(side.total)
    for c in side.columns():
        logits, powers = side.load(c)
        exponents = logits.sub_(side.peak).mul_(side.scale * _LOG2E)
        weighted += row_sum(torch.where(powers == 0, 0, exponents.mul_(powers)))
    return ((side.total.log2() - weighted / side.total) / _LOG2E).clamp_min_(0)


def _log_probability(side: _Side, tokens: Tensor) -> Tensor:
    """ln p of one token of each row, `[R, 1]`; NaN for a token that is no column."""
    inside = (tokens >= 0) & (tokens < side.rows.shape[-1])
    logits = side.rows.gather(-1, torch.where(inside, tokens, 0)).to(side.total)
    exponents = (logits - side.peak) * (side.scale * _LOG2E)
    # At most 0, which one column's rounding might pass.
    found = ((exponents - side.total.log2()) / _LOG2E).clamp_max_(0)
    return torch.where(inside.to(found.device), found, torch.nan)


def token_stats(p: RowPair, tokens: Tensor | None) -> Tensor:
    """As `Backend.token_stats` has it."""
    worker = worker_for(p.a.device)
    found = torch.empty((p.n_rows, TOKEN_STATS), dtype=torch.float64, device=worker)
    flat_tokens = None if tokens is None else tokens.reshape(-1, 1)
    for rows, a, b in _sides(p):
        of_tokens = [torch.full_like(a.total, torch.nan)] * 2
        if flat_tokens is not None:
            of_tokens = [_log_probability(side, flat_tokens[rows]) for side in (b, a)]
        agree = (a.rows.argmax(-1, keepdim=True) == b.rows.argmax(-1, keepdim=True)).to(a.total)
        parts = [_entropy(b), _entropy(a), *of_tokens, torch.where((a.top + b.top).isnan(), torch.nan, agree)]
        kls = []
        for weights, other in ((a, b), (b, a)):
            for side in (a, b):
                side.load(next(side.columns()))  # `_kl` finds a row's only block in the buffers
            kls.append(_kl(weights, other).clamp_min_(0))
        found[rows] = torch.cat((*kls, *parts), -1)
    if p.a.shape[-1] == 1:
        found[:, :2].mul_(0)
    if p.valid is not None:
        found = torch.where(p.valid.reshape(-1, 1).to(worker), found, 0)
    return found.T.to(p.a.device, p.dtype).contiguous()

"""The specification of `token_logprobs`, `topk_logprobs` and `topk_div`, in NumPy float64, by definition.

Shapes are `[..., V]` for logits and `[..., K]` for what is known of the teacher; rows are independent, values
are in nats. p is the teacher, q = softmax(student / T). An id outside [0, V) is an absent entry, and so is
one of log-probability −inf whose id stands elsewhere in its row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..kinds import KINDS
from .pair import Array, _entropy, _kl_terms, _log_mixture, _wide, log_softmax

Ids = NDArray[np.integer]


def token_logprobs(logits: ArrayLike, token_ids: ArrayLike, temperature: float = 1.0) -> Array:
    """log softmax(logits / T) at one id per row, `[...]`."""
    chosen, z = np.asarray(token_ids)[..., None], _wide(logits) / temperature
    plain = np.take_along_axis(log_softmax(logits, temperature), chosen, -1)[..., 0]
    # −log(1 + odds of the other tokens): all that is left of a token that is nearly certain.
    with np.errstate(over="ignore", invalid="ignore"):
        odds = np.exp(z - np.take_along_axis(z, chosen, -1))
        np.put_along_axis(odds, chosen, 0.0, -1)
        return np.where(plain > -0.5, -np.log1p(odds.sum(-1)), plain)


def entropy(logits: ArrayLike, temperature: float = 1.0) -> Array:
    """−Σ q log q, `[...]`."""
    return _entropy(log_softmax(logits, temperature))


def token_gradients(logits: ArrayLike, token_ids: ArrayLike, temperature: float = 1.0) -> tuple[Array, Array]:
    """∂log-probability/∂logits and ∂entropy/∂logits, `[..., V]` each."""
    log_q = log_softmax(logits, temperature)
    q = np.exp(log_q)
    one = np.zeros_like(q)
    np.put_along_axis(one, np.asarray(token_ids)[..., None], 1.0, -1)
    with np.errstate(invalid="ignore"):
        to_entropy = np.where(q == 0, 0.0, -q * (log_q + entropy(logits, temperature)[..., None]))
    return (one - q) / temperature, to_entropy / temperature


def _log_sum(log_x: Array) -> Array:
    """log Σ eˣ over the last axis, kept; −inf for an empty sum."""
    top = np.max(log_x, axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return top + np.log(np.exp(log_x - top).sum(-1, keepdims=True))


def topk_logprobs(logits: ArrayLike, k: int, temperature: float = 1.0) -> tuple[Array, Ids, Array]:
    """The k largest log softmax(logits / T), their columns, and the log of the others' summed probability."""
    z = _wide(logits) / temperature
    ids = np.argsort(-z, -1, kind="stable")[..., :k]
    logprobs = np.stack([token_logprobs(logits, ids[..., j], temperature) for j in range(k)], -1)
    # All others as one column, whose logit is the log of their sum.
    others = z.copy()
    np.put_along_axis(others, ids, -np.inf, -1)
    merged = np.concatenate((np.take_along_axis(z, ids, -1), _log_sum(others)), -1)
    return logprobs, ids, token_logprobs(merged, np.full(z.shape[:-1], k))


def remaining_mass(teacher_logprobs: ArrayLike, resolution: float) -> tuple[Array, Array]:
    """1 − Σ p, `[..., 1]`, and how much rounding log p may hide.

    log p is known to `resolution`·|log p|. Where it is 0, or above, rounding the result hid nothing: then the
    softmax had no finer number, in float32 at best, where whatever is within 2^-24 of certain has log p = 0.
    """
    log_p = np.sort(_wide(teacher_logprobs), -1)
    p = np.exp(log_p)
    error = resolution * np.abs(log_p)
    error = np.where(log_p < 0, error, np.maximum(error, min(resolution, 2.0**-24)))
    with np.errstate(invalid="ignore"):
        hidden = np.where(p == 0, 0.0, p * error).sum(-1, keepdims=True)
    # The largest first, so that a mass of 1e-12 beside it survives.
    rest = -np.expm1(log_p[..., -1:]) - p[..., :-1].sum(-1, keepdims=True)
    return rest, hidden


def _terms(log_q: Array, log_p: Array, kind: str, beta: float | None) -> tuple[Array, Array]:
    """Terms of the divergence of two measures over the last axis, Σ q and Σ p being anything.

    For KL they are p log(p/q) − p + q. Also ∂D/∂log q, straight from the definition.
    """
    name, beta = KINDS[kind].at(beta)
    q, p = np.exp(log_q), np.exp(log_p)
    r = np.where(np.isneginf(log_q) & np.isneginf(log_p), 0.0, log_p - log_q)
    with np.errstate(invalid="ignore"):
        difference = np.where(np.abs(r) < 1, -q * np.expm1(r), q - p)
        reverse_flow = np.where(q == 0, 0.0, -q * r)
    if name == "forward_kl":
        return _kl_terms(log_p, log_q), difference
    if name == "reverse_kl":
        return _kl_terms(log_q, log_p), reverse_flow
    if name == "jeffreys":
        terms = (1 - beta) * _kl_terms(log_p, log_q) + beta * _kl_terms(log_q, log_p)
        return terms, (1 - beta) * difference + beta * reverse_flow
    log_m = _log_mixture(log_p, log_q, beta)
    terms = beta * _kl_terms(log_p, log_m) + (1 - beta) * _kl_terms(log_q, log_m)
    with np.errstate(invalid="ignore"):
        return terms, (1 - beta) * np.where(q == 0, 0.0, q * (log_q - log_m))


def topk_div(
    student: ArrayLike,
    teacher_logprobs: ArrayLike,
    teacher_ids: ArrayLike,
    kind: str = "forward_kl",
    *,
    tail: str = "bucket",
    teacher_tail_logprob: ArrayLike | None = None,
    beta: float | None = None,
    temperature: float = 1.0,
    resolution: float = 2.0**-53,
) -> tuple[Array, Array, Array, Array]:
    """Per-row divergence `[...]`, its gradient to the student's logits, and both sides' mass on the ids.

    `resolution` is half an ulp of the dtype that `teacher_logprobs` were rounded to.
    """
    student, ids = _wide(student), np.asarray(teacher_ids)
    columns = student.shape[-1]
    present = (ids >= 0) & (ids < columns)
    # Padding: an entry without probability whose id another entry has too.
    twice = (ids[..., :, None] == ids[..., None, :]).sum(-1) > 1
    present &= ~(twice & np.isneginf(_wide(teacher_logprobs)))

    def in_columns(values: NDArray[Any]) -> NDArray[Any]:
        """`[..., K]` in the ids' columns of `[..., V]`, 0 elsewhere."""
        dense = np.zeros((*student.shape[:-1], columns + 1), values.dtype)  # the last is for what is absent
        np.put_along_axis(dense, np.where(present, ids, columns), values, -1)
        return dense[..., :-1]

    taken = in_columns(np.ones_like(present))
    at = np.where(present, ids, 0)
    log_p = np.where(present, _wide(teacher_logprobs), -np.inf)
    full = log_softmax(student, 1.0 if tail == "renormalize" else temperature)
    log_q = np.where(present, np.take_along_axis(full, at, -1), -np.inf)
    log_rest = _log_sum(np.where(taken, -np.inf, full))  # the student's mass outside the ids
    masses = np.exp(_log_sum(log_p))[..., 0], np.exp(_log_sum(log_q))[..., 0]

    with np.errstate(invalid="ignore", divide="ignore"):
        if tail == "renormalize":
            log_p, log_q = (x - _log_sum(x) for x in (log_p / temperature, log_q / temperature))
        if tail == "student_full":
            log_p = log_p - _log_sum(log_p)
            rest_p = np.full_like(log_rest, -np.inf)
        elif teacher_tail_logprob is not None:
            rest_p = _wide(teacher_tail_logprob)[..., None]
        else:
            rest, hidden = remaining_mass(log_p, resolution)
            # Where it is all rounding it is as much as that may hide, lest KL(q‖p) be infinite; but nothing
            # where the student has no mass there either, lest KL(p‖q) be.
            rest_p = np.log(np.where(rest > hidden, rest, np.where(np.isneginf(log_rest), 0.0, hidden)))
        # A tail without a column has no mass.
        rest_p = np.where(taken.all(-1, keepdims=True), -np.inf, rest_p)
        if tail in ("bucket", "student_full"):
            log_q, log_p = (np.concatenate(x, -1) for x in ((log_q, log_rest), (log_p, rest_p)))
        if tail == "truncate":
            terms = np.where(np.isneginf(log_p), 0.0, np.exp(log_p) * (log_p - log_q))
            flow = -np.exp(log_p)
        else:
            terms, flow = _terms(log_q, log_p, kind, beta)
    total = flow.sum(-1, keepdims=True)

    # ∂log q_j/∂logits = e_j − q; log of the remaining mass reaches each of its columns by its share.
    dense = in_columns(flow[..., : ids.shape[-1]])
    q = in_columns(np.exp(log_q)) if tail == "renormalize" else np.exp(full)
    if flow.shape[-1] > ids.shape[-1]:
        share = np.exp(np.where(taken | np.isneginf(full), -np.inf, full - log_rest))
        dense = dense + flow[..., -1:] * share
    with np.errstate(invalid="ignore"):
        gradient = np.where(np.isfinite(total), dense - q * total, np.nan) / temperature
    row = full.sum(-1) * 0 if tail != "renormalize" else 0.0
    row = np.where(np.isnan(row) & ~np.isnan(full).any(-1), 0.0, row)  # −inf·0 is no NaN of the row's
    return terms.sum(-1) + row, gradient, *masses

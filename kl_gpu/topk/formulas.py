"""What `topk_div` and `topk_logprobs` compute from K columns and the rest of a row.

For `topk_div` each tail's formula and its derivatives.

Each is an operator, one node under torch.compile: Inductor would take tens of seconds over its lines, and
find other last bits. Everything is `[*, K]` or `[*]`, in float64, on any device. q is the student, p the
teacher; log q_j = s_j − lse with lse = log(Σ e^s + e^u) over the ids. A divergence D of the log-probabilities
has the flows f_j = ∂D/∂log q_j, and with F = Σ f, ∂D/∂s_j = f_j − q_j F and ∂D/∂u = f_rest − q_rest F.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formulas import column_terms
from ..kinds import KINDS
from ..ops.register import operator

TAIL_KINDS = {
    "bucket": ("forward_kl", "reverse_kl", "jeffreys", "js"),
    "renormalize": ("forward_kl", "reverse_kl", "jeffreys", "js"),
    "student_full": ("forward_kl",),
    "truncate": ("forward_kl",),
    "generalized": ("forward_kl", "reverse_kl", "jeffreys", "js"),
}
# Kinds made of every column's min(p, q): of a bucket's sums only a bound of it would be known.
_OF_EVERY_COLUMN = ("nla", "lk")


def refuse_kind(kind: str, tail: str, allowed: tuple[str, ...]) -> None:
    """ValueError where `kind` is none of those that a tail has."""
    if kind in allowed:
        return
    names = ", ".join(map(repr, allowed))
    why = "; it is made of every column's min(p, q)" if kind in _OF_EVERY_COLUMN else ""
    raise ValueError(f"kind must be one of {names} for tail={tail!r}, got {kind!r}{why}")


# Half an ulp: what rounding to this dtype may have done to a number of size 1.
RESOLUTION = {
    torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8
}  # fmt: skip


def tree_sum(x: Tensor) -> Tensor:
    """Σ over the last axis, kept, pairwise in one fixed order.

    A reduction's order may depend on the whole tensor's shape, and a row's bits with it on its neighbours.
    """
    while x.shape[-1] > 1:
        half = (x.shape[-1] + 1) // 2
        left, right = x[..., :half], x[..., half:]
        if right.shape[-1] < half:
            right = torch.nn.functional.pad(right, (0, 1))
        x = left + right
    return x


def log_sum(log_x: Tensor) -> Tensor:
    top = log_x.amax(-1, keepdim=True)
    top = torch.where(torch.isneginf(top), 0.0, top)
    return top + torch.log(tree_sum(torch.exp(log_x - top)))


def log_normalizer(picked: Tensor, rest_lse: Tensor) -> Tensor:
    """log Σ e^s over all columns; NaN where there is no distribution."""
    lse = torch.logaddexp(rest_lse, log_sum(picked))
    return torch.where(torch.isfinite(lse), lse, torch.nan)


def student_mass(picked: Tensor, rest_lse: Tensor) -> Tensor:
    """What the student gives to the ids."""
    return tree_sum(torch.exp(picked - log_normalizer(picked, rest_lse[..., None])))[..., 0]


def mass_of(log_p: Tensor) -> Tensor:
    return tree_sum(torch.exp(log_p))[..., 0]


def _best_outputs(picked: Tensor, rest_lse: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(picked), torch.empty_like(rest_lse)


@operator("best(Tensor given, Tensor rest) -> (Tensor, Tensor)", _best_outputs)
def best(picked: Tensor, rest_lse: Tensor) -> tuple[Tensor, Tensor]:
    """log p of the picked columns, which hold the row's largest logit, and of all others together.

    Every line is a sum of terms ≤ 0: nothing cancels, however near 0 the result is.
    """
    top, where = picked.max(-1, keepdim=True)
    u = rest_lse[..., None]
    behind = picked - top
    # NaN where there is no distribution: the largest logit is then NaN or infinite.
    odds = tree_sum(torch.exp(behind).scatter(-1, where, 0.0)) + torch.exp(u - top)
    log_top = torch.where(torch.isfinite(top), 0.0 - torch.log1p(odds), torch.nan)
    # A tail heavier than any token may be all but certain itself.
    heavy = 0.0 - torch.log1p(tree_sum(torch.exp(picked - u)))
    tail = torch.where(u > top, heavy, (u - top) + log_top)
    return behind + log_top, torch.where(torch.isnan(log_top), torch.nan, tail)[..., 0].clone()


def remaining(log_p: Tensor, resolution: float, others: Tensor) -> Tensor:
    """log(1 − Σ p), but never below what rounding log p may hide: a teacher whose K probabilities round to a
    sum of 1 must not exclude the rest of the vocabulary, for KL(q‖p) would be infinite.

    Rounding log p hides `resolution`·|log p|. Where log p is 0, or above, that is nothing; but then it comes
    from a softmax in float32 at best, which gives 0 to any token within 2^-24 of certain.

    Args:
        others: bool, whether the student has mass beside the ids. Where it has none a rest that is only
            rounding is none either: it would make KL(p‖q) infinite.
    """
    top, where = log_p.max(-1, keepdim=True)
    p = torch.exp(log_p)
    # The largest apart, so that a mass of 1e-12 beside it survives.
    rest_p = -torch.expm1(top) - tree_sum(p.scatter(-1, where, 0.0))
    error = log_p.abs() * resolution
    error = torch.where(log_p < 0, error, error.clamp_min(min(resolution, 2.0**-24)))
    hidden = tree_sum(torch.where(p == 0, 0.0, p * error))
    return torch.log(torch.where(rest_p > hidden, rest_p, torch.where(others, hidden, 0.0)))


def _divergence(kind: str, beta: float, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Terms of the divergence of two measures, and ∂/∂log q of their sum.

    Σ p and Σ q may be anything: for KL the terms are p log(p/q) − p + q ≥ 0.
    """
    of = KINDS[kind]
    log_a, log_b = of.as_ab(log_q, log_p)
    r = torch.where(torch.isneginf(log_a) & torch.isneginf(log_b), 0.0, log_b - log_a)
    terms, *flows = column_terms(of.formula, (torch.exp(log_a), torch.exp(log_b)), r, beta)
    return terms, of.as_ab(flows[0], flows[1])[0]


def _topk_outputs(picked: Tensor, rest_lse: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(rest_lse), torch.empty_like(picked), torch.empty_like(rest_lse)


@operator(
    "topk(Tensor given, Tensor rest, Tensor log_p, Tensor? rest_log_p, Tensor has_rest, str kind, "
    "float beta, str tail, float scale, float resolution) -> (Tensor, Tensor, Tensor)",
    _topk_outputs,
)
def topk(
    picked: Tensor, rest_lse: Tensor, log_p: Tensor, rest_log_p: Tensor | None, has_rest: Tensor,
    kind: str, beta: float, tail: str, scale: float, resolution: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The divergence per row `[*]`, and its derivatives to s `[*, K]` and to u `[*]`.

    Args:
        picked: s of each id, −inf where absent.
        rest_lse: u; "renormalize" does not read it.
        log_p: the teacher's, −inf where absent.
        rest_log_p: the log of its remaining mass, or None for 1 − Σ p.
        has_rest: bool `[*]`, whether there are columns beside the ids.
        scale: 1/temperature, for "renormalize".
    """
    rest_lse = rest_lse[..., None]
    if tail == "renormalize":
        log_q = picked - log_sum(picked)
        log_p = log_p * scale
        log_p = log_p - log_sum(log_p)
        terms, flow = _divergence(kind, beta, log_q, log_p)
        q, total = torch.exp(log_q), tree_sum(flow)
        grad_picked, grad_rest = flow - q * total, torch.zeros_like(rest_lse)
    else:
        lse = log_normalizer(picked, rest_lse)
        log_q, rest_log_q = picked - lse, rest_lse - lse
        q, rest_q = torch.exp(log_q), torch.exp(rest_log_q)
        if tail == "student_full":
            log_p = log_p - log_sum(log_p)
            rest_log_p = torch.full_like(rest_lse, -torch.inf)
        elif rest_log_p is None:
            rest_log_p = remaining(log_p, resolution, ~torch.isneginf(rest_lse))
        else:
            rest_log_p = rest_log_p[..., None]
        # A rest without a column has no mass, whatever rounding says.
        rest_log_p = torch.where(has_rest[..., None], rest_log_p, -torch.inf)
        columns = picked.shape[-1]
        if tail in ("bucket", "student_full"):
            log_q = torch.cat((log_q, rest_log_q), -1)
            log_p = torch.cat((log_p, rest_log_p), -1)
        if tail == "truncate":
            p = torch.exp(log_p)
            terms, flow = torch.where(torch.isneginf(log_p), 0.0, p * (log_p - log_q)), -p
        else:
            terms, flow = _divergence(kind, beta, log_q, log_p)
        total = tree_sum(flow)
        grad_picked = flow[..., :columns] - q * total
        grad_rest = (flow[..., columns:] if flow.shape[-1] > columns else 0.0) - rest_q * total
    # An infinite divergence has no gradient to the side that weighs its terms: NaN, never a silent 0.
    broken = ~torch.isfinite(total)
    value = tree_sum(terms)
    if tail != "truncate":
        value = value.clamp_min(0.0)  # terms of 1e-31 may be negative
    grad_picked, grad_rest = (torch.where(broken, torch.nan, x) for x in (grad_picked, grad_rest))
    return value[..., 0].clone(), grad_picked, grad_rest[..., 0].clone()

"""What `token_logprobs` computes from one column, or from K, and the rest of a row.

Operators of float64 tensors `[*]` and `[*, K]`, as `topk.formulas` has them. q is the distribution, s a
picked column's scaled logit, u the log-sum-exp of all others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.register import operator
from .formulas import log_normalizer, log_sum, tree_sum


def _token_outputs(s: Tensor, *_: object) -> list[Tensor]:
    return [torch.empty_like(s) for _ in range(7)]


@operator("token(Tensor s, Tensor rest, Tensor spread) -> Tensor[]", _token_outputs)
def token(s: Tensor, rest_lse: Tensor, rest_entropy: Tensor) -> list[Tensor]:
    """log q of one column, the row's entropy, and the derivatives of each: to s, to u, and to `rest_entropy`.

    `rest_entropy` is the entropy of the other columns among themselves. With Q the probability of those,
    log q = −log(1 + e^{u − s}) and H = −q log q − Q log Q + Q·rest_entropy: only terms of one sign.
    """
    d = rest_lse - s
    lse = torch.logaddexp(rest_lse, s)
    broken = ~torch.isfinite(lse)
    log_q = torch.where(d < 0, 0.0 - torch.log1p(torch.exp(d)), s - lse)
    log_rest = torch.where(d > 0, 0.0 - torch.log1p(torch.exp(-d)), rest_lse - lse)
    log_q, log_rest = (torch.where(broken, torch.nan, x) for x in (log_q, log_rest))
    q, rest_q = torch.exp(log_q), torch.exp(log_rest)
    own = torch.where(q == 0, 0.0, -log_q)
    others = torch.where(rest_q == 0, 0.0, rest_entropy - log_rest)
    # H = q·own + Q·others, so ∂H/∂s = q Q (own − others) = −∂H/∂u.
    turn = q * rest_q * (own - others)
    return [log_q, q * own + rest_q * others, rest_q, -rest_q, turn, -turn, rest_q.clone()]


def _tokens_outputs(picked: Tensor, rest_lse: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(picked), *(torch.empty_like(rest_lse) for _ in range(3))  # type: ignore[return-value]


@operator(
    "tokens(Tensor given, Tensor rest, Tensor spread) -> (Tensor, Tensor, Tensor, Tensor)", _tokens_outputs
)
def tokens(picked: Tensor, rest_lse: Tensor, rest_entropy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log q of different columns `[*, K]`, the row's entropy, the probability Q of all others, and ∂H/∂u.

    With the probabilities q of the columns, H = −Σ q log q − Q log Q + Q·rest_entropy. The largest column's
    log q is −log(1 + Σ of the others' odds), so it keeps its digits near 0; all others are at most 1/2.
    """
    top, where = picked.max(-1, keepdim=True)
    u, without_top = rest_lse[..., None], picked.scatter(-1, where, -torch.inf)
    lse = log_normalizer(picked, u)
    odds = torch.logaddexp(log_sum(without_top), u) - top
    log_top = torch.where(odds < 0, 0.0 - torch.log1p(torch.exp(odds)), top - lse)
    log_q = torch.where(torch.isnan(lse), torch.nan, (picked - lse).scatter(-1, where, log_top))
    behind = log_sum(picked) - u
    log_rest = torch.where(behind < 0, 0.0 - torch.log1p(torch.exp(behind)), u - lse)
    log_rest = torch.where(torch.isnan(lse), torch.nan, log_rest)[..., 0]
    rest_q = torch.exp(log_rest)
    others = torch.where(rest_q == 0, 0.0, rest_entropy - log_rest)
    q = torch.exp(log_q)
    entropy = tree_sum(torch.where(q == 0, 0.0, -q * log_q))[..., 0] + rest_q * others
    return log_q, entropy, rest_q, torch.where(rest_q == 0, 0.0, rest_q * (others - entropy))


def _tokens_gradient_outputs(grad_log_q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad_log_q), grad_log_q.new_empty(grad_log_q.shape[:-1])


@operator(
    "tokens_gradient(Tensor to_log_q, Tensor to_entropy, Tensor log_q, Tensor entropy, Tensor rest_q, "
    "Tensor turn) -> (Tensor, Tensor)",
    _tokens_gradient_outputs,
)
def tokens_gradient(
    grad_log_q: Tensor, grad_entropy: Tensor, log_q: Tensor, entropy: Tensor, rest_q: Tensor, turn: Tensor
) -> tuple[Tensor, Tensor]:
    """What flows to the columns' s `[*, K]` and to u `[*]` from the gradients to log q and to the entropy.

    With G the sum of the g to log q, s_j gets g_j (1 − q_j) − q_j (G − g_j), and from the entropy's h
    −h q_j (log q_j + H).
    """
    q, total = torch.exp(log_q), tree_sum(grad_log_q)
    from_entropy = torch.where(q == 0, 0.0, q * (log_q + entropy[..., None]))
    to_picked = grad_log_q * -torch.expm1(log_q) - q * (total - grad_log_q)
    to_picked = to_picked - grad_entropy[..., None] * from_entropy
    return to_picked, grad_entropy * turn - rest_q * total[..., 0]

"""The KL penalty in five forms, each as its users apply it.

The objective is E[reward(y)] − β KL(policy‖reference), of whole completions y drawn from the policy. With D_t
the KL between the two models' distributions of the token at t, after the tokens before it, the KL of the
completions is E[Σ_t D_t], and its gradient has two parts:

    E[Σ_t ∇D_t]                         what the policy does at t,
    E[Σ_t ∇log q(y_t) Σ_{u>t} D_u]      and where that leads it.

D_t does not depend on the token drawn at t. Detached, in the reward, it therefore yields only the second part
(for completions of one token: nothing, on average), and as a loss only the first. `exact` uses it as both,
which is the whole gradient (Amini et al. 2025, "Better Estimation of the Kullback-Leibler Divergence Between
Language Models"). k1 in the reward has the same mean, with the variance of the drawn tokens on top. k2 and k3
as losses leave the second part out, and k3's mean is not even the first, but the opposite KL's gradient (Tang
and Munos 2025, "On a few pitfalls in KL divergence gradient estimation for RL").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kl_gpu import kl_div, kl_penalty

# Each with where it goes: k1 in the reward, as in PPO for language models; k3 in the loss, as in GRPO; and k2
# like k3, because in the reward neither has the KL's gradient.
FORMS = {"none": "", "exact": "loss and reward", "k1": "reward", "k2": "loss", "k3": "loss"}


@dataclass(frozen=True)
class Penalty:
    """Of a batch of completions, each `[batch, time]`, in nats."""

    later: Tensor  # to take from the reward of the token at t; no gradient
    loss: Tensor  # to differentiate


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probabilities of `tokens`, `[batch, time]`, under `logits`, `[batch, time, V]`."""
    chosen = logits.gather(-1, tokens[..., None]).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def penalty(
    form: str, policy_logits: Tensor, ref_logits: Tensor, tokens: Tensor, backend: str | None = None
) -> Penalty:
    """`tokens`, `[batch, time]`, were drawn from `policy_logits`; both models' are `[batch, time, V]`."""
    nothing = torch.zeros(tokens.shape, dtype=policy_logits.dtype)
    if form == "none":
        return Penalty(nothing, nothing)
    if form == "exact":
        kl = kl_div(policy_logits, ref_logits, direction="reverse", reduction="none", backend=backend)
        return Penalty(to_go(kl.detach()) - kl.detach(), kl)
    estimate = kl_penalty(token_logprobs(policy_logits, tokens), token_logprobs(ref_logits, tokens), form)
    return Penalty(to_go(estimate.detach()), nothing) if form == "k1" else Penalty(nothing, estimate)


def to_go(values: Tensor) -> Tensor:
    """At each t the sum of `values`, `[batch, time]`, from t on."""
    return values.flip(1).cumsum(1).flip(1)

"""OpenRLHF's KL estimates, log-probabilities and entropies, computed by kl_gpu.

    from kl_gpu.integrations import openrlhf as fast

    fast.patch()  # before the trainer's modules are used

The numbers stay OpenRLHF's: estimates are clamped at ±10, and log_probs_from_logits divides the caller's
logits by the temperature in place, which the entropy taken afterwards relies on. Known against 0.11.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..logprobs import token_logprobs
from ..rl import kl_penalty
from ._patching import Hook, Patch


def _compute_approx_kl(
    log_probs: Tensor, log_probs_base: Tensor, log_probs_old: Tensor | None = None, kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Any:  # fmt: skip
    if kl_estimator not in ("k1", "k2", "k3") or (unbiased_gradient and log_probs_old is not None):
        return NotImplemented
    return kl_penalty(
        log_probs.float(),
        log_probs_base.float(),
        kl_estimator,
        clamp=10.0,
        straight_through=unbiased_gradient,
    )


def _log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Any:
    if temperature != 1.0:
        logits.div_(temperature)
    return token_logprobs(logits, labels)


def _compute_entropy(logits: Tensor) -> Tensor:
    some = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprobs(logits, some, entropy=True)[1]


_MODULE = "openrlhf.models.utils"
_ESTIMATE = "log_probs log_probs_base log_probs_old kl_estimator unbiased_gradient"

#: What is replaced, with the arguments that OpenRLHF 0.11 gives it.
HOOKS = (
    Hook(_MODULE, "compute_approx_kl", _ESTIMATE, _compute_approx_kl),
    Hook(_MODULE, "log_probs_from_logits", "logits labels temperature", _log_probs_from_logits),
    Hook(_MODULE, "compute_entropy", "logits", _compute_entropy),
)
#: As `kl_gpu.integrations.trl.patch` and `unpatch`.
_PATCH = Patch("openrlhf", HOOKS)
patch, unpatch = _PATCH.apply, _PATCH.undo

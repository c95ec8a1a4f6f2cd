"""verl's log-probabilities, entropies and KL penalties, computed by kl_gpu.

    from kl_gpu.integrations import verl as fast

    fast.patch()  # in every worker, before its modules compute: an import in a file named by external_lib

`kl_penalty="full"`, which verl names and does not implement, is the exact KL(policy‖reference) of each token
from both sides' logits. With `use_chunked_topk` on, distillation from a teacher's top k reads the student's
logits once. Known against verl 0.9.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import kl_div
from ..logprobs import token_logprobs
from ..rl import kl_penalty as estimate
from ._patching import Hook, Patch


def _logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Any:
    return token_logprobs(logits, labels, inplace=inplace_backward and logits.requires_grad)


def _entropy_from_logits(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    some = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprobs(logits, some, entropy=True)[1]


def _topk_logprobs(logits: Tensor, topk_ids: Tensor, chunk_size: int = 4096) -> Any:
    return token_logprobs(logits, topk_ids)


def _kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Any:
    if kl_penalty == "full":
        return kl_div(logprob, ref_logprob, direction="reverse", reduction="none")
    base = kl_penalty.removesuffix("+")
    if base not in ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"):
        return NotImplemented
    limits: Any = {"clamp": 10.0, "input_clamp": 20.0} if base in ("low_var_kl", "k3") else {}
    value = estimate(logprob, ref_logprob, base, **limits)
    if kl_penalty == base:
        return value
    # kl_gpu's own "+" would limit k2's gradient where the estimate's argument is limited; verl's is free.
    slope = estimate(logprob, ref_logprob, "k2")
    return value.detach() + (slope - slope.detach())


_FUNCTIONAL, _FSDP = "verl.utils.torch_functional", "verl.trainer.distillation.fsdp.losses"

#: What is replaced, with the arguments that verl 0.9 gives it.
HOOKS = (
    Hook(_FUNCTIONAL, "logprobs_from_logits", "logits labels inplace_backward", _logprobs_from_logits),
    Hook(_FUNCTIONAL, "entropy_from_logits", "logits", _entropy_from_logits),
    Hook(_FUNCTIONAL, "entropy_from_logits_with_chunking", "logits chunk_size", _entropy_from_logits),
    Hook("verl.trainer.ppo.core_algos", "kl_penalty", "logprob ref_logprob kl_penalty", _kl_penalty),
    Hook(_FSDP, "_chunked_topk_log_probs", "logits topk_ids chunk_size", _topk_logprobs),
)
#: As `kl_gpu.integrations.trl.patch` and `unpatch`.
_PATCH = Patch("verl", HOOKS)
patch, unpatch = _PATCH.apply, _PATCH.undo

"""What takes the place of TRL's functions, by their arguments' names. NotImplemented leaves a call to TRL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import js_div
from ..linear.api import linear_div
from ..linear.tokens import linear_token_logprobs
from ..logprobs import token_logprobs
from ._packages import require


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Any:
    """Log-probabilities of `index`, `[N]` or `[N, K]`, float32 also for narrower logits."""
    mask = None if row_mask is None else row_mask != 0
    if mask is None or mask.shape == logits.shape[:-1]:
        return token_logprobs(logits, index, temperature=temperature, mask=mask)
    found: Any = token_logprobs(logits, index, temperature=temperature)
    return torch.where(mask, found, 0.0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropies `[N]`, differentiable; finite where a token is excluded by −inf."""
    some = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprobs(logits, some, entropy=True)[1]


def selective_log_softmax_and_entropy(
    logits: Tensor, index: Tensor, entropy_requires_grad: bool = True, temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both from one read of the logits."""
    mask = None if row_mask is None else row_mask != 0
    logprobs, entropy = token_logprobs(logits, index, temperature=temperature, entropy=True, mask=mask)
    return logprobs, entropy if entropy_requires_grad else entropy.detach()


def generalized_jsd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, beta: float = 0.5,
    temperature: float = 1.0, reduction: str = "batchmean", logits_are_probs: bool = False,
    num_items_in_batch: Any = None,
) -> Any:  # fmt: skip
    """GKD's and GOLD's divergence; β is the teacher's weight in the mixture, as in :func:`kl_gpu.js_div`."""
    if logits_are_probs or (num_items_in_batch is None and reduction not in ("batchmean", "sum", "mean")):
        return NotImplemented
    how: dict[str, Any] = {"reduction": "sum"}
    if num_items_in_batch is not None:
        how = {"normalizer": num_items_in_batch}
    elif reduction == "batchmean":  # their name for the mean over tokens, where there are labels
        how = {"reduction": "batchmean" if labels is None else "mean"}
    loss = js_div(
        student_logits, teacher_logits, beta=float(beta), temperature=temperature, labels=labels, **how
    )
    if num_items_in_batch is None and reduction == "mean":  # over columns as well
        rows = student_logits[..., 0].numel() if labels is None else (labels != -100).sum()
        return loss / (rows * student_logits.shape[-1])
    return loss


def _is_spread() -> bool:
    """Whether ZeRO-3 holds parameters in parts, which TRL gathers around each use."""
    return bool(require("transformers.integrations.deepspeed").is_deepspeed_zero3_enabled())


def _head(hidden: Tensor, weight: Any, bias: Any) -> list[Any]:
    """Weight and bias whole, in the hidden states' dtype where autocast does not choose it."""
    found = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in (weight, bias)]
    if torch.is_autocast_enabled(hidden.device.type):
        return found
    return [None if x is None else x.to(hidden.dtype) for x in found]


def chunked_logprobs(
    hidden: Tensor, weight: Any, bias: Any, targets: Tensor, temperature: float, chunk_size: int,
    final_logit_softcapping: float | None = None, logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("is_top1",),
) -> Any:  # fmt: skip
    """Log-probabilities of `targets` `[N]`, and entropies where they are among `outputs`."""
    if not set(outputs) <= {"log_probs", "entropy"} or _is_spread():
        return NotImplemented
    weight, bias = _head(hidden, weight, bias)
    found: Any = linear_token_logprobs(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=final_logit_softcapping,
        logit_scale=logit_scale, entropy="entropy" in outputs,
    )  # fmt: skip
    return (*(found if "entropy" in outputs else (found, None)), None, None, None)


def chunked_divergence(
    student_hidden: Tensor, student_weight: Any, student_bias: Any, teacher_hidden: Tensor,
    teacher_weight: Any, teacher_bias: Any, beta: float, temperature: float = 1.0,
    student_logit_scale: float = 1.0, student_final_logit_softcapping: float | None = None,
    teacher_logit_scale: float = 1.0, teacher_final_logit_softcapping: float | None = None, **options: Any,
) -> Any:  # fmt: skip
    """Divergences `[N]` and the student's entropies. A teacher that requires a gradient gets none."""
    if _is_spread():
        return NotImplemented
    student_weight, student_bias = _head(student_hidden, student_weight, student_bias)
    with torch.no_grad():
        teacher_weight, teacher_bias = _head(teacher_hidden, teacher_weight, teacher_bias)
    return linear_div(
        student_hidden, student_weight, teacher_hidden.detach(), teacher_weight.detach(), "js",
        beta=float(beta), student_bias=student_bias,
        teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
        softcap=student_final_logit_softcapping, teacher_softcap=teacher_final_logit_softcapping,
        logit_scale=student_logit_scale, teacher_logit_scale=teacher_logit_scale, temperature=temperature,
        return_entropy=True, **{"reduction": "none", **options},
    )  # fmt: skip


def chunked_divergence_loss(
    student_hidden_states: Tensor, teacher_hidden_states: Tensor, student_lm_head_weight: Any,
    teacher_lm_head_weight: Any, completion_mask: Tensor, beta: float, num_items_in_batch: Any = None,
    student_lm_head_bias: Any = None, teacher_lm_head_bias: Any = None, temperature: float = 1.0,
    **products: Any,
) -> Any:  # fmt: skip
    """DistillationTrainer's loss, the sum of the student's entropies, and how many tokens count."""
    mask = completion_mask != 0
    found = chunked_divergence(
        student_hidden_states, student_lm_head_weight, student_lm_head_bias, teacher_hidden_states,
        teacher_lm_head_weight, teacher_lm_head_bias, beta, temperature, **products, mask=mask,
        reduction="mean", normalizer=num_items_in_batch,
    )  # fmt: skip
    return found if found is NotImplemented else (found[0], found[1].sum(), mask.sum())

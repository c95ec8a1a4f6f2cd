"""Liger-Kernel's losses by their names, arguments, reductions and defaults, computed by kl_gpu.

    from kl_gpu.integrations.liger import LigerFusedLinearJSDLoss  # in place of liger_kernel.chunked_loss'

Liger-Kernel itself is not needed. What differs is where Liger's own numbers do not hold: the loss is float32,
good to 5e-6 of itself where the sides nearly agree; a swapped pair, the reverse KL, has a gradient; where no
token counts the loss is 0, not NaN; the padding of a wider teacher is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import divergence
from ..linear.api import linear_div
from ..linear.tokens import linear_token_logprobs


def _with_free_gradient(loss: Tensor, logprobs: Tensor, slope: Any, valid: Tensor | None) -> Tensor:
    """`loss` `[N]`, given `slope` along a shift of a whole row, along which a loss of logits has none."""
    if not logprobs.requires_grad:
        return loss
    if valid is not None:
        logprobs = logprobs.masked_fill(~valid[..., None], 0.0)
    total = torch.logsumexp(logprobs.to(loss.dtype), -1)
    return loss + slope * (total - total.detach())


def _divergence(log_q: Tensor, log_p: Tensor, beta: float, valid: Tensor | None = None) -> Tensor:
    """`[N]` from log-probabilities, with their gradients: with m = βp + (1−β)q, β KL(p‖m) + (1−β) KL(q‖m)."""
    loss: Tensor = divergence(log_q, log_p, "js", beta=beta, mask=valid, reduction="none")
    if not loss.requires_grad:
        return loss
    with torch.no_grad():
        slopes: list[Any]
        if beta in (0.0, 1.0):
            slopes = [loss + 1, -1] if beta else [-1, loss + 1]
        else:  # (1−β) KL(q‖m) and β KL(p‖m)
            slopes = [
                share * divergence(log_q, log_p, kind, beta=share, mask=valid, reduction="none")
                for share, kind in ((1 - beta, "skew_reverse_kl"), (beta, "skew_forward_kl"))
            ]
    loss = _with_free_gradient(loss, log_q, slopes[0], valid)
    return _with_free_gradient(loss, log_p, slopes[1], valid)


def liger_jsd(
    input: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    beta: float = 0.5,
    ignore_index: int = -100,
) -> Tensor:
    """Generalised Jensen-Shannon divergence of log-probabilities, the mean over the rows that count.

    `input` and `target` are the student's and the teacher's, `[N, V]`, both differentiable; `shift_labels`
    is int `[N]`; β = 0 is KL(p‖q), 1 is KL(q‖p). Errors are those of :func:`kl_gpu.divergence`.
    """
    valid = None if shift_labels is None else shift_labels != ignore_index
    rows = _divergence(input, target, float(beta), valid)
    return rows.mean() if valid is None else rows.sum() / valid.sum().clamp(min=1)


def liger_kl_div(
    input: Tensor, target: Tensor, size_average: bool = True, reduce: bool = True, reduction: str = "mean",
    log_target: bool = False, eps: float = 1e-10,
) -> Tensor:  # fmt: skip
    """KL(target‖input) with `torch.nn.functional.kl_div`'s arguments.

    `input` `[N, V]` are log-probabilities, `target` probabilities or, with `log_target`, their logarithms;
    rows sum to 1, both are differentiable. Reductions: "none" (`[N, V]`, term by term), "sum", "batchmean"
    (Σ / N), "mean" (Σ / (N V)). `size_average` and `reduce` have no effect, as in Liger, nor has `eps`: a
    target of 0 contributes 0. Errors are those of :func:`kl_gpu.divergence`.
    """
    if reduction not in ("none", "sum", "mean", "batchmean"):
        raise ValueError(f"reduction must be none, sum, mean or batchmean, got {reduction!r}")
    if reduction == "none":
        return nn.functional.kl_div(input.float(), target.float(), reduction="none", log_target=log_target)
    total = _divergence(input, target if log_target else target.log(), 0.0).sum()
    return total / {"sum": 1, "batchmean": len(input), "mean": input.numel()}[reduction]


class LigerJSD(nn.Module):
    """:func:`liger_jsd` as a module, called `(log_q, log_p, shift_labels=None)`."""

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta, self.ignore_index = beta, ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        return liger_jsd(log_q, log_p, shift_labels, self.beta, self.ignore_index)


class LigerKLDIVLoss(nn.KLDivLoss):
    """:func:`liger_kl_div` as a module: `eps`, then `torch.nn.KLDivLoss`' arguments; `(y_pred, y_true)`."""

    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        return liger_kl_div(y_pred, y_true, reduction=self.reduction, log_target=self.log_target)


class LigerFusedLinearJSDLoss(nn.Module):
    """Jensen-Shannon divergence and cross-entropy from hidden states and heads, by :func:`kl_gpu.linear_div`.

    weight_soft_loss · JS + weight_hard_loss · (−log q(label)), both means over the rows whose label is not
    `ignore_index`; the second at temperature 1. `compiled` has no effect, `chunk_size` is the rows of logits
    held at once. With `return_soft_hard_loss` a call returns its two parts too, unweighed and detached.
    """

    def __init__(
        self, weight_hard_loss: float = 0.5, weight_soft_loss: float = 0.5, beta: float = 0.5,
        ignore_index: int = -100, temperature: float = 1.0, compiled: bool = True, chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight_hard_loss, self.weight_soft_loss, self.beta = weight_hard_loss, weight_soft_loss, beta
        self.ignore_index, self.temperature, self.compiled = ignore_index, temperature, compiled
        self.chunk_size, self.return_soft_hard_loss = chunk_size, return_soft_hard_loss

    def forward(
        self, student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor,
        true_labels: Tensor, student_bias: Tensor | None = None, teacher_bias: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Student `[N, H_s]` and `[V_s, H_s]`, teacher `[N, H_t]` and `[V_t, H_t]`, labels `[N]`."""
        constant = None if teacher_bias is None else teacher_bias.detach()

        def soft_loss(hard_weight: float) -> Any:
            return linear_div(
                student_input, student_weight, teacher_input.detach(), teacher_weight.detach(), "js",
                beta=float(self.beta), student_bias=student_bias, teacher_bias=constant, labels=true_labels,
                ignore_index=self.ignore_index, temperature=self.temperature, chunk_rows=self.chunk_size,
                vocab_size=min(len(student_weight), len(teacher_weight)), hard_weight=hard_weight,
            )  # fmt: skip

        if self.weight_soft_loss > 0 and not self.return_soft_hard_loss:
            return self.weight_soft_loss * soft_loss(self.weight_hard_loss / self.weight_soft_loss)
        logprobs: Any = linear_token_logprobs(
            student_input, student_weight, true_labels, bias=student_bias, ignore_index=self.ignore_index,
            chunk_rows=self.chunk_size,
        )  # fmt: skip
        hard = -logprobs.sum() / (true_labels != self.ignore_index).sum().clamp(min=1)
        soft = soft_loss(0.0) if self.return_soft_hard_loss or self.weight_soft_loss else hard.new_zeros(())
        loss = self.weight_soft_loss * soft + self.weight_hard_loss * hard
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss

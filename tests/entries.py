"""One small call of every differentiable entry, for what must hold of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kl_gpu
from support import DEVICE

SAMPLES, ROWS, COLUMNS, HIDDEN, K = 2, 3, 24, 8, 4


class Entry(NamedTuple):
    """A call of one sample `[ROWS, ...]` or of all, `[SAMPLES, ROWS, ...]`.

    Attributes:
        call: (student, *constants, backend=..., **options) to values or a reduction of them.
        student: `[SAMPLES, ROWS, ...]`, what is differentiated.
        constants: `[SAMPLES, ROWS, ...]` each: what a teacher, or whoever sampled the tokens, has said.
        shared: constants that have no samples; they come last.
    """

    call: Callable[..., Tensor]
    student: Tensor
    constants: tuple[Tensor, ...]
    shared: tuple[Tensor, ...] = ()


def _both(logits: Tensor, ids: Tensor, **options: Any) -> Tensor:
    options.pop("reduction", None)
    logprobs, entropy = kl_gpu.token_logprobs(logits, ids, entropy=True, **options)
    return logprobs + 0.5 * entropy


def _linear(hidden: Tensor, teacher: Tensor, head: Tensor, teacher_head: Tensor, **options: Any) -> Tensor:
    return kl_gpu.linear_div(hidden, head, teacher, teacher_head, "js", **options)


def _linear_both(hidden: Tensor, ids: Tensor, head: Tensor, **options: Any) -> Tensor:
    options.pop("reduction", None)
    logprobs, entropy = kl_gpu.linear_token_logprobs(hidden, head, ids, entropy=True, **options)
    return logprobs + 0.5 * entropy


def _linear_topk(hidden: Tensor, logprobs: Tensor, ids: Tensor, head: Tensor, **options: Any) -> Tensor:
    return kl_gpu.linear_topk_div(hidden, head, logprobs, ids, "js", **options)


def _renormalized(*arguments: Tensor, **options: Any) -> Tensor:
    return kl_gpu.topk_div(*arguments, "reverse_kl", tail="renormalize", temperature=2.0, **options)


def entries() -> dict[str, Entry]:
    lead = SAMPLES, ROWS
    student, teacher = (2 * torch.randn(*lead, COLUMNS, device=DEVICE) for _ in range(2))
    ids = torch.randint(0, COLUMNS, lead, device=DEVICE)
    best, places = torch.log_softmax(teacher, -1).topk(K)
    hidden, teacher_hidden = (torch.randn(*lead, HIDDEN, device=DEVICE) for _ in range(2))
    weights = tuple(torch.randn(COLUMNS, HIDDEN, device=DEVICE) for _ in range(2))
    return {
        "kl_div": Entry(kl_gpu.kl_div, student, (teacher,)),
        "js_div": Entry(kl_gpu.js_div, student, (teacher,)),
        "token_logprobs": Entry(_both, student, (ids,)),
        "topk_div": Entry(kl_gpu.topk_div, student, (best, places)),
        "topk_div renormalized": Entry(_renormalized, student, (best, places)),
        "linear_div": Entry(_linear, hidden, (teacher_hidden,), weights),
        "linear_token_logprobs": Entry(_linear_both, hidden, (ids,), weights[:1]),
        "linear_topk_div": Entry(_linear_topk, hidden, (best, places), weights[:1]),
    }


NAMES = (
    "kl_div", "js_div", "token_logprobs", "topk_div", "topk_div renormalized", "linear_div",
    "linear_token_logprobs", "linear_topk_div",
)  # fmt: skip
# Per token, whatever the reduction.
PER_TOKEN = frozenset({"token_logprobs", "linear_token_logprobs"})
# Logits that are the caller's own may be overwritten; products are not.
HEADS = frozenset({"linear_div", "linear_token_logprobs", "linear_topk_div"})


def by_backward(function: Callable[..., Tensor], student: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """Value, and the gradient of its sum by `backward()`."""
    leaf = student.detach().clone().requires_grad_()
    value = function(leaf, *others)
    value.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().max() > 1e-4
    return value.detach(), leaf.grad

"""What is kept of each token: some numbers, none of them per column."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..logprobs import token_logprobs
from ..stats import token_stats
from ..topk.api import topk_div

TOP = 5
# Numbers of a token, float32 each. "top5" is the share of either side's five likeliest tokens that the other
# has among its own.
NUMBERS = (
    "forward_kl", "reverse_kl", "js", "acceptance", "base_entropy", "entropy", "base_logprob", "logprob",
    "same_top", "top5", "base_top_p",
)  # fmt: skip


def scored(base: Tensor, model: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What is kept of rows whose logits are whole on both sides.

    Args:
        base, model: logits `[N, V]`.
        labels: int64 `[N]`, the tokens that came.

    Returns:
        `NUMBERS` `[N]`, and `base_top`, `top` int32 and `base_top_logprob`, `top_logprob` `[N, 5]`.
    """
    model = model.to(base.device)
    labels = labels.to(base.device)
    stats = token_stats(model, base, labels)
    tops = {
        "base_top": base.topk(min(TOP, base.shape[-1])).indices,
        "top": model.topk(min(TOP, model.shape[-1])).indices,
    }
    logprobs = {
        f"{name}_logprob": cast(Tensor, token_logprobs(logits, tops[name]))
        for name, logits in (("base_top", base), ("top", model))
    }
    found = {
        "forward_kl": stats.forward_kl,
        "reverse_kl": stats.reverse_kl,
        "js": stats.js,
        "acceptance": stats.acceptance,
        "base_entropy": stats.teacher_entropy,
        "entropy": stats.student_entropy,
        "base_logprob": stats.teacher_logprob,
        "logprob": stats.student_logprob,
        "same_top": stats.top1_agree,
        "top5": _shared(tops["base_top"], tops["top"]),
        "base_top_p": logprobs["base_top_logprob"][:, 0].exp(),
    }
    return _stored(found | logprobs, tops)


def scored_from_floor(base: Tensor, floor: float, model: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The same of a base whose log-probabilities `[N, V]` are known above −floor only, by llama.cpp's rule.

    KL(base‖model) is Σ p (log p − log q) over the tokens that are known, with nothing in place of the others.
    What would need them is NaN.
    """
    log_q = model.to(base.device).double().log_softmax(-1)
    log_p, labels = base.double(), labels.to(base.device)
    p = torch.where(base > -floor, log_p.exp(), 0.0)
    top_p, base_top = base.topk(min(TOP, base.shape[-1]))
    top_q, top = log_q.topk(base_top.shape[-1])
    unknown = torch.full_like(top_p[:, 0], torch.nan)
    found = {
        "forward_kl": torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1),
        "reverse_kl": unknown,
        "js": unknown.clone(),
        "acceptance": unknown.clone(),
        "base_entropy": -torch.where(p > 0, p * log_p, 0.0).sum(-1),
        "entropy": -torch.where(log_q > -torch.inf, log_q.exp() * log_q, 0.0).sum(-1),
        "base_logprob": log_p.gather(1, labels[:, None])[:, 0],
        "logprob": log_q.gather(1, labels[:, None])[:, 0],
        # The first of equal codes counts, as there.
        "same_top": (base.argmax(-1) == log_q.argmax(-1)).float(),
        "top5": _shared(base_top, top),
        "base_top_p": top_p[:, 0].exp(),
    }
    return _stored(
        found | {"base_top_logprob": top_p, "top_logprob": top_q}, {"base_top": base_top, "top": top}
    )


class TopK(NamedTuple):
    """Rows of a base of whom K tokens are known.

    Attributes:
        logprobs: `[n, K]`, under its softmax over the whole vocabulary.
        ids: int `[n, K]`; −1 marks an absent entry.
        tail_logprob: `[n]`, the log of what all other tokens have together; None where nobody summed it.
        label_logprob: `[n]`, of the tokens that came; None where only the entries may know it.
    """

    logprobs: Tensor
    ids: Tensor
    tail_logprob: Tensor | None
    label_logprob: Tensor | None


def scored_from_topk(base: TopK, model: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The same of a base known by K tokens: the divergences are those of K + 1 outcomes, the tokens and the
    rest, which are never more than those of the whole vocabulary (:func:`kl_gpu.topk_div`).

    Where nobody summed the rest it is 1 − Σ p, whose rounding KL(model‖base) would be made of: that is NaN.
    """
    base = TopK._make(None if x is None else x.to(model.device) for x in base)
    ids, labels = base.ids.long(), labels.to(model.device)
    here = ids >= 0
    log_p = torch.where(here, base.logprobs.double(), -torch.inf)

    def of(kind: str) -> Tensor:
        found = topk_div(
            model, base.logprobs, ids, kind, teacher_tail_logprob=base.tail_logprob, reduction="none"
        )
        return cast(Tensor, found)

    unknown = torch.full_like(base.logprobs[:, 0], torch.nan)
    picked, entropy = token_logprobs(model, ids, entropy=True)
    p, q = log_p.exp(), torch.where(here, picked.double().exp(), 0.0)
    rest_p = 1 - p.sum(-1) if base.tail_logprob is None else base.tail_logprob.double().exp()
    rest_q = (1 - q.sum(-1)).clamp_min(0)
    order = log_p.sort(-1, descending=True)
    base_top = ids.gather(1, order.indices[:, :TOP])
    top = model.topk(base_top.shape[1]).indices
    named = torch.where(ids == labels[:, None], log_p, -torch.inf).amax(-1)
    label_logprob = named.masked_fill(named.isneginf(), torch.nan)
    found = {
        "forward_kl": of("forward_kl"),
        "reverse_kl": unknown if base.tail_logprob is None else of("reverse_kl"),
        "js": of("js"),
        "acceptance": torch.minimum(p, q).sum(-1) + torch.minimum(rest_p.clamp_min(0), rest_q),
        "base_entropy": unknown.clone(),
        "entropy": entropy,
        "base_logprob": label_logprob if base.label_logprob is None else base.label_logprob,
        "logprob": cast(Tensor, token_logprobs(model, labels)),
        "same_top": (base_top[:, 0] == top[:, 0]).float(),
        "top5": _shared(base_top, top),
        "base_top_p": order.values[:, 0].exp(),
        "base_top_logprob": order.values[:, :TOP],
        "top_logprob": cast(Tensor, token_logprobs(model, top)),
    }
    return _stored(found, {"base_top": base_top, "top": top})


def _shared(left: Tensor, right: Tensor) -> Tensor:
    return (left[:, :, None] == right[:, None, :]).any(-1).float().mean(-1)


def _stored(numbers: dict[str, Tensor], ids: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: x.float() for name, x in numbers.items()} | {name: x.int() for name, x in ids.items()}
    return {name: x.cpu().contiguous() for name, x in found.items()}

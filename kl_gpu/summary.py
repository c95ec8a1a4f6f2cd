"""Statistics over tokens, as floats: `TokenStats.summary`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_OF_KL = ("1", "5", "10", "90", "95", "99", "99.9")
_OF_DELTA = ("0.1", "1", "5", "10", "25", "75", "90", "95", "99", "99.9")


def of(names: Sequence[str], fields: Tensor) -> dict[str, float]:
    """The dictionary that `TokenStats.summary` describes, of its fields `[fields, rows]` by name."""
    counts = fields[names.index("counts")]
    by_name = dict(zip(names, fields[:, counts > 0].cpu().double(), strict=True))
    forward = by_name["forward_kl"]
    found = {"count": float(forward.numel())}
    found |= _mean("forward_kl_mean", forward) | _quantiles("forward_kl", forward, _OF_KL)
    found |= _mean("reverse_kl_mean", by_name["reverse_kl"])
    for side in ("student", "teacher"):
        found[f"{side}_entropy_mean"] = by_name[f"{side}_entropy"].mean().item()
    found |= _mean("top1_agree", by_name["top1_agree"])
    for name in ("js", "tv", "acceptance"):
        found |= _mean(f"{name}_mean", by_name[name])
    log_q, log_p = by_name["student_logprob"], by_name["teacher_logprob"]
    if bool((log_q.isnan() & log_p.isnan()).all()):
        return found
    return found | _of_labels(log_q, log_p)


def _of_labels(log_q: Tensor, log_p: Tensor) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, x in (("student_ppl", -log_q), ("teacher_ppl", -log_p), ("ppl_ratio", log_p - log_q)):
        mean = _mean("", x)
        value = _exp(mean[""])
        found |= {name: value, f"{name}_se": value * mean["_se"]}
    found |= _mean("log_ppl_ratio", log_p - log_q)
    q, p = found["student_ppl"], found["teacher_ppl"]
    # To first order what a token adds to the difference of the perplexities.
    found |= _mean("ppl_difference", p * log_p - q * log_q) | {"ppl_difference": q - p}
    # Of a single row PyTorch would warn.
    both = torch.stack((log_q, log_p))
    found["log_ppl_correlation"] = torch.corrcoef(both)[0, 1].item() if log_q.numel() > 1 else math.nan
    delta = log_q.exp() - log_p.exp()
    found |= _mean("delta_p_mean", delta) | _quantiles("delta_p", delta, _OF_DELTA)
    square = _mean("", delta.square())
    rms = math.sqrt(square[""])
    error = 0.5 * square["_se"] / rms if rms else square["_se"]
    return found | {"delta_p_rms": rms, "delta_p_rms_se": error}


def _mean(name: str, x: Tensor) -> dict[str, float]:
    """The mean and its standard error, of shares too: √(p (1 − p) / (n − 1)) is the same number."""
    error = x.std().item() / math.sqrt(x.numel()) if x.numel() > 1 else math.nan
    return {name: x.mean().item(), f"{name}_se": error}


def _exp(x: float) -> float:
    return math.exp(x) if not x > 709 else math.inf


def _quantiles(name: str, x: Tensor, percents: Sequence[str]) -> dict[str, float]:
    ordered = x.sort().values
    found = {f"{name}_median": _quantile(ordered, 0.5)}
    found |= {f"{name}_p{percent}": _quantile(ordered, float(percent) / 100) for percent in percents}
    return found | {f"{name}_min": _quantile(ordered, 0.0), f"{name}_max": _quantile(ordered, 1.0)}


def _quantile(ordered: Tensor, share: float) -> float:
    """Of ascending numbers, linear between two; NaN sorts last, and makes every quantile one."""
    n = ordered.numel()
    if n == 0 or bool(ordered[-1].isnan()):
        return math.nan
    at = share * (n - 1)
    low = math.floor(at)
    below, above = ordered[low].item(), ordered[min(low + 1, n - 1)].item()
    # Between two infinities, or an infinity and its share of 0, lies no NaN.
    return below if at == low or below == above else below + (above - below) * (at - low)

"""KL penalties of reinforcement learning, from the log-probabilities of sampled tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks, symbols

ESTIMATORS = ("k1", "k2", "k3", "abs")


def _exp_minus_linear(x: Tensor) -> Tensor:
    """eˣ − 1 − x ≥ 0, by its series below 1/2, where the subtraction would cancel."""
    near = x.abs() < 0.5
    small = torch.where(near, x, 0.0)
    series = torch.zeros_like(x)
    for n in range(15, 1, -1):  # the next term is 3e-18 of the sum
        series = series * small + 1 / math.factorial(n)
    far = torch.where(near, 1.0, x)
    return torch.where(near, series * small * small, torch.expm1(far) - far)


def kl_penalty(
    policy_logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: str,
    *,
    clamp: float | None = None,
    straight_through: bool = False,
) -> Tensor:
    """Estimate of KL(policy‖ref) from one sampled token each, in nats, with r = policy − ref log-probability.

    "k1" = r, "k2" = r²/2, "k3" = e^−r − 1 + r, "abs" = |r|: Schulman (2020), "Approximating KL divergence".
    Over tokens sampled from the policy k1 and k3 have the KL as their mean, k2 and abs have not. As a *loss*,
    only k2 has the KL's gradient as its mean; k1's is 0 on average, and k3's is that of KL(ref‖policy). Where
    the logits are at hand, `kl_div(policy, ref, direction="reverse")` is exact and has no variance.

    Args:
        policy_logprobs: `[N]`, any shape; float16, bfloat16, float32 or float64; r of two −inf is NaN.
        ref_logprobs: the same shape and device; the dtype may differ.
        estimator: a name in `kl_gpu.rl.ESTIMATORS`.
        clamp: limits the estimate to [−clamp, clamp]; the gradient beyond is 0.
        straight_through: the estimator's value with the gradient of an unclamped k2.

    Returns:
        float32 (float64 where both inputs are), in the inputs' shape. Never negative but for k1.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, `estimator` is unknown, or `clamp` is not a finite number > 0.
    """
    checks.name("estimator", estimator, ESTIMATORS)
    checks.booleans(straight_through=straight_through)
    checks.log_probabilities(policy_logprobs, ref_logprobs)
    if clamp is not None:
        checks.positive("clamp", clamp)
        clamp = float(clamp)

    wide = policy_logprobs.dtype == ref_logprobs.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    r = policy_logprobs.to(dtype) - ref_logprobs.to(dtype)
    if estimator == "k1":
        estimate = r
    elif estimator == "k2":
        estimate = r.square() / 2
    elif estimator == "abs":
        estimate = r.abs()
    else:
        # Past where clamp cuts k3 off, e^−r may overflow, and its gradient times the clamp's 0 is NaN. With
        # −r = √(2 · clamp) it is cut off: k3 ≥ r²/2 there. The logarithm would do, but makes it a constant.
        most = math.log(torch.finfo(dtype).max) - 1e-5
        limited = r if clamp is None else symbols.clamp(r, -min(2 * clamp**0.5 + 1, most), None)
        estimate = _exp_minus_linear(-limited)
    if clamp is not None:
        estimate = symbols.clamp(estimate, -clamp, clamp)
    if straight_through:
        k2 = r.square() / 2
        estimate = estimate.detach() + (k2 - k2.detach())
    return estimate

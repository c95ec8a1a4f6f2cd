"""KL penalties of reinforcement learning, from the log-probabilities of sampled tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .arguments import validation
from .arguments.reduction import as_bool
from .inference_tensors import ordinary_rows
from .ops import symbols

ESTIMATORS = ("k1", "k2", "k3", "abs")
# verl's names. With a "+" behind it any name is verl's straight-through form.
_ALSO_CALLED = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
_NAMES = (*ESTIMATORS, *_ALSO_CALLED, *(f"{name}+" for name in (*ESTIMATORS, *_ALSO_CALLED)))


def _exp_minus_linear(x: Tensor) -> Tensor:
    """eˣ − 1 − x ≥ 0, by its series below 1/2, where the subtraction would cancel."""
    near = x.abs() < 0.5
    small = torch.where(near, x, 0.0)
    series = torch.zeros_like(x)
    for n in range(15, 1, -1):  # the next term is 3e-18 of the sum
        series = series * small + 1 / math.factorial(n)
    far = torch.where(near, 1.0, x)
    # Past e^1000, which no dtype holds, it is infinite, and x may be: inf − inf would be NaN.
    return torch.where(near, series * small * small, torch.expm1(far) - far.clamp(max=1000.0))


class _StraightThrough(torch.autograd.Function):
    """The estimate, with the gradient of k2: r, which is finite where r²/2 is not."""

    generate_vmap_rule = True

    @staticmethod
    def forward(estimate: Tensor, r: Tensor) -> Tensor:
        return estimate.view_as(estimate)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (r,) = ctx.saved_tensors
        return None, gradient * r


def kl_penalty(
    policy_logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: str = "k3",
    *,
    clamp: float | None = None,
    input_clamp: float | None = None,
    straight_through: bool = False,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Estimate of KL(policy‖ref) from one sampled token each, in nats.

    With r = policy − ref log-probability, "k1" is r, "k2" is r²/2, "k3" is e^−r − 1 + r and "abs" is the
    absolute value of r: Schulman (2020), "Approximating KL divergence". Over tokens sampled from the policy,
    the mean of k1 and k3 is the KL; that of k2 and abs is not. As a *loss*, only k2 has the KL's gradient as
    its mean: k1's is 0 on average, and k3's is that of KL(ref‖policy). If you have the logits,
    `kl_div(policy, ref, direction="reverse")` is exact and has no variance.

    Args:
        policy_logprobs: `[N]`, any shape; float16, bfloat16, float32 or float64. Where both sides are −inf,
            the estimate is NaN; an infinite r gives an infinite estimate, or the clamp's.
        ref_logprobs: The same shape and device; the dtype may differ.
        estimator: "k1", "k2", "k3" or "abs", or verl's name: "kl" is k1, "mse" is k2, "low_var_kl" is k3, and
            "+" after a name means `straight_through=True`.
        clamp: Limits the estimate to [−clamp, clamp]; the gradient beyond is 0.
        input_clamp: Limits r to [−input_clamp, input_clamp] before anything is computed from it; the gradient
            beyond is 0. verl's k3 uses 20 here and 10 as `clamp`.
        straight_through: Return the estimator's value with the gradient of k2 without `clamp`, which is r.
        mask: bool, or integers 0 and 1, `[N]`. True or 1 counts. An entry that does not count (padding) has
            estimate 0 and gradient 0, whatever it holds: −1e10, −inf or NaN. The mean over the others is
            `penalty.sum() / mask.sum()`.
        weight: float `[N]`, multiplies each estimate and its gradient: importance ratios, for tokens sampled
            from another policy. Entries that do not count are ignored. Differentiable; detach it if it should
            be a constant.

    Returns:
        float32 (float64 where both inputs are float64), in the inputs' shape. Without `weight`, never
        negative except for k1.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or devices differ, `estimator` is unknown, or a clamp is not a finite number > 0.

    Example:
        >>> import torch, kl_gpu
        >>> policy = torch.tensor([-1.0, -2.0, -9.0])
        >>> ref = torch.tensor([-1.5, -2.0, float("-inf")])
        >>> mask = torch.tensor([True, True, False])
        >>> penalty = kl_gpu.kl_penalty(policy, ref, "k3", mask=mask)
        >>> [round(x, 4) for x in penalty.tolist()]
        [0.1065, 0.0, 0.0]
    """
    validation.name("estimator", estimator, _NAMES)
    validation.booleans(straight_through=straight_through)
    validation.log_probabilities(policy_logprobs, ref_logprobs, mask, weight)
    straight_through = straight_through or estimator.endswith("+")
    estimator = estimator.removesuffix("+")
    estimator = _ALSO_CALLED.get(estimator, estimator)
    if clamp is not None:
        validation.positive("clamp", clamp)
        clamp = float(clamp)

    wide = policy_logprobs.dtype == ref_logprobs.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    policy, ref = policy_logprobs.to(dtype), ref_logprobs.to(dtype)
    if mask is not None:
        mask = as_bool(ordinary_rows(mask))
        # before the difference: what is not taken gets a gradient of 0, not 0 · NaN
        policy, ref = torch.where(mask, policy, 0.0), torch.where(mask, ref, 0.0)
        weight = None if weight is None else torch.where(mask, weight, 0.0)
    r = policy - ref
    if input_clamp is not None:
        validation.positive("input_clamp", input_clamp)
        r = symbols.clamp(r, -float(input_clamp), float(input_clamp))
    # Past where clamp cuts an estimate off, it may overflow, and its gradient times the clamp's 0 is NaN: r
    # is limited to where the estimate is larger than clamp already.
    most = torch.finfo(dtype).max
    clamp = None if clamp is None else min(clamp, most)
    if estimator == "k1":
        estimate = r
    elif estimator == "k2":
        past = None if clamp is None else 2 * clamp**0.5 + 1
        limited = r if past is None else symbols.clamp(r, -past, past)
        estimate = limited / 2 * limited  # not r²/2: r² overflows before it
    elif estimator == "abs":
        estimate = r.abs()
    else:
        # Cut off at −r = √(2 · clamp), since k3 ≥ r²/2 there. Not −log(clamp): under torch.compile math.log
        # would turn a changing clamp into a constant.
        past = None if clamp is None else min(2 * clamp**0.5 + 1, math.log(most) - 1e-5)
        limited = r if past is None else symbols.clamp(r, -past, None)
        estimate = _exp_minus_linear(-limited)
    if clamp is not None:
        estimate = symbols.clamp(estimate, -clamp, clamp)
    if straight_through:
        estimate = _StraightThrough.apply(estimate.detach(), r)
    return estimate if weight is None else estimate * weight.to(dtype)

"""KLs to a teacher of whom K tokens are known, who gives every other token one small probability.

NeMo-RL's `DistillationLossFn` with `zero_outside_topk` takes e^−100 for it. Such a teacher sums to a little
more than he should, and a value may be below 0 by as much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import transforms
from ..ops.register import operator
from .formulas import log_normalizer, tree_sum

# What they are of.
KINDS = ("forward_kl", "reverse_kl", "jeffreys")


def _outputs(picked: Tensor, rest_lse: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    value, to_rest, to_entropy = (torch.empty_like(rest_lse) for _ in range(3))
    return value, torch.empty_like(picked), to_rest, to_entropy


@operator(
    "outside(Tensor given, Tensor rest, Tensor spread, Tensor log_p, float outside, float share) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _outputs,
)
def outside(
    picked: Tensor, rest_lse: Tensor, rest_entropy: Tensor, log_p: Tensor, outside_logprob: float,
    share: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(1 − share)·Σ_K p log(p/q) + share·KL(q‖p) per row `[*]`, and its derivatives to s `[*, K]`, to u and
    the entropy H of the other columns among themselves, `[*]` each.

    With Q the student's mass on those, Σ over them of q log(q/e^c) is Q (log Q − H − c): their logits are not
    needed one by one.

    Args:
        picked: s of each id, −inf where absent; rest_lse: u.
        log_p: the teacher's, −inf where absent.
        outside_logprob: c.
    """
    u = rest_lse[..., None]
    lse = log_normalizer(picked, u)
    log_q, log_rest_q = picked - lse, u - lse
    q, rest_q, p = torch.exp(log_q), torch.exp(log_rest_q), torch.exp(log_p)
    forward = tree_sum(torch.where(p == 0, 0.0, p * (log_p - log_q)))
    ratio = torch.where(q == 0, 0.0, log_q - log_p)
    far = torch.where(rest_q == 0, 0.0, log_rest_q - rest_entropy[..., None] - outside_logprob)
    reverse = tree_sum(torch.where(q == 0, 0.0, q * ratio)) + rest_q * far
    mass = tree_sum(p)
    to_picked = (1 - share) * (q * mass - p) + share * q * (ratio - reverse)
    to_rest = (1 - share) * rest_q * mass + share * rest_q * (far - reverse)
    # A teacher who excludes what the student allows: NaN, never a silent 0.
    broken = ~torch.isfinite(reverse) & (share > 0)
    to_picked, to_rest = (torch.where(broken, torch.nan, x) for x in (to_picked, to_rest))
    parts = [x * y for x, y in ((1 - share, forward), (share, reverse)) if x > 0]
    value = torch.stack(parts).sum(0)
    return value[..., 0].clone(), to_picked, to_rest[..., 0].clone(), (-share * rest_q)[..., 0].clone()


def _values(call: tuple[float, float], *tensors: Any) -> tuple[Tensor, ...]:
    *of_rows, valid = tensors
    found = outside(*of_rows, *call)
    if valid is None:
        return found
    return tuple(torch.where(valid[..., None] if x.dim() > valid.dim() else valid, x, 0.0) for x in found)


def _pull(call: tuple[float, float], needs: Any, incoming: Any, tensors: Any, kept: Any) -> Any:
    scale = incoming[0].to(kept[0].dtype)
    return scale[..., None] * kept[0], scale * kept[1], scale * kept[2], None, None


# From a row's split (`complement.split`), the teacher and which rows count to the divergence `[*]`.
_STEP = transforms.Step(_values, _pull, saves_inputs=False)


def values(call: tuple[float, float], *tensors: Tensor | None) -> Tensor:
    """The divergence `[*]`, for the outside log-probability and the reverse KL's share."""
    found: Tensor = transforms.apply(_STEP, call, *tensors)[0]
    return found

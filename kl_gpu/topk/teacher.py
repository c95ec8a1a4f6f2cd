"""What `topk_div` has to know of a teacher, from the teacher's logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import validation
from ..arguments.options import Options
from ..arguments.reduction import LogitsWindow, last_contiguous
from ..backends import registry
from ..ops import complement as ops
from . import formulas


class TopkLogprobs(NamedTuple):
    """A teacher's K most likely tokens, row by row, as :func:`kl_gpu.topk_div` takes them.

    Attributes:
        logprobs: `[N, K]`, log-probabilities under the full softmax, the largest first.
        ids: int64 `[N, K]`, the columns they belong to.
        tail_logprob: `[N]`, the log of the summed probability of all other columns.

    Example:
        >>> import torch, kl_gpu
        >>> logprobs, ids, rest = kl_gpu.topk_logprobs(torch.tensor([[0.6, 0.1, 0.3]]).log(), 2)
        >>> ids.tolist()
        [[0, 2]]
    """

    logprobs: Tensor
    ids: Tensor
    tail_logprob: Tensor


def topk_logprobs(
    logits: Tensor,
    k: int,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> TopkLogprobs:
    """The K largest log-probabilities of each row, their columns, and the log of what all others have.

    With p = softmax(logits / T), log p_i is computed as −log(1 + Σ p_j/p_i) over j ≠ i, and the tail is the
    log of the *sum* of the other probabilities. Neither is a difference, so both are accurate to 5e-6 of
    themselves however peaked the row is, where 1 − Σ p of rounded numbers is noise or negative. There is no
    gradient: logits that require one are fine, and the result is detached. Costs `torch.topk` and one read of
    the logits; beside what `torch.topk` takes, the extra memory is O(N·K).

    Args:
        logits: `[N, V]`, where N is any leading shape; float16, bfloat16, float32 or float64. Any view whose
            last dimension is contiguous is read without a copy.
        k: How many, within [1, V].
        temperature: Divides the logits: a float, or `[N]` with one per row, as in
            :func:`kl_gpu.token_logprobs`. `topk_div` expects log-probabilities at temperature 1.
        mask: bool, or integers 0 and 1, `[N]`. True or 1 counts. A row that does not count becomes a teacher
            of whom nothing is known: logprobs 0, ids −1 (absent) and tail_logprob 0, whatever its logits
            hold.
        vocab_size: The softmax is over the first `vocab_size` columns.
        backend: One of `kl_gpu.BACKENDS`, or None for the fastest on this device.

    Returns:
        TopkLogprobs: logprobs and tail_logprob in float32 (float64 for float64 logits), ids in int64, in the
        order and with the ties of `torch.topk`. A column at −inf has log p = −inf, and so has a tail without
        mass (K = V). A row with NaN, with +inf or with nothing but −inf is NaN, and its ids mean nothing.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, range or name is wrong; the message names the argument.

    Example:
        >>> import torch, kl_gpu
        >>> logprobs, ids, rest = kl_gpu.topk_logprobs(torch.tensor([[0.6, 0.1, 0.3]]).log(), 2)
        >>> [round(x, 4) for x in logprobs[0].exp().tolist()], round(rest.exp().item(), 4)
        ([0.6, 0.3], 0.1)
    """
    options = Options(temperature=temperature, mask=mask, vocab_size=vocab_size, backend=backend)
    validation.temperature("temperature", temperature)
    if validation.is_shared(logits):
        # Not to_local(): the best of one rank's columns are not the best of all.
        raise TypeError("logits must be a plain tensor, got a DTensor: give its full_tensor()")
    columns = validation.one_sided_logits("logits", logits, vocab_size, shift=False)
    validation.count("k", k, columns)
    valid = options.reduction_of(logits).computed
    chosen = registry.resolve(backend, logits.device)

    x = LogitsWindow(columns, shift=False).of(last_contiguous(logits.detach()))
    scale, _, scales = options.scales(logits, valid)
    ids = x.topk(k, -1).indices
    picked = ops.picked_logits(x, ids, valid, False, "ids") * (scale if scales is None else scales)
    rest_lse, *_ = ops.complement(x, ids, valid, scale, False, chosen, scales)
    logprobs, tail_logprob = formulas.best(picked, rest_lse)
    if valid is not None:
        each = valid[..., None]
        logprobs, ids = torch.where(each, logprobs, 0.0), torch.where(each, ids, -1)
        tail_logprob = torch.where(valid, tail_logprob, 0.0)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return TopkLogprobs(logprobs.to(dtype), ids, tail_logprob.to(dtype))

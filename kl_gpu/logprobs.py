"""Log-probabilities of given tokens, and the entropy, straight from logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import transforms
from .arguments import validation
from .arguments.options import Options
from .arguments.params import ComplementParams
from .backends import registry
from .columns import support_ids
from .complement import Rows, logits_rows
from .inference_tensors import ordinary_rows
from .topk import kept
from .topk.tokens import ONE, SEVERAL, Places


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    vocab_size: int | None = None,
    inplace: bool = False,
    backend: str | None = None,
    support: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of given tokens under softmax(logits / T), in nats, and optionally the entropy.

    One read of the logits; the gradient takes one more read and its own write. Nothing else of size `[N, V]`
    exists. log q is computed as −log(1 + Σ q_j/q over the other tokens), so it is accurate to 5e-6 of itself
    also near 0, where subtracting a log-normaliser returns noise.

    Args:
        logits: `[N, V]`, where N is any leading shape; float16, bfloat16, float32 or float64. Any view whose
            last dimension is contiguous is read without a copy.
        token_ids: int `[N]`, or `[N, K]` for K tokens of each row, within [0, V). On the CPU another id
            raises; on a GPU, where looking would wait for the device, its log-probability is NaN. Of K ids,
            one may occur more than once, and −1 or `ignore_index` marks an absent entry, which is 0.
        temperature: Divides the logits: a float within [1e-6, 1e9], or `[N]` with one per row, as in
            :func:`kl_gpu.divergence`.
        entropy: Also return the entropy of each row.
        mask: bool, or integers 0 and 1, `[N]`. True or 1 counts. A row that does not count is 0, with
            gradient 0, whatever its logits hold.
        ignore_index: Rows with this id do not count either; of K ids, only the entry.
        shift: Pair logits at t with entry t + 1 of token_ids and mask. Needs `[batch, time, V]` and returns
            `[batch, time − 1]`.
        vocab_size: The softmax is over the first `vocab_size` columns.
        inplace: Permit writing the gradient over the memory of `logits` in backward.
        backend: One of `kl_gpu.BACKENDS`, or None for the fastest on this device.
        support: The columns that the softmax runs over, as in :func:`kl_gpu.divergence`. A token outside has
            log-probability −inf and no gradient. Nothing else is read of a row.

    Returns:
        In the shape of `token_ids`, float32 (float64 for float64 logits), differentiable. With `entropy`, a
        pair of this and the entropies `[N]`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, range or name is wrong; the message names the argument.
        RuntimeError: From backward, when a second derivative is asked for, or when logits were modified since
            the call.

    Example:
        >>> import torch, kl_gpu
        >>> logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
        >>> logprob, entropy = kl_gpu.token_logprobs(logits, torch.tensor([0]), entropy=True)
        >>> print(f"{logprob.exp().item():.4f} {entropy.item():.4f}")
        0.7000 0.8018
    """
    validation.of_one_rank("token_logprobs", logits)
    rows = logits_rows("logits", logits, vocab_size, shift)
    options = Options(
        temperature=temperature, mask=mask, labels=token_ids, ignore_index=ignore_index, shift=shift,
        inplace=inplace, backend=backend, support=support,
    )  # fmt: skip
    return run_token_logprobs(rows, options, entropy)


def run_token_logprobs(rows: Rows, options: Options, entropy: bool) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` of rows that are checked, whatever they are made of; the tokens are the labels."""
    ids: Any = options.labels
    validation.booleans(entropy=entropy, inplace=options.inplace)
    validation.temperature("temperature", options.temperature)
    several = validation.token_ids(rows.tensor, ids)
    of_rows = options._replace(labels=None) if several else options
    valid = of_rows.reduction_of(rows.tensor).computed
    scale, _, scales = options.scales(rows.tensor, valid, over=rows.factor)
    chosen = registry.resolve(options.backend, rows.tensor.device)
    inplace = options.overwrites(rows.argument, rows.tensor)

    ids = (ordinary_rows(ids)[:, 1:] if options.shift else ids).long()
    validate = rows.tensor.device.type == "cpu" and not several
    params = ComplementParams(scale, True, entropy, validate, "token_ids", chosen, rows.window, inplace)
    if options.support is not None:
        support = support_ids(options.support, rows.tensor.shape[:-1], rows.columns, None)
        support = support[:, :-1] if options.shift else support
        tokens = ids if several else ids[..., None]
        validation.tokens_are_columns(tokens, valid, rows.columns, -1 if several else 0)
        picked, _, _ = rows.split(
            rows.tensor, support, valid, scales, params._replace(sweeps=False, entropy=False, validate=False)
        )
        absent = (tokens == options.ignore_index) | (tokens == -1)
        logprob, spread = kept.logprobs(picked, support, tokens, valid)
        logprob = torch.where(absent, 0.0, logprob)
        logprob = logprob if several else logprob[..., 0]
    elif several:
        ids = torch.where(ids == options.ignore_index, -1, ids)
        validation.tokens_are_columns(ids, valid, rows.columns)
        places = Places.of(ids)
        parts = rows.split(rows.tensor, places.picked, valid, scales, params)
        logprob, spread = transforms.apply(SEVERAL, rows.columns, *parts, valid, *places)
    else:
        picked, *rest = rows.split(rows.tensor, ids[..., None], valid, scales, params)
        logprob, spread = transforms.apply(ONE, rows.columns, picked[..., 0], *rest, ids, valid)
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return (logprob.to(dtype), spread.to(dtype)) if entropy else logprob.to(dtype)

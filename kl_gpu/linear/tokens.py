"""Log-probabilities of given tokens, and the entropy, from hidden states and an LM head."""

from __future__ import annotations

from torch import Tensor

from ..arguments import validation
from ..arguments.options import Options
from ..logprobs import run_token_logprobs
from .rows import one_head


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    entropy: bool = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    chunk_rows: int | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    vocab_size: int | None = None,
    backend: str | None = None,
    support: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log q of one token per row, or of K, with `entropy` also −Σ q log q, from hidden states and an LM head.

    :func:`kl_gpu.token_logprobs` of the logits that :func:`kl_gpu.linear_div` describes, in nats; only
    `chunk_rows` rows of them exist at a time. Forward takes one product; backward takes it again, and one
    product for each of hidden states and weight that require a gradient, so a frozen head costs no `[V, H]`
    buffer.

    Rows that do not count cost nothing on the CPU; elsewhere they are computed with the others. A row's last
    bits may depend on the size of its chunk, so on N. A NaN in a row that counts reaches all of the weight's
    and the bias's gradient.

    Args:
        hidden: `[N, H]`, N any leading shape; float16, bfloat16, float32 or float64.
        weight: `[V, H]`, of the same dtype. Under autocast both are cast as `F.linear` would; a gradient has
            its input's dtype. The weight's is summed over chunks in float32 at least.
        token_ids: int `[N]` or `[N, K]`, within [0, V), as in :func:`kl_gpu.token_logprobs`.
        entropy: also return the entropy of each row.
        bias: `[V]`, of the weight's dtype.
        softcap: a float > 0; None or 0 for none.
        logit_scale: a float > 0; the temperature over it must be within [1e-6, 1e9].
        temperature, mask, ignore_index, backend: as in :func:`kl_gpu.token_logprobs`.
        chunk_rows: as in :func:`kl_gpu.linear_div`.
        shift: hidden states at t go with entry t+1 of token_ids and mask; needs `[batch, time, H]` and gives
            `[batch, time − 1]`.
        vocab_size: rows of the weight at and past it are ignored.
        support: as in :func:`kl_gpu.token_logprobs`; all columns' products are taken nevertheless.

    Returns:
        In the shape of `token_ids`, float32 (float64 where the logits are), differentiable in hidden states,
        weight and bias; with `entropy` a pair of that and the entropies `[N]`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, range or name is wrong; the message names the argument.
        RuntimeError: from backward, when a second derivative is asked for, or when a tensor was modified
            since the call.
    """
    validation.of_one_rank("linear_token_logprobs", hidden, weight)
    rows = one_head(
        "", hidden, weight, bias, softcap=softcap, logit_scale=logit_scale, temperature=temperature,
        chunk_rows=chunk_rows, vocab_size=vocab_size, shift=shift,
    )  # fmt: skip
    options = Options(
        temperature=temperature, mask=mask, labels=token_ids, ignore_index=ignore_index, shift=shift,
        backend=backend, support=support,
    )  # fmt: skip
    return run_token_logprobs(rows, options, entropy)

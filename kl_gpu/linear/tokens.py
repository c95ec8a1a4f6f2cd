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
    """Log-probabilities of given tokens, and optionally the entropy, from hidden states and an LM head.

    :func:`kl_gpu.token_logprobs` of the logits that :func:`kl_gpu.linear_div` describes, in nats. Only
    `chunk_rows` rows of them exist at a time. Forward takes one matrix product; backward takes it again, and
    one product for each of hidden states and weight that require a gradient, so a frozen head costs no `[V,
    H]` buffer.

    Rows that do not count cost nothing on the CPU; on a GPU they are computed with the others. A row's last
    bits may depend on the size of its chunk, and so on N. A NaN in a row that counts reaches all of the
    weight's and the bias's gradient.

    Args:
        hidden: `[N, H]`, where N is any leading shape; float16, bfloat16, float32 or float64.
        weight: `[V, H]`, of the same dtype. Under autocast both are cast as `F.linear` would; a gradient has
            its input's dtype. The weight's gradient is summed over chunks in float32 at least.
        token_ids: int `[N]` or `[N, K]`, within [0, V), as in :func:`kl_gpu.token_logprobs`.
        entropy: Also return the entropy of each row.
        bias: `[V]`, of the weight's dtype.
        softcap: A float > 0; None or 0 for none.
        logit_scale: A float > 0. The temperature over it must be within [1e-6, 1e9].
        temperature, mask, ignore_index, backend: As in :func:`kl_gpu.token_logprobs`.
        chunk_rows: As in :func:`kl_gpu.linear_div`.
        shift: Hidden states at t go with entry t + 1 of token_ids and mask. Needs `[batch, time, H]` and
            returns `[batch, time − 1]`.
        vocab_size: The softmax is over the first `vocab_size` rows of the weight.
        support: As in :func:`kl_gpu.token_logprobs`; the products of all columns are taken nevertheless.

    Returns:
        In the shape of `token_ids`, float32 (float64 where the logits are float64), differentiable in hidden
        states, weight and bias. With `entropy`, a pair of this and the entropies `[N]`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, range or name is wrong; the message names the argument.
        RuntimeError: From backward, when a second derivative is asked for, or when a tensor was modified
            since the call.

    Example:
        >>> import torch, kl_gpu
        >>> hidden, head = torch.randn(2, 8, 16), torch.randn(100, 16, requires_grad=True)
        >>> tokens = torch.randint(100, (2, 8))
        >>> logprobs = kl_gpu.linear_token_logprobs(hidden, head, tokens, shift=True)
        >>> logprobs.shape
        torch.Size([2, 7])
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

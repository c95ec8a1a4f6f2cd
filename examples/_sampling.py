"""Text from a model, a batch at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def complete(model: Any, prompts: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`prompts`, [batch, time], each with `count` tokens more, [batch, time + count].

    Drawn from the model's own distribution, at temperature 1 and with no token ruled out: the estimators of
    the KL are unbiased over just those. Every completion has the same length, because the model has seen no
    document end.
    """
    ids, new, cache = prompts, prompts, None
    for _ in range(count):
        output = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        new = _drawn(output.logits[:, -1], generator)
        ids = torch.cat([ids, new], 1)
    return ids


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token of each row, [batch, 1], by one uniform number; multinomial draws one for each column."""
    sums = logits.softmax(-1).cumsum(-1)
    where = torch.rand(len(logits), 1, generator=generator) * sums[:, -1:]
    return torch.searchsorted(sums, where)

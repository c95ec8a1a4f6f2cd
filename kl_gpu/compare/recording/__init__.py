"""What a model says of a text, on disk: hidden states with the LM head, logits, or the best tokens.

    manifest.json           what is in the folder, and what it follows from
    windows.safetensors     ids int64 [windows, ctx]
    head.safetensors        weight [V, H] and bias [V] (of hidden states alone)
    tokenizer/              the model's, where it has one
    shard-000000.safetensors, …

A shard holds some windows, one after the other, with an entry for each scored prediction: position j of a
window predicts token j + 1, and positions first to ctx − 2 are scored. By form:

    hidden   hidden [windows, rows, H], in the model's dtype: exact
    logits   logits [windows, rows, V], normalizer [windows, rows] float32, the log-sum-exp before rounding
    topk     logprobs [windows, rows, K] float32, ids int32, tail_logprob and label_logprob [windows, rows]

A shard's header names its recording and its place in it.
"""

from .read import Recording
from .write import FORMS, record

__all__ = ["FORMS", "Recording", "record"]

"""Tiny Llama models, a tokenizer and a few sentences."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
transformers = pytest.importorskip("transformers", reason="of the extra integrations")

WORDS = (
    *("the", "a", "small", "large", "old", "new", "model", "token", "loss", "teacher", "student"),
    *("learns", "writes", "reads", "says", "and", "or", "not", "from", "to"),
)
VOCAB = 320


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    found.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return made


@pytest.fixture(scope="session")
def llama() -> Callable[..., Any]:
    """A model by its seed; `config` overrides."""

    def made(seed: int, **config: Any) -> Any:
        torch.manual_seed(seed)
        small = {
            "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        } | config  # fmt: skip
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))

    return made


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (12, 8), generator=generator)
    return [" ".join(WORDS[i] for i in row) for row in picks.tolist()]

"""Small Llama models with a tokenizer, on disk as people have them, and a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("gguf", reason="of the extra compare")

WORDS = 300


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(json.__doc__ * 6, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Path]:
    """The folders of a base, of the same with noise in its weights, and of one with another tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def tokenizer(size: int) -> transformers.PreTrainedTokenizerFast:
        found = Tokenizer(models.BPE())
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        found.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        found.train_from_iterator([text.read_text()], trainer)
        return transformers.PreTrainedTokenizerFast(tokenizer_object=found)

    torch.manual_seed(0)
    folder, same = tmp_path_factory.mktemp("models"), tokenizer(WORDS)
    config = transformers.LlamaConfig(
        vocab_size=len(same), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.2,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    found = {}
    for name, noise in (("base", 0.0), ("near", 1e-3), ("far", 0.1), ("other", 0.0)):
        model = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            for into, of in zip(model.parameters(), base.parameters(), strict=True):
                into.copy_(of + noise * torch.randn_like(of))
        found[name] = folder / name
        model.save_pretrained(found[name])
        (tokenizer(WORDS - 10) if name == "other" else same).save_pretrained(found[name])
    return found

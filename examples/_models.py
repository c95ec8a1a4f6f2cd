"""The teacher and the student: small Llamas made here, or models from a hub or a folder."""

from __future__ import annotations

from typing import Any

import huggingface_hub
import torch
import transformers
from _settings import BadInput, Size
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

huggingface_hub.logging.set_verbosity_error()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def small_llama(size: Size, vocabulary: int, positions: int, seed: int) -> Any:
    """With random weights. Its head is not tied to its embeddings: at this size that learns faster."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=size.hidden,
            intermediate_size=3 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.hidden // 32,
            num_key_value_heads=size.hidden // 32,
            max_position_embeddings=positions,
            tie_word_embeddings=False,
        )
    )


def pretrained(option: str, name: str, sequence: int) -> Any:
    model = _load(AutoModelForCausalLM, "a causal language model", option, name)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions < sequence:
        raise BadInput(f"--sequence: {name} has {positions} positions, got {sequence}")
    return model


def pretrained_tokeniser(option: str, name: str) -> Any:
    return _load(AutoTokenizer, "a tokeniser", option, name)


def _load(kind: Any, what: str, option: str, name: str) -> Any:
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise BadInput(f"{option}: cannot load {what} from {name!r}: {reason}") from error


def columns(model: Any) -> int:
    """V of the model's logits, which padding may make larger than its tokeniser."""
    return int(model.get_output_embeddings().weight.shape[0])


def check_same_tokens(teacher: Any, student: Any, sample: str) -> None:
    """A KL compares column with column, so a column must be the same token on both sides."""
    theirs = student.get_vocab()
    moved = [token for token, column in teacher.get_vocab().items() if theirs.get(token, column) != column]
    if moved:
        raise BadInput(f"the tokenisers of --teacher and --student differ: {moved[0]!r} has different ids")
    if teacher(sample)["input_ids"] != student(sample)["input_ids"]:
        raise BadInput("the tokenisers of --teacher and --student differ: they cut the same text differently")

"""What can be compared: a model that runs, or what one left in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ComparisonError
from .scores import scored
from .windows import Windows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Rows whose logits are compared at once; and how many numbers of a weight tell it from another.
BLOCK, _SAMPLED = 512, 1024
# What a side's file may be called, which is no part of its name.
SUFFIXES = (".kld", ".safetensors", ".gguf", ".parquet", ".jsonl")


class Side:
    """One of the two that are compared.

    Attributes:
        name: what the report calls it.
        vocab_size: columns of its logits.
        tokenizer: a hash of its vocabulary, or None where it has none.
        windows: the tokens it was recorded on, or None where it takes any.
        nbytes: of its weights, or None.
        encoder: its tokenizer, or None.
        note: what a reader of the report must know of its figures, or None.
    """

    name: str
    vocab_size: int | None
    note: str | None = None
    tokenizer: str | None = None
    windows: Windows | None = None
    nbytes: int | None = None
    encoder: Any = None

    def logits(self, windows: Windows, which: Sequence[int]) -> Tensor:
        """Of the scored rows of some windows, `[len(which), rows, V]`."""
        raise NotImplementedError

    def blocks(self, windows: Windows, which: Sequence[int]) -> Iterator[Tensor]:
        """The same rows, `[n, V]`, a block at a time."""
        yield from self.logits(windows, which).flatten(0, 1).split(BLOCK)

    def scores(
        self, model: Side, windows: Windows, which: Sequence[int], columns: int
    ) -> Iterator[dict[str, Tensor]]:
        """What is kept of each scored row of some windows, a block of rows at a time, with this as the base.

        Args:
            model: what is compared with it.
            columns: those at and past it are ignored on both sides.
        """
        labels = windows.labels[list(which)].reshape(-1).split(BLOCK)
        blocks = self.blocks(windows, which), model.blocks(windows, which)
        for p, q, some in zip(*blocks, labels, strict=True):
            yield scored(p[:, :columns], q[:, :columns], some)


class Partial(Side):
    """A base whose distributions are known in part: another side's cannot be compared with it."""

    def logits(self, windows: Windows, which: Sequence[int]) -> Tensor:
        raise ComparisonError(f"{self.name} knows a part of the vocabulary only: name it first, as the base")


class Model(Side):
    """A causal language model of transformers, on its device.

    Args:
        name: what the report calls it.
        model: called with ids `[windows, ctx]`, answers with `logits`.
        tokenizer: a tokenizer of transformers; without one texts cannot be read, and of two vocabularies only
            the sizes are compared.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any = None) -> None:
        self.name, self.model, self.encoder = name, model.eval(), tokenizer
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.tokenizer = None if tokenizer is None else _fingerprint(tokenizer)
        self.nbytes = sum(x.numel() * x.element_size() for x in model.parameters())
        self.bos = _leading_token(tokenizer)

    vocab_size: int

    @property
    def fingerprint(self) -> str:
        """A hash of its configuration and of a sample of every weight."""
        config = {k: v for k, v in self.model.config.to_dict().items() if not k.startswith("_")}
        found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, x in sorted(self.model.named_parameters()):
            flat = x.detach().flatten()
            some = flat[:: max(1, len(flat) // _SAMPLED)].cpu()
            found.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
            found.update(some.contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]

    def states(self, windows: Windows, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What the LM head reads, `[len(which), rows, H]`, and the logits, of the scored rows."""
        read: list[Tensor] = []
        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, x: read.append(x[0]))
        try:
            logits = self.logits(windows, which)
        finally:
            hook.remove()
        rows = windows.rows
        return read[-1][:, -rows - 1 : -1], logits

    @torch.inference_mode()
    def logits(self, windows: Windows, which: Sequence[int]) -> Tensor:
        ids = windows.ids[list(which)]
        if self.bos is not None:
            # As llama.cpp does: the text's own first token gives way.
            ids[:, 0] = self.bos
        keep = ids.shape[1] - windows.first
        found = self.model(input_ids=ids.to(self.model.device), logits_to_keep=keep, use_cache=False).logits
        return found[:, -keep:-1]

    def encode(self, text: str) -> list[int]:
        if self.encoder is None:
            raise ComparisonError(f"{self.name}: has no tokenizer, so a text cannot be read with it")
        return list(self.encoder(text, add_special_tokens=False, verbose=False)["input_ids"])


def open_side(spec: str, dtype: str = "float32", device: str | None = None) -> Side:
    """The side that a command line names.

    Args:
        spec: a recording's folder, a .kld file of llama.cpp, a .safetensors file of logits, a .parquet or
            .jsonl file of top-k log-probabilities, a .gguf file, or what transformers takes, a folder or a
            name. `NAME=spec` gives it a name for the report.
        dtype: of a model's weights, "float32", "bfloat16" or "float16".
        device: where a model runs; None is the GPU where there is one.

    Raises:
        ComparisonError: it cannot be opened; the message says why.
    """
    from . import recorded

    name, where = named(spec)
    path = Path(where)
    side = recorded.opened(path, device or _device()) or _from_transformers(path, where, dtype, device)
    side.name = name
    return side


def named(spec: str) -> tuple[str, str]:
    """The name that a command line gives a side, else its file's or folder's, and where it is."""
    name, _, where = spec.rpartition("=") if "=" in spec and not Path(spec).exists() else ("", "", spec)
    path = Path(where)
    return name or (path.stem if path.suffix in SUFFIXES else path.name), where


def _from_transformers(path: Path, where: str, dtype: str, device: str | None) -> Model:
    if dtype not in DTYPES:
        raise ComparisonError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ComparisonError("running a model needs transformers; pip install 'kl_gpu[compare]'") from None
    # Names on a hub have one slash at most, and begin with neither.
    if where.startswith(("/", ".")) and not path.exists():
        raise ComparisonError(f"{path}: no such file or folder")
    options: dict[str, Any] = {}
    if path.suffix == ".gguf":
        where, options = str(path.parent), {"gguf_file": path.name}
    try:
        # A GGUF file's weights are dequantised to the dtype.
        model = AutoModelForCausalLM.from_pretrained(where, dtype=DTYPES[dtype], **options)
    except Exception as error:  # what transformers raises for a folder that is no model has no common class
        raise ComparisonError(f"{path if options else where}: {_first_line(error)}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    except Exception:  # nor for a model without a tokenizer
        tokenizer = None
    return Model(path.stem if options else path.name, model.to(device or _device()), tokenizer)  # type: ignore[arg-type]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _fingerprint(tokenizer: Any) -> str:
    """A hash of the tokens and their ids."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    return hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]


def _leading_token(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts in front of every text, if it does."""
    if tokenizer is None or tokenizer.bos_token_id is None:
        return None
    first = tokenizer("a")["input_ids"][:1]
    return int(tokenizer.bos_token_id) if first == [tokenizer.bos_token_id] else None

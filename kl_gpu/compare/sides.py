"""What can be compared: a model that runs, or what one left in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ComparisonError
from .kld import KldFile
from .windows import Windows

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Side:
    """One of the two that are compared.

    Attributes:
        name: what the report calls it.
        vocab_size: columns of its logits.
        tokenizer: a hash of its vocabulary, or None where it has none.
        windows: the tokens it was recorded on, or None where it takes any.
        nbytes: of its weights, or None.
        floor: None where its logits are whole; else it has log-probabilities, and those ≤ −floor are unknown.
    """

    name: str
    vocab_size: int
    tokenizer: str | None = None
    windows: Windows | None = None
    nbytes: int | None = None
    floor: float | None = None

    def logits(self, windows: Windows, which: Sequence[int]) -> Tensor:
        """Of the scored rows of some windows, `[len(which), rows, V]`."""
        raise NotImplementedError


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


class Recorded(Side):
    """Logits in a safetensors file: `ids` int `[windows, ctx]`, and `logits` `[windows, rows, V]` of the last
    predictions of each window."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.name, self.path = path.stem, path
        try:
            self.file = safe_open(path, "pt")
            missing = {"ids", "logits"} - set(self.file.keys())
            if missing:
                raise ComparisonError(f"{path}: no tensor named {' or '.join(sorted(missing))}")
            ids = self.file.get_tensor("ids").to(torch.int64)
            count, rows, self.vocab_size = self.file.get_slice("logits").get_shape()
        except (OSError, SafetensorError, ValueError) as error:
            raise (
                error if isinstance(error, ComparisonError) else ComparisonError(f"{path}: {error}")
            ) from None
        if ids.dim() != 2 or count != len(ids) or not 1 <= rows < ids.shape[1]:
            raise ComparisonError(
                f"{path}: ids {list(ids.shape)} do not go with logits [{count}, {rows}, ...]"
            )
        self.windows = Windows(ids, ids.shape[1] - 1 - rows)

    def logits(self, windows: Windows, which: Sequence[int]) -> Tensor:
        return torch.stack([self.file.get_slice("logits")[i] for i in which])


class LlamaCpp(Side):
    """A `.kld` file of llama.cpp."""

    def __init__(self, path: Path) -> None:
        self.file = KldFile(path)
        self.name, self.windows = path.stem, self.file.windows
        self.vocab_size, self.floor = self.file.vocab_size, self.file.floor

    def logits(self, windows: Windows, which: Sequence[int]) -> Tensor:
        return torch.stack([self.file.logprobs(i) for i in which])


def open_side(spec: str, dtype: str = "float32", device: str | None = None) -> Side:
    """The side that a command line names.

    Args:
        spec: a .kld file of llama.cpp, a .safetensors file of logits, a .gguf file, or what transformers
            takes, a folder or a name. `NAME=spec` gives it a name for the report.
        dtype: of a model's weights, "float32", "bfloat16" or "float16".
        device: where a model runs; None is the GPU where there is one.

    Raises:
        ComparisonError: it cannot be opened; the message says why.
    """
    name, where = named(spec)
    path = Path(where)
    side: Side
    if path.suffix in (".kld", ".safetensors") or (path.is_file() and path.suffix != ".gguf"):
        if path.suffix == ".safetensors":
            if not path.is_file():
                raise ComparisonError(f"{path}: no such file")
            side = Recorded(path)
        else:
            side = LlamaCpp(path)
    else:
        side = _from_transformers(path, where, dtype, device)
    side.name = name
    return side


def named(spec: str) -> tuple[str, str]:
    """The name that a command line gives a side, else its file's or folder's, and where it is."""
    name, _, where = spec.rpartition("=") if "=" in spec and not Path(spec).exists() else ("", "", spec)
    path = Path(where)
    return name or (path.stem if path.suffix in (".kld", ".safetensors", ".gguf") else path.name), where


def _from_transformers(path: Path, where: str, dtype: str, device: str | None) -> Model:
    if dtype not in _DTYPES:
        raise ComparisonError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
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
        model = AutoModelForCausalLM.from_pretrained(where, dtype=_DTYPES[dtype], **options)
    except Exception as error:  # what transformers raises for a folder that is no model has no common class
        raise ComparisonError(f"{path if options else where}: {_first_line(error)}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    except Exception:  # nor for a model without a tokenizer
        tokenizer = None
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Model(path.stem if options else path.name, model.to(chosen), tokenizer)  # type: ignore[arg-type]


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

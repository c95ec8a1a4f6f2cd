"""Sides that were left on disk: recordings, logits, a `.kld` file of llama.cpp, top-k log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import others
from .errors import ComparisonError
from .kld import KldFile
from .recording import Recording
from .recording.layout import MANIFEST, TOKENIZER
from .scores import TopK, scored_from_floor, scored_from_topk
from .sides import BLOCK, Partial, Side
from .windows import Windows


def opened(path: Path, device: str = "cpu") -> Side | None:
    """The side that a path names, or None where it is none of these.

    Args:
        device: where a recording's logits are made and compared.

    Raises:
        ComparisonError: it is one of these and cannot be read; the message says why.
    """
    if (path / MANIFEST).is_file():
        recording = Recording(path)
        return RecordedTopK(recording) if recording.form == "topk" else RecordedModel(recording, device)
    kinds: dict[str, Callable[[Path], Side]] = {
        ".kld": LlamaCpp, ".safetensors": Logits, ".parquet": OthersTopK, ".jsonl": OthersTopK,
    }  # fmt: skip
    if path.suffix in kinds and not path.is_file():
        raise ComparisonError(f"{path}: no such file")
    if path.suffix in kinds:
        return kinds[path.suffix](path)
    return LlamaCpp(path) if path.is_file() and path.suffix != ".gguf" else None


class Logits(Side):
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
        return torch.stack([self.file.get_slice("logits")[i] for i in which])[:, -windows.rows :]


class LlamaCpp(Partial):
    """A `.kld` file of llama.cpp."""

    def __init__(self, path: Path) -> None:
        self.file = KldFile(path)
        self.name, self.windows = path.stem, self.file.windows
        self.vocab_size = self.file.vocab_size
        self.note = (
            f"{path.name} holds probabilities above e^-{self.file.floor:g} in 16 bits. KLD is llama.cpp's "
            "sum over those, not renormalised; figures that need the others are unknown."
        )

    def scores(
        self, model: Side, windows: Windows, which: Sequence[int], columns: int
    ) -> Iterator[dict[str, Tensor]]:
        base = torch.cat([self.file.logprobs(i)[-windows.rows :] for i in which]).split(BLOCK)
        labels = windows.labels[list(which)].reshape(-1).split(BLOCK)
        for p, q, some in zip(base, model.blocks(windows, which), labels, strict=True):
            yield scored_from_floor(p[:, :columns], self.file.floor, q[:, :columns], some)


def _describe(side: Side, recording: Recording) -> None:
    """What a side's attributes are, of a recording's model."""
    about = recording.manifest
    side.name, side.windows = str(about["model"]), recording.windows
    side.vocab_size, side.nbytes, side.tokenizer = (
        about["vocab_size"],
        about["model_bytes"],
        about["tokenizer"],
    )
    folder = recording.folder / TOKENIZER
    if folder.is_dir():
        try:
            from transformers import AutoTokenizer

            side.encoder = AutoTokenizer.from_pretrained(folder)
        except Exception:  # it is for the text view only, and what this raises has no common class
            side.encoder = None


class RecordedModel(Side):
    """A recording of hidden states or of logits."""

    def __init__(self, recording: Recording, device: str) -> None:
        self.recording, self.device = recording, device
        self.head = recording.head.to(torch.device(device)) if recording.form == "hidden" else None
        _describe(self, recording)
        if recording.form == "logits":
            dtype = recording.manifest["dtype"]
            self.note = f"{self.name} was recorded as logits in {dtype}; the figures are of those."

    def _rows(self, windows: Windows, which: Sequence[int], name: str) -> Tensor:
        rows = torch.stack([self.recording.recorded(i)[name][-windows.rows :] for i in which])
        return rows.to(self.device)

    def logits(self, windows: Windows, which: Sequence[int]) -> Tensor:
        return torch.cat(list(self.blocks(windows, which))).unflatten(0, (len(which), -1))

    def blocks(self, windows: Windows, which: Sequence[int]) -> Iterator[Tensor]:
        """Of hidden states no more than a block's logits exist at a time."""
        if self.head is None:
            yield from self._rows(windows, which, "logits").flatten(0, 1).split(BLOCK)
            return
        for hidden in self._rows(windows, which, "hidden").flatten(0, 1).split(BLOCK):
            yield self.head.logits(hidden)


class KnownByTopK(Partial):
    """A base known by some tokens of each row."""

    def entries(self, windows: Windows, which: Sequence[int]) -> TopK:
        """Of the scored rows of some windows."""
        raise NotImplementedError

    def scores(
        self, model: Side, windows: Windows, which: Sequence[int], columns: int
    ) -> Iterator[dict[str, Tensor]]:
        labels, entries = windows.labels[list(which)].reshape(-1).split(BLOCK), self.entries(windows, which)
        if int(entries.ids.max()) >= columns:
            raise ComparisonError(
                f"{self.name} names token {int(entries.ids.max())}, past the {columns} columns compared"
            )
        for i, q in enumerate(model.blocks(windows, which)):
            block = slice(i * BLOCK, i * BLOCK + len(q))
            some = TopK._make(None if x is None else x[block] for x in entries)
            yield scored_from_topk(some, q[:, :columns], labels[i])


class RecordedTopK(KnownByTopK):
    """A recording of the likeliest tokens."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        _describe(self, recording)
        self.note = (
            f"{self.name} was recorded by its {recording.manifest['k']} likeliest tokens, all others in one. "
            "KLD and the other divergences are of these outcomes, never more than of the whole vocabulary."
        )

    def entries(self, windows: Windows, which: Sequence[int]) -> TopK:
        kept = [self.recording.recorded(i) for i in which]
        names = "logprobs", "ids", "tail_logprob", "label_logprob"
        return TopK(*[torch.cat([x[name][-windows.rows :] for x in kept]) for name in names])


class OthersTopK(KnownByTopK):
    """Log-probabilities that axolotl or vLLM left; `others` says how they are read."""

    # Nobody wrote it down; the model's own, then.
    vocab_size = None

    def __init__(self, path: Path) -> None:
        self.name, (self.windows, self._entries, dialect) = path.stem, others.read(path)
        known = self._entries.ids.shape[-1]
        self.note = (
            f"{path.name} was read as {dialect}: the base is known by {known} tokens of a row and what these "
            "leave of 1. KLD is that of these outcomes, not of the whole vocabulary."
        )

    def entries(self, windows: Windows, which: Sequence[int]) -> TopK:
        # A row for every position that predicts one, from the first on.
        rows = [self._entries.of(i, windows.first) for i in which]
        return TopK(torch.cat([x.logprobs for x in rows]), torch.cat([x.ids for x in rows]), None, None)

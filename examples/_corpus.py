"""Text, its tokeniser, and the windows of tokens that a causal language model trains on."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _settings import BadInput
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

# The label of a position that counts in no loss: the default of PyTorch, transformers and kl_gpu.
IGNORED = -100

_SUFFIXES = (".py", ".md", ".txt")
# Beside the library itself, its folder may hold what was installed since and tests that not everyone has.
_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_VOCABULARY = 32_000
_TOKENISER_CHARACTERS = 8_000_000  # enough text for 32 000 merges, and a second of training
_HELD_OUT_EVERY = 10
_START = "<|endoftext|>"  # between documents, so at the start of each


@dataclass(frozen=True)
class Text:
    """Documents, split by file so that no held-out line has a training line beside it."""

    source: str
    training: list[str]
    held_out: list[str]


@dataclass(frozen=True)
class Windows:
    """Rows of consecutive tokens of one document, [count, sequence].

    A label is `IGNORED` where there is nothing to predict: at a document's start token and in the padding
    behind its end.
    """

    ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def predicted(self) -> int:
        """The tokens a model is asked for: none for a row's first, which has nothing before it."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def first(self, count: int) -> Windows:
        return Windows(self.ids[:count], self.labels[:count])

    def spread(self, count: int) -> Windows:
        """At most `count` windows, evenly spaced, so that all the documents have their say."""
        chosen = torch.linspace(0, len(self) - 1, min(count, len(self))).round().long()
        return Windows(self.ids[chosen], self.labels[chosen])

    def to(self, device: torch.device | str) -> Windows:
        return Windows(self.ids.to(device), self.labels.to(device))

    def batches(self, size: int) -> Iterator[Windows]:
        for ids, labels in zip(self.ids.split(size), self.labels.split(size), strict=True):
            yield Windows(ids, labels)

    def shuffled(self, size: int, steps: int, seed: int) -> Iterator[Windows]:
        """`steps` batches, a new shuffle each time round; the same ones for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            while len(order) < size:
                order = torch.cat([order, torch.randperm(len(self), generator=generator)])
            chosen, order = order[:size], order[size:]
            yield Windows(self.ids[chosen], self.labels[chosen])


def read(path: Path | None) -> Text:
    """The text under `path`, or the sources of Python's own standard library."""
    root = path or Path(sysconfig.get_path("stdlib"))
    if not root.exists():
        raise BadInput(f"--text: {root} does not exist")
    source = str(root) if path else "Python's standard library"
    files = _files(root) if path else _files(root, (".py",), _NOT_THE_LIBRARY)
    documents = [document for file in files if (document := _decoded(file)).strip()]
    if not documents:
        raise BadInput(f"--text: no UTF-8 text in {root} (of a folder, *.py, *.md and *.txt are read)")
    if len(documents) == 1:
        lines = documents[0].splitlines(keepends=True)
        cut = len(lines) - max(1, len(lines) // _HELD_OUT_EVERY)
        return Text(source, ["".join(lines[:cut])], ["".join(lines[cut:])])
    every = min(_HELD_OUT_EVERY, len(documents))
    held_out = documents[every - 1 :: every]
    del documents[every - 1 :: every]
    return Text(source, documents, held_out)


def _files(root: Path, suffixes: tuple[str, ...] = _SUFFIXES, skipped: Set[str] = frozenset()) -> list[Path]:
    if root.is_file():
        return [root]
    names = [file.relative_to(root) for file in root.rglob("*") if file.suffix in suffixes and file.is_file()]
    kept = [name for name in names if not any(part in skipped or part[0] == "." for part in name.parts)]
    # By their POSIX names, because the order of a folder's entries differs between file systems.
    return [root / name for name in sorted(kept, key=Path.as_posix)]


def _decoded(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def trained_tokeniser(documents: Sequence[str], vocabulary: int = _VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on a part of `documents` that is spread over all of them."""
    tokeniser = Tokenizer(models.BPE())
    tokeniser.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokeniser.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    share = min(1.0, _TOKENISER_CHARACTERS / max(1, sum(map(len, documents))))
    sample = (document[: int(len(document) * share) + 1] for document in documents)
    tokeniser.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokeniser, bos_token=_START, eos_token=_START)


def windows(tokeniser: Any, documents: Sequence[str], sequence: int) -> Windows:
    """Each document behind a start token (where the tokeniser has one), cut into rows of `sequence`."""
    start = tokeniser.bos_token_id if tokeniser.bos_token_id is not None else tokeniser.eos_token_id
    head = [] if start is None else [start]
    ids, labels = [], []
    for encoded in tokeniser(list(documents), add_special_tokens=False)["input_ids"]:
        tokens = torch.tensor(head + encoded, dtype=torch.long)
        targets = tokens.clone()
        targets[: len(head)] = IGNORED
        short = -len(tokens) % sequence
        ids.append(F.pad(tokens, (0, short), value=start or 0).view(-1, sequence))
        labels.append(F.pad(targets, (0, short), value=IGNORED).view(-1, sequence))
    rows = Windows(torch.cat(ids), torch.cat(labels))
    # The first position of a row is predicted by none, so a row needs a label behind it to be of use.
    useful = (rows.labels[:, 1:] != IGNORED).any(1)
    if not useful.any():
        raise BadInput(f"the text is too short for windows of {sequence} tokens")
    return Windows(rows.ids[useful], rows.labels[useful])

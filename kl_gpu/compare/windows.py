"""The tokens that models are compared on, cut into windows of equal length."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import ComparisonError

# What of a window is scored: llama.cpp's second half, whose tokens all have a context, or all that have any.
SCORED = ("half", "all")


class Windows(NamedTuple):
    """Token windows, each read by a model on its own.

    Attributes:
        ids: int64 `[windows, ctx]`.
        first: the first position of a window whose prediction is scored; position j predicts token j + 1.
        categories: of each window, or None where the text has none.
        counts: bool `[windows, rows]`, which of the scored predictions count; None where all do.
    """

    ids: Tensor
    first: int
    categories: list[str] | None = None
    counts: Tensor | None = None

    @property
    def rows(self) -> int:
        """Scored predictions of a window."""
        return self.ids.shape[1] - 1 - self.first

    @property
    def labels(self) -> Tensor:
        """The tokens that the scored predictions are of, `[windows, rows]`."""
        return self.ids[:, self.first + 1 :]

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens and of what is scored."""
        about = f"{tuple(self.ids.shape)} {self.first}".encode()
        counts = b"" if self.counts is None else self.counts.numpy().tobytes()
        return hashlib.sha256(about + self.ids.numpy().tobytes() + counts).hexdigest()[:16]

    def few(self, windows: int) -> Windows:
        """The first so many windows."""
        categories = None if self.categories is None else self.categories[:windows]
        counts = None if self.counts is None else self.counts[:windows]
        return Windows(self.ids[:windows], self.first, categories, counts)

    def narrowed(self, first: int) -> Windows:
        """The same, scored from a later position on."""
        counts = None if self.counts is None else self.counts[:, first - self.first :]
        return Windows(self.ids, first, self.categories, counts)


def cut(ids: Tensor, ctx: int, scored: str = "half") -> Windows:
    """Windows of `ctx` tokens, one behind the other, as llama.cpp's perplexity tool cuts them.

    Args:
        ids: int `[T]`; what is left over at the end is not compared.
        ctx: tokens of a window, at least 4.
        scored: "half" scores positions ctx/2 to ctx − 2 of a window, "all" scores every position.

    Raises:
        ComparisonError: fewer tokens than one window, or a window of fewer than 4.
    """
    if ctx < 4:
        raise ComparisonError(f"a window must have at least 4 tokens, got ctx={ctx}")
    if scored not in SCORED:
        raise ComparisonError(f"scored must be one of {', '.join(SCORED)}, got {scored!r}")
    count = len(ids) // ctx
    if count == 0:
        raise ComparisonError(f"the text has {len(ids)} tokens, which is less than one window of {ctx}")
    windows = ids[: count * ctx].to(torch.int64).reshape(count, ctx)
    return Windows(windows, ctx // 2 if scored == "half" else 0)


def of_texts(
    texts: Sequence[tuple[str, str]], encode: Callable[[str], list[int]], ctx: int, scored: str
) -> Windows:
    """Windows of (category, text) pairs: each category's texts are joined and cut on their own."""
    by_category: dict[str, list[str]] = {}
    for category, text in texts:
        by_category.setdefault(category, []).append(text)
    parts, names = [], []
    for category, some in by_category.items():
        ids = torch.tensor(encode("\n\n".join(some)), dtype=torch.int64, device="cpu")
        if len(by_category) > 1 and len(ids) < ctx:
            raise ComparisonError(
                f"category {category!r} has {len(ids)} tokens, less than one window of {ctx}"
            )
        parts.append(cut(ids, ctx, scored))
        names += [category] * len(parts[-1].ids)
    joined = torch.cat([part.ids for part in parts])
    return Windows(joined, parts[0].first, names if len(by_category) > 1 else None)


def read_texts(path: Path, column: str = "text", category: str | None = None) -> list[tuple[str, str]]:
    """(category, text) pairs of a file or of all files of a folder, in the order of their names.

    Args:
        path: .parquet and .jsonl are read by `column`; anything else is text in UTF-8.
        category: a column that names each row's category.

    Raises:
        ComparisonError: nothing is there, or not what the suffix says.
    """
    if not path.exists():
        raise ComparisonError(f"{path}: no such file or folder")
    files = sorted(x for x in path.rglob("*") if x.is_file()) if path.is_dir() else [path]
    found = [pair for file in files for pair in _texts_of(file, column, category)]
    if not any(text.strip() for _, text in found):
        raise ComparisonError(f"{path}: no text in it")
    return found


def _texts_of(file: Path, column: str, category: str | None) -> Iterator[tuple[str, str]]:
    if file.suffix not in (".parquet", ".jsonl", ".ndjson"):
        try:
            yield "", file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ComparisonError(f"{file}: {error}") from None
        return
    for row in rows_of(file):
        try:
            yield str(row[category]) if category else "", str(row[column])
        except KeyError as error:
            raise ComparisonError(f"{file}: no column {error}") from None


def rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .parquet file, or of one with a JSON object a line.

    Raises:
        ComparisonError: it cannot be read, or is not that.
    """
    try:
        if file.suffix == ".parquet":
            yield from _parquet(file)
            return
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = json.loads(line) if line.strip() else {}
                if not isinstance(row, dict):
                    raise ComparisonError(f"{file}: line {number} is no JSON object")
                if row:
                    yield row
    except (OSError, ValueError) as error:
        raise error if isinstance(error, ComparisonError) else ComparisonError(f"{file}: {error}") from None


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ComparisonError(
            f"{file}: reading parquet needs pyarrow; pip install 'kl_gpu[compare]'"
        ) from None
    for batch in parquet.ParquetFile(file).iter_batches(1024):
        yield from batch.to_pylist()


def read_ids(path: Path) -> Tensor:
    """Token ids `[T]` of a .npy file of integers.

    Raises:
        ComparisonError: it is not there or not that.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ComparisonError(f"{path}: {error}") from None
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise ComparisonError(f"{path}: expected integers [T], got {found.dtype} {list(found.shape)}")
    return torch.from_numpy(found.astype(np.int64))

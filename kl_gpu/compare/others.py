"""Top-k log-probabilities as axolotl and vLLM leave them.

Both have one entry for each token of a text, and **entry i describes token i**: it is what the model
predicted at position i − 1. The entry of token 0 says nothing (vLLM has null there) and is not read.

* vLLM, JSONL: a request's output a line, with `prompt_token_ids` (or `input_ids`) and `prompt_logprobs`, a
  list of null or {"token id": {"logprob": …, …}} with K entries, K + 1 where the text's own token is none of
  the best.
* axolotl, JSONL or parquet: columns `input_ids`, `target_token_ids` and `target_logprobs` `[T, K]`, and
  `target_mask` `[T, K]` or `[T]`, 0 where an entry does not count. Its own preparation renormalises the K
  probabilities to 1, and so leaves nothing to the rest of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import ComparisonError
from .windows import Windows, rows_of


class Entries(NamedTuple):
    """What is known of each prediction of texts that are filled up to one length.

    Attributes:
        logprobs: `[texts, length − 1, K]`.
        ids: int32, the same; −1 where absent.
    """

    logprobs: Tensor
    ids: Tensor

    def of(self, text: int, first: int) -> Entries:
        """A text's, from a position on."""
        return Entries(self.logprobs[text, first:], self.ids[text, first:])


# Of a text: its tokens, and of each its known tokens and their log-probabilities.
_Text = tuple[list[int], list[list[int]], list[list[float]]]


def read(path: Path) -> tuple[Windows, Entries, str]:
    """A file's texts, what is known of their tokens, and whose format it is.

    Texts of unequal length are filled up with tokens that do not count, nor do those of which nothing is
    known.

    Raises:
        ComparisonError: it is neither format, or its columns do not go together; the message names the row.
    """
    dialect, texts = "", []
    for number, row in enumerate(rows_of(path), 1):
        name, parse = _dialect(path, number, row)
        if dialect not in ("", name):
            raise ComparisonError(f"{path}: row {number} is {name}, and those before are {dialect}")
        dialect = name
        try:
            text = parse(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ComparisonError(f"{path}: row {number} is no row of {name} ({error})") from None
        if not len(text[0]) == len(text[1]) == len(text[2]):
            raise ComparisonError(
                f"{path}: row {number} has {len(text[0])} tokens and {len(text[2])} entries; entry i "
                "describes token i"
            )
        texts.append(text)
    if not texts:
        raise ComparisonError(f"{path}: no rows in it")
    windows, entries = _filled_up(texts)
    if not windows.counts.any():  # type: ignore[union-attr]
        raise ComparisonError(f"{path}: no entry that counts behind a text's first token")
    return windows, entries, dialect


def _dialect(path: Path, number: int, row: dict[str, Any]) -> tuple[str, Callable[[dict[str, Any]], _Text]]:
    if "prompt_logprobs" in row:
        return "vLLM's prompt_logprobs", _vllm
    if "target_logprobs" in row:
        return "axolotl's columns", _axolotl
    raise ComparisonError(f"{path}: row {number} has neither prompt_logprobs nor target_logprobs")


def _vllm(row: dict[str, Any]) -> _Text:
    tokens = row["prompt_token_ids"] if "prompt_token_ids" in row else row["input_ids"]
    ids, logprobs = [], []
    for entry in row["prompt_logprobs"]:
        known = {int(token): x["logprob"] if isinstance(x, dict) else x for token, x in (entry or {}).items()}
        ids.append(list(known))
        logprobs.append([float(x) for x in known.values()])
    return [int(x) for x in tokens], ids, logprobs


def _axolotl(text: dict[str, Any]) -> _Text:
    masks = text["target_mask"] if text.get("target_mask") is not None else [1] * len(text["input_ids"])
    ids, logprobs = [], []
    for some, of_some, mask in zip(text["target_token_ids"], text["target_logprobs"], masks, strict=True):
        each = mask if isinstance(mask, list) else [mask] * len(some)
        # What is filled up with has −inf, or −1e9, and any id.
        row = zip(some, of_some, each, strict=True)
        kept = [(t, x) for t, x, counts in row if counts and x is not None and x > -1e8]
        ids.append([int(t) for t, _ in kept])
        logprobs.append([float(x) for _, x in kept])
    return [int(x) for x in text["input_ids"]], ids, logprobs


def _filled_up(texts: list[_Text]) -> tuple[Windows, Entries]:
    length = max(2, *(len(tokens) for tokens, _, _ in texts))
    most = max(1, *(len(x) for _, known, _ in texts for x in known))
    tokens = torch.zeros(len(texts), length, dtype=torch.int64, device="cpu")
    ids = torch.full((len(texts), length - 1, most), -1, dtype=torch.int32, device="cpu")
    logprobs = torch.zeros(len(texts), length - 1, most, device="cpu")
    for i, (own, known, of_known) in enumerate(texts):
        tokens[i, : len(own)] = torch.tensor(own, dtype=torch.int64, device="cpu")
        for j, (some, x) in enumerate(zip(known[1:], of_known[1:], strict=True)):
            ids[i, j, : len(some)] = torch.tensor(some, dtype=torch.int32, device="cpu")
            logprobs[i, j, : len(x)] = torch.tensor(x, device="cpu")
    return Windows(tokens, 0, None, (ids >= 0).any(-1)), Entries(logprobs, ids)

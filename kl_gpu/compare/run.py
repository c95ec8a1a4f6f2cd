"""A comparison: checks, the models' turns over the windows, what is made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import __version__
from .errors import ComparisonError
from .ranks import rank_and_world, wait
from .sides import Partial, Side
from .store import Store
from .windows import Windows


class Scores(NamedTuple):
    """What was found of one model against the base.

    Attributes:
        name: of the model.
        nbytes: of its weights, or None.
        tokens: numbers of each token that counts, as `scores.NUMBERS` has them, window by window.
    """

    name: str
    nbytes: int | None
    tokens: dict[str, Tensor]


class Comparison(NamedTuple):
    """Models against a base, token by token.

    Attributes:
        base: the base's name.
        windows: the tokens.
        models: what was found of each model.
        about: versions, text and settings.
        notes: what a reader must know of the figures.
    """

    base: str
    windows: Windows
    models: list[Scores]
    about: dict[str, Any]
    notes: list[str]

    @property
    def window_of(self) -> Tensor:
        """The window that each token that counts lies in."""
        return self._places[0]

    @property
    def place_of(self) -> Tensor:
        """Its place in the window: 0 is the first of the ids."""
        return self._places[1] + self.windows.first + 1

    @property
    def _places(self) -> Tensor:
        counts = self.windows.counts
        shape = len(self.windows.ids), self.windows.rows
        everything = torch.ones(shape, dtype=torch.bool, device="cpu") if counts is None else counts
        return everything.nonzero().t()


# Beside the tokens' numbers in every part: a model that is done is not opened again to ask.
_BYTES = "model_bytes"
# Told how many tokens have been scored of how many, for the model of a name.
Progress = Callable[[str, int, int], None]
# A side, or what opens it when its turn comes: two models need not be in memory together.
Opens = Callable[[], Side]


def check(base: Side, model: Side, windows: Windows, vocab_size: int | None) -> int:
    """The number of columns to compare.

    Raises:
        ComparisonError: tokenizers, vocabularies or tokens differ; the message says which.
    """
    if base.tokenizer and model.tokenizer and base.tokenizer != model.tokenizer:
        raise ComparisonError(
            f"{base.name} and {model.name} have different tokenizers ({base.tokenizer} and {model.tokenizer})"
        )
    if isinstance(model, Partial):
        raise ComparisonError(f"{model.name} knows a part of the vocabulary only: name it first, as the base")
    sizes = [side.vocab_size for side in (base, model) if side.vocab_size is not None]
    if vocab_size is None and len(set(sizes)) > 1:
        raise ComparisonError(
            f"{base.name} has {base.vocab_size} columns of logits and {model.name} {model.vocab_size}; "
            "--vocab-size says how many to compare"
        )
    columns = min(sizes) if vocab_size is None else vocab_size
    if not 1 <= columns <= min(sizes):
        raise ComparisonError(f"vocab_size must lie between 1 and {min(sizes)}, got {columns}")
    for side in (base, model):
        own = side.windows
        if own is None:
            continue
        # What scores more than is asked for will do.
        if own.first > windows.first or not torch.equal(own.ids[: len(windows.ids)], windows.ids):
            raise ComparisonError(f"{side.name} was recorded on other tokens or windows")
    if int(windows.ids.max()) >= columns or int(windows.ids.min()) < 0:
        raise ComparisonError(
            f"the text has token {int(windows.ids.max())}, past the {columns} columns compared"
        )
    return columns


def compare(
    base: Side, models: Sequence[tuple[str, Opens]], windows: Windows, out: Path, *,
    vocab_size: int | None = None, batch: int = 1, fresh: bool = False, about: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Comparison:  # fmt: skip
    """Compare models with a base, one model at a time, and keep what is found of each token in a folder.

    Called again after an interruption it goes on with the windows that are missing; numbers are the same bit
    for bit. Under torchrun each rank takes its share of the windows, through a folder that all of them see.

    Args:
        base: what the others are compared with.
        models: (name, what opens the side), each opened when its turn comes.
        windows: the tokens.
        out: the folder.
        vocab_size: columns that are compared, where the sides have different numbers of them.
        batch: windows that go through a model together. A product's last bits may depend on it.
        fresh: throw away what the folder holds of an earlier run.
        about: what else the numbers follow from, for the report; another value is another comparison.
        progress: told of every group of windows.

    Raises:
        ComparisonError: the sides do not go together, or the folder cannot be used.
    """
    if not models:
        raise ComparisonError("nothing to compare the base with")
    if batch < 1:
        raise ComparisonError(f"batch must be at least 1, got {batch}")
    groups = torch.arange(len(windows.ids), device="cpu").split(batch)
    settings = {
        "base": base.name, "models": [name for name, _ in models], "tokens": windows.fingerprint,
        "windows": len(windows.ids), "ctx": windows.ids.shape[1], "first": windows.first, "batch": batch,
        "vocab_size": vocab_size, "kl_gpu": __version__, "torch": torch.__version__, **(about or {}),
    }  # fmt: skip
    rank, world = rank_and_world()
    store = _store_of(out, settings, fresh, rank)
    for index, (name, opens) in enumerate(models):
        own = range(rank, len(groups), world)
        missing = [g for g in own if not store.has(index, g)]
        if not missing:
            continue
        model = opens()
        columns = check(base, model, windows, vocab_size)
        done, total = len(own) - len(missing), len(own)
        for group in missing:
            store.put(index, group, _scores_of(base, model, windows, groups[group].tolist(), columns))
            done += 1
            if progress is not None:
                progress(name, done * batch * windows.rows, total * batch * windows.rows)
        del model
    wait()
    everything = range(len(groups))
    found = []
    counts = None if windows.counts is None else windows.counts.flatten()
    for index, (name, _) in enumerate(models):
        tokens = store.get(index, everything)
        nbytes = int(tokens.pop(_BYTES)[0]) or None
        tokens = tokens if counts is None else {key: x[counts] for key, x in tokens.items()}
        found.append(Scores(name, nbytes, tokens))
    return Comparison(base.name, windows, found, settings, [base.note] if base.note else [])


def _scores_of(
    base: Side, model: Side, windows: Windows, which: list[int], columns: int
) -> dict[str, Tensor]:
    blocks = list(base.scores(model, windows, which, columns))
    found = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    return found | {_BYTES: torch.tensor([model.nbytes or 0], device="cpu")}


def _store_of(out: Path, settings: dict[str, Any], fresh: bool, rank: int) -> Store:
    """The folder, made by the first rank."""
    if rank == 0:
        store = Store(out, settings, fresh)
        wait()
        return store
    wait()
    return Store(out, settings)


def noise_floor(side: Side) -> tuple[str, Opens]:
    """The base against itself with twice as many windows at once: what rounding alone makes."""
    return f"{side.name} again", lambda: _Doubled(side)


class _Doubled(Side):
    """A side whose windows are computed together with themselves once more."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.name, self.vocab_size, self.tokenizer = side.name, side.vocab_size, side.tokenizer
        self.windows, self.nbytes = side.windows, side.nbytes

    def logits(self, windows: Windows, which: Sequence[int]) -> Tensor:
        return self.side.logits(windows, [*which, *which])[: len(which)]

"""A comparison: checks, the models' turns over the windows, what is made of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import __version__
from .errors import ComparisonError
from .scores import scored, scored_from_floor
from .sides import Side
from .store import Store
from .windows import Windows


class Scores(NamedTuple):
    """What was found of one model against the base.

    Attributes:
        name: of the model.
        nbytes: of its weights, or None.
        tokens: numbers of each scored token, as `scores.NUMBERS` has them, window by window.
        partial: whether the base is known above a floor only, so that some of them are NaN.
    """

    name: str
    nbytes: int | None
    tokens: dict[str, Tensor]
    partial: bool


class Comparison(NamedTuple):
    """Models against a base, token by token.

    Attributes:
        base: the base's name.
        windows: the tokens.
        models: what was found of each model.
        about: versions, text and settings.
    """

    base: str
    windows: Windows
    models: list[Scores]
    about: dict[str, Any]

    @property
    def window_of(self) -> Tensor:
        """The window that each scored token lies in."""
        return torch.arange(len(self.windows.ids), device="cpu").repeat_interleave(self.windows.rows)


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
    if vocab_size is None and base.vocab_size != model.vocab_size:
        raise ComparisonError(
            f"{base.name} has {base.vocab_size} columns of logits and {model.name} {model.vocab_size}; "
            "--vocab-size says how many to compare"
        )
    columns = min(base.vocab_size, model.vocab_size) if vocab_size is None else vocab_size
    if not 1 <= columns <= min(base.vocab_size, model.vocab_size):
        raise ComparisonError(
            f"vocab_size must lie between 1 and {min(base.vocab_size, model.vocab_size)}, got {columns}"
        )
    for side in (base, model):
        own = side.windows
        if own is not None and (own.first != windows.first or not torch.equal(own.ids, windows.ids)):
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
    rank, world = _rank()
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
    _wait()
    everything = range(len(groups))
    found = []
    for index, (name, _) in enumerate(models):
        tokens = store.get(index, everything)
        nbytes = int(tokens.pop(_BYTES)[0]) or None
        found.append(Scores(name, nbytes, tokens, base.floor is not None))
    return Comparison(base.name, windows, found, settings)


def _scores_of(
    base: Side, model: Side, windows: Windows, which: list[int], columns: int
) -> dict[str, Tensor]:
    labels = windows.labels[which].reshape(-1)
    p, q = (side.logits(windows, which)[..., :columns].flatten(0, 1) for side in (base, model))
    found = scored(p, q, labels) if base.floor is None else scored_from_floor(p, base.floor, q, labels)
    return found | {_BYTES: torch.tensor([model.nbytes or 0], device="cpu")}


def _rank() -> tuple[int, int]:
    """This process among those that torchrun started."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return (torch.distributed.get_rank(), world) if world > 1 else (0, 1)


def _wait() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _store_of(out: Path, settings: dict[str, Any], fresh: bool, rank: int) -> Store:
    """The folder, made by the first rank."""
    if rank == 0:
        store = Store(out, settings, fresh)
        _wait()
        return store
    _wait()
    return Store(out, settings)


def noise_floor(side: Side) -> tuple[str, Opens]:
    """The base against itself with twice as many windows at once: what rounding alone makes."""
    return f"{side.name} again", lambda: _Doubled(side)


class _Doubled(Side):
    """A side whose windows are computed together with themselves once more."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.name, self.vocab_size, self.tokenizer = side.name, side.vocab_size, side.tokenizer
        self.windows, self.nbytes, self.floor = side.windows, side.nbytes, side.floor

    def logits(self, windows: Windows, which: Sequence[int]) -> Tensor:
        return self.side.logits(windows, [*which, *which])[: len(which)]

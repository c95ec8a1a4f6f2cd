"""The realistic rows that the tests of accuracy run on, and the small trained model, trained once a run."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import Tensor

from realistic_rows import (
    COPIES,
    FAMILIES,
    SmallModel,
    Trained,
    raised_token,
    tops_on_a_floor,
    train,
)
from support import DEVICE

CASES = (*FAMILIES, *COPIES)
MODEL_VOCAB = 4096


def trained(folder: Path) -> Trained:
    """The model from `folder`, the run's own (fixture `shared_folder`); the first to come trains it."""
    from filelock import FileLock

    file = folder / "small_model.pt"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            model, tokens = train(MODEL_VOCAB)
            torch.save((*model, tokens), file)
        *weights, tokens = torch.load(file)
    return Trained(SmallModel(*weights), tokens)


def realistic(case: str, rows: int, vocab: int, model: Trained, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(student, teacher) of one of CASES on the tests' device; the model's cases have its own vocabulary."""
    # Not hash(), which Python salts anew for each process.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case} {rows} {vocab} {seed}".encode()))
    if case in FAMILIES:
        student, teacher = FAMILIES[case](rows, vocab, generator)
    else:
        student, teacher = model.pair(case, rows, generator)
    return student.to(DEVICE), teacher.to(DEVICE)


def peaked_sides(
    rows: int = 6, vocab: int = 300, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(student, teacher), half of them five tokens on a floor, half with one token that holds most."""
    generator = torch.Generator().manual_seed(1)
    parts = [family(rows // 2, vocab, generator) for family in (tops_on_a_floor, raised_token)]
    return tuple(torch.cat(side).to(DEVICE, dtype) for side in zip(*parts, strict=True))  # type: ignore[return-value]

"""Finds out before the work, not behind it, what would end it."""

from __future__ import annotations

from pathlib import Path

import torch
from _settings import BadInput

from kl_gpu import kl_div


def check_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out: cannot write to {out}: {error.strerror}") from error


def check_backend(backend: str | None, device: str) -> None:
    probe = torch.zeros(1, 2, device=device)
    try:
        kl_div(probe, probe, backend=backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise BadInput(f"--backend: {error}") from error

"""What is kept of each token, on disk as it is found: an interrupted comparison goes on where it stopped."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ComparisonError
from .files import claim, replace


class Store:
    """A folder with one safetensors file for each group of windows and model.

    Args:
        folder: made if it is not there.
        about: what the numbers follow from; another comparison's folder is refused.
        fresh: throw away what the folder holds of an earlier run.

    Raises:
        ComparisonError: the folder cannot be written, or holds another comparison.
    """

    def __init__(self, folder: Path, about: dict[str, Any], fresh: bool = False) -> None:
        self.parts = folder / "parts"
        manifest = self.parts / "comparison.json"
        refusal = f"{folder}: holds another comparison; name another folder with --out, or pass --fresh"
        try:
            # One that came to nothing, say by a wrong option, claims no folder.
            if manifest.exists() and (fresh or not any(self.parts.glob("model*.safetensors"))):
                shutil.rmtree(self.parts)
            self.parts.mkdir(parents=True, exist_ok=True)
            claim(manifest, about, refusal)
        except OSError as error:
            raise ComparisonError(f"{folder}: {error.strerror or error}") from None

    def path(self, model: int, group: int) -> Path:
        return self.parts / f"model{model:02d}-{group:06d}.safetensors"

    def has(self, model: int, group: int) -> bool:
        return self.path(model, group).exists()

    def put(self, model: int, group: int, found: dict[str, Tensor]) -> None:
        """Write a group's numbers: whole or not at all, wherever the process is stopped."""
        from safetensors.torch import save

        try:
            replace(self.path(model, group), save(found))
        except OSError as error:
            raise ComparisonError(f"{self.path(model, group)}: {error.strerror or error}") from None

    def get(self, model: int, groups: Iterable[int]) -> dict[str, Tensor]:
        """All of a model's numbers, group by group."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        found = []
        for group in groups:
            path = self.path(model, group)
            try:
                found.append(load_file(path))
            except (OSError, SafetensorError) as error:
                raise ComparisonError(f"{path}: {error}; remove it, and it is computed again") from None
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

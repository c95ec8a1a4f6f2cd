"""The options of a run, and what suits the device where the user leaves one out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


class BadInput(Exception):
    """Something the user gave cannot work; the message is one line that says what and why."""


@dataclass(frozen=True)
class Size:
    """Of a small Llama."""

    hidden: int
    layers: int


@dataclass(frozen=True)
class Scale:
    teacher: Size
    student: Size
    steps: int
    batch: int
    sequence: int
    rate: float
    held_out_tokens: int
    cost_tokens: int


_SCALES = {
    "cpu": Scale(Size(192, 3), Size(96, 2), 200, 2, 128, 3e-3, 4_096, 1_024),  # three minutes on two cores
    "cuda": Scale(Size(768, 8), Size(384, 4), 600, 16, 512, 1e-3, 65_536, 8_192),
}
_FINE_TUNING_RATE = 2e-5  # for a student that somebody trained before


@dataclass(frozen=True)
class Settings:
    teacher: str | None
    student: str | None
    text: Path | None
    steps: int
    batch: int
    sequence: int
    rate: float
    temperature: float
    seed: int
    device: str
    backend: str | None
    out: Path
    fused_linear: bool = False

    @classmethod
    def choose(cls, **options: Any) -> Settings:
        """The user's options, completed by what suits the device."""
        options["device"] = options["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
        scale = _SCALES[_checked_device(options["device"]).type]
        rate = _FINE_TUNING_RATE if options["student"] else scale.rate
        suited = {"steps": scale.steps, "batch": scale.batch, "sequence": scale.sequence, "rate": rate}
        return cls(**options | {name: value for name, value in suited.items() if options[name] is None})

    @property
    def scale(self) -> Scale:
        return _SCALES[torch.device(self.device).type]


def _checked_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if device.type in _SCALES:
            torch.zeros((), device=device)
            return device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device: cannot use {name!r}: {str(error).splitlines()[0]}") from error
    raise BadInput(f"--device: expected cpu, cuda or cuda:N, got {name!r}")

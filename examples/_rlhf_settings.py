"""The options of a run of `rlhf_kl.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RlhfSettings:
    text: Path | None
    pretraining: int  # steps of the reference
    steps: int  # of each policy
    prompts: int  # a step
    samples: int  # completions of each prompt
    prompt: int  # tokens
    tokens: int  # of a completion
    rate: float
    coefficient: float  # β: reward per nat of KL(policy‖reference) of a completion
    held_out: int  # prompts to measure on
    seed: int
    backend: str | None
    out: Path

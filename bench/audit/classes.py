"""The dtypes and the classes of rows that are audited."""

from __future__ import annotations

from typing import NamedTuple

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class VClass(NamedTuple):
    """Rows of V columns, `stride` apart in memory."""

    V: int
    stride: int

    def logits(self, dtype: str) -> torch.Tensor:
        return torch.empty(1, 2, self.stride, dtype=DTYPES[dtype], device="meta")[..., : self.V]


# What `launch.layout` tells apart: V of whole runs of 16 bytes or not, rows at multiples of a run or a word.
V_CLASSES = {
    "aligned": VClass(128256, 128256),
    "unaligned": VClass(128256, 128257),
    "odd": VClass(50257, 50257),
    "odd, words": VClass(50257, 50304),
}

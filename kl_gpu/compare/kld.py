"""llama.cpp's file of a base model's log-probabilities (`llama-perplexity --kl-divergence-base`).

In the machine's byte order: 8 bytes `_logits_`; int32 n_ctx, n_vocab, n_chunk; int32 tokens `[n_chunk ·
n_ctx]`; then for each chunk n_ctx − 1 − n_ctx/2 rows of uint16, 2·⌈n_vocab/2⌉ + 4 a row: float32 scale,
float32 lowest log-probability, n_vocab codes. log p = scale · code + lowest. Codes hold 16 nats below the
largest logit (24 in ik_llama.cpp's files); code 0 says "so much or less".
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .errors import ComparisonError
from .windows import Windows

_MAGIC = b"_logits_"
# What llama.cpp leaves out of its sum: tokens of log-probability ≤ −16; of a file of 24 nats, −24.
_FLOORS = (16.0, 24.0)


class KldFile:
    """A `.kld` file, read by memory map.

    Attributes:
        windows: its tokens, and which of them are scored.
        vocab_size: columns of a row.
        floor: tokens of log p ≤ −floor are not known.

    Raises:
        ComparisonError: the file is missing, is something else, or was cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(20)
        except OSError as error:
            raise ComparisonError(f"{path}: {error.strerror or error}") from None
        if len(head) < 20 or head[:8] != _MAGIC:
            raise ComparisonError(f"{path}: not a file of llama.cpp's --kl-divergence-base")
        ctx, self.vocab_size, chunks = (int(x) for x in np.frombuffer(head, np.int32, 3, 8))
        if ctx < 4 or self.vocab_size < 1 or chunks < 1:
            raise ComparisonError(f"{path}: n_ctx {ctx}, n_vocab {self.vocab_size}, n_chunk {chunks}")
        first = ctx // 2
        rows, width = ctx - 1 - first, 2 * ((self.vocab_size + 1) // 2) + 4
        expected = 20 + 4 * chunks * ctx + 2 * chunks * rows * width
        if size < expected:
            raise ComparisonError(f"{path}: cut short, {size} bytes of {expected}")
        ids = np.fromfile(path, np.int32, chunks * ctx, offset=20).reshape(chunks, ctx)
        self.windows = Windows(torch.from_numpy(ids.astype(np.int64)), first)
        self._rows = np.memmap(
            path, np.uint16, "r", offset=20 + 4 * chunks * ctx, shape=(chunks, rows, width)
        )
        scales = np.ascontiguousarray(self._rows[:, :, :2]).view(np.float32)
        self.floor = _FLOORS[int(65535 * float(scales.max()) > 16.5)]

    def logprobs(self, window: int) -> Tensor:
        """log p of a window's scored rows, float32 `[rows, V]`, as the file has them."""
        block = np.ascontiguousarray(self._rows[window])
        scale, lowest = np.split(np.ascontiguousarray(block[:, :4]).view(np.float32), 2, axis=1)
        codes = block[:, 4 : 4 + self.vocab_size].astype(np.float32)
        return torch.from_numpy(scale * codes + lowest)

"""Which rows of a call from hidden states are computed together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes of logits, all sides, that are held at once, and the rows between which they may come to lie. Fewer
# make the products slow and a GPU wait for launches, and each chunk reads and writes the weight's gradient.
# More save nothing on a CPU: in float32 the time stays within 3 % from 512 rows on (H = 1024, V = 32000 and
# 128256). Products of 16 bits are faster, and the sum of the weight's gradient is not.
_LOGITS = {"cpu": 512 << 20}
_LOGITS_ON_A_GPU = 768 << 20
_FEWEST = {"cpu": 64}
_FEWEST_ON_A_GPU = 512
_MOST = {"cpu": 2048}  # over the bytes of a number
_MOST_ON_A_GPU = 4096
# Rows of a chunk are a multiple of this, where it was not the caller who chose them.
_STEP = 32
# Elsewhere looking which rows count would wait for the device: they are computed, and their result is 0.
_FINDS_ROWS = frozenset({"cpu"})


class Chunk(NamedTuple):
    """Rows that are computed together: a run of all, or those at `places`.

    Attributes:
        rows: their place among the rows that are computed.
        places: int64, where they lie among all rows; None where all are computed.
        keep: bool, which of them count; None where all do.
    """

    rows: slice
    places: Tensor | None
    keep: Tensor | None

    def take(self, per_row: Tensor) -> Tensor:
        """This chunk's part of what has an entry for each of all rows."""
        return per_row[self.rows] if self.places is None else per_row.index_select(0, self.places)

    def put(self, into: Tensor, what: Tensor) -> None:
        if self.places is None:
            into[self.rows] = what
        else:
            into.index_copy_(0, self.places, what.to(into.dtype))


def chunks_of(
    valid: Tensor | None, n: int, row_bytes: int, itemsize: int, chunk_rows: int, device: torch.device
) -> Iterator[Chunk]:
    """Where it costs nothing to find them, rows that do not count are left out."""
    index = None
    if valid is not None and device.type in _FINDS_ROWS:
        index = valid.nonzero()[:, 0]
        n, valid, index = len(index), None, None if len(index) == n else index
    chunk_rows = chosen_rows(n, row_bytes, itemsize, chunk_rows, device)
    for start in range(0, n, chunk_rows):
        part = slice(start, min(start + chunk_rows, n))
        yield Chunk(part, None if index is None else index[part], None if valid is None else valid[part])


def _free_bytes(device: torch.device) -> float:
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def chosen_rows(n: int, row_bytes: int, itemsize: int, chunk_rows: int, device: torch.device) -> int:
    """Rows of a chunk: by the sizes alone, so that the bits repeat, unless memory is short.

    The chunks are made equal, lest the last one be a few rows whose products take as long as many.

    Args:
        row_bytes: of a row's logits, all sides together.
        itemsize: bytes of a number of the products.
        chunk_rows: what the caller wants; 0 leaves it to the sizes.
    """
    if chunk_rows:
        return chunk_rows
    least = _FEWEST.get(device.type, _FEWEST_ON_A_GPU)
    most = _MOST[device.type] // itemsize if device.type in _MOST else _MOST_ON_A_GPU
    rows = min(most, max(least, _LOGITS.get(device.type, _LOGITS_ON_A_GPU) // max(1, row_bytes)))
    free = _free_bytes(device)
    while rows > _STEP and rows * row_bytes > free / 2:
        rows //= 2
    rows = max(_STEP, rows // _STEP * _STEP)
    equal = math.ceil(n / max(1, math.ceil(n / rows)))
    return max(1, min(n, _STEP * math.ceil(equal / _STEP)))


def memory_of_rows(chunks: list[Chunk], like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Where chunks put what they find, 0 in rows that none of them has."""
    complete = bool(chunks) and chunks[0].places is None
    return (like.new_empty if complete else like.new_zeros)(shape, dtype=dtype)

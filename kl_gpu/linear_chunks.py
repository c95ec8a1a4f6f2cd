"""What a call of linear_div is, and which of its rows are computed together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes of logits, both sides, that are held at once, and the rows between which they may come to lie. Fewer
# make the products slow and a GPU wait for launches, and each chunk reads and writes the weight's gradient.
_LOGITS = {"cpu": 512 << 20}
_LOGITS_ON_A_GPU = 768 << 20
_FEWEST = {"cpu": 64}
_FEWEST_ON_A_GPU = 512
_MOST = 4096
# Rows of a chunk are a multiple of this, where it was not the caller who chose them.
_STEP = 32
# Elsewhere looking which rows count would wait for the device: they are computed, and their result is 0.
_FINDS_ROWS = frozenset({"cpu"})


class Call(NamedTuple):
    """What a call is but its tensors, in the order of the operator's arguments.

    Attributes:
        student_dtype, teacher_dtype: of the products and the logits.
        student_inner, teacher_inner: what multiplies logits before their cap; without one it is in the scale.
        student_cap, teacher_cap: 0 where there is none.
        vocab_size: rows of the weights past it do not count.
        chunk_rows: 0 leaves it to the size and the device.
        student_scale, teacher_scale: what multiplies the logits, or the capped logits, before the softmax.
    """

    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    student_inner: float
    teacher_inner: float
    student_cap: float
    teacher_cap: float
    vocab_size: int
    chunk_rows: int
    kind: str
    beta: float
    student_scale: float
    teacher_scale: float
    backend: str

    @property
    def numbers(self) -> tuple[str, float, float, float, str]:
        return self[8:]


def arithmetic(dtypes: tuple[torch.dtype, torch.dtype]) -> torch.dtype:
    """What rows are computed in: float64 if either side's logits are, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


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

    def put(self, into: Tensor, what: Tensor) -> None:
        if self.places is None:
            into[self.rows] = what
        else:
            into.index_copy_(0, self.places, what.to(into.dtype))


def chunks_of(rows: Tensor | None, n: int, call: Call, device: torch.device) -> Iterator[Chunk]:
    """Where it costs nothing to find them, rows that do not count are left out."""
    index = None
    if rows is not None and device.type in _FINDS_ROWS:
        index = rows.nonzero()[:, 0]
        n, rows, index = len(index), None, None if len(index) == n else index
    chunk_rows = chosen_rows(n, call, device)
    for start in range(0, n, chunk_rows):
        part = slice(start, min(start + chunk_rows, n))
        yield Chunk(part, None if index is None else index[part], None if rows is None else rows[part])


def _bytes_a_row(call: Call) -> int:
    return call.vocab_size * (call.student_dtype.itemsize + call.teacher_dtype.itemsize)


def _free_bytes(device: torch.device) -> float:
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def chosen_rows(n: int, call: Call, device: torch.device) -> int:
    """Rows of a chunk: by the sizes alone, so that the bits repeat, unless memory is short.

    The chunks are made equal, lest the last one be a few rows whose products take as long as many.
    """
    if call.chunk_rows:
        return call.chunk_rows
    a_row = _bytes_a_row(call)
    least = _FEWEST.get(device.type, _FEWEST_ON_A_GPU)
    rows = min(_MOST, max(least, _LOGITS.get(device.type, _LOGITS_ON_A_GPU) // a_row))
    free = _free_bytes(device)
    while rows > _STEP and rows * a_row > free / 2:
        rows //= 2
    rows = max(_STEP, rows // _STEP * _STEP)
    equal = math.ceil(n / max(1, math.ceil(n / rows)))
    return max(1, min(n, _STEP * math.ceil(equal / _STEP)))

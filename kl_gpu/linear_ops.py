"""From hidden states and two LM heads to divergences and gradients, some rows of logits at a time.

One operator, a single node under torch.compile. A chunk is two products, the fused sweep that writes the
gradient over the student's logits, and the products that carry it on. All products are the vendor's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .checks import autocasts

# Bytes of logits, both sides, that are held at once, and the rows between which they may come to lie. Fewer
# make the products slow and a GPU wait for launches, and each chunk reads and writes the weight's gradient.
_LOGITS = {"cpu": 320 << 20}
_LOGITS_ON_A_GPU = 768 << 20
_FEWEST = {"cpu": 64}
_FEWEST_ON_A_GPU = 512
_MOST = 4096
# Rows of a chunk are a multiple of this, where it was not the caller who chose them.
_STEP = 32
# Elements of what passes through a soft cap at once: three such buffers, in float32, stay in a last cache.
_CAPPED = {"cpu": 1 << 20}
_CAPPED_ON_A_GPU = 1 << 23
# Elsewhere looking which rows count would wait for the device: they are computed, and their result is 0.
_FINDS_ROWS = frozenset({"cpu"})
# Elements of a temporary where 16-bit numbers are summed in float32.
_SUMMED = 1 << 23


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


_library = torch.library.Library("kl_gpu", "FRAGMENT")
_library.define(
    "linear(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor teacher_hidden, "
    "Tensor teacher_weight, Tensor? teacher_bias, Tensor? rows, Tensor? row_scale, bool[] needs, "
    "ScalarType student_dtype, ScalarType teacher_dtype, float student_inner, float teacher_inner, "
    "float student_cap, float teacher_cap, SymInt vocab_size, SymInt chunk_rows, str kind, float beta, "
    "float student_scale, float teacher_scale, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)


def arithmetic(dtypes: tuple[torch.dtype, torch.dtype]) -> torch.dtype:
    """What rows are computed in: float64 if either side's logits are, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


class _Head:
    """One side: its products in their dtype, and the memory of a chunk's logits."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, columns: int, rows: int
    ) -> None:
        self.hidden, self.dtype = hidden, dtype
        self.weight = weight[:columns].to(dtype)
        self.bias = None if bias is None else bias[:columns].to(dtype)
        self.buffer = hidden.new_empty((rows, columns), dtype=dtype)

    def states(self, chunk: _Chunk) -> Tensor:
        """The chunk's hidden states, those of rows that do not count replaced by 0: they may hold NaN."""
        if chunk.places is not None:
            hidden = self.hidden.index_select(0, chunk.places)
        else:
            hidden = self.hidden[chunk.rows]
            if chunk.keep is not None:
                hidden = hidden.masked_fill(~chunk.keep[:, None], 0)
        return hidden.to(self.dtype)

    def logits(self, states: Tensor) -> Tensor:
        out = self.buffer[: states.shape[0]]
        if self.bias is None:
            return torch.mm(states, self.weight.t(), out=out)
        return torch.addmm(self.bias, states, self.weight.t(), out=out)


class _Chunk(NamedTuple):
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


def _chunks(rows: Tensor | None, n: int, call: Call, device: torch.device) -> Iterator[_Chunk]:
    """Where it costs nothing to find them, rows that do not count are left out."""
    index = None
    if rows is not None and device.type in _FINDS_ROWS:
        index = rows.nonzero()[:, 0]
        n, rows, index = len(index), None, None if len(index) == n else index
    chunk_rows = chosen_rows(n, call, device)
    for start in range(0, n, chunk_rows):
        part = slice(start, min(start + chunk_rows, n))
        yield _Chunk(part, None if index is None else index[part], None if rows is None else rows[part])


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
    equal = math.ceil(n / max(1, math.ceil(n / rows)))
    return max(1, min(n, _STEP * math.ceil(equal / _STEP)))


class _Cap:
    """cap·tanh(inner·z/cap) of some rows, in the dtype that rows are computed in."""

    def __init__(self, inner: float, cap: float, like: Tensor, dtype: torch.dtype, rows: int) -> None:
        self.inner, self.cap = inner, cap
        self.tanh, self.out = (like.new_empty((rows, like.shape[1]), dtype=dtype) for _ in range(2))

    def of(self, logits: Tensor) -> Tensor:
        n = len(logits)
        tanh = self.tanh[:n].copy_(logits).mul_(self.inner / self.cap).tanh_()
        return torch.mul(tanh, self.cap, out=self.out[:n])

    def pull_back(self, gradient: Tensor) -> Tensor:
        """The gradient to z from that to the result of the last call, over both."""
        return gradient.mul_(self.tanh[: len(gradient)].square_().neg_().add_(1)).mul_(self.inner)


class _Sweep:
    """The divergences of a chunk's logits, and their gradient in place of the student's."""

    def __init__(self, call: Call, student: Tensor, teacher: Tensor) -> None:
        self.call = call
        dtype = arithmetic((student.dtype, teacher.dtype))
        elements = _CAPPED.get(student.device.type, _CAPPED_ON_A_GPU)
        self.at_once = max(1, elements // student.shape[1])
        at_once = min(len(student), self.at_once)
        self.caps = [
            _Cap(inner, cap, side, dtype, at_once) if cap else None
            for inner, cap, side in (
                (call.student_inner, call.student_cap, student),
                (call.teacher_inner, call.teacher_cap, teacher),
            )
        ]

    def __call__(
        self, student: Tensor, teacher: Tensor, keep: Tensor | None, row_scale: Tensor | None
    ) -> Tensor:
        if self.caps == [None, None]:
            return self._rows(student, teacher, keep, row_scale)
        # A few rows at a time: what the caps make of them stays in a cache.
        parts = [slice(i, i + self.at_once) for i in range(0, len(student), self.at_once)]
        return torch.cat(
            [
                self._capped(
                    student[p], teacher[p], None if keep is None else keep[p],
                    None if row_scale is None else row_scale[p],
                )
                for p in parts
            ]
        )  # fmt: skip

    def _capped(
        self, student: Tensor, teacher: Tensor, keep: Tensor | None, row_scale: Tensor | None
    ) -> Tensor:
        cap, teacher_cap = self.caps
        s = student if cap is None else cap.of(student)
        value = self._rows(s, teacher if teacher_cap is None else teacher_cap.of(teacher), keep, row_scale)
        if cap is not None and row_scale is not None:
            student.copy_(cap.pull_back(s))
        return value

    def _rows(
        self, student: Tensor, teacher: Tensor, keep: Tensor | None, row_scale: Tensor | None
    ) -> Tensor:
        numbers = self.call.numbers
        if row_scale is None:
            return ops.value(student, teacher, keep, *numbers)[0]
        if ops.fuses(self.call.backend):
            return ops.value_and_gradient(student, teacher, keep, row_scale, *numbers, student, None)[0]
        value, stats = ops.value(student, teacher, keep, *numbers)
        ops.gradient(student, teacher, keep, stats, row_scale, None, *numbers, student, None)
        return value


@cache
def _multiplies_into_float32(device_type: str) -> bool:
    """Whether 16-bit products can be added to a float32 matrix without being rounded."""
    if device_type != "cuda" or not hasattr(torch.ops.aten.addmm, "dtype_out"):
        return False
    with torch.inference_mode(False):
        some = torch.zeros((16, 16), device=device_type, dtype=torch.bfloat16)
        total = torch.zeros((16, 16), device=device_type)
        try:
            torch.ops.aten.addmm.dtype_out(total, some, some, torch.float32, out=total)
        except (RuntimeError, NotImplementedError):
            return False
    return True


def product_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Rows of a `[V, H]` product that are computed at once where it is rounded before it is added."""
    step = max(1, _SUMMED // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class _WeightGradient:
    """Σ over chunks of gradientᵀ·states, in float32 where the weight has 16 bits; `[V, H]`."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, columns: int, chunks: int) -> None:
        self.grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
        self.grad[columns:].zero_()
        counted = self.grad[:columns]
        # One chunk needs no sum: the product itself rounds once.
        wide = torch.promote_types(dtype, torch.float32 if chunks > 1 else weight.dtype)
        self.total = counted if counted.dtype == wide else torch.empty_like(counted, dtype=wide)
        self.dtype, self.empty = dtype, True
        self.parts: list[Tensor] = []

    def add(self, gradient: Tensor, states: Tensor) -> None:
        left, total, held = gradient.t(), self.total, 0.0 if self.empty else 1.0
        # With a factor of 0 what the memory held before is not looked at.
        if total.dtype == self.dtype:
            torch.addmm(total, left, states, beta=held, out=total)
        elif _multiplies_into_float32(total.device.type):
            torch.ops.aten.addmm.dtype_out(total, left, states, total.dtype, beta=held, out=total)
        else:
            self._add_rounded(left, states)
        self.empty = False

    def _add_rounded(self, left: Tensor, states: Tensor) -> None:
        """Rounded to 16 bits once per chunk, added up in float32."""
        blocks = list(product_blocks(*self.total.shape))
        if not self.parts:
            # Made once: a new block's pages cost as much as its product.
            self.parts = [self.total.new_empty(self.total[blocks[0]].shape, dtype=d) for d in self._dtypes]
        for block in blocks:
            total = self.total[block]
            product, wide = (part[: len(total)] for part in self.parts)
            torch.mm(left[block], states, out=product)
            if self.empty:
                total.copy_(product)
            else:
                total.add_(wide.copy_(product))

    @property
    def _dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        return self.dtype, self.total.dtype

    def result(self) -> Tensor:
        if self.empty:
            self.total.zero_()
        if self.total.data_ptr() != self.grad.data_ptr():
            self.grad[: len(self.total)].copy_(self.total)
        return self.grad


class _BiasGradient:
    """Σ over rows of the gradient, `[V]`, in float32 at least."""

    def __init__(self, bias: Tensor, dtype: torch.dtype, columns: int) -> None:
        self.bias = bias
        self.total = bias.new_zeros(columns, dtype=torch.promote_types(dtype, torch.float32))

    def add(self, gradient: Tensor) -> None:
        for part in gradient.split(max(1, _SUMMED // gradient.shape[1])):
            self.total += part.sum(0, dtype=self.total.dtype)

    def result(self) -> Tensor:
        grad = torch.zeros_like(self.bias, memory_format=torch.contiguous_format)
        grad[: len(self.total)] = self.total
        return grad


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """The dtypes are settled: autocast must not choose others for the products in here."""
    if autocasts(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _linear(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    rows: Tensor | None,
    row_scale: Tensor | None,
    needs: list[bool],
    *numbers: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call(*numbers)
    device, n = student_hidden.device, len(student_hidden)
    with torch.no_grad(), _without_autocast(device):
        value, to_hidden, *_ = _linear_fake(
            student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias,
            rows, row_scale, [needs[0], False, False], *numbers,
        )  # fmt: skip
        chunks = list(_chunks(rows, n, call, device))
        if not chunks or chunks[0].places is not None:
            value.zero_()
            to_hidden.zero_()
        longest = max((c.rows.stop - c.rows.start for c in chunks), default=0)
        columns = call.vocab_size
        student = _Head(student_hidden, student_weight, student_bias, call.student_dtype, columns, longest)
        teacher = _Head(teacher_hidden, teacher_weight, teacher_bias, call.teacher_dtype, columns, longest)
        sweep = _Sweep(call, student.buffer, teacher.buffer)
        to_weight = _WeightGradient(student_weight, student.dtype, columns, len(chunks)) if needs[1] else None
        to_bias = None if student_bias is None or not needs[2] else _BiasGradient(
            student_bias, student.dtype, columns
        )  # fmt: skip
        for chunk in chunks:
            states = student.states(chunk)
            s, t = student.logits(states), teacher.logits(teacher.states(chunk))
            scale = None
            if row_scale is not None:
                scale = row_scale[chunk.rows] if chunk.places is None else row_scale[chunk.places]
            chunk.put(value, sweep(s, t, chunk.keep, scale))
            if needs[0]:
                chunk.put(to_hidden, torch.mm(s, student.weight))
            if to_weight is not None:
                to_weight.add(s, states)
            if to_bias is not None:
                to_bias.add(s)
        nothing = student_hidden.new_empty(0)
        return (
            value,
            to_hidden,
            nothing if to_weight is None else to_weight.result(),
            nothing.clone() if to_bias is None else to_bias.result(),
        )


def _linear_fake(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    rows: Tensor | None,
    row_scale: Tensor | None,
    needs: list[bool],
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = arithmetic((student_dtype, teacher_dtype))
    value = student_hidden.new_empty(len(student_hidden), dtype=dtype)
    grads = [
        student_hidden.new_empty(0) if x is None or not need else x.new_empty(x.shape)
        for x, need in zip((student_hidden, student_weight, student_bias), needs, strict=True)
    ]
    return value, *grads  # type: ignore[return-value]


_IMPLEMENTATIONS: ops.Implementations = {"linear": (_linear, _linear_fake)}
ops.register(_library, _IMPLEMENTATIONS)

linear = torch.ops.kl_gpu.linear.default

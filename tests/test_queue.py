"""The queue of splits, launched hundreds of times with more splits than run at once: always the same bits.

On a GPU a launch has more programs than are resident, so that some start only when others have ended, and
programs wait for one another. Without one the same calls run small, through the interpreter.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from kl_gpu.backends.interface import RowPair
from kl_gpu.kinds import KINDS
from support import DEVICE, check_gradients, check_value, pair

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("wide_triton_programs")

ON_GPU = DEVICE.type == "cuda"
VOCAB = 40001  # ten splits of a row, the last of them ragged
ROWS, REPEATS = (600, 250) if ON_GPU else (3, 1)
DTYPE = torch.bfloat16

Bits = tuple[Tensor, ...]


def launched(student: Tensor, teacher: Tensor, kind: str, to: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """The rows' values by one launch, which writes the gradients of their sum into the buffers `to`."""
    from kl_gpu.backends import triton

    p = RowPair.of(student[None], teacher[None], None, *KINDS[kind].at(None), 1.0, 1.0)
    ones = torch.ones(len(student), device=DEVICE)
    value, _ = triton.value_and_gradient(
        p, ones, *KINDS[kind].as_ab(*(x if x is None else x[None] for x in to))
    )
    return value


def value_and_gradient(student: Tensor, teacher: Tensor, kind: str, inplace: bool) -> Bits:
    """The gradient is the student's, over its logits where that is wanted."""
    student = student.clone() if inplace else student
    gradient = student if inplace else torch.full_like(student, 7)
    return launched(student, teacher, kind, (gradient, None)), gradient


def differing(some: Bits, others: Bits) -> Tensor:
    """How many numbers have other bits. It stays on the device: looking at it would wait for the launch."""
    integer = {2: torch.int16, 4: torch.int32}
    pairs = [
        (x.view(integer[x.element_size()]), y.view(integer[y.element_size()]))
        for x, y in zip(some, others, strict=True)
    ]
    return torch.stack([(x != y).sum() for x, y in pairs]).sum()


def judge(student: Tensor, teacher: Tensor, kind: str, found: Bits) -> None:
    """The first, the last and a middle row against float64."""
    some = [0, len(student) // 2, len(student) - 1]
    student, teacher = student[some], teacher[some]
    both = torch.full_like(student, 7), torch.full_like(teacher, 7)
    launched(student, teacher, kind, both)
    value, gradient = (x[some] for x in found)
    check_value(value, student, teacher, kind, "triton", "queue")
    check_gradients(student, teacher, (gradient, both[1]), kind, "triton", "queue")


def streams(number: int) -> list[AbstractContextManager[object]]:
    if not ON_GPU:
        return [nullcontext()] * number
    made = [torch.cuda.Stream() for _ in range(number)]
    for stream in made:
        stream.wait_stream(torch.cuda.current_stream())  # the logits are written there
    return [torch.cuda.stream(stream) for stream in made]


def test_one_other_bit_counts() -> None:
    x = torch.zeros(5, dtype=DTYPE, device=DEVICE)
    assert int(differing((x, x), (x, x.clone()))) == 0
    assert int(differing((x, x), (x, -x))) == 5  # −0.0 == 0.0


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_more_splits_than_can_be_resident() -> None:
    processors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    assert 16 * processors < 10 * ROWS  # by their registers, sixteen programs of one warp share one


@pytest.mark.parametrize("resident", [1, None], ids=["lag 1", "usual lag"])
@pytest.mark.parametrize("inplace", [False, True], ids=["apart", "in place"])
@pytest.mark.parametrize("kind", ["forward_kl", "js"])
def test_every_launch_has_the_bits_of_the_first(
    kind: str, inplace: bool, resident: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kl_gpu.backends.triton import pair as kernels

    if resident is not None:  # so few that a row's second stage lies one row behind its first
        monkeypatch.setattr(kernels, "resident_programs", lambda device: resident)
    student, teacher = pair(ROWS, VOCAB, dtype=DTYPE)
    first = value_and_gradient(student, teacher, kind, inplace)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(REPEATS):
        wrong += differing(first, value_and_gradient(student, teacher, kind, inplace))
    assert int(wrong) == 0
    judge(student, teacher, kind, first)


@pytest.mark.parametrize("kind", ["forward_kl", "js"])
def test_two_streams_at_once(kind: str) -> None:
    sides = [pair(ROWS, VOCAB, dtype=DTYPE, spread=spread) for spread in (1.0, 0.1)]
    first = [value_and_gradient(*logits, kind, False) for logits in sides]
    wrong = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in sides]
    both = streams(len(sides))
    for _ in range(REPEATS):
        for at, stream in enumerate(both):
            with stream:
                wrong[at] += differing(first[at], value_and_gradient(*sides[at], kind, False))
    if ON_GPU:
        torch.cuda.synchronize()
    assert [int(count) for count in wrong] == [0, 0]
    for logits, found in zip(sides, first, strict=True):
        judge(*logits, kind, found)

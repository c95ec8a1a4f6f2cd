"""The kernels as GPUs run them: under the worst errors of approximations, in any order, with late stores.

Rows of ten splits, the last of them ragged; value, statistics and both gradients from one queue of work.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import kl_gpu
from kl_gpu.backends.interface import RowPair
from kl_gpu.kinds import KINDS
from support import check_gradients, check_value, pair
from tests.ptx.backend import executed
from tests.ptx.driver import Driver
from tests.ptx.requirements import ARCHITECTURES

VOCAB = 40001
ROWS = 3
# Of settings: few blocks and many, turns of an instruction and of hundreds, stores that come late.
SCHEDULES: dict[str, dict[str, object]] = {
    "one at a time": {"resident": 1},
    "many, often in turn": {"resident": 40, "quantum": 9, "seed": 1, "shuffle": True},
    "late stores": {"resident": 12, "quantum": 30, "seed": 2, "weak": True},
    "late stores, any order": {"resident": 25, "quantum": 100, "seed": 3, "weak": True, "shuffle": True},
}


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Iterator[Driver]:
    with executed(request.param) as driver:
        yield driver


def _on(arch: str, kernel: str, *values: object, always: bool) -> Any:
    """A parameter set. One worker takes all that run one kernel: compiling it takes ten seconds."""
    marks = [pytest.mark.xdist_group(f"ptx {arch} {kernel}")]
    return pytest.param(arch, *values, marks=marks if always else [*marks, pytest.mark.exhaustive])


# The PTX for sm_80 is that for sm_90 but for a dozen comparisons of bfloat16: there `make test` runs a kernel
# with one stage before the gradient, and one with two.
EACH_KIND = pytest.mark.parametrize(
    ("gpu", "kind"),
    [
        _on(arch, of.formula, name, always=arch == "sm_90" or name in ("forward_kl", "js"))
        for arch in ARCHITECTURES
        for name, of in KINDS.items()
    ],
    indirect=["gpu"],
)
# Columns, from row to row, and where the first begins: aligned rows of a buffer that is not, and the like.
GEOMETRIES = ((1030, 1040, 0), (2056, 2057, 3), (1101, 1101, 1))
EACH_GEOMETRY = pytest.mark.parametrize(
    ("gpu", "dtype", "vocab", "stride", "start"),
    [
        _on(
            arch, f"alignment {dtype}", dtype, *geometry,
            always=geometry == (2056, 2057, 3) or (arch, dtype) == ("sm_90", torch.bfloat16),
        )
        for arch in ARCHITECTURES
        for dtype in (torch.bfloat16, torch.float32)
        for geometry in GEOMETRIES
    ],
    indirect=["gpu"],
)  # fmt: skip


def rows() -> tuple[Tensor, Tensor]:
    """Teachers with a few tops on a broad floor, a student near and one far from its own."""
    student, teacher = pair(1, ROWS, VOCAB, scale=2.0, spread=0.3, dtype=torch.bfloat16)
    for row, place in enumerate((77, 20_500, 39_999)):
        teacher[0, row, place : place + 2] += 14
        student[0, row, place] += 13
    student[0, 1] += torch.randn(VOCAB)
    return student, teacher


def both(student: Tensor, teacher: Tensor, kind: str) -> tuple[Tensor, ...]:
    """Value, statistics, and gradients of student and teacher."""
    from kl_gpu.backends import triton

    p = RowPair.of(student, teacher, None, *KINDS[kind].at(None), 1.0, 1.0)
    grads = torch.full_like(p.a, 7), torch.full_like(p.b, 7)
    scale = torch.tensor([0.5, 1.0, -2.0])[: student.shape[1]]
    value, stats = triton.value_and_gradient(p, scale, *grads)
    return value, stats[:, :9], *KINDS[kind].as_ab(*grads)


def equal(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(some, others, strict=True))


@EACH_KIND
@pytest.mark.parametrize("error", ["up", "down", "hashed"])
def test_promises_hold_under_the_worst_errors_of_approximations(gpu: Driver, kind: str, error: str) -> None:
    student, teacher = rows()
    gpu.settings.error = error
    value, _, *grads = both(student, teacher, kind)
    check_value(value[None], student, teacher, kind, "triton", f"{gpu.arch}, approximations {error}")
    check_gradients(
        student, teacher, (grads[0], grads[1]), kind, "triton", f"{gpu.arch}, approximations {error}",
        torch.tensor([[0.5, 1.0, -2.0]]).numpy(),
    )  # fmt: skip


@EACH_KIND
def test_no_bit_depends_on_the_order_of_work(gpu: Driver, kind: str) -> None:
    # And nothing is read that is not there yet, or that a store could still change.
    student, teacher = rows()
    want = both(student, teacher, kind)
    for name, settings in SCHEDULES.items():
        for key, value in settings.items():
            setattr(gpu.settings, key, value)
        gpu.settings.races = True
        assert equal(both(student, teacher, kind), want), name


@EACH_KIND
def test_no_bit_of_a_row_depends_on_the_rows_beside_it(gpu: Driver, kind: str) -> None:
    student, teacher = rows()
    want = both(student, teacher, kind)
    # A row that is alone has no stride, and of an odd V is loaded by another kernel: compiled for one kind.
    n = 1 if kind == "forward_kl" else 2
    fewer = both(student[:, :n], teacher[:, :n], kind)
    assert equal(fewer[:2], tuple(x[:n] for x in want[:2]))
    assert equal(fewer[2:], tuple(x[:, :n] for x in want[2:]))
    assert want[0].unique().numel() == ROWS


@pytest.mark.parametrize(
    "gpu", [_on(arch, "token_stats", always=True) for arch in ARCHITECTURES], indirect=True
)
@pytest.mark.parametrize("error", ["up", "hashed"])
def test_token_statistics_and_log_probabilities(gpu: Driver, error: str) -> None:
    student, teacher = (x[0] for x in rows())
    labels = torch.tensor([5, 20_500, 40_000])
    gpu.settings.error, gpu.settings.races, gpu.settings.weak = error, True, True
    stats = kl_gpu.token_stats(student, teacher, labels, backend="triton")
    for kind in ("forward_kl", "reverse_kl"):
        check_value(
            getattr(stats, kind), student, teacher, kind, "triton", f"token_stats, {gpu.arch} {error}"
        )
    exact = torch.log_softmax(student.double(), -1)
    entropy = -(exact.exp() * exact).sum(-1)
    picked = exact.gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(stats.student_logprob.double(), picked, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(stats.student_entropy.double(), entropy, rtol=5e-6, atol=0)
    logits = student.detach().requires_grad_()
    logprob, found = kl_gpu.token_logprobs(logits, labels, entropy=True, backend="triton")
    torch.testing.assert_close(logprob.double(), picked, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found.double(), entropy, rtol=5e-6, atol=0)
    logprob.sum().backward()
    want = -exact.exp()
    want[torch.arange(ROWS), labels] += 1
    torch.testing.assert_close(logits.grad.double(), want, rtol=2**-8, atol=2e-6)


@EACH_GEOMETRY
def test_no_bit_depends_on_how_rows_are_aligned(
    gpu: Driver, dtype: torch.dtype, vocab: int, stride: int, start: int
) -> None:
    """Rows of wider buffers, and buffers that start anywhere: a thread owns the same columns."""

    def moved(x: Tensor) -> Tensor:
        buffer = torch.full((start + ROWS * stride,), float("nan"), dtype=dtype)
        return buffer.as_strided((1, ROWS, vocab), (ROWS * stride, stride, 1), start).copy_(x)

    student, teacher = pair(1, ROWS, vocab, dtype=dtype)
    # Statistics too: where the compiler fuses a product into a sum in one form alone, only they may show it.
    assert equal(both(moved(student), moved(teacher), "forward_kl"), both(student, teacher, "forward_kl"))
    labels = torch.tensor([5, vocab // 2, vocab - 1])
    want = kl_gpu.token_stats(student[0], teacher[0], labels, backend="triton")
    assert equal(kl_gpu.token_stats(moved(student)[0], moved(teacher)[0], labels, backend="triton"), want)

"""Rows shared by several Triton programs, and value with gradient from one queue of work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kl_gpu.backends.interface import STATS, RowPair
from kl_gpu.kinds import KINDS
from support import DEVICE, check_gradients, check_value, pair
from tests.ptx.fixtures import AS_USUAL

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("triton_execution")
on_interpreter = pytest.mark.skipif(DEVICE.type != "cpu", reason="steers Triton's interpreter")

# Three splits of a row, the last of them ragged.
VOCAB = 40001


def problem(student: Tensor, teacher: Tensor, kind: str, rows: Tensor | None = None) -> RowPair:
    return RowPair.of(student, teacher, rows, *KINDS[kind].at(None), 1.0, 1.0)


def both(p: RowPair, row_scale: Tensor, to_a: bool = True, to_b: bool = True) -> tuple[Tensor, ...]:
    """Value, statistics and gradients in one launch."""
    from kl_gpu.backends import triton

    grads = [torch.full_like(x, 7) if wanted else None for x, wanted in ((p.a, to_a), (p.b, to_b))]
    value, stats = triton.value_and_gradient(p, row_scale, *grads)
    return value, stats, *(grad for grad in grads if grad is not None)


def apart(p: RowPair, row_scale: Tensor) -> tuple[Tensor, ...]:
    """The same in two."""
    from kl_gpu.backends import triton

    value, stats = triton.value(p)
    grads = torch.full_like(p.a, 7), torch.full_like(p.b, 7)
    triton.gradient(p, stats, row_scale, *grads)
    return value, stats, *grads


def same(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    # Behind the statistics lie counters, and the two ways count differently.
    (value, stats, *grads), (other_value, other_stats, *other_grads) = some, others
    pairs = [(value, other_value), (stats[:, :9], other_stats[:, :9]), *zip(grads, other_grads, strict=True)]
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.usefixtures("wide_triton_programs")
@pytest.mark.parametrize("vocab", [1100, VOCAB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_launch_has_the_bits_of_two(kind: str, dtype: torch.dtype, vocab: int) -> None:
    student, teacher = pair(1, 3, vocab, dtype=dtype)
    p = problem(student, teacher, kind, torch.tensor([[True, False, True]], device=DEVICE))
    row_scale = torch.tensor([0.5, 1.0, -2.0], dtype=p.dtype, device=DEVICE)
    found = both(p, row_scale)
    assert same(found, apart(p, row_scale))
    assert found[0][1] == 0
    assert all((grad[0, 1] == 0).all() for grad in found[2:])
    assert all((grad[0, ::2] != 7).all() for grad in found[2:])


def test_shared_rows_keep_the_promises(kind: str) -> None:
    # Splits of several tiles, as on a GPU. The mass in one split, the other splits far below; nearly equal
    # sides; a hole; a NaN.
    student, teacher = pair(1, 5, VOCAB, spread=1e-3)
    student[0, 0, 20000] += 30
    teacher[0, 0, 20001] += 30
    student[0, 1, 17000:] -= 200
    teacher[0, 1, 17000:] -= 200
    teacher[0, 3, 30000], student[0, 3, 30000] = -float("inf"), -float("inf")
    student[0, 4, 39999] = float("nan")
    value, _, *grads = both(problem(student, teacher, kind), torch.ones(5, device=DEVICE))
    to_student, to_teacher = KINDS[kind].as_ab(*grads)
    good = slice(0, 3)
    check_value(value[good], student[0, good], teacher[0, good], kind, "triton", "shared row")
    check_gradients(
        student[0, good],
        teacher[0, good],
        (to_student[0, good], to_teacher[0, good]),
        kind,
        "triton",
        "shared",
    )
    assert 0 < value[3] < 1e-3
    assert all((grad[0, 3, 30000] == 0) and torch.isfinite(grad[0, 3]).all() for grad in grads)
    assert value[4].isnan()
    assert all(grad[0, 4].isnan().all() for grad in grads)


@on_interpreter
@pytest.mark.usefixtures("wide_triton_programs")
def test_splits_are_merged_in_their_order_whoever_comes_last(
    monkeypatch: pytest.MonkeyPatch, triton_execution: str
) -> None:
    if triton_execution != AS_USUAL:
        pytest.skip("steers Triton's interpreter")
    from triton.runtime.interpreter import InterpreterBuilder

    from kl_gpu.backends import triton

    # A KL's value: what has more sweeps than one takes its work from the queue, in the queue's order.
    p = problem(*pair(1, 1, VOCAB), "forward_kl")
    value, stats = triton.value(p)
    visit, visited = InterpreterBuilder.set_grid_idx, []

    def backwards(self: InterpreterBuilder, x: int, y: int, z: int) -> None:
        visited.append(x)
        visit(self, self.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", backwards)
    other_value, other_stats = triton.value(p)
    assert visited == [0, 1, 2]
    assert torch.equal(value, other_value)
    assert torch.equal(stats[:, :9], other_stats[:, :9])


@on_interpreter
@pytest.mark.usefixtures("wide_triton_programs")
@pytest.mark.parametrize("resident", [1, 5, 1000])
def test_bits_do_not_depend_on_how_far_sweeps_lie_apart(
    kind: str, resident: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kl_gpu.backends.triton import pair as kernels

    student, teacher = pair(1, 3, VOCAB, dtype=torch.bfloat16)
    p, row_scale = problem(student, teacher, kind), torch.ones(3, device=DEVICE)
    want = both(p, row_scale)
    monkeypatch.setattr(kernels, "resident_programs", lambda device: resident)
    assert same(both(p, row_scale), want)


@on_interpreter
@pytest.mark.usefixtures("wide_triton_programs")
def test_stages_are_launches_of_their_own_where_programs_may_not_spin(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    kernels = importlib.import_module("kl_gpu.backends.triton.pair")
    student, teacher = pair(1, 3, VOCAB, dtype=torch.bfloat16)
    p = problem(student, teacher, kind, torch.tensor([[True, False, True]], device=DEVICE))
    row_scale = torch.tensor([0.5, 1.0, -2.0], device=DEVICE)
    want = both(p, row_scale)
    launched = []

    class Counted(kernels.PreparedLaunch):
        def __init__(self, kernel: object, programs: int, *arguments: object, **constants: object) -> None:
            launched.append((programs, constants["STAGE"]))
            super().__init__(kernel, programs, *arguments, **constants)

    def never(*_: object) -> None:
        raise AssertionError("a program waits")

    monkeypatch.setattr(kernels, "PreparedLaunch", Counted)
    monkeypatch.setattr(kernels, "_may_spin", lambda device: False)
    monkeypatch.setattr(kernels, "_wait", never)
    assert same(both(p, row_scale), want)
    stages = 2 if KINDS[kind].formula == "kl" else 3
    assert [stage for _, stage in launched] == list(range(stages))
    assert {programs % 3 for programs, _ in launched} == {0}  # three rows, no queue that runs past them


def test_amd_and_intel_do_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    kernels = importlib.import_module("kl_gpu.backends.triton.pair")
    monkeypatch.setattr(torch.version, "hip", None)
    assert kernels._may_spin(torch.device("cuda"))
    assert not kernels._may_spin(torch.device("xpu"))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not kernels._may_spin(torch.device("cuda"))


@pytest.mark.usefixtures("wide_triton_programs")
@pytest.mark.parametrize("incoming", [1.0, 0.25, -3.0, 0.0])
def test_an_incoming_gradient_of_one_leaves_the_buffers_alone(
    incoming: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kl_gpu.backends import triton
    from kl_gpu.backends.triton import pair as kernels

    # Fewer programs than splits: each takes several.
    monkeypatch.setattr(kernels, "resident_programs", lambda device: 2)
    student, teacher = pair(1, 3, VOCAB)
    p, row_scale = problem(student, teacher, "forward_kl"), torch.rand(3, device=DEVICE)
    _, stats = triton.value(p)
    want, got = torch.empty_like(student), torch.full_like(student, 7)
    triton.gradient(p, stats, row_scale * incoming, None, want)
    triton.gradient(p, stats, row_scale, None, got, torch.tensor(incoming, device=DEVICE))
    if incoming == 1:
        assert (got == 7).all()
    else:
        torch.testing.assert_close(got, want, rtol=3e-7, atol=0)
        assert (got != 7).all()


def test_how_a_row_is_shared_depends_on_its_columns_alone() -> None:
    from kl_gpu.backends.triton import launch

    for columns in (1, 1000, 16384, 16385, 32000, 50257, 128256, 151936, 262144, 1_000_003):
        count, width = launch.splits_of(columns, 1024)
        assert (count - 1) * width < columns <= count * width
        assert width <= launch.SPLIT_COLUMNS
        assert width % 1024 == 0
    for n in (1, 4):
        logits = torch.empty(1, n, 50257)
        assert launch.configuration(problem(logits, logits, "tv"), {4: launch.ProgramShape(8)})["LAYOUT"] == 0
    assert STATS > 11  # the counters' places


def test_accesses_are_as_wide_as_rows_are_aligned() -> None:
    # An access at another address than a multiple of its width ends a GPU's context.
    from kl_gpu.backends.triton.launch import Layout, gradient_layout, layout

    whole = torch.zeros(1, 4, 2048, dtype=torch.bfloat16)
    padded = torch.zeros(1, 4, 2049, dtype=torch.bfloat16)
    assert layout(whole, whole) == Layout.ALIGNED_RUNS
    assert layout(whole, padded[..., :2048]) == Layout.RUNS
    assert layout(padded[..., 1:], whole) == Layout.RUNS
    assert layout(whole[..., 4:-4], whole[..., 8:]) == Layout.RUNS
    assert layout(padded[:, :1, :2048], whole[:, :1]) == Layout.ALIGNED_RUNS
    assert layout(padded[:, 1:2, :2048], whole[:, :1]) == Layout.RUNS
    # 2040 columns are whole runs of 8, though no multiple of 16.
    assert layout(torch.zeros(1, 4, 2040, dtype=torch.bfloat16), whole[..., :-8]) == Layout.ALIGNED_RUNS

    even = whole[..., :2046]
    assert layout(even, even) == Layout.PAIRS_IN_WORDS
    assert layout(even, whole[..., 1:-1]) == Layout.PAIRS
    assert layout(padded, padded) == Layout.PAIRS
    assert layout(even.float(), even) == layout(padded.float(), padded.float()) == Layout.SINGLES
    # Runs of four columns: 16 bytes of one side, 8 of the other.
    assert layout(whole.float()[..., 4:], whole[..., 4:]) == Layout.ALIGNED_RUNS
    assert layout(whole.float()[..., 4:], whole[..., 2:-2]) == Layout.RUNS
    assert layout(whole.float()[..., 2:-2], whole[..., 4:]) == Layout.RUNS

    for given in (Layout.PAIRS, Layout.PAIRS_IN_WORDS):
        assert gradient_layout(given, padded, None, padded.clone()) == Layout.PAIRS_IN_WORDS
        assert gradient_layout(given, whole[..., 1:-1], whole[..., 3:]) == Layout.PAIRS_IN_WORDS
        assert gradient_layout(given, even, whole[..., 1:-1]) == Layout.SINGLES
        assert gradient_layout(given, padded[..., :-3], whole[..., :-2]) == Layout.SINGLES
        assert gradient_layout(given, padded[:, :1, :-3], whole[:, :1, :-2]) == Layout.PAIRS_IN_WORDS
    for given in (Layout.RUNS, Layout.ALIGNED_RUNS):
        assert gradient_layout(given, whole, None, whole.clone()) == Layout.ALIGNED_RUNS
        assert gradient_layout(given, whole, whole, padded[..., 1:]) == Layout.SINGLES
        assert gradient_layout(given, whole[..., 4:-4], whole[..., 8:], None) == Layout.SINGLES
    assert gradient_layout(Layout.SINGLES, padded, padded) == Layout.SINGLES


@pytest.mark.usefixtures("wide_triton_programs")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_how_rows_are_loaded_changes_no_bit(kind: str, dtype: torch.dtype) -> None:
    # 3000: a step of two tiles and a tail.
    student, teacher = pair(1, 3, 3000, dtype=dtype)
    row_scale = torch.ones(3, device=DEVICE)
    found = both(problem(student, teacher, kind), row_scale)
    odd = torch.zeros(1, 3, 3001, dtype=dtype, device=DEVICE)
    odd[..., 1:] = student
    assert same(both(problem(odd[..., 1:], teacher, kind), row_scale), found)


def placed(logits: Tensor, at: int, between: int) -> Tensor:
    """The same rows in a buffer of NaN, the first `at` columns from its start, `between` columns apart."""
    _, n, vocab = logits.shape
    step = vocab + between
    buffer = torch.full((at + n * step,), float("nan"), dtype=logits.dtype, device=logits.device)
    # The last row ends where the buffer does.
    return (
        buffer[: at + (n - 1) * step + vocab].as_strided((1, n, vocab), (n * step, step, 1), at).copy_(logits)
    )


@pytest.mark.usefixtures("wide_triton_programs")
@pytest.mark.parametrize("vocab", [1, 2, 1101, 1102, 33793])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_bit_depends_on_where_a_row_lies(dtype: torch.dtype, vocab: int) -> None:
    # 33793: a step of two tiles of 16384, a tile, and a column; rows at odd and even starts, NaN around them.
    student, teacher = (x.expand(1, 3, vocab) for x in pair(1, 1, vocab, dtype=dtype))
    row_scale = torch.ones(3, device=DEVICE)
    want = both(problem(student.contiguous(), teacher.contiguous(), "forward_kl"), row_scale)
    assert all((x == x[..., :1, :]).all() if x.ndim > 2 else (x == x[:1]).all() for x in (want[0], *want[2:]))
    for at, between in ((0, 1), (1, 0), (1, 1), (3, 2)):
        p = problem(placed(student, at, between), placed(teacher, at, between), "forward_kl")
        assert same(both(p, row_scale), want), (at, between)
        p = problem(placed(student, at, between), teacher.contiguous(), "forward_kl")
        assert same(both(p, row_scale), want), (at, between)


@pytest.mark.usefixtures("wide_triton_programs")
@pytest.mark.parametrize("vocab", [1101, 1102])
@pytest.mark.parametrize("at", [0, 1])
def test_gradients_stay_within_their_rows(kind: str, vocab: int, at: int) -> None:
    from kl_gpu.backends import triton

    student, teacher = pair(1, 3, vocab, dtype=torch.bfloat16)
    p, row_scale = problem(student, teacher, kind), torch.ones(3, device=DEVICE)
    want = both(p, row_scale)
    grads = [placed(torch.zeros_like(student), at, 1) for _ in range(2)]
    value, stats = triton.value_and_gradient(p, row_scale, *grads)
    assert same((value, stats, *grads), want)
    for grad in grads:
        outside = torch.as_strided(grad, (2,), (vocab + 1,), at + vocab)
        assert outside.isnan().all()
        assert at == 0 or torch.as_strided(grad, (1,), (1,), 0).isnan()


@pytest.mark.usefixtures("wide_triton_programs")
@pytest.mark.parametrize("kind", ["forward_kl", "js"])
def test_odd_rows_take_their_gradient_in_place(kind: str) -> None:
    from kl_gpu.backends import triton

    student, teacher = pair(1, 3, VOCAB, dtype=torch.bfloat16)
    p, row_scale = problem(student, teacher, kind), torch.ones(3, device=DEVICE)
    value, _, want = both(p, row_scale, to_a=p.a is student, to_b=p.b is student)
    got, _ = triton.value_and_gradient(p, row_scale, *(x if x is student else None for x in (p.a, p.b)))
    assert torch.equal(got, value)
    assert torch.equal(student, want)

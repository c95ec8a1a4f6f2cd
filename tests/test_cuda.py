"""What only a GPU can show: compiled kernels, no wait for the device, CUDA graphs, more than 2³¹ logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import kl_gpu
from support import DEVICE, check_gradients, check_value, pair

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")

ROWS, VOCAB = 8, 40001  # three parts of a row


def test_kernels_are_compiled_not_interpreted() -> None:
    pytest.importorskip("triton")
    from kl_gpu.backends.triton import device_math

    assert not device_math.INTERPRETED.value


@contextmanager
def no_waiting() -> Iterator[None]:
    """PyTorch raises where the host would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_guard_sees_a_wait() -> None:
    number = torch.ones((), device=DEVICE)
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        number.item()


# Calls that go different ways through the library. Made before anybody looks for waits.
OPTIONS: dict[str, Callable[[], dict]] = {
    "mean": dict,
    "none": lambda: {"reduction": "none"},
    "sum of some rows": lambda: {
        "reduction": "sum",
        "mask": torch.rand(ROWS, device=DEVICE) > 0.4,
        "weight": torch.rand(ROWS, device=DEVICE),
    },
    "labels": lambda: {"labels": torch.randint(-1, 2, (ROWS,), device=DEVICE), "ignore_index": -1},
    "normalizer": lambda: {"normalizer": torch.tensor(5.0, device=DEVICE)},
    "two temperatures": lambda: {
        "reduction": "batchmean",
        "temperature": 2.0,
        "teacher_temperature": 0.5,
    },
    "T²": lambda: {"temperature": 2.0, "t_squared": True},
    "columns": lambda: {"vocab_size": VOCAB - 3},
    "in place": lambda: {"inplace": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_waits_for_the_device(backend: str, kind: str, name: str) -> None:
    options = OPTIONS[name]()
    student, teacher = (x.requires_grad_() for x in pair(ROWS, VOCAB))
    incoming = torch.tensor(0.3, device=DEVICE)

    def call() -> None:
        with torch.no_grad():
            kl_gpu.divergence(student, teacher, kind, backend=backend, **options)
        for factor in (None, incoming):  # the gradient of 1 that .backward() brings, and another
            value = kl_gpu.divergence(student * 1, teacher, kind, backend=backend, **options)
            outer = None if factor is None and value.ndim == 0 else incoming.expand_as(value)
            torch.autograd.grad(value, (student, teacher), outer)

    call()  # compiles, and fills the allocator's cache
    with no_waiting():
        call()


def captured(call: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A graph of `call`, and the tensors its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and warms up as capture asks for
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@pytest.mark.parametrize("work", ["value", "value and gradient", "forward then backward", "in place"])
def test_replay_of_a_captured_graph(backend: str, kind: str, work: str) -> None:
    student, teacher = pair(ROWS, VOCAB)
    student.requires_grad_()
    row_gradient = torch.rand(ROWS, device=DEVICE) + 0.5

    def call() -> tuple[Tensor, ...]:
        if work == "value":
            with torch.no_grad():
                return (kl_gpu.divergence(student, teacher, kind, reduction="none", backend=backend),)
        if work == "forward then backward":
            value = kl_gpu.divergence(student, teacher, kind, reduction="none", backend=backend)
            return value.detach(), *torch.autograd.grad(value, student, row_gradient)
        options = {"inplace": work == "in place", "reduction": "sum", "backend": backend}
        value = kl_gpu.divergence(student * 1, teacher, kind, **options)
        return value.detach(), *torch.autograd.grad(value, student)

    graph, results = captured(call)
    for spread in (0.5, 2.0):  # twice, and other logits than those it was captured with
        fresh = pair(ROWS, VOCAB, spread=spread)
        with torch.no_grad():
            for x, new in zip((student, teacher), fresh, strict=True):
                x.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        plain = call()
        assert all(torch.equal(x, y) for x, y in zip(results, plain, strict=True))
        where = f"graph, {work}"
        if results[0].ndim:
            check_value(results[0], *fresh, kind, backend, where)
        if len(results) > 1:
            scale = row_gradient.cpu().double().numpy() if results[0].ndim else 1.0
            check_student_gradient(fresh, results[1], kind, backend, where, scale)


def check_student_gradient(sides, gradient: Tensor, kind: str, backend: str, where: str, scale) -> None:
    """Against float64; the teacher's comes from the same backend outside the graph, and is judged along."""
    student, teacher = (x.detach().clone().requires_grad_() for x in sides)
    value = kl_gpu.divergence(student, teacher, kind, reduction="none", backend=backend)
    (other,) = torch.autograd.grad(
        value, teacher, torch.as_tensor(scale, device=DEVICE).expand_as(value).float()
    )
    check_gradients(*sides, (gradient, other), kind, backend, where, scale)


@pytest.mark.xdist_group("large")  # two at a time would not find their memory
def test_more_than_2_31_logits(backend: str, kind: str) -> None:
    if backend == "eager" and kind != "forward_kl":
        pytest.skip("some seconds a kind, and every kind walks rows alike")
    vocab = 128256
    rows = 2**31 // vocab + 3
    room = 3 * rows * vocab * 2 + 4 * 2**30
    if torch.cuda.mem_get_info()[0] < room:
        pytest.skip(f"needs {room / 2**30:.0f} GiB of GPU memory")
    student, teacher = (torch.empty(rows, vocab, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    for x in (student, teacher):
        x.normal_()
    student.requires_grad_()
    value = kl_gpu.divergence(student, teacher, kind, reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    for some in (slice(0, 1), slice(rows - 3, rows)):
        s, t = (x[some].detach().clone() for x in (student, teacher))
        s.requires_grad_()
        alone = kl_gpu.divergence(s, t, kind, reduction="none", backend=backend)
        assert torch.equal(value[some], alone)
        assert torch.equal(gradient[some], torch.autograd.grad(alone.sum(), s)[0])
        check_value(alone, s, t, kind, backend, "2³¹ logits")

"""Between forward and backward, checkpoint and save_on_cpu have charge of all memory; bits stay."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from entries import NAMES, by_backward, entries
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import kl_gpu
from kl_gpu import autograd
from kl_gpu.backends.registry import resolve
from support import DEVICE

CHUNKS = 8


def live_bytes() -> int:
    """Of all tensors that Python can reach, each storage once."""
    gc.collect()
    dense = (Tensor, torch.nn.Parameter)
    # Another test's sparse tensor has no storage to ask for.
    tensors = [x for x in gc.get_objects() if type(x) in dense and x.layout is torch.strided]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def divergence_chunk(backend: str) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    student, teacher = (torch.randn(2 * CHUNKS, 64, device=DEVICE) for _ in range(2))

    def chunk(s: Tensor, t: Tensor) -> Tensor:
        return kl_gpu.kl_div(s * 2, t, reduction="sum", backend=backend)

    return chunk, student, teacher


def linear_chunk(backend: str) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    hidden, teacher = (torch.randn(2 * CHUNKS, 8, device=DEVICE) for _ in range(2))
    weights = [torch.randn(64, 8, device=DEVICE) for _ in range(2)]
    weights[0].requires_grad_()

    def chunk(h: Tensor, x: Tensor) -> Tensor:
        return kl_gpu.linear_div(h, weights[0], x, weights[1], reduction="sum", backend=backend)

    return chunk, hidden, teacher


@pytest.mark.parametrize("chunk_of", [divergence_chunk, linear_chunk])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_holds_nothing(backend: str, chunk_of, use_reentrant: bool) -> None:
    chunk, student, teacher = chunk_of(backend)

    def run(held: list[int], apply: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        leaf = student.clone().requires_grad_()
        before = live_bytes()
        parts = zip(leaf.split(2), teacher.split(2), strict=True)
        total = torch.stack([apply(chunk, s, t) for s, t in parts]).sum()
        held.append(live_bytes() - before)
        total.backward()
        return total.detach(), leaf.grad

    held: list[int] = []
    want = run([], lambda function, *x: function(*x))
    options = {"use_reentrant": use_reentrant, "preserve_rng_state": False}
    got = run(held, lambda function, *x: checkpoint(function, *x, **options))
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)
    assert want[1].abs().max() > 1e-4
    # One chunk's logits or gradient, of eight; plain PyTorch holds a number for each.
    assert held[0] < 2 * 64 * 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_same_bits_when_others_manage_what_is_saved(backend: str, name: str, reduction: str) -> None:
    entry = entries()[name]
    others = *entry.constants, *entry.shared

    def loss(*x: Tensor) -> Tensor:
        return entry.call(*x, backend=backend, reduction=reduction)

    def managed(*x: Tensor) -> Tensor:
        with save_on_cpu():
            return loss(*x)

    def again(*x: Tensor) -> Tensor:
        return checkpoint(loss, *x, use_reentrant=False)

    want = by_backward(loss, entry.student, *others)
    for function in (managed, again):
        for x, y in zip(by_backward(function, entry.student, *others), want, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("chunk_of", [divergence_chunk, linear_chunk])
def test_what_is_handed_over_is_no_gradient(backend: str, chunk_of) -> None:
    # save_on_cpu would carry it to the host and back, for as much as computing it again takes.
    chunk, student, teacher = chunk_of(backend)
    leaf = student.requires_grad_()
    saved: list[Tensor] = []
    before = live_bytes()
    with saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        total = chunk(leaf, teacher)
    # The logits are the chunk's own, and are handed over, with a few numbers a row; a gradient would be as
    # large again. linear_div's smallest is of the hidden states.
    logits = student.nbytes if chunk_of is divergence_chunk else 0
    assert live_bytes() - before < logits + (student.nbytes // 2 if logits else student.nbytes)
    total.backward()
    # Twice, with another incoming gradient: nothing was written over.
    first = leaf.grad.clone()
    with saved_tensors_hooks(lambda x: x, lambda x: x):
        total = chunk(leaf, teacher)
    for factor in (1.0, -3.0, 1.0):
        outer = torch.tensor(factor, device=DEVICE)
        (gradient,) = torch.autograd.grad(total, leaf, outer, retain_graph=True)
        torch.testing.assert_close(gradient, factor * first, rtol=1e-5, atol=1e-5)


def test_hooks_are_found_without_asking_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch tells since 2.8.
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(autograd, "_top_hooks", None)
        assert not autograd.are_saved_tensors_managed()
        with saved_tensors_hooks(lambda x: x, lambda x: x):
            assert autograd.are_saved_tensors_managed()
            with torch.no_grad():
                assert autograd.are_saved_tensors_managed()
        assert not autograd.are_saved_tensors_managed()
    test_checkpoint_holds_nothing(resolve(None, DEVICE), divergence_chunk, False)

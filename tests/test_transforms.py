"""torch.func: grad, grad_and_value and vmap give what backward() gives; all else is refused by name."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.distributed as dist
from entries import NAMES, SAMPLES, Entry, by_backward, entries
from torch.func import grad, grad_and_value, hessian, jacrev, jvp, vjp, vmap

import kl_gpu
from support import DEVICE, is_slow, pair

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-7)


def _loss(entry: Entry, backend: str, reduction: str):
    return lambda *x: entry.call(*x, backend=backend, reduction=reduction).sum()


def _samples(entry: Entry, loss) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sample's value and gradient, by backward()."""
    one_by_one = [
        by_backward(loss, entry.student[i], *(x[i] for x in entry.constants), *entry.shared)
        for i in range(SAMPLES)
    ]
    return torch.stack([value for value, _ in one_by_one]), torch.stack([grad for _, grad in one_by_one])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradients_are_those_of_backward(backend: str, name: str, reduction: str) -> None:
    entry = entries()[name]
    loss = _loss(entry, backend, reduction)
    constants = *entry.constants, *entry.shared
    value, gradient = by_backward(loss, entry.student, *constants)
    close(grad(loss)(entry.student, *constants), gradient)
    if is_slow(backend):
        return
    got, got_value = grad_and_value(loss)(entry.student, *constants)
    close(got_value, value)
    close(got, gradient)
    close(jacrev(loss)(entry.student, *constants), gradient)
    _, pull = vjp(lambda x: loss(x, *constants), entry.student)
    close(pull(torch.tensor(-3.0, device=DEVICE))[0], -3 * gradient)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_vmap_over_samples(backend: str, name: str, reduction: str) -> None:
    entry = entries()[name]
    loss = _loss(entry, backend, reduction)
    arguments = entry.student, *entry.constants, *entry.shared
    dims = *(0 for _ in (entry.student, *entry.constants)), *(None for _ in entry.shared)
    values, gradients = _samples(entry, loss)
    close(vmap(grad(loss), dims)(*arguments), gradients)
    if is_slow(backend):
        return
    close(vmap(loss, dims)(*arguments), values)
    close(grad(lambda *x: vmap(loss, dims)(*x).sum())(*arguments), gradients)
    close(by_backward(vmap(loss, dims), *arguments)[1], gradients)


@pytest.mark.parametrize("which", [0, 1])
def test_only_one_side_is_mapped(backend: str, which: int) -> None:
    sides = pair(3, 2, 24)
    mapped, other = sides[which], sides[1 - which][0]

    def loss(x, y):
        return kl_gpu.kl_div(*((x, y) if which == 0 else (y, x)), backend=backend)

    want = [by_backward(lambda y, x=x: loss(x, y), other) for x in mapped]
    close(vmap(loss, (0, None))(mapped, other), torch.stack([value for value, _ in want]))
    # Of the side that all samples share, each sample has a gradient of its own.
    close(vmap(grad(loss, argnums=1), (0, None))(mapped, other), torch.stack([g for _, g in want]))
    close(grad(lambda y: vmap(loss, (0, None))(mapped, y).sum())(other), sum(g for _, g in want))


def test_mapped_in_any_dimension_with_all_options(backend: str) -> None:
    student, teacher = pair(2, 4, 24)
    labels = torch.tensor([[1, -100, 3, 4], [5, 6, -100, -100]], device=DEVICE)
    weight = torch.rand(2, 4, device=DEVICE)
    mask = torch.tensor([[True, True, True, False], [True, True, False, True]], device=DEVICE)

    def loss(s, t, labels, mask, weight):
        options = {"labels": labels[None], "mask": mask[None], "weight": weight[None], "shift": True}
        return kl_gpu.kl_div(s[None], t[None], vocab_size=20, inplace=True, **options, backend=backend)

    arguments = student, teacher, labels, mask, weight
    want = torch.stack([loss(*(x[i] for x in arguments)) for i in range(2)])
    moved = student.permute(1, 2, 0).contiguous(), teacher.transpose(0, 1), labels.t(), mask, weight
    dims = 2, 1, 1, 0, 0
    close(vmap(loss, dims)(*moved), want)
    got = vmap(grad(loss), dims)(*moved)
    for i in range(2):
        close(got[i], by_backward(lambda s, *x: loss(s * 1, *x), *(x[i] for x in arguments))[1])


def test_nested_vmaps_and_rows(backend: str) -> None:
    # A vmap over rows: one row at a time is what the kernels see as one more leading dimension.
    student, teacher = pair(2, 3, 24)
    rows = vmap(vmap(lambda s, t: kl_gpu.kl_div(s, t, reduction="none", backend=backend)))
    close(rows(student, teacher), kl_gpu.kl_div(student, teacher, reduction="none", backend=backend))


def test_gradients_of_the_heads_weights_per_sample(backend: str) -> None:
    entry = entries()["linear_div"]
    student, (teacher,), (weight, teacher_weight) = entry.student, entry.constants, entry.shared

    def loss(w, h, x):
        return entry.call(h, x, w, teacher_weight, backend=backend)

    got = vmap(grad(loss), (None, 0, 0))(weight, student, teacher)
    for i in range(SAMPLES):
        close(got[i], by_backward(loss, weight, student[i], teacher[i])[1])


@pytest.mark.parametrize("name", ["linear_token_logprobs", "linear_topk_div"])
def test_gradients_of_one_heads_weight_per_sample(backend: str, name: str) -> None:
    entry = entries()[name]
    (weight,) = entry.shared

    def loss(w, *rows):
        return entry.call(*rows, w, backend=backend).sum()

    rows = entry.student, *entry.constants
    got = vmap(grad(loss), (None, *(0 for _ in rows)))(weight, *rows)
    for i in range(SAMPLES):
        close(got[i], by_backward(loss, weight, *(x[i] for x in rows))[1])


def test_statistics_of_heads_under_vmap(backend: str) -> None:
    entry = entries()["linear_div"]
    sides = entry.student, *entry.constants
    labels = torch.tensor([[1, 2, -100], [3, -100, 4]], device=DEVICE)

    def stats(hidden, teacher, labels):
        weight, teacher_weight = entry.shared
        return kl_gpu.linear_token_stats(hidden, weight, teacher, teacher_weight, labels, backend=backend)

    for got, want in zip(vmap(stats)(*sides, labels), stats(*sides, labels), strict=True):
        close(got, want)


def test_statistics_under_vmap(backend: str) -> None:
    student, teacher = pair(2, 3, 24)
    labels = torch.tensor([[1, 2, -100], [3, -100, 4]], device=DEVICE)
    stats = partial(kl_gpu.token_stats, backend=backend)
    for got, want in zip(vmap(stats)(student, teacher, labels), stats(student, teacher, labels), strict=True):
        close(got, want)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_what_is_refused_by_name(backend: str, name: str, reduction: str) -> None:
    entry = entries()[name]
    loss = _loss(entry, backend, reduction)
    student, others = entry.student, (*entry.constants, *entry.shared)
    call = partial(lambda others, x: loss(x, *others), others)
    with pytest.raises(RuntimeError, match="kl_gpu has no forward-mode derivatives"):
        jvp(call, (student,), (torch.ones_like(student),))
    with pytest.raises(RuntimeError, match="kl_gpu has no forward-mode derivatives"):
        hessian(call)(student)
    with pytest.raises(RuntimeError, match="kl_gpu has no second derivatives"):
        grad(lambda x: grad(call)(x).square().sum())(student)
    for requires_grad in (False, True):
        with fwAD.dual_level():
            leaf = student.clone().requires_grad_(requires_grad)
            dual = fwAD.make_dual(leaf, torch.ones_like(leaf))
            with pytest.raises(RuntimeError, match="kl_gpu has no forward-mode derivatives"):
                call(dual)


def test_vocab_parallel_entries_refuse_transforms() -> None:
    student, teacher = pair(3, 24)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match=r"kl_gpu\.vocab_parallel_div has no rule"):
            grad(lambda s: kl_gpu.distributed.vocab_parallel_div(s, teacher))(student)
        ids = torch.tensor([1, 2, 3], device=DEVICE)
        with pytest.raises(RuntimeError, match=r"kl_gpu\.vocab_parallel_token_logprobs has no rule"):
            vmap(kl_gpu.distributed.vocab_parallel_token_logprobs)(student, ids)
        with pytest.raises(RuntimeError, match=r"kl_gpu\.vocab_parallel_linear_token_logprobs has no rule"):
            vmap(kl_gpu.distributed.vocab_parallel_linear_token_logprobs, (0, None, 0))(student, teacher, ids)
    finally:
        dist.destroy_process_group()


def test_a_teachers_numbers_are_still_checked_under_vmap(backend: str) -> None:
    if DEVICE.type != "cpu":
        pytest.skip("on a GPU asking would wait for the device")
    student, _ = pair(2, 3, 24)
    logprobs, ids = torch.zeros(2, 3, 2), torch.tensor([0, 1]).expand(2, 3, 2)
    with pytest.raises(ValueError, match="teacher_logprobs must be log-probabilities"):
        vmap(partial(kl_gpu.topk_div, backend=backend))(student, logprobs, ids)
    with pytest.raises(ValueError, match="token_ids must be within"):
        vmap(partial(kl_gpu.token_logprobs, backend=backend))(student, torch.full((2, 3), 24))

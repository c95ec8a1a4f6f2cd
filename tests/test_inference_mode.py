"""A teacher made under torch.inference_mode gives the bits of one made under no_grad, without a copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from entries import HEADS, NAMES, PER_TOKEN, by_backward, entries
from torch import Tensor
from torch.func import grad, vmap

import kl_gpu
from kl_gpu.rl import ESTIMATORS, kl_penalty
from support import DEVICE, pair


def made_there(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def per_row_options() -> dict[str, Tensor]:
    return {
        "mask": torch.tensor([[True, False, True], [True, True, True]], device=DEVICE),
        "labels": torch.tensor([[1, 2, -100], [3, 4, 5]], device=DEVICE),
        "weight": torch.tensor([[0.5, 1.0, 2.0], [3.0, 1.0, 0.25]], device=DEVICE),
    }


def _same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    for x, y in zip(got, want, strict=True):
        assert not x.is_inference()
        assert torch.equal(x, y)


@pytest.mark.pairs
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("inplace", [False, True])
def test_constants_of_every_entry(backend: str, name: str, reduction: str, inplace: bool) -> None:
    entry = entries()[name]
    options = {} if name in HEADS else {"inplace": inplace}

    def loss(x: Tensor, *others: Tensor) -> Tensor:
        return entry.call(x * 1, *others, backend=backend, reduction=reduction, **options)

    constants = *entry.constants, *entry.shared
    want = by_backward(loss, entry.student, *constants)
    _same(by_backward(loss, entry.student, *map(made_there, constants)), want)


@pytest.mark.pairs
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shift", [False, True])
def test_options_of_every_entry(backend: str, name: str, reduction: str, shift: bool) -> None:
    entry = entries()[name]
    options = per_row_options()
    if reduction == "mean":
        options["normalizer"] = torch.tensor(3.0, device=DEVICE)
    if name in PER_TOKEN:
        options = {"mask": options["mask"]}

    def loss(**options: Tensor) -> Callable[..., Tensor]:
        return lambda *x: entry.call(*x, backend=backend, reduction=reduction, shift=shift, **options)

    arguments = entry.student, *entry.constants, *entry.shared
    want = by_backward(loss(**options), *arguments)
    _same(by_backward(loss(**{key: made_there(x) for key, x in options.items()}), *arguments), want)


@pytest.mark.pairs
@pytest.mark.parametrize("name", [name for name in NAMES if name not in PER_TOKEN])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("option", ["mask", "labels", "weight"])
def test_one_option_of_every_entry(backend: str, name: str, reduction: str, shift: bool, option: str) -> None:
    # Together they are combined, and what is saved is the result; alone it is what was given.
    entry, rows = entries()[name], per_row_options()[option]

    def loss(x: Tensor) -> Callable[..., Tensor]:
        own = {option: x}
        return lambda *y: entry.call(*y, backend=backend, reduction=reduction, shift=shift, **own)

    arguments = entry.student, *entry.constants, *entry.shared
    want = by_backward(loss(rows), *arguments)
    _same(by_backward(loss(made_there(rows)), *arguments), want)


def test_a_student_made_there(backend: str) -> None:
    student, teacher = pair(2, 3, 24)

    def loss(t: Tensor, s: Tensor) -> Tensor:
        return kl_gpu.kl_div(s, t, direction="reverse", inplace=True, backend=backend)

    want = by_backward(loss, teacher, student)
    frozen = made_there(student)
    _same(by_backward(loss, teacher, frozen), want)
    assert torch.equal(frozen, student)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]], device=DEVICE)
    assert torch.equal(
        kl_gpu.token_logprobs(frozen, ids, inplace=True, backend=backend),
        kl_gpu.token_logprobs(student, ids, backend=backend),
    )
    for got, plain in zip(
        kl_gpu.token_stats(frozen, made_there(teacher), made_there(ids), backend=backend),
        kl_gpu.token_stats(student, teacher, ids, backend=backend),
        strict=True,
    ):
        assert torch.equal(got, plain)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_penalty(estimator: str) -> None:
    policy, ref = pair(3, 4)
    for options in ({}, {"clamp": 2.0}, {"straight_through": True}):

        def loss(p: Tensor, r: Tensor, options=options) -> Tensor:
            return kl_penalty(p, r, estimator, **options)

        _same(by_backward(loss, policy, made_there(ref)), by_backward(loss, policy, ref))


def test_module_and_heads(backend: str) -> None:
    student, teacher = pair(2, 3, 24)
    module = kl_gpu.DivergenceLoss("jeffreys", backend=backend)
    _same(by_backward(module, student, made_there(teacher)), by_backward(module, student, teacher))
    # A frozen head of the student, too: only its hidden states get a gradient.
    entry = entries()["linear_div"]
    bias = torch.randn(24, device=DEVICE)

    def loss(h: Tensor, *others: Tensor) -> Tensor:
        x, w, tw, b, tb = others
        return kl_gpu.linear_div(h, w, x, tw, student_bias=b, teacher_bias=tb, backend=backend)

    constants = *entry.constants, *entry.shared, bias, -bias
    _same(
        by_backward(loss, entry.student, *map(made_there, constants)),
        by_backward(loss, entry.student, *constants),
    )


def test_nothing_is_copied(backend: str) -> None:
    student, teacher = pair(2, 3, 24)
    teacher, leaf = made_there(teacher), student.requires_grad_()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        kl_gpu.kl_div(leaf, teacher, reduction="none", backend=backend)
    assert teacher.data_ptr() in saved


@pytest.mark.parametrize("name", NAMES)
def test_under_torch_func(backend: str, name: str) -> None:
    entry = entries()[name]
    constants = *map(made_there, entry.constants), *map(made_there, entry.shared)
    dims = *(0 for _ in (entry.student, *entry.constants)), *(None for _ in entry.shared)

    def loss(*x: Tensor) -> Tensor:
        return entry.call(*x, backend=backend).sum()

    _, want = by_backward(loss, entry.student, *entry.constants, *entry.shared)
    torch.testing.assert_close(grad(loss)(entry.student, *constants), want, rtol=1e-5, atol=1e-7)
    value, gradient = by_backward(vmap(loss, dims), entry.student, *constants)
    again = by_backward(vmap(loss, dims), entry.student, *entry.constants, *entry.shared)
    _same((value, gradient), again)


def test_under_compile() -> None:
    # One graph: compiling takes longer than all else here.
    heads = "linear_div", "linear_topk_div"
    calls = {name: entry for name, entry in entries().items() if name in ("kl_div", "topk_div", *heads)}

    def loss(
        student: Tensor, hidden: Tensor, constants: dict[str, list[Tensor]], rows: dict[str, Tensor]
    ) -> Tensor:
        tokens = {"shift": True, "mask": rows["mask"]}
        total = kl_gpu.token_logprobs(student, rows["labels"], **tokens).sum()
        head = constants["linear_topk_div"][-1]
        total = total + kl_gpu.linear_token_logprobs(hidden, head, rows["labels"], **tokens).sum()
        for name, entry in calls.items():
            first = hidden if name in heads else student
            total = total + entry.call(first, *constants[name], shift=name == "kl_div", **rows)
        return total

    def gradients(function: Callable[..., Tensor], made: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [calls[name].student.clone().requires_grad_() for name in ("kl_div", "linear_div")]
        constants = {name: list(map(made, (*x.constants, *x.shared))) for name, x in calls.items()}
        rows = {key: made(x) for key, x in per_row_options().items()}
        value = function(*leaves, constants, rows)
        return [value, *torch.autograd.grad(value, leaves)]

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True)
    want = gradients(loss, lambda x: x)
    for got, exact in zip(gradients(compiled, made_there), want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6)
        assert exact.abs().max() > 1e-3

"""Differentiation: against finite differences, twice, after modification, in place."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fwAD

import kl_gpu
from kl_gpu.backends import registry
from kl_gpu.ops import pair as ops
from support import DEVICE, check_gradients, pair


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck_of_both_sides(backend: str, kind: str, temperature: float) -> None:
    if kind == "lk":
        pytest.skip("no gradient flows through its weight; test_draft_kinds.py has its gradient")
    student, teacher = (x.requires_grad_() for x in pair(2, 3, 13, scale=1.0, dtype=torch.float64))
    weight = torch.rand(2, 3, device=DEVICE, dtype=torch.float64)

    def call(s, t):
        return kl_gpu.divergence(
            s, t, kind, temperature=temperature, weight=weight, reduction="none", backend=backend
        )

    # fast_mode projects on random directions; column by column the interpreter would take minutes.
    fast = backend == "triton" and DEVICE.type == "cpu"
    assert torch.autograd.gradcheck(call, (student, teacher), eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=fast)


def test_only_the_side_that_asks_gets_a_gradient(backend: str, kind: str) -> None:
    for which in (0, 1):
        sides = list(pair(3, 40))
        sides[which].requires_grad_()
        kl_gpu.divergence(*sides, kind, reduction="sum", backend=backend).backward()
        assert sides[which].grad.abs().max() > 1e-4
        assert sides[1 - which].grad is None


def test_a_teacher_that_is_the_student(backend: str, kind: str) -> None:
    # One tensor on both sides: the two gradients add up, to exactly zero.
    logits, _ = pair(3, 40)
    logits.requires_grad_()
    kl_gpu.divergence(logits, logits, kind, backend=backend).backward()
    assert (logits.grad == 0).all()


def test_second_backward_with_retain_graph_is_not_scaled_twice(backend: str, kind: str) -> None:
    student, teacher = pair(3, 40)
    student.requires_grad_()
    loss = kl_gpu.divergence(student, teacher, kind, backend=backend)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    (second,) = torch.autograd.grad(loss, student)
    assert torch.equal(first, second)
    assert first.abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_incoming_gradient_other_than_one(backend: str, kind: str, dtype: torch.dtype) -> None:
    # Scaling what was rounded to 16 bits, or written over before, would be wrong in the second figure.
    student, teacher = pair(3, 300, dtype=dtype)
    leaves = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    loss = kl_gpu.divergence(*leaves, kind, backend=backend)
    for factor in (0.3, 1.0, -7.0, 1.0):
        outer = torch.tensor(factor, device=DEVICE)
        grads = torch.autograd.grad(loss, leaves, outer, retain_graph=True)
        check_gradients(student, teacher, grads, kind, backend, f"× {factor}", scale=factor / 3)


def test_factors_that_need_a_gradient_get_one(backend: str, kind: str) -> None:
    student, teacher = pair(4, 40)
    student.requires_grad_()
    weight = torch.rand(4, device=DEVICE, requires_grad=True)
    normalizer = torch.tensor(3.0, device=DEVICE, requires_grad=True)
    loss = kl_gpu.divergence(student, teacher, kind, weight=weight, normalizer=normalizer, backend=backend)
    loss.backward()
    rows = kl_gpu.divergence(student.detach(), teacher, kind, reduction="none", backend=backend)
    torch.testing.assert_close(weight.grad, rows / 3, rtol=1e-6, atol=0)
    torch.testing.assert_close(normalizer.grad, -loss.detach() / 3, rtol=1e-6, atol=0)
    assert student.grad.abs().max() > 1e-4


def test_second_derivative_raises(backend: str, kind: str) -> None:
    student, teacher = pair(3, 40)
    student.requires_grad_()
    loss = kl_gpu.divergence(student, teacher, kind, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        (gradient**2).sum().backward()


def test_second_derivative_raises_as_part_of_a_larger_loss(backend: str) -> None:
    # A gradient penalty added to another loss must not quietly lose our share of it.
    student, teacher = pair(3, 40)
    student.requires_grad_()
    loss = kl_gpu.kl_div(student, teacher, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        (student.square().sum() + gradient.square().sum()).backward()


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_derivatives_without_requires_grad_raise(backend: str, which: int, reduction: str) -> None:
    # Forward mode differentiates inputs that require no gradient: an operator called past the
    # autograd.Function would answer it with zeros.
    sides = pair(3, 40)
    ones = torch.ones_like(sides[which])

    def call(x):
        replaced = [x if i == which else side for i, side in enumerate(sides)]
        return kl_gpu.kl_div(*replaced, reduction=reduction, backend=backend).sum()

    def call_of_each_row(x):
        rows = torch.func.vmap(lambda s, t: kl_gpu.kl_div(s, t, reduction=reduction, backend=backend))
        return rows(*(x if i == which else side for i, side in enumerate(sides))).sum()

    for function in (call, call_of_each_row):
        with pytest.raises(RuntimeError, match="jvp"):
            torch.func.jvp(function, (sides[which],), (ones,))
    with fwAD.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        call(fwAD.make_dual(sides[which], ones))


@pytest.mark.parametrize("which", [0, 1])
def test_logits_modified_between_forward_and_backward(backend: str, kind: str, which: int) -> None:
    leaf = torch.zeros(3, 40, device=DEVICE, requires_grad=True)
    sides = [leaf + x for x in pair(3, 40)]
    loss = kl_gpu.divergence(*sides, kind, backend=backend)
    sides[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.pairs
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_writes_the_gradient_over_the_logits(backend: str, kind: str, dtype, shift: bool) -> None:
    student, teacher = pair(2, 4, 300, dtype=dtype)
    leaf = student.clone().requires_grad_()
    want_leaf = student.clone().requires_grad_()
    options = {"shift": shift, "vocab_size": 290, "backend": backend}
    kl_gpu.divergence(want_leaf * 1, teacher, kind, **options).backward()
    logits = leaf * 1
    # Asks autograd for the very tensor our backward returned.
    loss = kl_gpu.divergence(logits, teacher, kind, inplace=True, **options)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    assert torch.equal(gradient, want_leaf.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


def test_inplace_without_a_gradient_leaves_the_logits_alone(backend: str, kind: str) -> None:
    student, teacher = pair(2, 300)
    before = student.clone()
    kl_gpu.divergence(student, teacher, kind, inplace=True, backend=backend)
    assert torch.equal(student, before)


def test_inplace_with_both_gradients(backend: str, kind: str) -> None:
    student, teacher = pair(3, 2055)
    leaves = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    kl_gpu.divergence(
        leaves[0] * 1, leaves[1], kind, reduction="sum", inplace=True, backend=backend
    ).backward()
    check_gradients(student, teacher, (leaves[0].grad, leaves[1].grad), kind, backend, "in place")


def test_no_graph_without_grad(backend: str, kind: str) -> None:
    student, teacher = pair(2, 30)
    student.requires_grad_()
    with torch.no_grad():
        assert not kl_gpu.divergence(student, teacher, kind, backend=backend).requires_grad
    with torch.inference_mode():
        assert kl_gpu.divergence(student, teacher, kind, backend=backend) > 0


def test_works_under_autocast(backend: str, kind: str) -> None:
    head = torch.randn(16, 300, device=DEVICE, requires_grad=True)
    hidden, (_, teacher) = torch.randn(4, 16, device=DEVICE), pair(4, 300)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        logits = hidden @ head
        loss = kl_gpu.divergence(logits, teacher, kind, backend=backend)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert torch.isfinite(head.grad).all()
    assert head.grad.abs().max() > 0


def test_a_reduction_takes_one_visit_of_each_row(backend: str, kind: str, monkeypatch) -> None:
    seen = []
    for name in ("value", "gradient", "value_and_gradient"):
        run = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, name=name, run=run: seen.append(name) or run(*a))
    student, teacher = pair(2, 30)
    student.requires_grad_()
    first, then = "value_and_gradient" if registry.load(backend).fuses else "value", ["gradient"]
    kl_gpu.divergence(student, teacher, kind, backend=backend).backward()
    # On the CPU an incoming gradient of 1 is seen at once: what forward wrote is the result.
    assert seen == [first, *([] if first != "value" and DEVICE.type == "cpu" else then)]
    assert student.grad.abs().max() > 1e-4
    seen.clear()
    (2 * kl_gpu.divergence(student, teacher, kind, backend=backend)).backward()
    assert seen == [first, *then]

"""The kinds that draft models are trained with: −log α, and the KL and TV mixed by α = Σ min(p, q)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import kl_gpu
from kl_gpu import reference
from support import DEVICE, check_gradients, check_value, pair, to_numpy

INF = math.inf


def apart(gap: float, vocab: int = 700, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """A floor, and a top on each side `gap` above it in another column."""
    student, teacher = (torch.randn(3, vocab, device=DEVICE) for _ in range(2))
    student[:, 17] += gap
    teacher[:, vocab - 3] += gap
    teacher[:, 17] -= gap / 3
    return student.to(dtype), teacher.to(dtype)


def evaluate(student, teacher, kind, backend, **options):
    sides = student.detach().clone().requires_grad_(), teacher.detach().clone().requires_grad_()
    value = kl_gpu.divergence(*sides, kind, reduction="none", backend=backend, **options)
    return value.detach(), *torch.autograd.grad(value.sum(), sides)


@pytest.mark.parametrize("gap", [8.0, 20.0, 30.0, 35.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_is_good_relative_to_itself(backend: str, gap: float, dtype: torch.dtype) -> None:
    """Down to 1e-13; 1 − TV would have nothing of it below 1e-7."""
    student, teacher = apart(gap, dtype=dtype)
    value, *grads = evaluate(student, teacher, "nla", backend)
    sides = to_numpy(student), to_numpy(teacher)
    want = reference.divergence(*sides, "nla")
    assert want.max() < 30
    assert gap < 35 or want.max() > 27
    assert np.abs(np.expm1(want - to_numpy(value))).max() < 2e-6
    check_gradients(student, teacher, tuple(grads), "nla", backend, f"gap {gap}")
    if dtype != torch.float32:
        return  # tops of 16 bits lie a round number apart, and many a column is as good as a tie
    for grad, exact in zip(grads, reference.gradients(*sides, "nla"), strict=True):
        # Relative to the gradient itself; next to a column of p = q nobody can say on which side it lies.
        sure = np.abs(np.subtract(*map(reference.log_softmax, sides))) > 1e-5
        error = np.abs(to_numpy(grad) - exact)[sure]
        assert (error <= 2.1e-6 * np.abs(exact)[sure] + 1e-30).all()
        assert np.abs(exact).max() > 0.1


@pytest.mark.parametrize("spread", [1e-7, 1e-4, 0.1])
def test_alpha_near_1(backend: str, spread: float) -> None:
    student, teacher = pair(3, 700, spread=spread)
    value, *grads = evaluate(student, teacher, "nla", backend)
    check_value(value, student, teacher, "nla", backend, f"near {spread}")
    check_gradients(student, teacher, tuple(grads), "nla", backend, f"near {spread}")
    assert (value > 1e-3 * spread).all()


@pytest.mark.parametrize("beta", [None, 0.5, 10.0])
def test_lk_is_made_of_kl_and_tv(backend: str, beta: float | None) -> None:
    student, teacher = pair(4, 700)
    value, *grads = evaluate(student, teacher, "lk", backend, beta=beta)
    kl, tv = (evaluate(student, teacher, kind, backend) for kind in ("forward_kl", "tv"))
    weight = torch.exp(-(3.0 if beta is None else beta) * (1 - tv[0].double()))
    assert 0 < weight.min() < weight.max() < 1
    np.testing.assert_allclose(to_numpy(value), to_numpy(weight * kl[0] + (1 - weight) * tv[0]), rtol=1e-5)
    for grad, of_kl, of_tv in zip(grads, kl[1:], tv[1:], strict=True):
        want = weight[:, None] * of_kl + (1 - weight[:, None]) * of_tv
        np.testing.assert_allclose(to_numpy(grad), to_numpy(want), rtol=1e-4, atol=1e-7)


def test_nothing_shared(backend: str) -> None:
    """α = 0: −log α is +inf and has no gradient to either side, the KL within lk as it has alone."""
    student, teacher = pair(2, 700)
    student[1, :350] = teacher[1, 350:] = -INF
    value, *grads = evaluate(student, teacher, "nla", backend)
    assert value[1] == INF
    assert all(torch.isnan(grad[1]).all() for grad in grads)
    assert all(torch.isfinite(grad[0]).all() for grad in grads)
    value, to_student, to_teacher = evaluate(student, teacher, "lk", backend)
    assert value[1] == INF
    assert torch.isnan(to_teacher[1]).all()
    q, p = student[1].double().softmax(-1), teacher[1].double().softmax(-1)
    torch.testing.assert_close(to_student[1].double(), q - p, rtol=1e-5, atol=1e-7)


def test_a_column_that_one_side_lacks(backend: str) -> None:
    student, teacher = pair(4, 700)
    student[1, 3], teacher[2, 5] = -INF, -INF
    value, *grads = evaluate(student, teacher, "nla", backend)
    check_value(value, student, teacher, "nla", backend, "a column lacks")
    for grad, exact in zip(
        grads, reference.gradients(to_numpy(student), to_numpy(teacher), "nla"), strict=True
    ):
        np.testing.assert_allclose(to_numpy(grad), exact, rtol=1e-4, atol=1e-6)


def test_an_eta_of_lk_is_no_share() -> None:
    student, teacher = pair(2, 9)
    assert torch.equal(
        kl_gpu.divergence(student, teacher, "lk", beta=0.0), kl_gpu.divergence(student, teacher, "forward_kl")
    )
    with pytest.raises(ValueError, match=r"beta must be within \[0, 1e\+06\] for kind 'lk', got -1"):
        kl_gpu.divergence(student, teacher, "lk", beta=-1.0)
    with pytest.raises(ValueError, match="beta is not a parameter of kind 'nla'"):
        kl_gpu.divergence(student, teacher, "nla", beta=0.5)


@pytest.mark.parametrize("kind", ["nla", "lk"])
def test_k_tokens_say_nothing_of_alpha(kind: str) -> None:
    ids = torch.arange(3).expand(2, 3)
    logprobs = torch.full((2, 3), -2.0)
    with pytest.raises(ValueError, match=r"kind.*every column"):
        kl_gpu.topk_div(torch.randn(2, 9), logprobs, ids, kind)
    with pytest.raises(ValueError, match=r"kind.*every column"):
        kl_gpu.sparse_div(logprobs, ids, logprobs, ids, kind)

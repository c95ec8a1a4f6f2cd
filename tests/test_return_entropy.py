"""Divergences that come with the student's entropies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import kl_gpu
from kl_gpu import reference
from realistic import peaked_sides as sides
from support import DEVICE, is_slow, to_numpy

N, COLUMNS = 6, 300


def exact(logits: Tensor, temperature: object = 1.0) -> np.ndarray:
    log_q = reference.log_softmax(to_numpy(logits), temperature)
    return -(np.exp(log_q) * log_q).sum(-1)


def check(got: Tensor, want: np.ndarray, relative: float = 1e-6) -> None:
    assert not got.requires_grad
    assert got.shape == want.shape
    assert want.max() > 0.1
    assert (np.abs(to_numpy(got) - want) <= relative * np.maximum(1, want)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_of_logits(backend: str, dtype: torch.dtype, reduction: str) -> None:
    student, teacher = sides(dtype=dtype)
    temperature = torch.linspace(0.7, 2, N, device=DEVICE) if reduction == "none" else 1.3
    options = {"temperature": temperature, "reduction": reduction, "backend": backend}
    leaf, other = (student.clone().requires_grad_() for _ in range(2))
    loss, entropy = kl_gpu.js_div(leaf, teacher, return_entropy=True, **options)
    at = to_numpy(temperature)[:, None] if reduction == "none" else temperature
    check(entropy, exact(student, at))
    assert entropy.dtype == loss.dtype
    alone = kl_gpu.js_div(other, teacher, **options)
    assert torch.equal(loss, alone)
    loss.sum().backward()
    alone.sum().backward()
    assert torch.equal(leaf.grad, other.grad)


def test_of_rows_that_count(backend: str) -> None:
    student, teacher = (x.view(2, 3, -1).clone() for x in sides())
    labels = torch.tensor([[0, 1, -100], [0, -100, 2]], device=DEVICE)
    student[0, 1] = torch.nan
    _, entropy = kl_gpu.kl_div(
        student, teacher, labels=labels, shift=True, vocab_size=250, temperature=5.0, return_entropy=True,
        backend=backend,
    )  # fmt: skip
    want = exact(student[:, :-1, :250].nan_to_num(), 5.0) * to_numpy(labels[:, 1:] != -100)
    check(entropy, want)


@pytest.mark.parametrize("how", [{}, {"softcap": 4.0}, {"logit_scale": 0.5}], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_of_hidden_states(backend: str, how: dict[str, float], reduction: str) -> None:
    if is_slow(backend) and how:
        pytest.skip("Triton's interpreter is slow, and caps and factors are not its affair")
    generator = torch.Generator().manual_seed(3)
    shapes = (N, 8), (90, 8), (N, 12), (90, 12)
    leaf, weight, *others = (torch.randn(x, generator=generator).to(DEVICE) for x in shapes)
    leaf.requires_grad_()
    mask = torch.tensor([True, True, False, True, True, True], device=DEVICE)
    options = {"chunk_rows": 2, "mask": mask, "reduction": reduction, "backend": backend, "temperature": 0.8}
    loss, entropy = kl_gpu.linear_div(leaf, weight, *others, "js", return_entropy=True, **how, **options)
    logits = leaf.detach().double() @ weight.double().t() * how.get("logit_scale", 1.0)
    logits = 4 * torch.tanh(logits / 4) if "softcap" in how else logits
    # The products are float32's.
    check(entropy, exact(logits, 0.8) * to_numpy(mask), 5e-6)
    alone = kl_gpu.linear_div(leaf, weight, *others, "js", **how, **options)
    assert torch.equal(loss, alone)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    assert torch.equal(grad, *torch.autograd.grad(alone.sum(), leaf))


def test_compiled_and_in_a_module(backend: str) -> None:
    if is_slow(backend):
        pytest.skip("Triton's interpreter is slow, and the graph is not its affair")
    student, teacher = sides()
    loss = kl_gpu.DivergenceLoss("reverse_kl", return_entropy=True, backend=backend)
    want = loss(student, teacher)
    torch.testing.assert_close(want[1], torch.from_numpy(exact(student)).to(want[1]), rtol=1e-6, atol=1e-6)
    leaf = student.clone().requires_grad_()
    heads = leaf[:, :8], teacher[:50, :8].repeat(10, 1), teacher[:, :8], teacher[:50, :8].repeat(10, 1)
    for function, arguments in ((loss, (leaf, teacher)), (loss.linear, heads)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        got = compiled(*arguments)
        torch.testing.assert_close(got, function(*arguments), rtol=1e-6, atol=1e-7)
        assert got[0].requires_grad
        assert not got[1].requires_grad
        got[0].backward()


def test_under_checkpoint(backend: str) -> None:
    student, teacher = sides()
    leaf = student[:, :8].clone().requires_grad_()
    heads = teacher[:50, :8].repeat(10, 1), teacher[:, :8], teacher[:50, :8].repeat(10, 1)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return kl_gpu.linear_div(x, *heads, return_entropy=True, backend=backend)

    loss, entropy = torch.utils.checkpoint.checkpoint(run, leaf, use_reentrant=False)
    want = run(leaf)
    assert torch.equal(loss, want[0])
    assert torch.equal(entropy, want[1])
    (got,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(got, *torch.autograd.grad(want[0], leaf))


def test_refused() -> None:
    with pytest.raises(TypeError, match="return_entropy must be True or False"):
        kl_gpu.kl_div(*sides(), return_entropy=1)

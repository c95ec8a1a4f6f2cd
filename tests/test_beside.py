"""Entropies and labels' terms that a backend finds in the divergence's own visit of a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kl_gpu
from kl_gpu.backends import native, registry
from kl_gpu.backends.native import extension
from kl_gpu.ops import beside as ops
from realistic import peaked_sides as sides
from support import DEVICE

needs_native = pytest.mark.skipif(not native.available(), reason="installed without compiled kernels")
ASKED: dict[str, Any] = {"hard_weight": 0.3, "return_entropy": True}


def labels_of(rows: int, columns: int) -> Tensor:
    return torch.arange(rows, device=DEVICE) * (columns // rows) + columns // rows - 1


@needs_native
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_logits_are_not_read_again(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(*_: object) -> None:
        raise AssertionError("a second sweep")

    monkeypatch.setattr(extension, "_native", Watched(again))
    student, teacher = (x.cpu() for x in sides(6, 300))
    leaf = student.requires_grad_()
    options = {"labels": labels_of(6, 300).cpu(), "temperature": 2.0, "reduction": reduction}
    loss, entropy = kl_gpu.js_div(leaf, teacher, backend="native", **ASKED, **options)
    loss.sum().backward()
    assert (entropy > 0).all()
    heads = torch.randn(4, 50, 8).unbind(0)
    kl_gpu.linear_div(*heads, labels=labels_of(50, 50).cpu(), backend="native", **ASKED)


class Watched:
    """The extension, of which two functions are not to be called."""

    def __init__(self, refuse: Any) -> None:
        self.complement = self.complement_gradient = refuse
        self.others = extension._native

    def __getattr__(self, name: str) -> Any:
        return getattr(self.others, name)


@needs_native
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["forward_kl", "js"])
def test_bits_do_not_depend_on_batch_or_threads(kind: str, temperature: float) -> None:
    student, teacher = (x.cpu().bfloat16() for x in sides(4, 100001))
    labels, threads = labels_of(4, 100001).cpu(), torch.get_num_threads()

    def run(rows: slice) -> list[Tensor]:
        leaf = student[rows].clone().requires_grad_()
        options = {"temperature": temperature, "labels": labels[rows], "reduction": "none"}
        value, entropy = kl_gpu.divergence(leaf, teacher[rows], kind, backend="native", **ASKED, **options)
        value.sum().backward()
        return [value.detach(), entropy, leaf.grad]

    try:
        torch.set_num_threads(1)
        whole = run(slice(None))
        torch.set_num_threads(3)
        parts = [run(slice(i, i + 1)) for i in range(4)]
    finally:
        torch.set_num_threads(threads)
    for x, *each in zip(whole, *parts, strict=True):
        assert torch.equal(x, torch.cat(each))


def test_sure_labels_keep_their_digits(backend: str) -> None:
    """Of a q that rounds to 1, −log q and q − 1 are the sum of the others, and not what rounding leaves."""
    student = sides(4, 900)[0].float()
    labels = labels_of(4, 900)
    rows = torch.arange(4, device=DEVICE)
    student[rows, labels] = student.amax(-1) + torch.tensor([9.0, 14, 19, 24], device=DEVICE)
    leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    options = {"labels": labels, "reduction": "none", "temperature": 1.0}
    got = kl_gpu.kl_div(leaf, student, hard_weight=1.0, backend=backend, **options)
    others = exact.scatter(1, labels[:, None], -torch.inf).logsumexp(-1)
    want = torch.nn.functional.softplus(others - exact[rows, labels])
    assert want.max() < 0.1
    assert want.min() < 1e-7
    torch.testing.assert_close(got.double(), want, rtol=5e-6, atol=0)
    got.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(leaf.grad[rows, labels].double(), exact.grad[rows, labels], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js", "lk"])
def test_gradients_of_every_formula(backend: str, kind: str, dtype: torch.dtype) -> None:
    """Both sides', the teacher's untouched by the labels, at a temperature that is not the labels'."""
    student, teacher = (x.to(dtype) for x in sides(4, 300))
    labels, rows = labels_of(4, 300), torch.arange(4, device=DEVICE)

    def run(hard: float, backend: str, *given: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in given]
        options = {"labels": labels, "temperature": 1.5, "reduction": "sum", "backend": backend}
        kl_gpu.divergence(*leaves, kind, hard_weight=hard, **options).backward()
        return [x.grad for x in leaves]

    got, teachers = run(2.0, backend, student, teacher)
    loose = 1e-5 if dtype == torch.float32 else 2**-7
    # Whoever joins the labels' term may take another of its loops, which rounds otherwise.
    torch.testing.assert_close(teachers, run(0.0, backend, student, teacher)[1], rtol=loose, atol=2e-7)
    plain = run(0.0, "eager", student.double(), teacher.double())[0]
    added = 2 * torch.softmax(student.double(), -1)
    added[rows, labels] -= 2
    # In 16 bits a backend may round each part and the sum.
    error = (got.double() - (plain + added)).abs()
    assert (error <= loose * (added.abs() + plain.abs()) + 2e-7).all()
    assert added.abs().max() > 0.1


def test_a_backend_that_does_not_join_says_so() -> None:
    assert not registry.joins("eager")
    student, teacher = sides(2, 30)
    with pytest.raises(RuntimeError, match="'eager' finds nothing beside a divergence"):
        ops.value_and_beside(student, teacher, None, None, None, True, "forward_kl", 0.0, 1.0, 1.0, "eager")

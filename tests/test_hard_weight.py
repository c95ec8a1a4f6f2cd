"""The labels' negative log-probabilities beside a divergence, against the two losses in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kl_gpu
from realistic import peaked_sides as sides
from support import DEVICE, is_slow

N, COLUMNS, HARD = 6, 300, 0.3
REDUCTIONS = ["none", "sum", "mean", "batchmean"]


def labels_of(columns: int = COLUMNS) -> Tensor:
    labels = torch.arange(N, device=DEVICE) * (columns // N) + 3
    labels[2] = -100
    return labels


def plain(
    s: Tensor, t: Tensor, temperature: Any, reduction: str, weight: Tensor, hard: float = HARD
) -> Tensor:
    """T² KL(p‖q) at the temperature and the cross entropy at 1, from the definitions."""
    labels = labels_of(s.shape[-1])
    log_q, log_p = (torch.log_softmax(x / temperature, -1) for x in (s, t))
    soft = (log_p.exp() * (log_p - log_q)).sum(-1) * torch.as_tensor(temperature, device=DEVICE).reshape(
        -1
    ) ** 2
    rows = soft + hard * F.cross_entropy(s, labels, reduction="none")
    rows = torch.where(labels >= 0, rows * weight, 0)
    if reduction == "none":
        return rows
    return rows.sum() / {"sum": 1, "mean": N - 1, "batchmean": N}[reduction]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_of_logits(backend: str, reduction: str) -> None:
    student, teacher = sides()
    weight = torch.linspace(0.5, 1.5, N, device=DEVICE)
    temperature = torch.linspace(0.8, 2, N, device=DEVICE) if reduction == "none" else 2.0
    leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    got = kl_gpu.kl_div(
        leaf, teacher, labels=labels_of(), temperature=temperature, t_squared=True, weight=weight,
        reduction=reduction, hard_weight=HARD, backend=backend,
    )  # fmt: skip
    at = temperature.double()[:, None] if isinstance(temperature, Tensor) else temperature
    want = plain(exact, teacher.double(), at, reduction, weight.double())
    torch.testing.assert_close(got.double(), want, rtol=5e-6, atol=1e-9)
    got.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=2e-6)
    # Each label's own part shows.
    rows = torch.arange(N, device=DEVICE) != 2
    assert (exact.grad[rows, labels_of()[rows]].abs() > 1e-3).any()
    assert (leaf.grad[2] == 0).all()


def test_weights_get_their_gradient(backend: str) -> None:
    student, teacher = sides()
    weight = torch.linspace(0, 1.5, N, device=DEVICE).requires_grad_()
    options = {"labels": labels_of(), "reduction": "sum", "backend": backend}
    kl_gpu.kl_div(student, teacher, weight=weight, hard_weight=HARD, **options).backward()
    alone = kl_gpu.kl_div(student, teacher, hard_weight=HARD, **(options | {"reduction": "none"}))
    torch.testing.assert_close(weight.grad, alone)
    assert weight.grad[0] > 0


def test_shift(backend: str) -> None:
    student, teacher = (x.view(2, 3, -1) for x in sides())
    labels = labels_of().view(2, 3)
    got = kl_gpu.js_div(
        student, teacher, labels=labels, shift=True, hard_weight=HARD, reduction="none", backend=backend
    )
    own = kl_gpu.js_div(student, teacher, labels=labels, shift=True, reduction="none", backend=backend)
    flat = student[:, :-1].reshape(4, -1).double(), labels[:, 1:].reshape(4)
    want = HARD * F.cross_entropy(*flat, reduction="none").view(2, 2)
    torch.testing.assert_close((got - own).double(), want, rtol=1e-5, atol=1e-6)


def test_inplace_is_not_used(backend: str) -> None:
    student, teacher = sides()
    leaf, other = (student.clone().requires_grad_() for _ in range(2))
    options = {"labels": labels_of(), "hard_weight": HARD, "backend": backend}
    kl_gpu.kl_div(leaf * 1, teacher, inplace=True, **options).backward()
    kl_gpu.kl_div(other * 1, teacher, **options).backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    assert leaf.grad.abs().max() > 1e-3


@pytest.mark.parametrize("how", [{}, {"softcap": 4.0}, {"logit_scale": 0.5}], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_of_hidden_states(backend: str, how: dict[str, float], reduction: str) -> None:
    if is_slow(backend) and how:
        pytest.skip("Triton's interpreter is slow, and caps and factors are not its affair")
    generator = torch.Generator().manual_seed(3)
    shapes = (N, 8), (90, 8), (N, 12), (90, 12)
    hidden, weight, *others = (torch.randn(x, generator=generator).to(DEVICE) for x in shapes)
    rows = torch.linspace(0.5, 1.5, N, device=DEVICE)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    got, entropy = kl_gpu.linear_div(
        *leaves, *others, labels=labels_of(90), temperature=2.0, t_squared=True, weight=rows, chunk_rows=2,
        reduction=reduction, hard_weight=HARD, return_entropy=True, backend=backend, **how,
    )  # fmt: skip
    logits = exact[0] @ exact[1].t() * how.get("logit_scale", 1.0)
    logits = 4 * torch.tanh(logits / 4) if "softcap" in how else logits
    teacher = others[0].double() @ others[1].double().t()
    want = plain(logits, teacher, 2.0, reduction, rows.double())
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-6)
    assert entropy.shape == (N,)
    assert not entropy.requires_grad
    (2 * got).sum().backward()
    (2 * want).sum().backward()
    for x, y in zip(leaves, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-5)


def test_compiled(backend: str) -> None:
    if is_slow(backend):
        pytest.skip("Triton's interpreter is slow, and the graph is not its affair")
    student, teacher = sides()
    loss = kl_gpu.DivergenceLoss("js", hard_weight=HARD, backend=backend)
    leaf = student.clone().requires_grad_()
    heads = leaf[:, :8], teacher[:50, :8].repeat(10, 1), teacher[:, :8], teacher[:50, :8].repeat(10, 1)
    for function, arguments, columns in ((loss, (leaf, teacher), COLUMNS), (loss.linear, heads, 60)):
        labels = labels_of(columns)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        got, want = (f(*arguments, labels=labels) for f in (compiled, function))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
        grads = (torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (got, want))
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"hard_weight": -1.0, "labels": labels_of()},
            ValueError,
            "hard_weight must be a finite number >= 0",
        ),
        ({"hard_weight": "1", "labels": labels_of()}, TypeError, "hard_weight must be a float"),
        ({"hard_weight": 1.0}, ValueError, "labels must be given"),
        (
            {"hard_weight": 1.0, "labels": labels_of(), "support": torch.zeros(N, 1, dtype=torch.int64)},
            ValueError,
            "support must be None",
        ),
    ],
)
def test_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kl_gpu.kl_div(*sides(), **options)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a device looking at them would wait")
def test_labels_are_columns() -> None:
    labels = labels_of()
    labels[0] = COLUMNS
    with pytest.raises(ValueError, match=r"labels must be within \[0, 300\)"):
        kl_gpu.kl_div(*sides(), labels=labels, hard_weight=HARD)

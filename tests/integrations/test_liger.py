"""Liger's names: beside Liger itself where it runs here, beside the definition in float64 everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kl_gpu.integrations import liger as faces
from realistic import realistic

CPU_ONLY = pytest.mark.skipif(
    torch.cuda.is_available(), reason="where Triton's interpreter runs Liger's kernel"
)


def logprobs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Of students and teachers, `[6, 512]`, both requiring gradients."""
    student, teacher = realistic("moved tokens", 6, 512, None)  # type: ignore[arg-type]
    return tuple(x.to(dtype).log_softmax(-1).requires_grad_() for x in (student, teacher))  # type: ignore[return-value]


def jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """`[N]` from free log-probabilities, as written down."""
    q, p = log_q.exp(), log_p.exp()
    if beta == 0:
        return (p * (log_p - log_q)).sum(-1)
    if beta == 1:
        return (q * (log_q - log_p)).sum(-1)
    log_m = (beta * p + (1 - beta) * q).log()
    return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)


def same_with_gradients(ours: Any, definition: Any, *inputs: Tensor) -> None:
    """`ours` of float32 inputs against `definition` of the same in float64; gradients of all inputs."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found, expected = ours(*inputs), definition(*wide)
    assert found.item() == pytest.approx(expected.item(), rel=2e-5)
    grads = zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, wide), strict=True)
    for mine, their in grads:
        assert their.abs().max() > 0
        torch.testing.assert_close(mine.double(), their, rtol=1e-4, atol=1e-5 * their.abs().max().item())


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_jsd(beta, masked) -> None:
    labels = torch.tensor([3, -100, 5, 5, -100, 0]).to(logprobs()[0].device) if masked else None
    keep = slice(None) if labels is None else labels != -100
    same_with_gradients(
        lambda q, p: faces.LigerJSD(beta)(q, p, labels),
        lambda q, p: jsd(q, p, beta)[keep].mean(),
        *logprobs(),
    )


def test_no_token_counts_and_masked_rows_are_not_read() -> None:
    q, p = logprobs()
    labels = torch.full((6,), 7, device=q.device)
    assert faces.liger_jsd(q, p, labels, ignore_index=7).item() == 0.0  # Liger: NaN
    with torch.no_grad():
        q[2] = torch.nan
    labels[2] = -100
    loss = faces.liger_jsd(q, p, labels)
    loss.backward()
    assert loss.isfinite()
    assert q.grad is not None
    assert q.grad[2].abs().max() == 0
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_kl_div_is_torchs(reduction, log_target) -> None:
    q, p = logprobs()
    target = p if log_target else p.detach().exp().requires_grad_()
    how = {"reduction": reduction, "log_target": log_target}
    weights = torch.linspace(0.5, 2, q.numel(), device=q.device).view_as(q) if reduction == "none" else 1
    for ours in faces.LigerKLDIVLoss(**how), lambda *sides: faces.liger_kl_div(*sides, **how):
        same_with_gradients(
            lambda q, t, ours=ours: (ours(q, t) * weights).sum(),
            lambda q, t: (F.kl_div(q, t, **how) * weights).sum(),
            q, target,
        )  # fmt: skip


def test_a_target_of_zero_counts_nothing() -> None:
    q, p = logprobs()
    target = p.detach().exp()
    target[:, ::2] = 0
    target /= target.sum(-1, keepdim=True)
    found = faces.liger_kl_div(q, target, reduction="batchmean")
    expected = F.kl_div(q.double(), target.double(), reduction="batchmean")
    assert found.item() == pytest.approx(expected.item(), rel=2e-5)


def heads(padding: int = 0) -> list[Tensor]:
    """Student's hidden states, weight, bias and the teacher's; labels, of which two do not count."""
    torch.manual_seed(0)
    student, teacher = nn.Linear(24, 300), nn.Linear(32, 300 + padding)
    sides = [torch.randn(8, 24), 4 * student.weight.detach(), student.bias.detach()]
    labels = torch.tensor([3, -100, 299, 5, 0, -100, 7, 8])
    return [
        *(x.requires_grad_() for x in sides),
        torch.randn(8, 32),
        4 * teacher.weight,
        teacher.bias,
        labels,
    ]


@pytest.mark.parametrize(("soft", "hard"), [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("triple", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_fused_linear_jsd(soft, hard, triple, beta) -> None:
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="of the extra integrations")
    student, weight, bias, teacher, teacher_weight, teacher_bias, labels = heads()
    how = {
        "weight_soft_loss": soft, "weight_hard_loss": hard, "beta": beta, "temperature": 1.5,
        "compiled": False, "chunk_size": 3, "return_soft_hard_loss": triple,
    }  # fmt: skip
    sides = student, weight, teacher, teacher_weight, labels, bias, teacher_bias
    found, results = [], []
    for kind in faces.LigerFusedLinearJSDLoss, liger.LigerFusedLinearJSDLoss:
        result = kind(**how)(*sides)
        results.append(torch.stack(result).detach() if triple else result.detach()[None])
        found.append(torch.autograd.grad(result[0] if triple else result, (student, weight, bias)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)
    for mine, their in zip(*found, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-5 * their.abs().max().item())


def test_a_wider_teachers_padding_is_left_out() -> None:
    student, weight, bias, teacher, teacher_weight, teacher_bias, labels = heads(padding=20)
    loss = faces.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0)
    found = loss(student, weight, teacher, teacher_weight, labels, bias, teacher_bias)
    exact = loss(student, weight, teacher, teacher_weight[:300], labels, bias, teacher_bias[:300])
    assert found.item() == exact.item() > 1e-2


@CPU_ONLY
def test_beside_liger_in_tritons_interpreter() -> None:
    liger = pytest.importorskip("liger_kernel.transformers", reason="of the extra integrations")
    q, p = logprobs()
    results = []
    for kind in faces.LigerJSD, liger.LigerJSD:
        loss = kind(beta=0.3)(q, p.detach())
        results.append((loss.detach(), *torch.autograd.grad(loss, q)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)

"""A teacher known by K tokens who gives every other token one small probability, against the whole rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kl_gpu
from realistic_rows import raised_token, tops_on_a_floor
from support import DEVICE

N, COLUMNS, K, OUTSIDE = 6, 300, 5, -100.0


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """A student's logits, and a teacher's K best log-probabilities and their ids."""
    generator = torch.Generator().manual_seed(1)
    parts = [family(N // 2, COLUMNS, generator) for family in (tops_on_a_floor, raised_token)]
    student, teacher = (torch.cat(side).to(DEVICE) for side in zip(*parts, strict=True))
    return student, *torch.log_softmax(teacher, -1).topk(K)


def plain(s: Tensor, logprobs: Tensor, ids: Tensor, kind: str, outside: float, beta: float = 0.5) -> Tensor:
    """In float64 over the whole vocabulary."""
    log_q = torch.log_softmax(s, -1)
    log_p = torch.full_like(s, outside).scatter(-1, ids, logprobs.double())
    forward = (logprobs.double().exp() * (logprobs - log_q.gather(-1, ids))).sum(-1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
    share = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(kind, beta)
    return (1 - share) * forward + share * reverse


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jeffreys"])
@pytest.mark.parametrize(("outside", "tail"), [(OUTSIDE, "student_full"), (-9.0, "truncate")])
def test_of_whole_rows(backend: str, kind: str, outside: float, tail: str) -> None:
    student, logprobs, ids = rows()
    p = logprobs.log_softmax(-1) if tail == "student_full" else logprobs
    mask = torch.arange(N, device=DEVICE) != 2
    leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    beta = {"beta": 0.3} if kind == "jeffreys" else {}
    options = {"kind": kind, "tail": tail, "outside_logprob": outside, "backend": backend, **beta}
    got, teacher_mass, _ = kl_gpu.topk_div(
        leaf, logprobs, ids, mask=mask, reduction="none", return_mass=True, **options
    )
    want = torch.where(mask, plain(exact, p, ids, kind, outside, **beta), 0.0)
    assert want.abs().max() > 0.1
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)
    assert (teacher_mass[mask] > 0.3).any()
    got.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
    assert exact.grad.abs().max() > 1e-2


def test_the_forward_kl_is_that_without(backend: str) -> None:
    options = {"tail": "truncate", "backend": backend}
    got = kl_gpu.topk_div(*rows(), outside_logprob=OUTSIDE, **options)
    torch.testing.assert_close(got, kl_gpu.topk_div(*rows(), **options))


def test_absent_entries_and_hidden_states(backend: str) -> None:
    student, logprobs, ids = rows()
    options = {"kind": "reverse_kl", "tail": "truncate", "outside_logprob": OUTSIDE, "backend": backend}
    fewer = kl_gpu.topk_div(student, logprobs[:, :3], ids[:, :3], **options)
    ids[:, 3:] = -1
    assert torch.equal(kl_gpu.topk_div(student, logprobs, ids, **options), fewer)
    hidden, weight = student[:, :8].contiguous(), student[:, 8:16].t().contiguous() @ student[:, :8] / 99
    heads = hidden, weight.repeat(5, 1)
    ids = torch.arange(3, device=DEVICE).expand(N, 3)
    got = kl_gpu.linear_topk_div(*heads, logprobs[:, :3], ids, **options)
    want = kl_gpu.topk_div(hidden @ heads[1].t(), logprobs[:, :3], ids, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_refused() -> None:
    for options, error, message in (
        ({"outside_logprob": OUTSIDE}, ValueError, "belongs to tail='truncate' and 'student_full'"),
        ({"outside_logprob": 1.0, "tail": "truncate"}, ValueError, "finite number <= 0"),
        ({"outside_logprob": "1", "tail": "truncate"}, TypeError, "outside_logprob must be a float"),
        ({"outside_logprob": OUTSIDE, "tail": "truncate", "kind": "js"}, ValueError, "kind must be one of"),
        ({"tail": "truncate", "kind": "reverse_kl"}, ValueError, "kind must be one of"),
    ):
        with pytest.raises(error, match=message):
            kl_gpu.topk_div(*rows(), **options)

"""token_logprobs of K tokens per row: against float64, doubled and absent ids, near certainty, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import kl_gpu
from kl_gpu.arguments import validation
from realistic_rows import tops_on_a_floor
from support import DEVICE, GRADIENT, RELATIVE

ABSENT, IGNORED = -1, -100


def exact(logits: Tensor, ids: Tensor, counts: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log q and the entropy in float64, differentiable, written from their definitions."""
    log_q = torch.log_softmax(logits.double() / temperature, -1)
    kept = counts[..., None] & (ids >= 0)
    entropy = -(log_q.exp() * log_q.masked_fill(log_q.isneginf(), 0)).sum(-1)
    return torch.where(kept, log_q.gather(-1, ids.clamp_min(0)), 0.0), torch.where(counts, entropy, 0.0)


def some_ids(lead: tuple[int, ...], columns: int, k: int) -> Tensor:
    """With doubles, absent and ignored entries, and a row of nothing but absent ones."""
    ids = torch.randint(0, columns, (*lead, k), device=DEVICE)
    ids[..., 0, -1] = ids[..., 0, 0]
    ids[..., 1, 0], ids[..., 1, -1], ids[..., 2, :] = ABSENT, IGNORED, ABSENT
    return ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (2, 0.7), (7, 1.0), (30, 2.5)])
def test_values_and_gradients(backend: str, dtype: torch.dtype, k: int, temperature: float) -> None:
    logits = (4 * torch.randn(2, 5, 700, device=DEVICE)).to(dtype)
    ids, counts = some_ids((2, 5), 700, k), torch.rand(2, 5, device=DEVICE) > 0.2
    flows = torch.randn(2, 5, k, device=DEVICE), torch.randn(2, 5, device=DEVICE)
    both = []
    for function in (
        lambda x: kl_gpu.token_logprobs(
            x, ids, entropy=True, mask=counts, temperature=temperature, backend=backend
        ),
        lambda x: exact(x, ids, counts, temperature),
    ):
        leaf = logits.clone().requires_grad_()
        found = function(leaf)
        total = sum((x * flow).sum() for x, flow in zip(found, flows, strict=True))
        both.append((*found, *torch.autograd.grad(total, leaf)))
    (logprob, entropy, grad), (want, want_entropy, want_grad) = both
    wide = dtype == torch.float64
    assert logprob.dtype == entropy.dtype == (dtype if wide else torch.float32)
    relative = 1e-12 if wide else RELATIVE
    np.testing.assert_allclose(logprob.detach().cpu(), want.detach().cpu(), rtol=relative, atol=0)
    np.testing.assert_allclose(entropy.detach().cpu(), want_entropy.detach().cpu(), rtol=relative, atol=0)
    log_q = torch.log_softmax(logits.double() / temperature, -1)
    q = log_q.exp()
    size = flows[0].abs().sum(-1, keepdim=True)
    size = size + flows[1].abs()[..., None] * (1 + want_entropy[..., None] - log_q)
    picked = torch.zeros_like(q).scatter_(-1, ids.clamp_min(0), 1.0)
    bound = (1e-12 if wide else GRADIENT) * size * torch.maximum(q, picked) / temperature
    rounding = want_grad.double().abs() * torch.finfo(dtype).eps
    assert ((grad.double() - want_grad.double()).abs() <= bound + rounding + torch.finfo(dtype).tiny).all()
    assert want_grad.abs().max() > 0.05


def test_near_certainty_and_beside_it(backend: str) -> None:
    """log q of a token that is all but certain, of its rivals, and of one the others outweigh by far."""
    logits = torch.tensor(
        [[0.0, -30.0, -31.0, -60.0, -90.0], [-700.0, 0.0, -1.0, -1.5, -600.0]], device=DEVICE
    )
    ids = torch.tensor([[0, 3, 0, 4], [0, 4, 0, ABSENT]], device=DEVICE)
    got = kl_gpu.token_logprobs(logits, ids, backend=backend)
    want, _ = exact(logits, ids, torch.ones(2, dtype=torch.bool, device=DEVICE), 1.0)
    small = -np.log1p(np.exp(-30.0) + np.exp(-31.0) + np.exp(-60.0) + np.exp(-90.0))
    np.testing.assert_allclose(got[0, [0, 2]].cpu(), [small, small], rtol=RELATIVE)
    np.testing.assert_allclose(got[0, [1, 3]].cpu(), want[0, [1, 3]].cpu(), rtol=RELATIVE)
    np.testing.assert_allclose(got[1].cpu(), want[1].cpu(), rtol=RELATIVE)


def test_one_of_k_is_the_token_alone(backend: str) -> None:
    logits = 3 * torch.randn(6, 300, device=DEVICE)
    ids = torch.randint(0, 300, (6,), device=DEVICE)
    alone, entropy = kl_gpu.token_logprobs(logits, ids, entropy=True, backend=backend)
    of_one, same = kl_gpu.token_logprobs(logits, ids[:, None], entropy=True, backend=backend)
    torch.testing.assert_close(of_one[:, 0], alone, rtol=1e-6, atol=0)
    torch.testing.assert_close(same, entropy, rtol=1e-6, atol=0)


def test_order_and_doubles_change_no_bit(backend: str) -> None:
    logits = 3 * torch.randn(4, 300, device=DEVICE)
    ids = torch.stack([torch.randperm(300, device=DEVICE)[:5] for _ in range(4)])
    first = kl_gpu.token_logprobs(logits, ids, backend=backend)
    order = torch.tensor([3, 3, 1, 0, 4, 2, 1], device=DEVICE)
    assert torch.equal(kl_gpu.token_logprobs(logits, ids[:, order], backend=backend), first[:, order])


def test_shift_and_vocab_size(backend: str) -> None:
    logits = 3 * torch.randn(2, 6, 310, device=DEVICE)
    ids = some_ids((2, 6), 300, 4)
    mask = torch.rand(2, 6, device=DEVICE) > 0.3
    got = kl_gpu.token_logprobs(logits, ids, mask=mask, shift=True, vocab_size=300, backend=backend)
    want, _ = exact(logits[:, :-1, :300], ids[:, 1:], mask[:, 1:], 1.0)
    np.testing.assert_allclose(got.cpu(), want.cpu(), rtol=RELATIVE, atol=0)


def test_compiled(backend: str) -> None:
    logits = (3 * torch.randn(4, 300, device=DEVICE)).requires_grad_()
    ids = some_ids((4,), 300, 5)

    def both(x: Tensor, i: Tensor) -> Tensor:
        logprobs, entropy = kl_gpu.token_logprobs(x, i, entropy=True, backend=backend)
        return logprobs.sum() + 0.3 * entropy.sum()

    grads = [
        torch.autograd.grad(function(logits, ids), logits)[0]
        for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager"))
    ]
    torch.testing.assert_close(*grads)
    assert grads[0].abs().max() > 0.1


def test_whole_logits_rows_of_tops(backend: str) -> None:
    """A few tops on a floor, as trained models have them: every top's log-probability, and the floor's."""
    logits = tops_on_a_floor(8, 900, torch.Generator().manual_seed(5))[0].to(DEVICE)
    ids = logits.topk(6).indices
    ids[:, -1] = logits.argmin(-1)
    got = kl_gpu.token_logprobs(logits, ids, backend=backend)
    want, _ = exact(logits, ids, torch.ones(8, dtype=torch.bool, device=DEVICE), 1.0)
    np.testing.assert_allclose(got.cpu(), want.cpu(), rtol=RELATIVE, atol=0)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3, 5, dtype=torch.int64), r"token_ids.*\(4,\).*\(3, 5\)"),
        (torch.zeros(4, 0, dtype=torch.int64), r"token_ids.*K, at least 1.*\(4, 0\)"),
        (torch.full((4, 2), 300), r"token_ids.*\[0, 300\).*-1.*300"),
        (torch.full((4, 2), -2), "token_ids.*-2"),
    ],
)
def test_bad_ids(ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kl_gpu.token_logprobs(torch.randn(4, 300), ids)


def test_of_rows_that_do_not_count_nothing_is_asked() -> None:
    ids = torch.tensor([[300, 1], [2, 3]])
    got = kl_gpu.token_logprobs(torch.randn(2, 300), ids, mask=torch.tensor([0, 1]))
    assert (got[0] == 0).all()
    assert (got[1] < 0).all()


def test_an_id_outside_is_nan_where_it_is_not_refused(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """As on a device, where asking would wait."""
    monkeypatch.setattr(validation, "readable", lambda _: False)
    logits = torch.randn(2, 300, device=DEVICE)
    ids = torch.tensor([[5, 300, 7], [1, -1, 2]], device=DEVICE)
    got = kl_gpu.token_logprobs(logits, ids, backend=backend)
    assert torch.isnan(got).tolist() == [[False, True, False], [False, False, False]]
    assert got[1, 1] == 0

"""token_logprobs: values and gradients against the NumPy reference, its edges and its errors."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kl_gpu
from kl_gpu import reference
from kl_gpu.ops import complement as complement_ops
from kl_gpu.reference import topk as reference_topk
from support import DEVICE, DTYPES, GRADIENT, RELATIVE, ROUNDING, TINY, is_slow, record, to_numpy

INF, NAN = float("inf"), float("nan")


def given(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits = (3 * torch.randn(rows, columns, device=DEVICE)).to(dtype)
    return logits, torch.randint(0, columns, (rows,), device=DEVICE)


def check(
    logits: Tensor, ids: Tensor, backend: str, where: str, temperature: float = 1.0, floor: float = 0.0
) -> None:  # fmt: skip
    """Values relative to themselves, also where the token is all but certain; the entropy where it is not 0
    to 2e-7 more, or relative to `floor` where that is more. Gradients to 2e-6 of the probability, times what
    the entropy's logarithm brings."""
    leaf = logits.detach().requires_grad_()
    logprob, entropy = kl_gpu.token_logprobs(
        leaf, ids, temperature=temperature, entropy=True, backend=backend
    )
    grads = [torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0] for x in (logprob, entropy)]
    both = torch.autograd.grad(logprob.sum() + 0.3 * entropy.sum(), leaf)[0]
    x, token = to_numpy(logits), ids.cpu().numpy()
    want, spread = (
        reference_topk.token_logprobs(x, token, temperature),
        reference_topk.entropy(x, temperature),
    )
    share = (np.abs(to_numpy(logprob) - want) / (RELATIVE * np.abs(want) + 1e-30)).max()
    record("logprob", backend, "token", float(share), where)
    assert share <= 1, f"{share} of the bound at {where}"
    bound = np.maximum(RELATIVE * spread + 2e-7, RELATIVE * floor)
    share = (np.abs(to_numpy(entropy) - spread) / bound).max()
    record("entropy", backend, "token", float(share), where)
    assert share <= 1, f"{share} of the bound at {where}"
    assert logprob.dtype == entropy.dtype == (leaf.dtype if leaf.dtype == torch.float64 else torch.float32)

    exact = reference_topk.token_gradients(x, token, temperature)
    log_q = reference.log_softmax(x, temperature)
    q = np.exp(log_q)
    turned = np.maximum(1, np.where(q > 0, np.abs(log_q), 0)) + spread[..., None]
    flows = (*exact, exact[0] + 0.3 * exact[1])
    for grad, flow, size in zip((*grads, both), flows, (1.0, turned, turned), strict=True):
        assert grad.dtype == leaf.dtype
        assert np.abs(flow).max() > (1e-6 if (want < -1e-3).all() else 0)
        slack = np.abs(flow) * ROUNDING[grad.dtype] + TINY[grad.dtype]
        bound = GRADIENT * np.maximum(q, np.abs(flow)) * size / temperature
        share = ((np.abs(to_numpy(grad) - flow) - slack) / np.maximum(bound, 1e-300)).max()
        record("gradient", backend, "token", float(share), where)
        assert share <= 1, f"{share} of the gradient's bound at {where}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_against_the_reference(backend: str, dtype: torch.dtype, temperature: float) -> None:
    for columns in (2, 33, 2100) if is_slow(backend) else (2, 33, 32000, 50257):
        logits, ids = given(3, columns, dtype)
        check(logits, ids, backend, f"V={columns} {dtype} T={temperature}", temperature)


@pytest.mark.parametrize("temperature", [1e-6, 1e9])
def test_the_ends_of_the_range_of_temperatures(backend: str, temperature: float) -> None:
    logits, ids = given(6, 70)
    ids[:3] = logits[:3].argmax(-1)
    leaf = logits.requires_grad_()
    logprob, entropy = kl_gpu.token_logprobs(
        leaf, ids, temperature=temperature, entropy=True, backend=backend
    )
    (grad,) = torch.autograd.grad(logprob.sum(), leaf)
    x, token = to_numpy(logits), ids.cpu().numpy()
    np.testing.assert_allclose(
        to_numpy(logprob), reference_topk.token_logprobs(x, token, temperature), rtol=RELATIVE
    )
    np.testing.assert_allclose(
        to_numpy(entropy), reference_topk.entropy(x, temperature), rtol=RELATIVE, atol=2e-7
    )
    flow = reference_topk.token_gradients(x, token, temperature)[0] * temperature
    np.testing.assert_allclose(to_numpy(grad) * temperature, flow, rtol=1e-6, atol=2e-6)
    assert np.abs(flow).max() > 0.9


@pytest.mark.parametrize("columns", [128256, 151936])
@pytest.mark.parametrize("rows", [1, 5])
def test_large_vocabularies(backend: str, columns: int, rows: int) -> None:
    if is_slow(backend):
        pytest.skip("the interpreter takes minutes")
    check(*given(rows, columns, torch.bfloat16), backend, f"V={columns}")


@pytest.mark.parametrize("gap", [5.0, 20.0, 60.0])
def test_a_token_that_is_all_but_certain(backend: str, gap: float) -> None:
    # log q is −V e^−gap: a log-normaliser in float32 has lost it at a gap of 20.
    logits, ids = given(2, 700)
    logits /= 3
    logits[torch.arange(2), ids] = gap
    check(logits, ids, backend, f"gap={gap}")


@pytest.mark.parametrize("offset", [-3000.0, 1000.0])
def test_a_common_offset(backend: str, offset: float) -> None:
    logits, ids = given(3, 600)
    check(logits + offset, ids, backend, f"offset={offset}")


def test_a_row_whose_maximum_rises(backend: str) -> None:
    logits = torch.linspace(-20, 20, 2100 if is_slow(backend) else 70001, device=DEVICE).repeat(2, 1)
    logits[1] = logits[1].flip(0)
    check(logits, torch.tensor([7, 12], device=DEVICE), backend, "rising")


def test_minus_infinity(backend: str) -> None:
    logits, ids = given(4, 500)
    logits[:, ::3] = -INF
    ids = torch.tensor([1, 2, 3, 4], device=DEVICE)  # 3 is masked
    logits[3] = -INF
    logits[3, 4] = 2.0
    leaf = logits.requires_grad_()
    logprob, entropy = kl_gpu.token_logprobs(leaf, ids, entropy=True, backend=backend)
    want = reference_topk.token_logprobs(to_numpy(logits), ids.cpu().numpy())
    np.testing.assert_allclose(to_numpy(logprob), want, rtol=RELATIVE)
    assert logprob[2] == -INF
    assert logprob[3] == 0
    assert entropy[3] == 0
    np.testing.assert_allclose(to_numpy(entropy), reference_topk.entropy(to_numpy(logits)), rtol=RELATIVE)
    for out, flow in zip(
        (logprob, entropy), reference_topk.token_gradients(to_numpy(logits), ids.cpu().numpy()), strict=True
    ):
        (grad,) = torch.autograd.grad(out.sum(), leaf, retain_graph=True)
        np.testing.assert_allclose(to_numpy(grad), flow, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_in_its_row_only(backend: str, bad: float) -> None:
    logits, ids = given(4, 500)
    logits[1, (ids[1] + 1) % 500] = bad
    logits[2, ids[2]] = bad
    leaf = logits.requires_grad_()
    for out in kl_gpu.token_logprobs(leaf, ids, entropy=True, backend=backend):
        assert torch.isnan(out).tolist() == [False, True, True, False]
        (grad,) = torch.autograd.grad(out.sum(), leaf, retain_graph=True)
        assert torch.isnan(grad).all(-1).tolist() == [False, True, True, False]
        assert torch.isfinite(grad[[0, 3]]).all()
    assert torch.isnan(kl_gpu.token_logprobs(torch.full((1, 9), -INF), ids[:1] % 9, backend="eager")).all()


def test_rows_that_do_not_count(backend: str) -> None:
    logits, ids = given(5, 300)
    logits[1], logits[2] = NAN, NAN
    ids[2] = -100
    mask = torch.tensor([True, False, True, True, True], device=DEVICE)
    leaf = logits.requires_grad_()
    logprob, entropy = kl_gpu.token_logprobs(leaf, ids, mask=mask, entropy=True, backend=backend)
    # With the entropy, too: without it the sums may round otherwise.
    plain = kl_gpu.token_logprobs(logits[[0, 3, 4]], ids[[0, 3, 4]], entropy=True, backend=backend)
    assert torch.equal(logprob[[0, 3, 4]], plain[0])
    assert torch.equal(entropy[[0, 3, 4]], plain[1])
    assert (logprob[1:3] == 0).all()
    assert (entropy[1:3] == 0).all()
    (grad,) = torch.autograd.grad(logprob.sum() + entropy.sum(), leaf)
    assert (grad[1:3] == 0).all()
    assert (grad[[0, 3, 4]].abs().sum(-1) > 0.1).all()


def test_shift_and_vocab_size(backend: str) -> None:
    logits = torch.full((2, 5, 310), NAN, device=DEVICE)
    logits[..., :300] = torch.randn(2, 5, 300, device=DEVICE)
    labels = torch.randint(0, 300, (2, 5), device=DEVICE)
    labels[0, :2] = -100
    leaf = logits.requires_grad_()
    got = kl_gpu.token_logprobs(leaf, labels, shift=True, vocab_size=300, backend=backend)
    dense = logits.detach()[:, :-1, :300].double().log_softmax(-1)
    want = dense.gather(-1, labels[:, 1:, None].clamp_min(0))[..., 0]
    torch.testing.assert_close(got, torch.where(labels[:, 1:] < 0, 0, want).float())
    (grad,) = torch.autograd.grad(got.sum(), leaf)
    assert torch.isfinite(grad).all()
    assert (grad[:, -1] == 0).all()
    assert (grad[..., 300:] == 0).all()
    assert grad.abs().max() > 0.1


def test_gradcheck(backend: str) -> None:
    logits, ids = given(3, 11, torch.float64)
    leaf = logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: kl_gpu.token_logprobs(x, ids, temperature=1.3, entropy=True, backend=backend), leaf
    )
    logprob = kl_gpu.token_logprobs(leaf, ids, backend=backend)
    (grad,) = torch.autograd.grad(logprob.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("columns", [1, 2])
def test_few_columns(backend: str, columns: int) -> None:
    logits = torch.randn(2, columns, device=DEVICE).requires_grad_()
    ids = torch.zeros(2, dtype=torch.uint8, device=DEVICE)
    logprob, entropy = kl_gpu.token_logprobs(logits, ids, entropy=True, backend=backend)
    (grad,) = torch.autograd.grad((logprob + entropy).sum(), logits)
    if columns == 1:
        assert (logprob == 0).all()
        assert (entropy == 0).all()
        assert (grad == 0).all()
    torch.testing.assert_close(logprob, logits.log_softmax(-1)[:, 0], rtol=1e-5, atol=0)


def test_no_rows(backend: str) -> None:
    logits = torch.zeros(0, 9, device=DEVICE, requires_grad=True)
    out = kl_gpu.token_logprobs(logits, torch.zeros(0, dtype=torch.long, device=DEVICE), backend=backend)
    assert out.shape == (0,)
    assert torch.autograd.grad(out.sum(), logits)[0].shape == (0, 9)


def test_the_same_bits_alone_and_among_others(backend: str) -> None:
    logits, ids = given(23, 2100 if is_slow(backend) else 70001)

    def run(rows: slice) -> tuple[Tensor, ...]:
        leaf = logits[rows].detach().requires_grad_()
        out = kl_gpu.token_logprobs(leaf, ids[rows], entropy=True, backend=backend)
        return out[0].detach(), out[1].detach(), torch.autograd.grad((out[0] + out[1]).sum(), leaf)[0]

    alone = run(slice(11, 12))
    for start, stop in ((0, 23), (11, 23), (10, 13), (11, 12)):
        assert all(
            torch.equal(x[0], y[11 - start]) for x, y in zip(alone, run(slice(start, stop)), strict=True)
        )


def test_views_are_read_as_they_lie(backend: str) -> None:
    base = torch.randn(3, 6, 410, device=DEVICE)
    ids = torch.randint(0, 400, (3, 2), device=DEVICE)
    for view in (base[:, 1::4, 3:403], base[:, :1, 5:405].expand(3, 2, 400), base[::2, 1:3, 7:407]):
        some = ids[: len(view)]
        got = kl_gpu.token_logprobs(view, some, backend=backend)
        assert torch.equal(got, kl_gpu.token_logprobs(view.clone(), some, backend=backend))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inplace_writes_the_gradient_over_the_logits(backend: str, dtype: torch.dtype, shift: bool) -> None:
    source = (3 * torch.randn(3, 4, 2100, device=DEVICE)).to(dtype)
    ids = torch.randint(0, 2000, (3, 4), device=DEVICE)

    def run(logits: Tensor, **options: Any) -> Tensor:
        found = kl_gpu.token_logprobs(
            logits, ids, entropy=True, shift=shift, vocab_size=2090, backend=backend, **options
        )
        return sum(x.sum() for x in found)

    (want,) = torch.autograd.grad(run(apart := source.clone().requires_grad_()), apart)
    assert want.abs().amax(-1)[:, : 3 if shift else 4].min() > 1e-3
    logits = source.clone().requires_grad_() * 1
    # Asks autograd for the very tensor our backward returned.
    (gradient,) = torch.autograd.grad(loss := run(logits, inplace=True), logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    assert torch.equal(gradient, want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


def test_one_graph(backend: str) -> None:
    torch.compiler.reset()

    def loss(logits: Tensor, ids: Tensor) -> Tensor:
        logprob, entropy = kl_gpu.token_logprobs(logits, ids, entropy=True, backend=backend)
        return logprob.mean() + 0.1 * entropy.mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows in (3, 5):
        logits, ids = given(rows, 90)
        logits.requires_grad_()
        plain, traced = loss(logits, ids), compiled(logits, ids)
        torch.testing.assert_close(traced, plain, rtol=1e-6, atol=0)
        want, got = (torch.autograd.grad(x, logits)[0] for x in (plain, traced))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_an_id_outside_is_nan_where_it_is_not_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(complement_ops, "check_ids", lambda *_: None)
    logits, ids = given(3, 300)
    ids[1] = 300
    logprob = kl_gpu.token_logprobs(logits, ids, backend=backend)
    assert torch.isnan(logprob).tolist() == [False, True, False]


X, I = torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.long)  # noqa: E741
LEAF = X.clone().requires_grad_()
CASES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("logits a list", {"logits": [0.0]}, TypeError, "logits.*tensor.*list"),
    ("logits int", {"logits": I}, TypeError, "logits.*int64"),
    ("no columns", {"logits": X[..., :0]}, ValueError, "logits.*column"),
    ("ids float", {"token_ids": X[..., 0]}, TypeError, "token_ids.*integer.*float32"),
    ("ids of 4-D", {"token_ids": X.long()[..., None]}, ValueError, r"token_ids.*\(2, 3\).*\(2, 3, 8, 1\)"),
    ("ids would broadcast", {"token_ids": I[:1]}, ValueError, r"token_ids.*\(1, 3\)"),
    ("ids elsewhere", {"token_ids": I.to("meta")}, ValueError, "token_ids.*cpu.*meta"),
    ("id past V", {"token_ids": I + 8}, ValueError, r"token_ids.*\[0, 8\), got 8"),
    ("id past vocab_size", {"token_ids": I + 7, "vocab_size": 7}, ValueError, r"token_ids.*\[0, 7\).*7"),
    ("id −1", {"token_ids": I - 1}, ValueError, r"token_ids.*\[0, 8\), got -1"),
    ("temperature 0", {"temperature": 0}, ValueError, "temperature.*> 0"),
    ("inplace an int", {"inplace": 1}, TypeError, "inplace.*True or False"),
    ("inplace on a leaf", {"logits": LEAF, "inplace": True}, ValueError, "inplace.*logits.*leaf"),
    ("entropy an int", {"entropy": 1}, TypeError, "entropy.*True or False"),
    ("mask of 2", {"mask": I + 2}, ValueError, "mask.*0 and 1, got 2"),
    ("shift of 2-D", {"logits": X[0], "token_ids": I[0], "shift": True}, ValueError, "shift.*batch"),
    ("vocab_size 0", {"vocab_size": 0}, ValueError, r"vocab_size.*\[1, 8\]"),
    ("ignore_index float", {"ignore_index": 0.5}, TypeError, "ignore_index.*int"),
    ("backend an int", {"backend": 1}, TypeError, "backend.*string"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_refused(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a kernel was started")

    monkeypatch.setattr(complement_ops, "complement", refuse)
    with pytest.raises(AssertionError, match="started"):
        kl_gpu.token_logprobs(X, I)
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        kl_gpu.token_logprobs(**{"logits": X, "token_ids": I} | arguments)


@pytest.mark.parametrize("offset", [1.2e7, -1.3e7])
def test_logits_past_2_to_24(backend: str, offset: float) -> None:
    """In units of ln 2: float32 neighbours lie a nat and more apart there, no multiple of log2 e is exact."""
    logits = offset + torch.randint(-3, 1, (4, 300), device=DEVICE).float()
    logits[:, 5] += 2
    check(logits, logits.argmin(-1), backend, f"offset {offset}")
    level = torch.full((2, 300), 100 * offset, device=DEVICE)
    logprob = kl_gpu.token_logprobs(level, torch.tensor([3, 299], device=DEVICE), backend=backend)
    np.testing.assert_allclose(to_numpy(logprob), -np.log(300), rtol=RELATIVE)


@pytest.mark.parametrize("temperature", [1e-6, 1e-5, 1e-3])
def test_temperatures_near_0(backend: str, temperature: float) -> None:
    logits, ids = given(4, 300)
    logits[:, 9] = logits[:, 200] = 15.0
    ids[:2], ids[2] = 9, 7
    logits[3, 200] += 2.0**-20  # of the float32 neighbours
    logprob, entropy = kl_gpu.token_logprobs(
        logits, ids, temperature=temperature, entropy=True, backend=backend
    )
    want = reference_topk.token_logprobs(to_numpy(logits), ids.cpu().numpy(), temperature)
    np.testing.assert_allclose(to_numpy(logprob), want, rtol=RELATIVE)
    spread = reference_topk.entropy(to_numpy(logits), temperature)
    assert spread.max() > 0.6
    np.testing.assert_allclose(to_numpy(entropy), spread, rtol=RELATIVE, atol=2e-7)
    leaf = logits.requires_grad_()
    logprob = kl_gpu.token_logprobs(leaf, ids, temperature=temperature, backend=backend)
    (grad,) = torch.autograd.grad(logprob.sum(), leaf)
    exact = reference_topk.token_gradients(to_numpy(logits), ids.cpu().numpy(), temperature)[0]
    np.testing.assert_allclose(to_numpy(grad), exact, rtol=1e-5, atol=GRADIENT / temperature)

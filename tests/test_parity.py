"""Parity with what people use today: the same number, and the same gradient, from one call of ours.

The other side of every comparison is the published formula, written out here in float64 and evaluated on the
very inputs we were given, or the library itself where it is a dependency of the tests (PyTorch, SciPy). The
bounds are the promised ones. docs/parity.md is the table for users; each of its rows names a test here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from torch import Tensor
from torch.distributions import Categorical
from torch.distributions import kl_divergence as torch_kl_divergence

import kl_gpu
from support import DEVICE, FIRST_ORDER, GRADIENT, RELATIVE, ROUNDING, TINY, pair, record, to_numpy

Loss = Callable[[Tensor, Tensor], Tensor]

# The batch of every row: [batch, time, V], the prompt and the padding masked out by their labels.
LEAD, VOCAB = (2, 5), 90
LABELS = torch.tensor([[-100, 4, 17, 8, -100], [-100, -100, 3, 60, 5]], device=DEVICE)
COUNTS = LABELS != -100


@pytest.fixture(params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def batch(dtype: torch.dtype, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    return pair(*LEAD, VOCAB, spread=spread, dtype=dtype)


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    z = logits / temperature
    return z - z.logsumexp(-1, keepdim=True)


def softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return log_softmax(logits, temperature).exp()


def entropy(logits: Tensor) -> Tensor:
    return -(softmax(logits) * log_softmax(logits)).sum(-1)


def valid_mean(rows: Tensor, labels: Tensor = LABELS) -> Tensor:
    """Σ / number of labels that are not −100, as every distillation loss below has it."""
    keep = (labels != -100).to(rows)
    return (rows * keep).sum() / keep.sum()


def agree(
    ours: Loss, theirs: Loss, logits: tuple[Tensor, Tensor], backend: str, kind: str, *,
    scale: Tensor | float = 1.0, temperature: float = 1.0, constant: Tensor | float = 0.0,
) -> None:  # fmt: skip
    """Ours is theirs less `constant`, and the gradients to the student are equal, both to the promised bound.

    `theirs` is evaluated and differentiated in float64 on the same inputs. `scale` is the factor of each row
    in the result, by which the promise about gradients is stated. `constant` is what theirs adds.
    """
    student, teacher = (side.detach() for side in logits)
    mine = student.clone().requires_grad_()
    value = ours(mine, teacher)
    (grad,) = torch.autograd.grad(value.sum(), mine)

    exact = student.double().requires_grad_()
    other = theirs(exact, teacher.double())
    (exact_grad,) = torch.autograd.grad(other.sum(), exact)
    want = to_numpy(other - constant)

    log_p, log_q = (to_numpy(log_softmax(side.double(), temperature)) for side in (teacher, student))
    per_row = np.broadcast_to(to_numpy(torch.as_tensor(scale)), log_p.shape[:-1])[..., None]
    fine = 1.0 if student.dtype == torch.float32 else 1e-10 / RELATIVE
    bound = RELATIVE * fine * np.abs(want)
    if kind in FIRST_ORDER:
        lse = [side.double().div(temperature).logsumexp(-1) for side in (student, teacher)]
        first_order = 2e-7 * (1 + np.abs(to_numpy(lse[0] - lse[1]))) * np.abs(per_row[..., 0])
        bound = bound + fine * (first_order if value.dim() else first_order.sum())
        # The gradient is a step where p = q; these inputs have no such column.
        assert np.abs(log_p - log_q).min() > 1e-5
    assert value.shape == other.shape
    assert (np.abs(want) > 1e-9 * np.abs(per_row).max()).any(), "a zero result would pass"
    share = np.max(np.abs(to_numpy(value) - want) / np.where(want == 0, 1e-300, bound))
    record("parity", backend, kind, float(share), "value")
    assert share <= 1, f"value: {share} of the bound, {value} against {want}"

    bound = GRADIENT * fine * np.exp(np.maximum(log_p, log_q)) * np.abs(per_row) / temperature
    if kind not in ("forward_kl", "tv"):  # where logarithms weigh a term
        bound = bound * np.maximum(1.0, np.abs(log_p - log_q))
    exact_grad = to_numpy(exact_grad)
    slack = np.abs(exact_grad) * ROUNDING[grad.dtype] + TINY[grad.dtype] + 1e-300
    assert np.abs(exact_grad).max() > 1e-6 * np.abs(per_row).max(), "a zero gradient would pass"
    share = np.max((np.abs(to_numpy(grad) - exact_grad) - slack) / np.where(bound == 0, 1e-300, bound))
    record("parity", backend, kind, float(share), "gradient")
    assert share <= 1, f"gradient: {share} of the bound"


# --- TRL ----------------------------------------------------------------------------------------------------


def trl_generalized_jsd(
    student: Tensor, teacher: Tensor, labels: Tensor | None, beta: float, temperature: float, reduction: str
) -> Tensor:
    """Agarwal et al. (2024), eq. 1, elementwise, reduced as trl's `GKDTrainer.generalized_jsd_loss` does."""
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    if beta == 0:
        terms = log_p.exp() * (log_p - log_q)
    elif beta == 1:
        terms = log_q.exp() * (log_q - log_p)
    else:
        log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
        terms = beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
    if labels is not None:
        terms = terms[labels != -100]
    divisor = {
        "batchmean": terms.shape[0],  # unmasked tokens where there are labels, else the first dimension
        "mean": terms.numel(),
        "sum": 1,
        "none": 1,
    }[reduction]
    return terms if reduction == "none" else terms.sum() / divisor


@pytest.mark.parametrize("temperature", [1.0, 0.9, 2.5])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_trl_gkd(backend: str, dtype: torch.dtype, beta: float, temperature: float) -> None:
    """trl `GKDTrainer.generalized_jsd_loss`, its default "batchmean": our "mean". No T²."""
    agree(
        lambda s, t: kl_gpu.js_div(s, t, beta=beta, temperature=temperature, labels=LABELS, backend=backend),
        lambda s, t: trl_generalized_jsd(s, t, LABELS, beta, temperature, "batchmean"),
        batch(dtype), backend, {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "js"),
        scale=COUNTS / COUNTS.sum(), temperature=temperature,
    )  # fmt: skip


@pytest.mark.parametrize(("labels", "theirs", "reduction", "per_element"), [
    (LABELS, "batchmean", "mean", 1), (LABELS, "mean", "mean", VOCAB), (LABELS, "sum", "sum", 1),
    (LABELS, "none", "none", 1), (None, "batchmean", "batchmean", 1), (None, "mean", "mean", VOCAB),
    (None, "sum", "sum", 1), (None, "none", "none", 1),
])  # fmt: skip
def test_trl_gkd_reductions(
    backend: str, labels: Tensor | None, theirs: str, reduction: str, per_element: int
) -> None:
    """trl's "batchmean" divides by the labels that count, by the batch without labels; "mean" by elements."""
    keep = torch.ones(LEAD, dtype=torch.bool, device=DEVICE) if labels is None else labels != -100
    divisor = {"none": 1, "sum": 1, "mean": int(keep.sum()) * per_element, "batchmean": LEAD[0]}[reduction]

    def other(s: Tensor, t: Tensor) -> Tensor:
        loss = trl_generalized_jsd(s, t, labels, 0.3, 1.0, theirs)
        return loss.sum(-1)[keep if labels is None else ...].view(-1) if theirs == "none" else loss

    def ours(s: Tensor, t: Tensor) -> Tensor:
        loss = kl_gpu.js_div(s, t, beta=0.3, labels=labels, reduction=reduction, backend=backend)
        return loss[keep] if theirs == "none" else loss / per_element

    agree(ours, other, batch(torch.float32), backend, "js", scale=keep / divisor)


def test_trl_beta_ends_are_the_two_kls(backend: str) -> None:
    """trl: beta = 0 is F.kl_div(student, teacher), the forward KL; beta = 1 the reverse one.

    The limits of eq. 1 itself are 0: the ends are conventions, not continuations.
    """
    student, teacher = batch(torch.float32)
    p, q = log_softmax(teacher.double()), log_softmax(student.double())
    forward, reverse = (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)
    for beta, want in ((0.0, forward), (1.0, reverse)):
        got = kl_gpu.js_div(student, teacher, beta=beta, reduction="none", backend=backend)
        np.testing.assert_allclose(to_numpy(got), to_numpy(want), rtol=RELATIVE)
        near = kl_gpu.js_div(student, teacher, beta=abs(beta - 1e-6), reduction="none", backend=backend)
        assert (near < 1e-4).all()
    assert not torch.allclose(forward, reverse, rtol=1e-2)


def test_trl_num_items_in_batch(backend: str) -> None:
    """transformers' `num_items_in_batch`: Σ of all micro-batches / one count, as in one large batch."""
    student, teacher = batch(torch.float32)
    n = COUNTS.sum()
    parts = [
        kl_gpu.js_div(s, t, labels=y, normalizer=n, backend=backend)
        for s, t, y in zip(student, teacher, LABELS, strict=True)
    ]
    whole = trl_generalized_jsd(student.double(), teacher.double(), LABELS, 0.5, 1.0, "batchmean")
    assert sum(parts).item() == pytest.approx(whole.item(), rel=RELATIVE)


# --- torchtune ----------------------------------------------------------------------------------------------


def cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """−Σ p log q, per token: torchtune `ForwardKLLoss` and DistiLLM `forward_kl` before their mean."""
    return -(softmax(teacher) * log_softmax(student)).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ q (log q − log p), per token."""
    return (softmax(student) * (log_softmax(student) - log_softmax(teacher))).sum(-1)


def test_torchtune_forward(backend: str, dtype: torch.dtype) -> None:
    """torchtune `ForwardKLLoss`: a cross-entropy, above ours by the teacher's mean entropy; one gradient."""
    student, teacher = batch(dtype)
    constant = valid_mean(entropy(teacher.double()))
    assert constant > 0.5
    agree(
        lambda s, t: kl_gpu.kl_div(s, t, labels=LABELS, backend=backend),
        lambda s, t: valid_mean(cross_entropy(s, t)),
        (student, teacher), backend, "forward_kl", scale=COUNTS / COUNTS.sum(), constant=constant,
    )  # fmt: skip


def test_torchtune_reverse(backend: str, dtype: torch.dtype) -> None:
    """torchtune `ReverseKLLoss`."""
    agree(
        lambda s, t: kl_gpu.kl_div(s, t, direction="reverse", labels=LABELS, backend=backend),
        lambda s, t: valid_mean(reverse_kl(s, t)),
        batch(dtype), backend, "reverse_kl", scale=COUNTS / COUNTS.sum(),
    )  # fmt: skip


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_torchtune_symmetric(backend: str, dtype: torch.dtype, ratio: float) -> None:
    """torchtune `SymmetricKLLoss`: sym_kd_ratio weighs the forward part, β = 1 − ratio; a constant apart."""
    student, teacher = batch(dtype)
    agree(
        lambda s, t: kl_gpu.divergence(s, t, "jeffreys", beta=1 - ratio, labels=LABELS, backend=backend),
        lambda s, t: ratio * valid_mean(cross_entropy(s, t)) + (1 - ratio) * valid_mean(reverse_kl(s, t)),
        (student, teacher), backend, {0.0: "reverse_kl", 1.0: "forward_kl"}.get(ratio, "jeffreys"),
        scale=COUNTS / COUNTS.sum(), constant=ratio * valid_mean(entropy(teacher.double())),
    )  # fmt: skip


def test_torchtune_chunked(backend: str) -> None:
    """torchtune `ForwardKLWithChunkedOutputLoss`: Σ over chunks of time / one count; ours needs no chunks."""
    student, teacher = batch(torch.float32)

    def chunked(s: Tensor, t: Tensor) -> Tensor:
        parts = zip(s.split(2, 1), t.split(2, 1), COUNTS.split(2, 1), strict=True)
        return sum((cross_entropy(x, y) * keep).sum() for x, y, keep in parts) / COUNTS.sum()

    agree(
        lambda s, t: kl_gpu.kl_div(s, t, labels=LABELS, backend=backend),
        chunked,
        (student, teacher), backend, "forward_kl",
        scale=COUNTS / COUNTS.sum(), constant=valid_mean(entropy(teacher.double())),
    )  # fmt: skip


# --- DistiLLM, MiniLLM --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
def test_distillm_skewed_forward(backend: str, dtype: torch.dtype, lam: float) -> None:
    """distillm `skewed_forward_kl`, Ko et al. (2024), section 3: β = lam. The code leaves out −H(p)."""
    student, teacher = batch(dtype)

    def skewed(s: Tensor, t: Tensor) -> Tensor:
        p, q = softmax(t), softmax(s)
        return valid_mean(-(p * (lam * p + (1 - lam) * q).log()).sum(-1))

    agree(
        lambda s, t: kl_gpu.divergence(s, t, "skew_forward_kl", beta=lam, labels=LABELS, backend=backend),
        skewed, (student, teacher), backend, "skew_forward_kl",
        scale=COUNTS / COUNTS.sum(), constant=valid_mean(entropy(teacher.double())),
    )  # fmt: skip


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
def test_distillm_skewed_reverse(backend: str, dtype: torch.dtype, lam: float) -> None:
    """distillm `skewed_reverse_kl`, Ko et al. (2024), section 3: β = lam, the student's share of m."""

    def skewed(s: Tensor, t: Tensor) -> Tensor:
        p, q = softmax(t), softmax(s)
        return valid_mean((q * (log_softmax(s) - ((1 - lam) * p + lam * q).log())).sum(-1))

    agree(
        lambda s, t: kl_gpu.divergence(s, t, "skew_reverse_kl", beta=lam, labels=LABELS, backend=backend),
        skewed, batch(dtype), backend, "skew_reverse_kl", scale=COUNTS / COUNTS.sum(),
    )  # fmt: skip


def test_distillm_js(backend: str, dtype: torch.dtype) -> None:
    """distillm `js_distance`, lam = 0.9: lam is the *student's* share, so β = 1 − lam. No root is taken."""
    lam = 0.9

    def js_distance(s: Tensor, t: Tensor) -> Tensor:
        p, q = softmax(t), softmax(s)
        log_m = ((1 - lam) * p + lam * q).log()
        to_q, to_p = q * (log_softmax(s) - log_m), p * (log_softmax(t) - log_m)
        return valid_mean(lam * to_q.sum(-1) + (1 - lam) * to_p.sum(-1))

    agree(
        lambda s, t: kl_gpu.js_div(s, t, beta=1 - lam, labels=LABELS, backend=backend),
        js_distance, batch(dtype), backend, "js", scale=COUNTS / COUNTS.sum(),
    )  # fmt: skip


def test_distillm_symmetric(backend: str, dtype: torch.dtype) -> None:
    """distillm `symmetric_kl`, lam = 0.9: (1 − lam) cross-entropy + lam reverse KL, so β = lam."""
    student, teacher = batch(dtype)
    agree(
        lambda s, t: kl_gpu.divergence(s, t, "jeffreys", beta=0.9, labels=LABELS, backend=backend),
        lambda s, t: 0.1 * valid_mean(cross_entropy(s, t)) + 0.9 * valid_mean(reverse_kl(s, t)),
        (student, teacher), backend, "jeffreys",
        scale=COUNTS / COUNTS.sum(), constant=0.1 * valid_mean(entropy(teacher.double())),
    )  # fmt: skip


def test_distillm_tv(backend: str, dtype: torch.dtype) -> None:
    """distillm `tv_distance`, total variation: half the sum of |p − q|."""
    agree(
        lambda s, t: kl_gpu.divergence(s, t, "tv", labels=LABELS, backend=backend),
        lambda s, t: valid_mean(0.5 * (softmax(t) - softmax(s)).abs().sum(-1)),
        batch(dtype), backend, "tv", scale=COUNTS / COUNTS.sum(),
    )  # fmt: skip


def accepted(student: Tensor, teacher: Tensor) -> Tensor:
    """α, the share of draft tokens that speculative sampling accepts."""
    return torch.minimum(softmax(teacher), softmax(student)).sum(-1)


def test_speculators_nla(backend: str, dtype: torch.dtype) -> None:
    """speculators `neg_log_acceptance_loss`: −log α."""
    agree(
        lambda s, t: kl_gpu.divergence(s, t, "nla", labels=LABELS, backend=backend),
        lambda s, t: valid_mean(-accepted(s, t).log()),
        batch(dtype), backend, "nla", scale=COUNTS / COUNTS.sum(),
    )  # fmt: skip


def test_speculators_lk_hybrid(backend: str, dtype: torch.dtype) -> None:
    """speculators `lk_hybrid_loss`: KL and TV mixed by λ = exp(−η α), which has no gradient; η = 3."""

    def hybrid(s: Tensor, t: Tensor) -> Tensor:
        alpha = accepted(s, t)
        weight = torch.exp(-3.0 * alpha.detach())
        kl = (softmax(t) * (log_softmax(t) - log_softmax(s))).sum(-1)
        return valid_mean(weight * kl + (1 - weight) * (1 - alpha))

    agree(
        lambda s, t: kl_gpu.divergence(s, t, "lk", labels=LABELS, backend=backend), hybrid,
        batch(dtype), backend, "lk", scale=COUNTS / COUNTS.sum(),
    )  # fmt: skip


def test_total_variation_is_the_largest_difference_of_an_event(backend: str) -> None:
    """The definition of total variation, max over events A of |P(A) − Q(A)|, by trying all 2^V of them."""
    student, teacher = pair(6, 7)
    p, q = to_numpy(softmax(teacher.double())), to_numpy(softmax(student.double()))
    events = (np.arange(2**7)[:, None] >> np.arange(7)) & 1
    want = np.abs((p - q) @ events.T).max(-1)
    got = to_numpy(kl_gpu.divergence(student, teacher, "tv", reduction="none", backend=backend))
    lse = to_numpy(student.double().logsumexp(-1) - teacher.double().logsumexp(-1))
    assert (np.abs(got - want) <= RELATIVE * want + 2e-7 * (1 + np.abs(lse))).all()
    assert want.min() > 0.01


def test_minillm_reverse(backend: str, dtype: torch.dtype) -> None:
    """MiniLLM, Gu et al. (2024), eq. 1 at one step: cross-entropy(q, p) − entropy(q), as in `_reg_loss`."""

    def single_step(s: Tensor, t: Tensor) -> Tensor:
        q = softmax(s)
        return valid_mean(-(q * log_softmax(t)).sum(-1) + (q * log_softmax(s)).sum(-1))

    agree(
        lambda s, t: kl_gpu.kl_div(s, t, direction="reverse", mask=COUNTS, backend=backend),
        single_step, batch(dtype), backend, "reverse_kl", scale=COUNTS / COUNTS.sum(),
    )  # fmt: skip


# --- NVIDIA ModelOpt, PyTorch -------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_modelopt_logits_distillation(backend: str, dtype: torch.dtype, temperature: float) -> None:
    """modelopt `LogitsDistillationLoss`: T² KL(p‖q), rows flattened before "batchmean", so our "mean"."""

    def distillation(s: Tensor, t: Tensor) -> Tensor:
        log_p, log_q = (log_softmax(x.flatten(0, -2), temperature) for x in (t, s))
        return temperature**2 * (log_p.exp() * (log_p - log_q)).sum() / len(log_p)

    agree(
        lambda s, t: kl_gpu.kl_div(s, t, temperature=temperature, t_squared=True, backend=backend),
        distillation, batch(dtype), backend, "forward_kl",
        scale=temperature**2 / math.prod(LEAD), temperature=temperature,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
def test_torch_kl_div(backend: str, dtype: torch.dtype, reduction: str, log_target: bool) -> None:
    """torch.nn.functional.kl_div(log q, p): the forward KL; "mean" is over elements, so ours / V."""

    def theirs(s: Tensor, t: Tensor) -> Tensor:
        target = F.log_softmax(t, -1) if log_target else F.softmax(t, -1)
        loss = F.kl_div(F.log_softmax(s, -1), target, reduction=reduction, log_target=log_target)
        return loss.sum(-1) if reduction == "none" else loss

    def ours(s: Tensor, t: Tensor) -> Tensor:
        loss = kl_gpu.kl_div(s, t, reduction=reduction, backend=backend)
        return loss / VOCAB if reduction == "mean" else loss

    scale = {"none": 1.0, "sum": 1.0, "batchmean": 1 / LEAD[0], "mean": 1 / (math.prod(LEAD) * VOCAB)}
    agree(ours, theirs, batch(dtype), backend, "forward_kl", scale=scale[reduction])


@pytest.mark.parametrize("spread", [0.1, 0.01])
def test_torch_kl_div_of_close_logits(backend: str, spread: float) -> None:
    """torch.nn.functional.kl_div in float64, on logits where its own float32 result is mostly noise."""
    agree(
        lambda s, t: kl_gpu.kl_div(s, t, reduction="none", backend=backend),
        lambda s, t: F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="none").sum(-1),
        batch(torch.float32, spread), backend, "forward_kl",
    )  # fmt: skip


def test_torch_kl_div_swapped_is_reverse(backend: str, dtype: torch.dtype) -> None:
    """torch.nn.functional.kl_div(log p, log q, log_target=True): the reverse KL."""
    agree(
        lambda s, t: kl_gpu.kl_div(s, t, direction="reverse", reduction="batchmean", backend=backend),
        lambda s, t: F.kl_div(
            F.log_softmax(t, -1), F.log_softmax(s, -1), reduction="batchmean", log_target=True
        ),
        batch(dtype), backend, "reverse_kl", scale=1 / LEAD[0],
    )  # fmt: skip


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_torch_distributions(backend: str, dtype: torch.dtype, direction: str) -> None:
    """torch.distributions.kl_divergence(Categorical, Categorical), per row."""

    def theirs(s: Tensor, t: Tensor) -> Tensor:
        p, q = Categorical(logits=t), Categorical(logits=s)
        return torch_kl_divergence(*((p, q) if direction == "forward" else (q, p)))

    agree(
        lambda s, t: kl_gpu.kl_div(s, t, direction=direction, reduction="none", backend=backend),
        theirs, batch(dtype), backend, f"{direction}_kl",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_hinton_soft_targets(backend: str, kind: str) -> None:
    """Hinton et al. (2015), section 2.1: at high T and zero-mean logits, T² × gradient is (z − v)/V."""
    student, teacher = (x - x.mean(-1, keepdim=True) for x in pair(4, VOCAB, scale=1.0, dtype=torch.float64))
    student.requires_grad_()
    loss = kl_gpu.divergence(
        student, teacher, kind, temperature=1e4, t_squared=True, reduction="sum", backend=backend
    )
    (grad,) = torch.autograd.grad(loss, student)
    want = (student - teacher) / VOCAB
    torch.testing.assert_close(grad, want.detach(), rtol=0, atol=1e-3 * want.abs().max().item())


# --- SciPy, Keras, TensorFlow Probability -------------------------------------------------------------------


def test_scipy_rel_entr(backend: str, dtype: torch.dtype) -> None:
    """scipy.special.rel_entr(p, q) summed (scipy.stats.entropy(p, q) is the same), both directions."""
    student, teacher = batch(dtype)
    p, q = to_numpy(softmax(teacher.double())), to_numpy(softmax(student.double()))
    rtol = RELATIVE if dtype == torch.float32 else 1e-10
    for direction, want in (("forward", rel_entr(p, q).sum(-1)), ("reverse", rel_entr(q, p).sum(-1))):
        got = kl_gpu.kl_div(student, teacher, direction=direction, reduction="none", backend=backend)
        np.testing.assert_allclose(to_numpy(got), want, rtol=rtol)


def test_scipy_jensenshannon(backend: str, dtype: torch.dtype) -> None:
    """scipy.spatial.distance.jensenshannon is the *root* of js at β = ½, in nats or another base."""
    student, teacher = batch(dtype)
    p, q = to_numpy(softmax(teacher.double())), to_numpy(softmax(student.double()))
    got = kl_gpu.js_div(student, teacher, reduction="none", backend=backend)
    rtol = RELATIVE if dtype == torch.float32 else 1e-10
    np.testing.assert_allclose(to_numpy(got), jensenshannon(p, q, axis=-1) ** 2, rtol=rtol)
    np.testing.assert_allclose(to_numpy(got / math.log(2)), jensenshannon(p, q, 2.0, axis=-1) ** 2, rtol=rtol)


def test_scipy_jensenshannon_documented_examples(backend: str) -> None:
    """The three examples of scipy.spatial.distance.jensenshannon's page: 1.0 in bits, 0.4645…, 0.0."""
    cases = (
        ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], 1.0, math.log(2)),
        ([1.0, 0.0], [0.5, 0.5], 0.46450140402245893, 1.0),
        ([1.0, 0.0, 0.0], [1.0, 0.0, 0.0], 0.0, 1.0),
    )
    for p, q, distance, unit in cases:
        teacher, student = (torch.tensor(x, dtype=torch.float64, device=DEVICE).log() for x in (p, q))
        got = kl_gpu.js_div(student, teacher, backend=backend).item()
        assert got == pytest.approx(distance**2 * unit, rel=1e-10, abs=0)


def test_keras_kl_divergence(backend: str, dtype: torch.dtype) -> None:
    """tf.keras.losses.KLDivergence: Σ p log(p/q), both clipped to [1e-7, 1], mean over rows."""

    def keras(s: Tensor, t: Tensor) -> Tensor:
        p, q = softmax(t).clamp(1e-7, 1), softmax(s).clamp(1e-7, 1)
        return (p * (p / q).log()).sum(-1).mean()

    student, teacher = pair(*LEAD, VOCAB, scale=1.5, dtype=dtype)
    assert min(softmax(x.double()).min() for x in (student, teacher)) > 1e-7, "nothing is clipped here"
    agree(
        lambda s, t: kl_gpu.kl_div(s, t, backend=backend),
        keras, (student, teacher), backend, "forward_kl", scale=1 / math.prod(LEAD),
    )  # fmt: skip
    # Where the student falls below 1e-7 the clip shows: theirs saturates at −log 1e-7, ours goes on.
    far = torch.tensor([0.0, -40.0], dtype=dtype, device=DEVICE)
    assert kl_gpu.kl_div(far, far.flip(0), backend=backend).item() == pytest.approx(40, rel=RELATIVE)
    assert keras(far[None].double(), far.flip(0)[None].double()).item() == pytest.approx(
        -math.log(1e-7), rel=1e-4
    )


def test_keras_documented_example(backend: str) -> None:
    """The example of tf.keras.losses.KLDivergence's page, its row that is a distribution: −log 0.4, 0.916."""
    teacher = torch.tensor([0.0, 1.0], dtype=torch.float64, device=DEVICE).log()
    student = torch.tensor([0.6, 0.4], dtype=torch.float64, device=DEVICE).log()
    got = kl_gpu.kl_div(student, teacher, backend=backend).item()
    assert got == pytest.approx(0.9162907319, rel=1e-9)


def test_tfp_categorical(backend: str, dtype: torch.dtype) -> None:
    """tfp.distributions.kl_divergence(Categorical(logits=a), Categorical(logits=b)): KL(a‖b), per row."""
    agree(
        lambda s, t: kl_gpu.kl_div(s, t, direction="reverse", reduction="none", backend=backend),
        lambda s, t: (torch.softmax(s, -1) * (torch.log_softmax(s, -1) - torch.log_softmax(t, -1))).sum(-1),
        batch(dtype), backend, "reverse_kl",
    )  # fmt: skip


def test_uniform_prior(backend: str, dtype: torch.dtype) -> None:
    """A categorical VAE's prior term, KL(q‖uniform) = log V − H(q), the uniform side with stride 0."""
    student, _ = batch(dtype)
    uniform = torch.zeros((), dtype=dtype, device=DEVICE).expand(*LEAD, VOCAB)
    assert uniform.stride() == (0, 0, 0)
    agree(
        lambda s, t: kl_gpu.kl_div(s, t, direction="reverse", reduction="none", backend=backend),
        lambda s, t: math.log(VOCAB) - entropy(s),
        (student, uniform), backend, "reverse_kl",
    )  # fmt: skip
    # One row of zeros for the whole batch is the layout our kernels read as it lies.
    row = torch.zeros(VOCAB, dtype=dtype, device=DEVICE).expand(*LEAD, VOCAB)
    pair_of = [
        kl_gpu.kl_div(student, x, direction="reverse", reduction="none", backend=backend)
        for x in (row, uniform)
    ]
    assert torch.equal(*pair_of)


# --- llama.cpp ----------------------------------------------------------------------------------------------


def llama_dump(base_logits: np.ndarray) -> np.ndarray:
    """Log-probabilities as llama-perplexity's file of base logits holds them: 16 bits over up to 16 nats."""
    largest = base_logits.max(-1, keepdims=True)
    least = np.maximum(base_logits.min(-1, keepdims=True), largest - 16)
    lse = largest + np.log(np.exp(base_logits - largest).sum(-1, keepdims=True))
    step = (largest - least) / 65535
    codes = np.where(base_logits > least, np.rint((base_logits - least) / step), 0)
    return step * codes + (least - lse)


def llama_statistics(logits: np.ndarray, base: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """tools/perplexity/perplexity.cpp of ggml-org/llama.cpp, `kl_divergence`, token by token in float64."""
    nll, nll_base, kld, p_diff, same_top = [], [], [], [], 0
    for row, log_p, token in zip(logits, base, tokens, strict=True):
        lse = row.max() + math.log(np.exp(row - row.max()).sum())
        kept = log_p > -16
        nll.append(lse - row[token])
        nll_base.append(-log_p[token])
        kld.append(float((np.exp(log_p) * (log_p - row + lse))[kept].sum()))
        p_diff.append(math.exp(-nll[-1]) - math.exp(-nll_base[-1]))
        same_top += int(np.argmax(row) == np.argmax(log_p))

    def mean(x: list[float]) -> tuple[float, float]:
        f = sum(x) / len(x)
        return f, math.sqrt(max(sum(v * v for v in x) / len(x) - f * f, 0) / (len(x) - 1))

    def percentile(x: list[float], share: float) -> float:
        at = share * (len(x) - 1)
        i = int(at)
        return (1 - (at - i)) * x[i] + (at - i) * x[min(i + 1, len(x) - 1)]

    n, values = len(kld), sorted(kld)
    (log_ppl, error), (log_ppl_base, error_base) = mean(nll), mean(nll_base)
    products = [x * y for x, y in zip(nll, nll_base, strict=True)]
    covariance = (sum(products) / n - log_ppl * log_ppl_base) / (n - 1)
    log_ratio_error = math.sqrt(error**2 + error_base**2 - 2 * covariance)
    ratio = math.exp(log_ppl - log_ppl_base)
    square, square_error = mean([x * x for x in p_diff])
    agree = same_top / n
    middle = n // 2
    return {
        "student_ppl": math.exp(log_ppl), "student_ppl_se": math.exp(log_ppl) * error,
        "teacher_ppl": math.exp(log_ppl_base), "teacher_ppl_se": math.exp(log_ppl_base) * error_base,
        "log_ppl_ratio": log_ppl - log_ppl_base, "log_ppl_ratio_se": log_ratio_error,
        "ppl_ratio": ratio, "ppl_ratio_se": ratio * log_ratio_error,
        "forward_kl_mean": mean(kld)[0], "forward_kl_mean_se": mean(kld)[1],
        "forward_kl_median": values[middle] if n % 2 else (values[middle] + values[middle - 1]) / 2,
        "forward_kl_max": values[-1],
        **{f"forward_kl_p{p}": percentile(values, float(p) / 100)
           for p in ("1", "5", "10", "90", "95", "99", "99.9")},
        "delta_p_mean": mean(p_diff)[0], "delta_p_mean_se": mean(p_diff)[1],
        "delta_p_rms": math.sqrt(square), "delta_p_rms_se": 0.5 / math.sqrt(square) * square_error,
        "top1_agree": agree, "top1_agree_se": math.sqrt(agree * (1 - agree) / (n - 1)),
    }  # fmt: skip


@pytest.mark.parametrize("n", [120, 121])
def test_llama_cpp_kl_divergence(n: int) -> None:
    """llama-perplexity --kl-divergence: its base model is the teacher, its printed figures the summary's."""
    student, teacher = pair(n, VOCAB, scale=1.5, spread=0.4, dtype=torch.float64)
    tokens = torch.randint(0, VOCAB, (n,), device=DEVICE)
    logits, base = to_numpy(student), to_numpy(log_softmax(teacher))
    assert base.min() > -16, "nothing is left out here"
    known = tokens.cpu().numpy()
    theirs = llama_statistics(logits, base, known)
    assert 0.05 < theirs["forward_kl_mean"] < 0.2
    assert 0.5 < theirs["top1_agree"] < 0.95
    ours = kl_gpu.token_stats(student, teacher, tokens).summary()
    for name, want in theirs.items():
        assert ours[name] == pytest.approx(want, rel=1e-9), name
    narrow = kl_gpu.token_stats(student.float(), teacher.float(), tokens).summary()
    for name, want in theirs.items():
        assert narrow[name] == pytest.approx(want, rel=2e-5), name

    # Read back from its file the base's probabilities do not sum to 1 exactly: half a step of the logarithm.
    dumped = llama_dump(to_numpy(teacher))
    half_step = np.ptp(to_numpy(teacher), axis=-1).max() / 65535 / 2
    theirs = llama_statistics(logits, dumped, known)
    ours = kl_gpu.token_stats(student, torch.as_tensor(dumped, device=DEVICE), tokens).summary()
    assert 0 < abs(ours["forward_kl_mean"] - theirs["forward_kl_mean"]) < half_step
    for name, want in theirs.items():
        assert ours[name] == pytest.approx(want, rel=half_step, abs=2 * half_step), name


# --- worked examples of tutorials ---------------------------------------------------------------------------

# (P, Q): KL(P‖Q), KL(Q‖P), JS at ½, TV; mpmath at 30 digits, printed to 10.
WORKED = [
    ((0.5, 0.5), (0.7, 0.3), (0.08717669357, 0.08228287851, 0.02100592570, 0.2)),
    ((0.4, 0.4, 0.2), (0.3, 0.4, 0.3), (0.03397980736, 0.03533491070, 0.008617554938, 0.1)),
    ((0.2, 0.3, 0.5), (0.1, 0.5, 0.4), (0.09695352464, 0.09684067330, 0.02391205058, 0.2)),
]


@pytest.mark.parametrize(("p", "q", "figures"), WORKED)
def test_worked_examples(
    backend: str, dtype: torch.dtype, p: tuple[float, ...], q: tuple[float, ...], figures: tuple[float, ...]
) -> None:
    """Small examples that tutorials print: logits are the logarithms of the probabilities."""
    teacher, student = (torch.tensor(x, dtype=torch.float64, device=DEVICE).log().to(dtype) for x in (p, q))
    for kind, want in zip(("forward_kl", "reverse_kl", "js", "tv"), figures, strict=True):
        got = kl_gpu.divergence(student, teacher, kind, backend=backend).item()
        # The literals have 10 digits; in float32 the logarithms are rounded before we see them.
        assert got == pytest.approx(want, rel=RELATIVE if dtype == torch.float32 else 1e-9), kind
    halves = [kl_gpu.divergence(student, teacher, "jeffreys", backend=backend).item(), sum(figures[:2]) / 2]
    assert halves[0] == pytest.approx(halves[1], rel=RELATIVE)


# --- Top-k teachers (docs/offline-distillation.md) ----------------------------------------------------------


def best_of(teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return log_softmax(teacher, 1.0).topk(k)


def agree_on_topk(
    theirs: Callable[[Tensor, Tensor, Tensor], Tensor], backend: str, name: str, k: int = 8, **options: Any
) -> None:
    """Per-token values and gradient are those of `theirs(student, teacher's log-probabilities, ids)`.

    In float64, where both have digits to spare; the accuracy of float32 is tests/test_topk.py's affair.
    """
    teacher = 3 * torch.randn(3, 150, dtype=torch.float64, device=DEVICE)
    student = (teacher + torch.randn_like(teacher)).requires_grad_()
    logprobs, ids = best_of(teacher, k)
    ours = kl_gpu.topk_div(student, logprobs, ids, reduction="none", backend=backend, **options)
    other = theirs(student, logprobs, ids)
    torch.testing.assert_close(ours, other, rtol=1e-10, atol=0)
    assert ours.abs().min() > 1e-6
    (grad,), (want,) = (torch.autograd.grad(x.sum(), student) for x in (ours, other))
    torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-12)
    assert want.abs().max() > 1e-3
    record("parity", backend, name, 0.0, "top-k")


def nemo_rl_topk(
    student: Tensor, logprobs: Tensor, ids: Tensor, kl_type: str, weight: float, zero_outside_topk: bool
) -> Tensor:
    """`DistillationLossFn` of NVIDIA-NeMo/RL before masking: both sides over the teacher's k tokens.

    Or, with zero_outside_topk, the student over the whole vocabulary and the teacher at −100 elsewhere.
    """
    log_p = log_softmax(logprobs, 1.0)
    full = log_softmax(student, 1.0)
    log_q = full.gather(-1, ids)
    if not zero_outside_topk:
        log_q = log_softmax(log_q, 1.0)
    forward = (log_p.exp() * (log_p - log_q)).sum(-1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
    if zero_outside_topk:
        outside = (full.exp() * full).sum(-1) - (log_q.exp() * log_q).sum(-1)
        reverse = reverse + outside + 100 * (1 - log_q.exp().sum(-1))
    return {"forward": forward, "reverse": reverse, "mixed": weight * forward + (1 - weight) * reverse}[
        kl_type
    ]


@pytest.mark.parametrize("kl_type", ["forward", "reverse", "mixed"])
def test_nemo_rl_renormalised(backend: str, kl_type: str) -> None:
    options = {"forward": {}, "reverse": {"kind": "reverse_kl"}, "mixed": {"kind": "jeffreys", "beta": 0.7}}
    agree_on_topk(
        lambda *x: nemo_rl_topk(*x, kl_type, 0.3, False), backend, "NeMo-RL", tail="renormalize",
        **options[kl_type],
    )  # fmt: skip


def test_nemo_rl_zero_outside_topk(backend: str) -> None:
    agree_on_topk(lambda *x: nemo_rl_topk(*x, "forward", 0.3, True), backend, "NeMo-RL", tail="student_full")


def test_nemo_rl_zero_outside_topk_reverse_needs_a_dense_teacher(backend: str) -> None:
    # No tail has a −100 for every other column; a teacher with it spelled out has, at the price of [N, V].
    teacher = 3 * torch.randn(2, 150, dtype=torch.float64, device=DEVICE)
    student = teacher + torch.randn_like(teacher)
    logprobs, ids = best_of(teacher, 8)
    dense = torch.full_like(teacher, -100.0).scatter(-1, ids, log_softmax(logprobs, 1.0))
    ours = kl_gpu.kl_div(student, dense, direction="reverse", reduction="none", backend=backend)
    theirs = nemo_rl_topk(student, logprobs, ids, "reverse", 0.3, True)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)


def verl_topk(student: Tensor, logprobs: Tensor, ids: Tensor) -> Tensor:
    """verl's `forward_kl_topk`: not renormalised, log-probabilities clamped at log 1e-8."""
    log_q = log_softmax(student, 1.0).gather(-1, ids).clamp_min(math.log(1e-8))
    log_p = logprobs.clamp_min(math.log(1e-8))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_verl_forward_kl_topk(backend: str) -> None:
    agree_on_topk(verl_topk, backend, "verl", tail="truncate")


@pytest.mark.parametrize("beta", [0.2, 0.5])
def test_verl_jsd_topk(backend: str, beta: float) -> None:
    def theirs(student: Tensor, logprobs: Tensor, ids: Tensor) -> Tensor:
        log_q = log_softmax(student, 1.0).gather(-1, ids)
        p, q = logprobs.exp(), log_q.exp()
        log_m = (beta * p + (1 - beta) * q).log()
        return (beta * p * (logprobs - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)

    agree_on_topk(theirs, backend, "verl", kind="js", beta=beta, tail="generalized")


def test_verl_reverse_kl_topk_less_the_masses(backend: str) -> None:
    def theirs(student: Tensor, logprobs: Tensor, ids: Tensor) -> Tensor:
        log_q = log_softmax(student, 1.0).gather(-1, ids)
        return (log_q.exp() * (log_q - logprobs) - log_q.exp() + logprobs.exp()).sum(-1)

    agree_on_topk(theirs, backend, "verl", kind="reverse_kl", tail="generalized")


def test_verl_clamp_differs_below_1e_8(backend: str) -> None:
    student = torch.zeros(1, 20, dtype=torch.float64, device=DEVICE)
    student[0, 3] = -30.0  # q = 5e-15 at an id
    ids = torch.tensor([[3, 4]], device=DEVICE)
    logprobs = torch.tensor([[0.5, 0.2]], dtype=torch.float64, device=DEVICE).log()
    ours = kl_gpu.topk_div(student, logprobs, ids, tail="truncate", backend=backend)
    missing = 0.5 * (math.log(1e-8) - log_softmax(student, 1.0)[0, 3])
    torch.testing.assert_close(ours, verl_topk(student, logprobs, ids)[0] + missing)


def axolotl_topk(
    student: Tensor, logprobs: Tensor, ids: Tensor, temperature: float, beta: float, normalize: bool
) -> Tensor:
    """The loss of axolotl's `kd/kernels/liger.py` for one token; the teacher comes scaled and normalised."""
    log_p = log_softmax(logprobs, temperature)
    log_q = log_softmax(student, temperature).gather(-1, ids)
    if normalize:
        log_q = log_softmax(log_q, 1.0)
    p, q = log_p.exp(), log_q.exp()
    log_m = (beta * p + (1 - beta) * q).log()
    if beta == 0:
        loss = p * (log_p - log_q)
    elif beta == 1:
        loss = q * (log_q - log_p)
    else:
        loss = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
    return loss.sum(-1) * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_axolotl_topk(backend: str, temperature: float, beta: float) -> None:
    agree_on_topk(
        lambda *x: axolotl_topk(*x, temperature, beta, True), backend, "axolotl", tail="renormalize",
        kind="js", beta=beta, temperature=temperature, t_squared=True,
    )  # fmt: skip


def test_axolotl_without_normalize_topk(backend: str) -> None:
    agree_on_topk(lambda *x: axolotl_topk(*x, 1.0, 0.0, False), backend, "axolotl", tail="student_full")

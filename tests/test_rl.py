"""kl_penalty: values, gradients, and what its estimators are on average over a known distribution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kl_gpu
from kl_gpu.rl import ESTIMATORS
from support import DEVICE, DTYPES, to_numpy

INF, NAN = math.inf, math.nan
FORMULAS = {
    "k1": lambda r: r,
    "k2": lambda r: r**2 / 2,
    # e^−r − 1 + r with enough digits for r down to 1e-8.
    "k3": lambda r: np.where(np.abs(r) < 1e-2, r**2 / 2 - r**3 / 6 + r**4 / 24 - r**5 / 120 + r**6 / 720,
                             np.expm1(-r) + r),
    "abs": np.abs,
}  # fmt: skip


def log_ratios(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-probabilities whose r goes from 1e-7 to 60 and back through 0."""
    size = torch.logspace(-7, math.log10(60), 300, dtype=torch.float64)
    r = torch.cat([size, -size, torch.zeros(3, dtype=torch.float64)])
    ref = -torch.rand(len(r), dtype=torch.float64) * torch.cat([size, size, torch.ones(3)]) * 4
    return (ref + r).to(DEVICE, dtype), ref.to(DEVICE, dtype)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(estimator: str, dtype: torch.dtype) -> None:
    policy, ref = log_ratios(dtype)
    got = kl_gpu.kl_penalty(policy, ref, estimator)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    r = to_numpy(policy) - to_numpy(ref)
    want = FORMULAS[estimator](r)
    np.testing.assert_allclose(to_numpy(got), want, rtol=1e-12 if dtype == torch.float64 else 5e-6, atol=0)
    assert estimator == "k1" or (got >= 0).all()
    assert (got[policy == ref] == 0).all()


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("clamp", [None, 1.5])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients(estimator: str, clamp: float | None, straight_through: bool) -> None:
    r = torch.tensor([-3.0, -0.7, -1e-3, 1e-3, 0.4, 2.5], dtype=torch.float64, device=DEVICE)
    ref = torch.linspace(-2, -1, 6, dtype=torch.float64, device=DEVICE)
    sides = (ref + r).requires_grad_(), ref.requires_grad_()

    def penalty(policy: Tensor, ref: Tensor) -> Tensor:
        return kl_gpu.kl_penalty(policy, ref, estimator, clamp=clamp, straight_through=straight_through)

    if not straight_through:
        assert torch.autograd.gradcheck(penalty, sides)
        return
    value = penalty(*sides)
    plain = kl_gpu.kl_penalty(*sides, estimator, clamp=clamp)
    assert torch.equal(value, plain)
    to_policy, to_ref = torch.autograd.grad(value.sum(), sides)
    difference = sides[0].detach() - sides[1].detach()
    assert torch.equal(to_policy, difference)
    assert torch.equal(to_ref, -difference)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_clamp(estimator: str) -> None:
    policy = torch.tensor([0.0, 0.0, -500.0, -0.5], device=DEVICE, requires_grad=True)
    ref = torch.tensor([-400.0, -3.0, -1.0, -0.7], device=DEVICE)
    free = kl_gpu.kl_penalty(policy, ref, estimator)
    held = kl_gpu.kl_penalty(policy, ref, estimator, clamp=10)
    assert torch.equal(held, free.clamp(-10, 10))
    (gradient,) = torch.autograd.grad(held.sum(), policy)
    assert torch.isfinite(gradient).all()
    assert (gradient[free.abs() > 10] == 0).all()
    assert gradient[3] != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("clamp", [None, 1e-3, 10.0, 1e25])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_huge_and_infinite_log_probabilities(
    estimator: str, clamp: float | None, straight_through: bool, dtype: torch.dtype
) -> None:
    most = torch.finfo(dtype).max
    pairs = [
        (-most, 0.0), (0.0, -most), (-1e10, 0.0), (0.0, -1e30), (-1e3, -1.0), (-1.0, -1e3), (-INF, 0.0),
        (0.0, -INF), (-1.0, -1.5),
    ]  # fmt: skip
    policy, ref = (x.to(DEVICE).requires_grad_() for x in torch.tensor(pairs, dtype=dtype).T)
    got = kl_gpu.kl_penalty(policy, ref, estimator, clamp=clamp, straight_through=straight_through)
    to_policy, to_ref = torch.autograd.grad(got.sum(), (policy, ref))
    # k3 of an infinite r is infinite; its formula would subtract one infinity from another.
    r = to_numpy(policy) - to_numpy(ref)
    with np.errstate(over="ignore", invalid="ignore"):
        want = FORMULAS[estimator](r)
        want = np.where(np.isnan(want), np.inf, want)
        free = want.astype(np.float32 if dtype == torch.float32 else np.float64).astype(np.float64)
        cut = np.zeros(len(r), bool) if clamp is None else np.abs(free) > clamp
        want = free if clamp is None else np.clip(free, -clamp, clamp)
    np.testing.assert_allclose(to_numpy(got), want, rtol=5e-6, atol=0)
    if straight_through:
        np.testing.assert_array_equal(to_numpy(to_policy), r)
    else:
        assert not np.isnan(to_numpy(to_policy)).any()
        assert (to_policy[torch.as_tensor(cut, device=DEVICE)] == 0).all()
        assert (to_policy[torch.as_tensor(~cut, device=DEVICE)] != 0).all()
    assert torch.equal(to_ref, -to_policy)


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("clamp", [None, 1.5])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_padding_that_the_mask_leaves_out(
    estimator: str, clamp: float | None, straight_through: bool
) -> None:
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]], device=DEVICE)
    policy = torch.tensor([[-0.5, -7.0, -1e10, NAN], [-2.0, -INF, 0.0, -3.0]], device=DEVICE)
    ref = torch.tensor([[-0.7, -1.0, 0.0, -1.0], [-1.5, -INF, NAN, -3e38]], device=DEVICE)
    options = {"estimator": estimator, "clamp": clamp, "straight_through": straight_through}

    def found(policy: Tensor, ref: Tensor, **more: Any) -> tuple[Tensor, ...]:
        sides = policy.clone().requires_grad_(), ref.clone().requires_grad_()
        penalty = kl_gpu.kl_penalty(*sides, **options, **more)
        return penalty.detach(), *torch.autograd.grad(penalty.sum(), sides)

    for masked, plain in zip(found(policy, ref, mask=mask), found(policy[mask], ref[mask]), strict=True):
        assert torch.equal(masked[mask], plain)
        assert (masked[~mask] == 0).all()
    nothing = kl_gpu.kl_penalty(policy, ref, mask=torch.zeros_like(mask), **options)
    assert (nothing == 0).all()


def test_straight_through_under_torch_func_and_compile() -> None:
    policy, ref = log_ratios(torch.float64)
    mask = torch.arange(len(policy), device=DEVICE) % 3 > 0

    def total(policy: Tensor) -> Tensor:
        penalty = kl_gpu.kl_penalty(policy, ref, "k3", clamp=10.0, straight_through=True, mask=mask)
        return penalty.sum()

    want = torch.where(mask, policy - ref, 0.0)
    assert torch.equal(torch.func.grad(total)(policy), want)
    each = torch.func.vmap(
        torch.func.grad(lambda p, r: kl_gpu.kl_penalty(p, r, "k3", clamp=10.0, straight_through=True))
    )
    assert torch.equal(each(policy, ref), policy - ref)
    leaf = policy.clone().requires_grad_()
    torch.compile(total, fullgraph=True, backend="aot_eager")(leaf).backward()
    assert torch.equal(leaf.grad, want)


def known(spread: float) -> tuple[Tensor, Tensor]:
    """Logits of a policy and a reference over 50 tokens."""
    generator = torch.Generator().manual_seed(3)
    ref = 2 * torch.randn(50, generator=generator, dtype=torch.float64)
    policy = ref + spread * torch.randn(50, generator=generator, dtype=torch.float64)
    return policy.requires_grad_(), ref


def moments(spread: float, estimator: str) -> tuple[float, float, float]:
    """The KL, and mean and deviation of the estimator over the policy's tokens, summed over all."""
    policy, ref = known(spread)
    log_q, log_p = policy.detach().log_softmax(-1), ref.log_softmax(-1)
    k = kl_gpu.kl_penalty(log_q, log_p, estimator)
    mean = (log_q.exp() * k).sum()
    deviation = (log_q.exp() * (k - mean) ** 2).sum().sqrt()
    kl = kl_gpu.kl_div(policy.detach()[None], ref[None], direction="reverse", backend="eager")
    return kl.item(), mean.item(), deviation.item()


# docs/rlhf.md has these: per spread the KL, then mean and deviation of each estimator, over the KL.
MOMENTS = {
    spread: {name: moments(spread, name) for name in ("k1", "k2", "k3")} for spread in (0.05, 0.5, 2.0)
}


@pytest.mark.parametrize("spread", MOMENTS)
def test_bias_and_variance(spread: float) -> None:
    for name in ("k1", "k3"):
        kl, mean, _ = MOMENTS[spread][name]
        assert mean == pytest.approx(kl, rel=1e-9)
    kl, biased, _ = MOMENTS[spread]["k2"]
    assert abs(biased / kl - 1) > 1e-4
    # Near the reference k1 is noise, and k3 is not.
    assert spread > 1 or MOMENTS[spread]["k1"][2] > 2 * MOMENTS[spread]["k3"][2]


def test_samples_converge_to_the_exact_value() -> None:
    policy, ref = known(0.5)
    log_q, log_p = policy.detach().log_softmax(-1), ref.log_softmax(-1)
    tokens = torch.multinomial(log_q.exp(), 200_000, True, generator=torch.Generator().manual_seed(0))
    for name in ("k1", "k3"):
        kl, _, deviation = MOMENTS[0.5][name]
        mean = kl_gpu.kl_penalty(log_q[tokens], log_p[tokens], name).mean().item()
        assert abs(mean - kl) < 5 * deviation / math.sqrt(len(tokens))
        assert deviation / math.sqrt(len(tokens)) < kl / 20  # else the line above says nothing


def expected_gradient(estimator: str, **options: Any) -> Tensor:
    """The mean over the policy's tokens of the penalty's gradient to the policy's logits."""
    policy, ref = known(0.5)
    log_q = policy.log_softmax(-1)
    penalties = kl_gpu.kl_penalty(log_q, ref.log_softmax(-1), estimator, **options)
    (gradient,) = torch.autograd.grad((penalties * log_q.exp().detach()).sum(), policy)
    return gradient


def test_which_estimator_may_be_a_loss() -> None:
    policy, ref = known(0.5)
    exact = {
        direction: torch.autograd.grad(
            kl_gpu.kl_div(policy[None], ref[None], direction=direction, backend="eager"), policy
        )[0]
        for direction in ("forward", "reverse")
    }
    size = exact["reverse"].abs().max()
    assert (exact["reverse"] - exact["forward"]).abs().max() > 0.05 * size

    def near(one: Tensor, other: Tensor) -> bool:
        return bool((one - other).abs().max() < 1e-9 * size)

    assert near(expected_gradient("k2"), exact["reverse"])
    assert near(expected_gradient("k3"), exact["forward"])  # of KL(ref‖policy)
    assert near(expected_gradient("k1"), torch.zeros(50))
    assert near(expected_gradient("k3", straight_through=True), exact["reverse"])


def test_documented_figures() -> None:
    from test_contributing import ROOT

    text = (ROOT / "docs" / "rlhf.md").read_text()
    for spread, of in MOMENTS.items():
        kl = of["k1"][0]
        cells = [f"{spread}", f"{kl:.4f}"]
        cells += [f"{of[name][1] / kl:.3f} ± {of[name][2] / kl:.2f}" for name in ("k1", "k2", "k3")]
        assert f"| {' | '.join(cells)} |" in text


# -- what others compute, from their published formulas ------------------------------------------------


def verl(logprob: Tensor, ref: Tensor, name: str) -> Tensor:
    """verl, trainer/ppo/core_algos.py, kl_penalty: forward value, and with '+' the gradient of the square."""
    d = logprob - ref
    if name.endswith("+"):
        square = 0.5 * d.square()
        return square - square.detach() + verl(logprob, ref, name[:-1]).detach()
    if name in ("kl", "k1"):
        return d
    if name == "abs":
        return d.abs()
    if name in ("mse", "k2"):
        return 0.5 * d.square()
    k = torch.clamp(ref - logprob, -20, 20)
    return torch.clamp(k.exp() - k - 1, -10, 10)


@pytest.mark.parametrize("plus", ["", "+"])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("k1", {"estimator": "k1"}),
        ("abs", {"estimator": "abs"}),
        ("mse", {"estimator": "k2"}),
        ("low_var_kl", {"estimator": "k3", "clamp": 10.0}),
    ],
)
def test_verl(name: str, call: dict[str, Any], plus: str) -> None:
    policy, ref = (x.detach().clone() for x in log_ratios(torch.float64))
    policy.requires_grad_()
    theirs = verl(policy, ref, name + plus)
    ours = kl_gpu.kl_penalty(policy, ref, **call, straight_through=bool(plus))
    # Theirs cancels in low_var_kl: an absolute error of two roundings of 1.
    rounding = 4.5e-16 if name == "low_var_kl" else 0
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=rounding)
    gradients = [torch.autograd.grad(x.sum(), policy)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=rounding)


def openrlhf(logprob: Tensor, ref: Tensor, estimator: str) -> Tensor:
    """OpenRLHF, models/utils.py, compute_approx_kl."""
    r = logprob.float() - ref.float()
    if estimator == "k2":
        r = r**2 / 2.0
    elif estimator == "k3":
        r = -r
        r = r.exp() - 1 - r
    return r.clamp(min=-10, max=10)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_openrlhf(estimator: str) -> None:
    policy, ref = log_ratios(torch.float32)
    theirs, ours = openrlhf(policy, ref, estimator), kl_gpu.kl_penalty(policy, ref, estimator, clamp=10)
    # Theirs cancels in k3: an absolute error of its rounding.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-7 if estimator == "k3" else 0)
    assert (ours > 0).any()


# -- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "estimator"), [("kl", "k1"), ("mse", "k2"), ("low_var_kl", "k3")])
def test_names_of_verl(name: str, estimator: str) -> None:
    policy, ref = log_ratios(torch.float32)
    for plus in ("", "+"):
        leaves = policy.clone().requires_grad_(), policy.clone().requires_grad_()
        theirs = kl_gpu.kl_penalty(leaves[0], ref, name + plus)
        ours = kl_gpu.kl_penalty(leaves[1], ref, estimator, straight_through=bool(plus))
        assert torch.equal(theirs, ours)
        theirs.sum().backward()
        ours.sum().backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)
        assert leaves[0].grad.abs().max() >= 1
    assert torch.equal(kl_gpu.kl_penalty(policy, ref), kl_gpu.kl_penalty(policy, ref, "k3"))


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_input_clamp(estimator: str, straight_through: bool) -> None:
    """r is limited first: an estimate is that of the limited r, and nothing flows from beyond."""
    r = torch.tensor([-INF, -50.0, -3.0, 0.4, 2.5, 70.0, INF], dtype=torch.float64, device=DEVICE)
    policy = r.clone().requires_grad_()
    got = kl_gpu.kl_penalty(
        policy, torch.zeros_like(r), estimator, input_clamp=20, straight_through=straight_through
    )
    np.testing.assert_allclose(to_numpy(got), FORMULAS[estimator](to_numpy(r).clip(-20, 20)), rtol=1e-12)
    got.sum().backward()
    inside = r.abs() < 20
    assert (policy.grad[~inside] == 0).all()
    assert (policy.grad[inside] != 0).all()


def test_importance_weights() -> None:
    policy, ref = (x.double() for x in log_ratios(torch.float32))
    ratio = torch.rand_like(policy) + 0.5
    mask = torch.rand_like(policy) > 0.3
    plain = policy.clone().requires_grad_()
    want = kl_gpu.kl_penalty(plain, ref) * ratio * mask
    want.sum().backward()
    leaf, weight = policy.clone().requires_grad_(), ratio.masked_fill(~mask, NAN).requires_grad_()
    got = kl_gpu.kl_penalty(leaf, ref, weight=weight, mask=mask.long())
    torch.testing.assert_close(got, want)
    got.sum().backward()
    torch.testing.assert_close(leaf.grad, plain.grad)
    torch.testing.assert_close(weight.grad, kl_gpu.kl_penalty(policy, ref, mask=mask))
    assert leaf.grad.abs().max() > 1


GOOD = {"policy_logprobs": torch.zeros(2, 3), "ref_logprobs": torch.zeros(2, 3), "estimator": "k3"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"policy_logprobs": [0.0]}, TypeError, "policy_logprobs.*tensor.*list"),
        ({"ref_logprobs": torch.zeros(2, 3).long()}, TypeError, "ref_logprobs.*int64"),
        ({"ref_logprobs": torch.zeros(3)}, ValueError, r"same shape.*\(2, 3\).*\(3,\)"),
        ({"ref_logprobs": torch.zeros(2, 3, device="meta")}, ValueError, "one device.*cpu.*meta"),
        ({"estimator": "k4"}, ValueError, "estimator.*'k1'.*'k4'"),
        ({"estimator": None}, TypeError, "estimator.*string.*NoneType"),
        ({"clamp": 0}, ValueError, "clamp.*> 0.*0"),
        ({"clamp": math.nan}, ValueError, "clamp.*nan"),
        ({"clamp": "10"}, TypeError, "clamp.*number.*str"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool.*float32"),
        ({"mask": 2 * torch.ones(2, 3).long()}, ValueError, "mask must be bool, or integers 0 and 1, got 2"),
        ({"input_clamp": 0.0}, ValueError, "input_clamp.*> 0.*0"),
        ({"weight": torch.ones(2, 3).long()}, TypeError, "weight.*floating.*int64"),
        ({"weight": torch.ones(3)}, ValueError, r"weight.*shape \(2, 3\).*\(3,\)"),
        ({"mask": [True]}, TypeError, "mask must be a tensor.*list"),
        ({"mask": torch.ones(3).bool()}, ValueError, r"mask.*shape \(2, 3\).*\(3,\)"),
        ({"mask": torch.ones(2, 3, device="meta").bool()}, ValueError, "mask.*cpu.*meta"),
        ({"straight_through": 1}, TypeError, "straight_through.*True or False.*int"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kl_gpu.kl_penalty(**{**GOOD, **change})

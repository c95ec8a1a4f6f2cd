"""verl, ms-swift, axolotl, OpenRLHF and torchtune: their numbers from ours.

None of them is among the extra's packages. Everywhere ours stand in a package of empty functions with the
published names and parameters, and where one imports also in the package itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kl_gpu
from kl_gpu.integrations import axolotl, openrlhf, swift, torchtune, verl
from realistic import realistic

ROOMS = {"verl": verl, "swift": swift, "openrlhf": openrlhf, "axolotl": axolotl}


@pytest.fixture(params=["published", "installed"])
def there(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a package importable and patched by its name; gives a function that finds a hooked name in it."""

    def patched(name: str) -> Any:
        room, modules = ROOMS[name], {}
        for hook in room.HOOKS if request.param == "published" else ():
            path = hook.module.split(".")
            for end in range(1, len(path) + 1):
                monkeypatch.setitem(sys.modules, ".".join(path[:end]), ModuleType(".".join(path[:end])))
            modules[hook.module] = sys.modules[hook.module]
        for hook in room.HOOKS if modules else ():
            takes = ", ".join(f"{name}=None" for name in hook.parameters.split())
            made = f"def {hook.name}({takes}): raise NotImplementedError"
            if hook.name[0].isupper():
                made = (
                    f"class {hook.name}:\n  @staticmethod\n  def forward(ctx, {takes}): ...\n  apply = None"
                )
            exec(made, vars(sys.modules.setdefault(hook.module, modules[hook.module])))
        for hook in room.HOOKS:
            pytest.importorskip(hook.module, reason=f"{name} is not installed", exc_type=ImportError)
        request.addfinalizer(room.unpatch)
        room.patch()
        return lambda hook: getattr(import_module(hook.module), hook.name)

    return patched


def hooks(name: str) -> dict[str, Any]:
    return {hook.name: hook for hook in ROOMS[name].HOOKS}


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    student, teacher = realistic("moved tokens", 6, 400, None)  # type: ignore[arg-type]
    return student.view(2, 3, 400).cpu().requires_grad_(), teacher.view(2, 3, 400).cpu()


def close(found: Tensor, expected: Tensor, x: Tensor, rtol: float = 2e-5) -> None:
    """Values and gradients to x."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=1e-6)
    grads = [torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in (found, expected)]
    assert grads[1].abs().max() > 0
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5 * grads[1].abs().max().item())


def test_verl(there, logits) -> None:
    student, teacher = logits
    find = there("verl")
    run = {name: find(hook) for name, hook in hooks("verl").items()}
    q, p, ids = student.log_softmax(-1), teacher.log_softmax(-1), torch.arange(6).view(2, 3)
    picked = q.gather(-1, ids[..., None])[..., 0]
    close(run["logprobs_from_logits"](student, ids, inplace_backward=False), picked, student)
    for name in "entropy_from_logits", "entropy_from_logits_with_chunking":
        close(run[name](student), -(q.exp() * q).sum(-1), student)
    several = torch.arange(12).view(2, 3, 2)
    close(run["_chunked_topk_log_probs"](student, several), q.gather(-1, several), student)
    close(run["kl_penalty"](student, teacher, "full"), (q.exp() * (q - p)).sum(-1), student)
    ref = picked.detach() + torch.tensor([[0.0, 1e-3, -2.0], [30.0, 0.5, -30.0]])
    r = picked - ref
    low_var = ((-r).clamp(-20, 20).exp() - (-r).clamp(-20, 20) - 1).clamp(-10, 10)
    for name, expected in ("kl", r), ("abs", r.abs()), ("k2", r * r / 2), ("low_var_kl", low_var):
        close(run["kl_penalty"](picked, ref, name), expected, picked)
    straight = r * r / 2
    close(run["kl_penalty"](picked, ref, "k3+"), straight - straight.detach() + low_var.detach(), picked)
    with pytest.raises(NotImplementedError):
        run["kl_penalty"](picked, ref, "k4")


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_swift(beta, there, logits) -> None:
    student, teacher = logits[0].view(6, 400), logits[1].view(6, 400)
    try:
        loss = there("swift")(hooks("swift")["jsd_loss"])
    finally:
        module = sys.modules.get("swift.rlhf_trainers.gkd_loss")
    for name in "default_log_softmax", "default_kl_div":
        if not hasattr(module, name):
            setattr(module, name, object())
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    m = (beta * p.exp() + (1 - beta) * q.exp()).log()
    parts = [(x.exp() * (x - m)).sum() for x in (p, q)]
    expected = {0: (p.exp() * (p - q)).sum(), 1: (q.exp() * (q - p)).sum()}.get(
        beta, beta * parts[0] + (1 - beta) * parts[1]
    )
    usual = module.default_log_softmax, module.default_kl_div
    close(loss(student, teacher, beta, *usual, 4), expected, student)


def test_openrlhf(there, logits) -> None:
    student, _ = logits
    find = there("openrlhf")
    run = {name: find(hook) for name, hook in hooks("openrlhf").items()}
    ids = torch.arange(6).view(2, 3)
    scaled = student.detach().clone()
    found = run["log_probs_from_logits"](scaled, ids, temperature=2.0)
    assert torch.equal(scaled, student.detach() / 2)  # their caller takes the entropy of these
    q = (student / 2).log_softmax(-1)
    torch.testing.assert_close(found, q.gather(-1, ids[..., None])[..., 0], rtol=1e-5, atol=1e-6)
    q = student.log_softmax(-1)
    close(run["compute_entropy"](student), -(q.exp() * q).sum(-1), student)
    picked = q.gather(-1, ids[..., None])[..., 0]
    ref = picked.detach() + torch.tensor([[0.0, 1e-3, -2.0], [30.0, 0.5, -30.0]])
    r = picked - ref
    for name, expected in (
        ("k1", r),
        ("k2", r * r / 2),
        ("k3", (-r.clamp(min=-10)).exp() - 1 + r.clamp(min=-10)),
    ):
        close(run["compute_approx_kl"](picked, ref, kl_estimator=name), expected.clamp(-10, 10), picked)
        straight = r * r / 2
        unbiased = expected.clamp(-10, 10).detach() + straight - straight.detach()
        close(run["compute_approx_kl"](picked, ref, None, name, True), unbiased, picked)


@pytest.mark.parametrize(
    ("beta", "normalize", "temperature"),
    [(0.0, True, 2.0), (1.0, True, 1.0), (0.3, True, 1.5), (0.0, False, 1.0)],
)
def test_axolotl(beta, normalize, temperature, there, logits) -> None:
    """Their loss; the gradient of what they return, T² and all."""
    torch.manual_seed(0)
    function = there("axolotl")(hooks("axolotl")["LigerFusedLinearKLTopKLogprobFunction"])
    hidden, weight = torch.randn(2, 3, 16, requires_grad=True), torch.randn(400, 16, requires_grad=True)
    best = (logits[1] / temperature).log_softmax(-1).topk(8, -1)
    target, ids = best.values.log_softmax(-1) if normalize else best.values, best.indices
    mask, labels = torch.ones_like(ids), torch.tensor([[5, 6, -100], [7, -100, 9]])
    mask[0, 1] = 0
    found = function.apply(
        hidden, weight, ids, target, mask, labels, None, 0.5, 0.25, -100, temperature, beta, False, 4, True,
        normalize,
    )  # fmt: skip
    z = hidden @ weight.t()
    q = (z / temperature).log_softmax(-1).gather(-1, ids)
    q = q.log_softmax(-1) if normalize else q
    m = (beta * target.exp() + (1 - beta) * q.exp()).log()
    js = beta * target.exp() * (target - m) + (1 - beta) * q.exp() * (q - m)
    kinds = {0.0: target.exp() * (target - q), 1.0: q.exp() * (q - target)}
    soft = (kinds.get(beta, js) * mask).sum() * temperature**2
    hard = F.cross_entropy(z[:, :-1].reshape(-1, 400), labels[:, 1:].reshape(-1), reduction="sum")
    close(found, 0.25 * soft + 0.5 * hard, weight)
    close(found, 0.25 * soft + 0.5 * hard, hidden)


def test_torchtune(logits) -> None:
    student, teacher = logits
    labels = torch.tensor([[1, -100, 3], [4, 5, -100]])
    q, p, counts = student.log_softmax(-1), teacher.log_softmax(-1), labels != -100
    forward, reverse = (
        ((p.exp() * (p - q)).sum(-1) * counts).sum(),
        ((q.exp() * (q - p)).sum(-1) * counts).sum(),
    )
    for name, total in (
        ("Forward", forward),
        ("Reverse", reverse),
        ("Symmetric", 0.3 * forward + 0.7 * reverse),
    ):
        how = {"sym_kd_ratio": 0.3} if name == "Symmetric" else {}
        loss = getattr(torchtune, f"{name}KLLoss")(**how)
        flat = student.view(6, 400), teacher.view(6, 400), labels
        close(loss(*flat), total / 4, student)
        close(loss(*flat, normalize=False), total, student)
        assert loss(*flat[:2], torch.full_like(labels, -100)).item() == 0.0
        chunked = getattr(torchtune, f"{name}KLWithChunkedOutputLoss")(num_output_chunks=2, **how)
        assert chunked.num_output_chunks == 2
        parts = [x.tensor_split(2, dim=1) for x in (student, teacher)]
        close(chunked(*parts, labels), total / 4, student)
    js = torchtune.KDLoss("js", beta=0.2)(student, teacher, labels)
    assert js.item() == pytest.approx(
        kl_gpu.js_div(student, teacher, beta=0.2, labels=labels).item(), rel=1e-6
    )

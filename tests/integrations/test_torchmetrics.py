"""A torchmetrics Metric of divergences over tokens."""

from __future__ import annotations

import pickle

import pytest
import torch

import kl_gpu
from kl_gpu.integrations.torchmetrics import TokenDivergence
from realistic import realistic

torchmetrics = pytest.importorskip("torchmetrics", reason="of the extra integrations")


@pytest.fixture(scope="module")
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = realistic("tops on a floor", 24, 300, None)  # type: ignore[arg-type]
    return student.view(4, 6, 300), teacher.view(4, 6, 300)


def test_every_kind_streams(kind, logits) -> None:
    """Batches of unequal size: each token weighs the same."""
    student, teacher = logits
    labels = torch.arange(24, device=student.device).view(4, 6)
    labels[0, :4] = -100
    metric = TokenDivergence(kind, temperature=1.5, shift=True).to(student.device)
    for batch in slice(0, 1), slice(1, 4):
        metric.update(student[batch], teacher[batch], labels=labels[batch])
    expected = kl_gpu.divergence(student, teacher, kind, temperature=1.5, shift=True, labels=labels)
    assert metric.count == 3 * 5 + 2
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-6)
    assert pickle.loads(pickle.dumps(metric)).compute().item() == metric.compute().item()
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert metric.compute().isnan()


def test_masks_collections_and_plots(logits) -> None:
    pytest.importorskip("matplotlib").use("agg")
    student, teacher = logits[0].clone().requires_grad_(), logits[1]
    mask = (torch.arange(24, device=student.device) % 3 > 0).long().view(4, 6)
    both = torchmetrics.MetricCollection(
        {"kl": TokenDivergence(), "js": TokenDivergence("js", beta=0.2, sync_on_compute=False)}
    ).to(student.device)
    step = both(student, teacher, mask=mask)
    found = both.compute()
    for name, kind, beta in ("kl", "forward_kl", None), ("js", "js", 0.2):
        expected = kl_gpu.divergence(student, teacher, kind, beta=beta, mask=mask)
        assert found[name].item() == pytest.approx(expected.item(), rel=1e-6)
        assert step[name].item() == pytest.approx(expected.item(), rel=1e-6)
        assert not found[name].requires_grad
    figure, axes = both["js"].plot([step["js"], found["js"]])
    assert axes.get_ylim()[0] <= 0.0
    figure.clear()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of .*forward_kl.* got 'kl'"):
        TokenDivergence("kl")
    with pytest.raises(ValueError, match="takes no reduction"):
        TokenDivergence(reduction="sum")

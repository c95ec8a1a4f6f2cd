"""What stands in place of TRL's functions, beside them and beside the definition; how they are patched."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kl_gpu.integrations import trl as fast
from realistic import realistic

pytest.importorskip("trl", reason="of the extra integrations")
pytest.importorskip("datasets", reason="of the extra integrations")


def there(hook: fast.Hook) -> Any:
    return getattr(*hook.owner())


def both(module: str, name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """What TRL's own function gives, and what ours gives in its place."""

    def run() -> Any:
        found = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return getattr(found, "apply", found)(*args, **kwargs)

    theirs = run()
    with fast.patch():
        return theirs, run()


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    """Of students and teachers, `[2, 6, 512]`."""
    student, teacher = realistic("tops on a floor", 12, 512, None)  # type: ignore[arg-type]
    return student.view(2, 6, -1).cpu().requires_grad_(), teacher.view(2, 6, -1).cpu()


def test_every_hook_is_replaced_everywhere_and_put_back() -> None:
    import trl.experimental.cpo.cpo_trainer as importer
    import trl.trainer.utils as utils

    before = [there(hook) for hook in fast.HOOKS]
    names = importer.selective_log_softmax, utils._ChunkedLogProbFunction
    with fast.patch():
        assert all(there(hook) is not old for hook, old in zip(fast.HOOKS, before, strict=True))
        assert importer.selective_log_softmax is utils.selective_log_softmax is not names[0]
        assert (
            utils._ChunkedLogProbFunction
            is import_module("trl.kernels").ChunkedLogProbFunction
            is not names[1]
        )
        with fast.patch():
            pass
        assert there(fast.HOOKS[0]) is not before[0]  # the inner one has not put back
    assert [there(hook) for hook in fast.HOOKS] == before
    assert (importer.selective_log_softmax, utils._ChunkedLogProbFunction) == names
    fast.patch()
    fast.unpatch()
    assert [there(hook) for hook in fast.HOOKS] == before


def test_this_release_has_every_hook() -> None:
    """Fails, with the symbol, where a release of TRL has moved one."""
    assert [hook.fault() for hook in fast.HOOKS if hook.fault()] == []


@pytest.mark.parametrize("change", ["missing", "other arguments"])
def test_another_release_is_refused_by_name_and_nothing_is_patched(change, monkeypatch) -> None:
    import trl.trainer.utils as utils

    if change == "missing":
        monkeypatch.delattr(utils, "entropy_from_logits")
    else:
        monkeypatch.setattr(utils, "entropy_from_logits", lambda logits, rows=128: None)
    before = [getattr(utils, "entropy_from_logits", None), *(there(hook) for hook in fast.HOOKS[:4])]
    with pytest.raises(
        RuntimeError, match=r"trl 1\..*nothing was patched: trl\.trainer\.utils\.entropy_from_logits"
    ):
        fast.patch()
    assert [getattr(utils, "entropy_from_logits", None), *(there(hook) for hook in fast.HOOKS[:4])] == before


@pytest.mark.parametrize("beta", [0, 0.3, 1.0])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"labels": True},
        {"labels": True, "reduction": "mean"},
        {"reduction": "sum", "temperature": 2.0},
        {"labels": True, "num_items_in_batch": torch.tensor(17)},
        {"reduction": "none"},
    ],
    ids=str,
)
def test_generalized_jsd_loss(beta, how, logits) -> None:
    student, teacher = logits
    if "labels" in how:
        labels = torch.arange(12).view(2, 6).clone()
        labels[0, :3] = -100
        how = how | {"labels": labels}
    for place in ("gkd.gkd_trainer", "GKDTrainer"), ("gold.gold_trainer", "GOLDTrainer"):
        theirs, ours = both(
            f"trl.experimental.{place[0]}",
            f"{place[1]}.generalized_jsd_loss",
            student,
            teacher,
            beta=beta,
            **how,
        )
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0.0 if theirs.dim() == 0 else 1e-9)
        grads = [torch.autograd.grad(loss.sum(), student)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4 * grads[1].abs().max().item())


def test_probabilities_are_left_to_gold(logits) -> None:
    student, teacher = (x.softmax(-1) for x in logits)
    where = "trl.experimental.gold.gold_trainer", "GOLDTrainer.generalized_jsd_loss"
    theirs, ours = both(*where, student, teacher, logits_are_probs=True)
    assert torch.equal(ours, theirs)
    assert theirs.item() > 1e-3


@pytest.mark.parametrize("several", [False, True])
def test_selective_log_softmax(several, logits) -> None:
    student, _ = logits
    index = torch.arange(36).view(2, 6, 3) if several else torch.arange(12).view(2, 6)
    mask = torch.ones_like(index)
    mask[0, 1] = 0
    theirs, ours = both(
        "trl.trainer.utils", "selective_log_softmax", student, index, temperature=0.7, row_mask=mask
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert ours[0, 1].abs().max() == 0
    grads = [torch.autograd.grad(x.sum(), student)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_entropies(logits) -> None:
    student = logits[0]
    theirs, ours = both("trl.trainer.utils", "entropy_from_logits", student)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    index = torch.arange(12).view(2, 6)
    theirs, ours = both(
        "trl.trainer.utils", "selective_log_softmax_and_entropy", student, index, entropy_requires_grad=False,
        row_mask=(index != 4).int(),
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not ours[1].requires_grad
    cut = student.detach().clone()
    cut[..., 100:] = -torch.inf
    theirs, ours = both("trl.trainer.utils", "entropy_from_logits", cut)
    p = cut.double().softmax(-1)
    torch.testing.assert_close(ours.double(), torch.special.entr(p).sum(-1), rtol=1e-5, atol=1e-6)


def heads(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states `[2, 5, H]`, weight and bias of a student and a teacher; both heads require gradients."""
    torch.manual_seed(0)
    made = []
    for width in (24, 32):
        hidden, layer = torch.randn(2, 5, width, dtype=dtype), nn.Linear(width, 300, dtype=dtype)
        layer.weight.data *= 4
        made.append([hidden.requires_grad_(), layer.weight, layer.bias])
    return made[0], made[1]


PRODUCTS = {
    "student_logit_scale": 1.5, "teacher_logit_scale": 0.5, "student_final_logit_softcapping": 6.0,
    "teacher_final_logit_softcapping": None, "temperature": 1.25,
}  # fmt: skip


@pytest.mark.parametrize("items", [None, torch.tensor(11), 9])
@pytest.mark.parametrize("beta", [0.0, 0.7, 1.0])
def test_chunked_divergence_loss(beta, items) -> None:
    student, teacher = heads()
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]])
    theirs, ours = both(
        "trl.trainer.distillation_trainer", "_chunked_divergence_loss", student[0], teacher[0], student[1],
        teacher[1], mask, beta, items, student_lm_head_bias=student[2], teacher_lm_head_bias=teacher[2],
        **PRODUCTS,
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    grads = [torch.autograd.grad(x[0], student) for x in (ours, theirs)]
    for mine, their in zip(*grads, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-5 * their.abs().max().item())


def test_chunked_functions() -> None:
    student, teacher = ([x[0].reshape(10, -1), *x[1:]] for x in heads())
    theirs, ours = both(
        "trl.kernels.chunked_divergence", "ChunkedDivergenceFunction", *student, *teacher, 0.5, 1.25, 1.5, 6.0
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    grads = [torch.autograd.grad(x[0].sum(), student[1])[0] for x in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5 * grads[1].abs().max().item())

    where, targets = ("trl.kernels.chunked_logprob", "ChunkedLogProbFunction"), torch.arange(10)
    for outputs in ("log_probs",), ("log_probs", "entropy"):
        theirs, ours = both(*where, *student, targets, 0.8, 128, 6.0, 1.5, outputs)
        assert [x is None for x in ours] == [x is None for x in theirs]
        torch.testing.assert_close(
            [x for x in ours if x is not None], [x for x in theirs if x is not None], rtol=1e-5, atol=1e-6
        )
        grads = [torch.autograd.grad(x[0].sum(), student[1])[0] for x in (ours, theirs)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5 * grads[1].abs().max().item())
    theirs, ours = both(*where, *student, targets, 0.8, 128, None, 1.0, ("log_probs", "is_top1"))
    assert torch.equal(ours[4], theirs[4])

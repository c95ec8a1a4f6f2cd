"""Fake tensors and the meta device: shapes and dtypes of every entry, forward and backward."""

from __future__ import annotations

import pytest
import torch
from entries import HEADS, NAMES, PER_TOKEN, entries
from torch._subclasses.fake_tensor import FakeTensorMode

import kl_gpu
from kl_gpu.rl import kl_penalty


def _backward(name: str, backend: str | None, device: str, dtype: torch.dtype, **options) -> None:
    entry = entries()[name]
    student, *others = (
        torch.empty(x.shape, dtype=dtype if x.is_floating_point() else x.dtype, device=device)
        for x in (entry.student, *entry.constants, *entry.shared)
    )
    for reduction, inplace in (("none", False), ("mean", False), ("sum", True)):
        leaf = student.detach().requires_grad_()
        if inplace and name not in HEADS:
            options["inplace"] = True
        value = entry.call(leaf * 1, *others, backend=backend, reduction=reduction, **options)
        # Whose shape does not follow the reduction: log-probabilities are per token.
        assert value.shape == (student.shape[:-1] if reduction == "none" or name in PER_TOKEN else ())
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        value.sum().backward()
        assert (leaf.grad.shape, leaf.grad.dtype) == (student.shape, dtype)


def _options(device: str) -> dict[str, torch.Tensor]:
    return {"mask": torch.ones(2, 3, dtype=torch.bool, device=device)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fake_tensors(backend: str, name: str, dtype: torch.dtype) -> None:
    for chosen in (backend, None):
        with FakeTensorMode():
            _backward(name, chosen, "cpu", dtype, **_options("cpu"))


@pytest.mark.parametrize("name", NAMES)
def test_meta_device(name: str) -> None:
    for chosen in (None, "eager"):
        _backward(name, chosen, "meta", torch.float32, **_options("meta"))


def _statistics(backend: str | None, device: str) -> None:
    sides = torch.empty(2, 3, 24, device=device)
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    found = kl_gpu.token_stats(*sides, labels, backend=backend)
    assert all((x.shape, x.dtype, x.device.type) == ((3,), torch.float32, device) for x in found)


def test_statistics_with_labels(backend: str) -> None:
    for chosen in (backend, None):
        with FakeTensorMode():
            _statistics(chosen, "cpu")
    _statistics(None, "meta")


def test_penalty_and_module() -> None:
    for device in ("cpu", "meta"):
        with FakeTensorMode():
            policy = torch.empty(3, device=device, requires_grad=True)
            kl_penalty(policy, torch.empty(3, device=device), "k3", clamp=2.0).sum().backward()
            assert policy.grad.shape == (3,)
            logits = torch.empty(3, 24, device=device, requires_grad=True)
            kl_gpu.DivergenceLoss("js")(logits, logits.detach()).backward()
            assert logits.grad.shape == logits.shape


def test_no_rows_in_place(backend: str) -> None:
    # Neither side has memory then: nothing is overwritten.
    leaf = torch.empty(0, 24, requires_grad=True)
    kl_gpu.kl_div(leaf * 1, torch.empty(0, 24), inplace=True, backend=backend).backward()
    assert leaf.grad.shape == (0, 24)

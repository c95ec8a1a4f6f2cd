"""The registered operators: opcheck, one graph under torch.compile."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import kl_gpu
from kl_gpu.backends import registry
from kl_gpu.ops import pair as ops
from support import DEVICE, pair


def _compile(function, **options):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, **options)


# Whether rows are given is no affair of the kind's; nor are symbolic sizes, below.
@pytest.mark.parametrize(
    ("kind", "with_rows"), [(name, True) for name in kl_gpu.KINDS] + [("forward_kl", False)]
)
def test_opcheck(backend: str, kind: str, with_rows: bool) -> None:
    student, teacher = pair(2, 3, 40)
    rows = torch.rand(2, 3, device=DEVICE) > 0.5 if with_rows else None
    _, beta = kl_gpu.KINDS[kind].at(None)
    arguments = (student, teacher, rows, kind, beta, 1.0, 0.5, backend)
    torch.library.opcheck(torch.ops.kl_gpu.value.default, arguments)
    torch.library.opcheck(torch.ops.kl_gpu.divergence.default, arguments)
    value, stats = ops.value(*arguments)
    assert torch.equal(ops.divergence(*arguments), value)
    row_scale = torch.rand(2, 3, device=DEVICE)
    for grads in (
        (torch.empty_like(student), None),
        (torch.empty_like(student), torch.empty_like(teacher)),
    ):
        arguments = (student, teacher, rows, stats, row_scale, None, kind, beta, 1.0, 0.5, backend, *grads)
        torch.library.opcheck(torch.ops.kl_gpu.gradient.default, arguments)
        if registry.load(backend).fuses:
            incoming = torch.tensor(0.5, device=DEVICE)
            arguments = (*arguments[:5], incoming, *arguments[6:])
            torch.library.opcheck(torch.ops.kl_gpu.gradient.default, arguments)
            arguments = (student, teacher, rows, row_scale, kind, beta, 1.0, 0.5, backend, *grads)
            torch.library.opcheck(torch.ops.kl_gpu.value_and_gradient.default, arguments)


@pytest.mark.parametrize(
    ("kind", "dynamic"), [(name, True) for name in kl_gpu.KINDS] + [("forward_kl", False)]
)
def test_one_graph_for_value_and_gradient(backend: str, kind: str, dynamic: bool) -> None:
    def loss(student, teacher, labels):
        return kl_gpu.divergence(
            student,
            teacher,
            kind,
            labels=labels,
            shift=True,
            temperature=2.0,
            t_squared=True,
            backend=backend,
        )

    compiled = _compile(loss, dynamic=dynamic)
    for batch, time in ((2, 5), (3, 7)):
        sides = [x.requires_grad_() for x in pair(batch, time, 90)]
        labels = torch.randint(-2, 3, (batch, time), device=DEVICE)
        labels[labels < 0] = -100
        plain, traced = loss(*sides, labels), compiled(*sides, labels)
        torch.testing.assert_close(plain, traced, rtol=1e-6, atol=0)  # Inductor sums in its own order
        for x, y in zip(torch.autograd.grad(plain, sides), torch.autograd.grad(traced, sides), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)
            assert x.abs().max() > 1e-6


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"inplace": True}, {"vocab_size": 80}])
def test_one_graph_with(backend: str, options: dict) -> None:
    def loss(student, teacher, mask, weight):
        return kl_gpu.kl_div(student * 2, teacher, mask=mask, weight=weight, backend=backend, **options).sum()

    student, teacher = pair(4, 90)
    student.requires_grad_()
    arguments = student, teacher, torch.rand(4, device=DEVICE) > 0.3, torch.rand(4, device=DEVICE)
    plain, traced = loss(*arguments), _compile(loss, dynamic=True)(*arguments)
    torch.testing.assert_close(plain, traced, rtol=1e-6, atol=0)
    want, got = (torch.autograd.grad(x, student)[0] for x in (plain, traced))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    assert want.abs().max() > 1e-6


def test_module_under_compile(backend: str) -> None:
    module = kl_gpu.DivergenceLoss("reverse_kl", reduction="sum", backend=backend)
    student, teacher = pair(4, 90)
    torch.testing.assert_close(
        module(student, teacher), _compile(module)(student, teacher), rtol=1e-6, atol=0
    )


def test_default_backend() -> None:
    compiled = importlib.util.find_spec("kl_gpu._native") is not None
    assert registry.resolve(None, torch.device("cpu")) == ("native" if compiled else "eager")
    assert registry.resolve(None, torch.device("cuda")) == "triton"
    assert registry.resolve(None, torch.device("mps")) == "eager"

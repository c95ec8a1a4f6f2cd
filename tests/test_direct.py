"""Operators called past PyTorch's dispatcher: only where nobody would notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import kl_gpu
from kl_gpu.ops import direct
from support import DEVICE, pair

OPERATOR = "kl_gpu.divergence.default"


def value(student: Tensor, teacher: Tensor) -> Tensor:
    return kl_gpu.kl_div(student, teacher, reduction="none")


def by_a_mode(student: Tensor, teacher: Tensor) -> list[str]:
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(operator))
            return operator(*args, **(kwargs or {}))

    with Mode():
        value(student, teacher)
    return seen


def by_a_profiler(student: Tensor, teacher: Tensor) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        value(student, teacher)
    return [event.key.replace("kl_gpu::divergence", OPERATOR) for event in profile.key_averages()]


def by_a_tracer(student: Tensor, teacher: Tensor) -> list[str]:
    return [str(node.target) for node in make_fx(value)(student, teacher).graph.nodes]


def by_a_tracer_before_dispatch(student: Tensor, teacher: Tensor) -> list[str]:
    return [str(node.target) for node in make_fx(value, pre_dispatch=True)(student, teacher).graph.nodes]


class Subclass(Tensor):
    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs)


def by_a_subclass(student: Tensor, teacher: Tensor) -> list[str]:
    Subclass.seen.clear()
    value(student.as_subclass(Subclass), teacher)
    return list(Subclass.seen)


LISTENERS = (by_a_mode, by_a_profiler, by_a_tracer, by_a_tracer_before_dispatch, by_a_subclass)


@pytest.mark.parametrize("seen", LISTENERS)
def test_who_listens_sees_the_operator(seen: Callable[[Tensor, Tensor], list[str]]) -> None:
    assert OPERATOR in seen(*pair(2, 40))


@pytest.mark.parametrize("inference", [False, True])
def test_without_a_listener_the_function_is_called(inference: bool) -> None:
    student, teacher = pair(2, 40)
    with torch.inference_mode(inference):
        assert direct.nobody_listens((student, torch.nn.Parameter(teacher, False), None, "js", 0.5, True))


def test_a_tensor_that_asks_for_a_gradient_is_dispatched() -> None:
    leaf = torch.zeros(2, 3, device=DEVICE, requires_grad=True)
    assert not direct.nobody_listens((leaf,))
    with torch.no_grad():
        assert direct.nobody_listens((leaf,))


def test_what_is_no_plain_argument_is_dispatched() -> None:
    assert not direct.nobody_listens(([torch.zeros(1)],))


def test_should_pytorch_not_tell_who_listens_all_is_dispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_added", None)
    assert not direct.nobody_listens((torch.zeros(1),))


@pytest.mark.parametrize("kind", ["forward_kl", "js"])
def test_both_ways_have_the_same_bits(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def bits() -> list[Tensor]:
        student, teacher = (x.requires_grad_() for x in pair(3, 40))
        found = kl_gpu.divergence(student, teacher, kind, reduction="sum", backend=backend)
        found.backward()
        assert student.grad is not None
        assert teacher.grad is not None
        return [found.detach(), student.grad, teacher.grad, *kl_gpu.token_stats(student, teacher)[:4]]

    torch.manual_seed(0)
    at_once = bits()
    monkeypatch.setattr(direct, "_added", None)
    torch.manual_seed(0)
    assert all(torch.equal(x, y) for x, y in zip(at_once, bits(), strict=True))
    assert at_once[0] > 0

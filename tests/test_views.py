"""Views are read as they lie: same bits as a copy, no copy made, and no 32-bit offset anywhere."""

from __future__ import annotations

import pytest
import torch

import kl_gpu
from kl_gpu.backends import registry
from kl_gpu.ops import pair as ops
from support import DEVICE, pair


def _sliced(x: torch.Tensor) -> torch.Tensor:
    room = torch.randn(x.shape[0], x.shape[1] + 2, x.shape[2], device=x.device)
    room[:, 1:-1] = x
    return room[:, 1:-1]


def _padded(x: torch.Tensor) -> torch.Tensor:
    room = torch.randn(*x.shape[:2], x.shape[2] + 24, device=x.device)
    room[..., 16:-8] = x
    return room[..., 16:-8]


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _every_other(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, 0)[::2]


VIEWS = [_sliced, _padded, _transposed, _every_other]


@pytest.mark.parametrize("make", VIEWS)
def test_a_view_gives_the_bits_of_its_copy(backend: str, kind: str, make) -> None:
    student, teacher = pair(2, 3, 2500)

    def results(*sides: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, y = (side.detach().requires_grad_() for side in sides)
        value = kl_gpu.divergence(x, y, kind, reduction="none", backend=backend)
        return value.detach(), *torch.autograd.grad(value.sum(), (x, y))

    plain = results(student, teacher)
    for s, t in ((make(student), teacher), (student, make(teacher)), (make(student), _padded(teacher))):
        assert torch.equal(s, student)
        assert torch.equal(t, teacher)
        assert all(torch.equal(x, y) for x, y in zip(plain, results(s, t), strict=True))


def test_an_expanded_teacher(backend: str, kind: str) -> None:
    student, teacher = pair(3, 4, 500)
    one = teacher[:1, :1]
    got = kl_gpu.divergence(student, one.expand(3, 4, 500), kind, reduction="none", backend=backend)
    want = kl_gpu.divergence(student, one.repeat(3, 4, 1), kind, reduction="none", backend=backend)
    assert torch.equal(got, want)


def test_an_expanded_teacher_gets_the_summed_gradient(backend: str, kind: str) -> None:
    student, teacher = pair(3, 500)
    one = teacher[:1].clone().requires_grad_()
    kl_gpu.divergence(student, one.expand(3, 500), kind, reduction="sum", backend=backend).backward()
    many = one.detach().repeat(3, 1).requires_grad_()
    kl_gpu.divergence(student, many, kind, reduction="sum", backend=backend).backward()
    torch.testing.assert_close(one.grad, many.grad.sum(0, keepdim=True), rtol=1e-5, atol=1e-7)


def test_leading_dimensions_that_two_strides_cannot_walk(backend: str, kind: str) -> None:
    student, teacher = pair(2, 3, 2, 4, 60)
    odd = student.permute(3, 1, 0, 2, 4), teacher.permute(3, 1, 0, 2, 4)
    sides = [x.detach().requires_grad_() for x in odd]
    plain = [x.contiguous().detach().requires_grad_() for x in odd]
    got = kl_gpu.divergence(*sides, kind, reduction="none", backend=backend)
    want = kl_gpu.divergence(*plain, kind, reduction="none", backend=backend)
    assert torch.equal(got, want)
    got_grads = torch.autograd.grad(got.square().sum(), sides)
    want_grads = torch.autograd.grad(want.square().sum(), plain)
    assert all(torch.equal(x, y) for x, y in zip(got_grads, want_grads, strict=True))


def test_a_last_dimension_that_is_not_contiguous_is_copied_not_refused(backend: str, kind: str) -> None:
    student, teacher = pair(60, 4)
    got = kl_gpu.divergence(student.T, teacher.T, kind, reduction="none", backend=backend)
    want = kl_gpu.divergence(
        student.T.contiguous(), teacher.T.contiguous(), kind, reduction="none", backend=backend
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("make", [*VIEWS, lambda x: x[:1, :1].expand(x.shape)])
def test_a_view_is_not_copied(backend: str, kind: str, make, monkeypatch: pytest.MonkeyPatch) -> None:
    # What reaches the backend must be the caller's own memory, in value and in gradient.
    module = registry.load(backend)
    seen: list[set[int]] = []
    for name in ("value", "gradient", "value_and_gradient"):
        if not hasattr(module, name):
            continue
        inner = getattr(module, name)

        def spy(problem, *rest, inner=inner):
            seen.append({x.untyped_storage().data_ptr() for x in (problem.a, problem.b)})
            return inner(problem, *rest)

        monkeypatch.setattr(module, name, spy)
    student, teacher = (make(x).detach() for x in pair(3, 4, 200))
    student.requires_grad_()
    # On the CPU a gradient of 1 never reaches a backend that wrote it in forward.
    loss = kl_gpu.divergence(student, teacher, kind, backend=backend)
    loss.backward(torch.full_like(loss, 2.0))
    own = {x.untyped_storage().data_ptr() for x in (student, teacher)}
    assert seen == [own] * 2


def test_more_than_2_31_elements(backend: str, kind: str) -> None:
    # Rows 2³¹ elements apart in a virtual reservation: only the pages that are touched exist. Offsets in
    # 32 bits would read the row before the start, or nothing at all.
    vocab, apart = 700, 2**31 + 64
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GiB of GPU memory")
    room = torch.empty(apart + vocab, dtype=torch.bfloat16, device=DEVICE)
    student = room.as_strided((2, vocab), (apart, 1))
    fill, teacher = pair(2, vocab, dtype=torch.bfloat16)
    student.copy_(fill)
    got = kl_gpu.divergence(student, teacher, kind, reduction="none", backend=backend)
    assert torch.equal(got, kl_gpu.divergence(fill, teacher, kind, reduction="none", backend=backend))
    # The gradient kernel's stores as well, through the same strides.
    want = fill.clone().requires_grad_()
    kl_gpu.divergence(want, teacher, kind, reduction="sum", backend=backend).backward()
    call = kl_gpu.KINDS[kind].at(None)
    _, stats = ops.value(student, teacher, None, *call, 1.0, 1.0, backend)
    scale = torch.ones(2, device=DEVICE)
    ops.gradient(student, teacher, None, stats, scale, None, *call, 1.0, 1.0, backend, student, None)
    assert torch.equal(student, want.grad)

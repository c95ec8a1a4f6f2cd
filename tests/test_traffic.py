"""How often the Triton kernels touch each logit, counted by the interpreter: the README's traffic."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

import kl_gpu
from kl_gpu.kinds import KINDS
from support import DEVICE, pair

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter counts; a GPU does not say")

# A row of one split has the reference of one tile: 5 % of float32 rows with a spread of 1 fall back there,
# and one of these with a spread of 0.3.
ROWS, VOCAB = 2, 2055


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Elements read and written per tensor, by name; register tensors with `watch`.

    A loop that loads a tile ahead asks for its last tile twice in a row, the second time from the L1: what
    the load before has brought does not count.
    """
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    counts: Counter[str] = Counter()
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def note(action: str, pointers: np.ndarray, mask: np.ndarray) -> None:
        at = pointers[mask].astype(np.int64)
        for name, (first, last) in ranges.items():
            inside = at[(at >= first) & (at < last)]
            if inside.size == 0:
                continue
            counts[f"{action} {name}"] += int(
                np.isin(inside, before.get((action, name), ()), invert=True).sum()
            )
            before[action, name] = inside

    def counting_load(self, ptrs, mask, *rest):
        note("read", ptrs.data, mask.data)
        return load(self, ptrs, mask, *rest)

    def counting_store(self, ptrs, value, mask, *rest):
        note("write", ptrs.data, mask.data)
        return store(self, ptrs, value, mask, *rest)

    ranges: dict[str, tuple[int, int]] = {}
    before: dict[tuple[str, str], np.ndarray] = {}
    monkeypatch.setattr(Builder, "create_masked_load", counting_load)
    monkeypatch.setattr(Builder, "create_masked_store", counting_store)
    counts.ranges = ranges  # type: ignore[attr-defined]
    return counts


def watch(touched: Counter[str], **tensors: torch.Tensor) -> None:
    for name, x in tensors.items():
        touched.ranges[name] = (x.data_ptr(), x.data_ptr() + x.numel() * x.element_size())  # type: ignore[attr-defined]


def test_the_counter_sees_a_second_sweep(touched: Counter[str]) -> None:
    student, teacher = pair(ROWS, VOCAB, spread=0.1)
    watch(touched, student=student)
    for _ in range(2):
        kl_gpu.kl_div(student, teacher, backend="triton")
    assert touched["read student"] == 2 * student.numel()


def test_value(kind: str, touched: Counter[str]) -> None:
    student, teacher = pair(ROWS, VOCAB, spread=0.1)
    watch(touched, student=student, teacher=teacher)
    kl_gpu.divergence(student, teacher, kind, backend="triton")
    sweeps = 1 if KINDS[kind].formula == "kl" else 2  # 2 U, or 4 U where both normalisers come first
    for side in ("student", "teacher"):
        assert touched[f"read {side}"] == sweeps * student.numel()
        assert touched[f"write {side}"] == 0


def test_token_stats(touched: Counter[str]) -> None:
    student, teacher = pair(3, VOCAB)
    student[0, 5] = teacher[0, 2000] = 40.0  # the largest in different tiles
    student[1, 1029] = teacher[1, 1030] = 40.0  # in one tile, which is looked at again
    watch(touched, student=student, teacher=teacher)
    mask = torch.tensor([True, True, False])
    stats = kl_gpu.token_stats(student, teacher, mask=mask, backend="triton", overlap=False)
    assert stats.top1_agree.tolist() == [0, 0, 0]
    for side in ("student", "teacher"):
        # 2 U, and a tile of 256 columns of the second row; of the third, which does not count, none.
        assert touched[f"read {side}"] == 2 * VOCAB + 256
        assert touched[f"write {side}"] == 0


def test_gradient_in_place_adds_two_reads_and_a_write(kind: str, touched: Counter[str]) -> None:
    student, teacher = pair(ROWS, VOCAB, spread=0.1)
    leaf = student.clone().requires_grad_()
    logits = leaf * 1
    watch(touched, student=logits, teacher=teacher)
    loss = kl_gpu.divergence(logits, teacher, kind, inplace=True, backend="triton")
    before = Counter(touched)
    loss.backward()
    for side in ("student", "teacher"):
        assert touched[f"read {side}"] - before[f"read {side}"] == student.numel()
    assert touched["write student"] == student.numel()
    assert touched["write teacher"] == 0


def test_value_and_gradient_in_one_call(kind: str, touched: Counter[str]) -> None:
    student, teacher = pair(ROWS, VOCAB, spread=0.1)
    student.requires_grad_()
    watch(touched, student=student, teacher=teacher)
    loss = kl_gpu.divergence(student, teacher, kind, backend="triton")
    swept = Counter(touched)
    loss.backward()
    stages = 2 if KINDS[kind].formula == "kl" else 3  # all but the first from the L2
    for side in ("student", "teacher"):
        assert swept[f"read {side}"] == stages * student.numel()
    # An incoming gradient of 1 finds everything done.
    assert touched == swept

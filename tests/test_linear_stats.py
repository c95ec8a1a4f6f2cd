"""linear_token_stats against the NumPy reference on explicit logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kl_gpu
from kl_gpu import TokenStats, reference
from kl_gpu.linear import chunks
from kl_gpu.linear import heads as of_heads
from linear_heads import Heads, heads, logits
from support import DEVICE, RELATIVE, is_slow, to_numpy

NAN = float("nan")
FIELDS = TokenStats._fields[:7]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "labels, bias": {"labels": True, "bias": True, "chunk_rows": 3},
    "mask, labels, shift": {"mask": True, "labels": True, "shift": True, "chunk_rows": 4},
    "temperatures, scales": {
        "temperature": 2.0,
        "teacher_temperature": 1.5,
        "logit_scale": 0.5,
        "labels": True,
    },
    "caps": {"softcap": 4.0, "teacher_softcap": 5.0, "logit_scale": 2.0, "labels": True, "chunk_rows": 7},
    "one cap, bias, mask": {"teacher_softcap": 3.0, "teacher_logit_scale": 0.5, "mask": True, "bias": True},
    "unequal V": {"columns": (60, 67), "vocab_size": 57, "labels": True, "bias": True, "chunk_rows": 1},
}
SLOW = ("mask, labels, shift", "caps")


def stats(given: Heads, labels: Tensor | None = None, **options: Any) -> TokenStats:
    biases = {"student_bias": given.student_bias, "teacher_bias": given.teacher_bias}
    return kl_gpu.linear_token_stats(*given[:4], labels, **biases, **options)


def explicit(given: Heads, **options: Any) -> list[np.ndarray]:
    """Both sides' logits in float64."""
    found = []
    for side, name in ((0, ""), (2, "teacher_")):
        bias = given[4 + side // 2]
        cap, scale = options.get(f"{name}softcap"), options.get(f"{name}logit_scale", 1.0)
        found.append(logits(given[side], given[side + 1], bias, cap, scale))
    return [x[..., : options.get("vocab_size")] for x in found]


def check(
    found: TokenStats, sides: list[np.ndarray], labels: np.ndarray | None, counts: np.ndarray, wide: bool,
    moved: float = 0.0, **temperatures: float,
) -> None:  # fmt: skip
    """Every field; `moved` is how far a capped logit over its temperature may be off."""
    want = reference.token_stats(*sides, labels, **temperatures)
    for name in FIELDS:
        got = getattr(found, name)
        assert got.dtype == (torch.float64 if wide else torch.float32)
        assert not got.requires_grad
        exact, got = want[name], to_numpy(got)
        assert got.shape == exact.shape
        assert (got[~counts] == 0).all(), name
        exact, got = exact[counts], got[counts]
        np.testing.assert_array_equal(np.isnan(got), np.isnan(exact), err_msg=name)
        if name == "top1_agree":
            np.testing.assert_array_equal(got, exact)
            continue
        size = np.abs(exact) if name.endswith("_kl") else np.maximum(1, np.abs(exact))
        bound = (1e-6 if wide else 1.0) * (RELATIVE * size + 4 * moved * np.maximum(1, np.abs(exact)))
        known = ~np.isnan(exact)
        assert (np.abs(got - exact)[known] <= bound[known]).all(), name
        assert (np.abs(exact[known]) > 1e-3).all(), name
    np.testing.assert_array_equal(to_numpy(found.counts), counts)


def _against_the_reference(case: dict[str, Any], backend: str | None, dtype: torch.dtype) -> None:
    given = heads(bias=case.get("bias", False), columns=case.get("columns", (60, 60)), dtype=dtype)
    options = {name: x for name, x in case.items() if name not in ("bias", "columns", "labels")}
    lead = given.student_hidden.shape[:-1]
    counts, labels = torch.ones(lead, dtype=torch.bool, device=DEVICE), None
    if case.get("mask"):
        options["mask"] = torch.rand(lead, device=DEVICE) > 0.4
        counts &= options["mask"]
    if case.get("labels"):
        labels = torch.randint(0, 57, lead, device=DEVICE)
        labels[torch.rand(lead, device=DEVICE) > 0.7] = -100
        counts &= labels != -100
    found = stats(given.require_grad(), labels, backend=backend, **options)
    cut = slice(None, -1) if case.get("shift") else slice(None)
    later = slice(1, None) if case.get("shift") else slice(None)
    sides = [x[:, cut] for x in explicit(given, **case)]
    token = None if labels is None else labels[:, later].clamp_min(0).cpu().numpy()
    temperatures = {name: case[name] for name in ("temperature", "teacher_temperature") if name in case}
    caps = [case[name] for name in ("softcap", "teacher_softcap") if name in case]
    moved = 2.0**-24 * sum(caps) / case.get("temperature", 1.0)
    wide = dtype == torch.float64
    check(found, sides, token, counts[:, later].cpu().numpy(), wide, moved, **temperatures)


@pytest.mark.parametrize("name", CASES)
def test_every_field(backend: str, name: str) -> None:
    if is_slow(backend) and name not in SLOW:
        pytest.skip("the interpreter has been shown two cases")
    for dtype in (torch.float32,) if is_slow(backend) else (torch.float32, torch.float64):
        _against_the_reference(CASES[name], backend, dtype)


@pytest.mark.parametrize("name", ["mask, labels, shift", "one cap, bias, mask"])
def test_rows_that_may_not_be_looked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU, where looking would wait for the device: they are computed, and their result is 0.
    monkeypatch.setattr(chunks, "_FINDS_ROWS", frozenset())
    _against_the_reference(CASES[name], None, torch.float32)


@pytest.mark.parametrize("finds", [True, False])
def test_caps_of_two_rows_at_a_time(finds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # A last cache holds all rows of these sizes: here only two, and one of the last chunk.
    monkeypatch.setattr(of_heads, "_CAPPED", {DEVICE.type: 130})
    if not finds:
        monkeypatch.setattr(chunks, "_FINDS_ROWS", frozenset())
    _against_the_reference(CASES["caps"] | {"mask": True}, None, torch.float32)


@pytest.mark.parametrize("finds", [True, False])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_what_a_masked_row_holds_does_not_matter(
    finds: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not finds:
        monkeypatch.setattr(chunks, "_FINDS_ROWS", frozenset())
    given, mask = heads((6,), bias=True), torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool, device=DEVICE)
    labels = torch.randint(0, 60, (6,), device=DEVICE)
    spoilt = Heads(*(x.clone() for x in given))
    for hidden in (spoilt.student_hidden, spoilt.teacher_hidden):
        hidden[~mask] = NAN
    options = {"mask": mask, "softcap": softcap, "chunk_rows": 4}
    got, want = stats(spoilt, labels.where(mask, 10**6), **options), stats(given, labels, **options)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    assert (want.forward_kl[mask] > 0).all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_products_round_and_nothing_else(
    backend: str, autocast: bool, half: torch.dtype
) -> None:
    given = heads((6,), bias=True, dtype=torch.float32 if autocast else half)
    labels = torch.randint(0, 60, (6,), device=DEVICE)
    with torch.autocast(DEVICE.type, half, enabled=autocast):
        found = stats(given, labels, backend=backend)
        sides = [
            torch.nn.functional.linear(given[i], given[i + 1], given[4 + i // 2]).to(half) for i in (0, 2)
        ]
    want = kl_gpu.token_stats(*sides, labels, backend=backend)
    for name, got, exact in zip(TokenStats._fields, found, want, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, exact, rtol=RELATIVE, atol=1e-6, msg=name)
    assert (want.forward_kl > 1e-3).all()


def test_it_is_token_stats_of_the_logits(backend: str) -> None:
    given, labels = heads((4,), bias=True), torch.tensor([1, -100, 3, 59], device=DEVICE)
    sides = [given[i] @ given[i + 1].T + given[4 + i // 2] for i in (0, 2)]
    options = {"temperature": 1.5, "backend": backend}
    for got, want in zip(
        stats(given, labels, **options), kl_gpu.token_stats(*sides, labels, **options), strict=True
    ):
        assert torch.equal(got, want)


def test_a_float64_side_with_a_narrower_one() -> None:
    given = heads((4,), dtype=torch.float64)
    narrow = given._replace(
        teacher_hidden=given.teacher_hidden.float(), teacher_weight=given.teacher_weight.float()
    )
    found = stats(narrow)
    assert found.forward_kl.dtype == torch.float32
    check(found, explicit(given), None, np.ones(4, bool), False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_does_not_grow_with_rows(dtype: torch.dtype) -> None:
    memory = pytest.importorskip("bench.harness.memory")
    v, h, beyond = 4000, 32, []
    for n in (256, 2048):
        given = heads((n,), columns=(v, v), widths=(h, h), dtype=dtype)
        labels = torch.randint(0, v, (n,), device=DEVICE)

        def step(given: Heads = given, labels: Tensor = labels) -> None:
            stats(given, labels, chunk_rows=64)

        step()
        beyond.append(memory.peak_extra_bytes(step, DEVICE) - n * 200)
    both = 2 * 64 * v * dtype.itemsize
    assert both / 2 < beyond[0] < 1.2 * both
    assert beyond[1] <= beyond[0] * 1.05


@pytest.mark.parametrize("finds", [True, False])
def test_no_rows_and_no_rows_that_count(backend: str, finds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not finds:
        monkeypatch.setattr(chunks, "_FINDS_ROWS", frozenset())
    for n in (0, 3):
        found = stats(heads((n,)), torch.full((n,), -100, device=DEVICE), backend=backend, softcap=3.0)
        assert all(x.shape == (n,) and (x == 0).all() for x in found)
    assert found.summary()["count"] == 0


def test_one_column(backend: str) -> None:
    given, labels = heads((3,), columns=(1, 1)), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    for softcap in (None, 3.0):
        found = stats(given, labels, backend=backend, softcap=softcap)
        assert (found.forward_kl == 0).all()
        assert (found.reverse_kl == 0).all()
        assert all((x.abs() < 1e-6).all() for x in found[2:6])
        assert (found.top1_agree == 1).all()


def test_columns_of_minus_infinity_and_nan(backend: str) -> None:
    given = heads((3,), bias=True)
    for bias in (given.student_bias, given.teacher_bias):
        bias[7:20] = -torch.inf
    given.teacher_hidden[1] = NAN
    labels = torch.tensor([3, 40, 59], device=DEVICE)
    found = stats(given, labels, backend=backend)
    keep = [*range(7), *range(20, 60)]
    short = Heads(*(x if i in (0, 2) else x[keep] for i, x in enumerate(given)))
    fewer = stats(short, torch.tensor([3, 27, 46], device=DEVICE), backend=backend)
    for got, want in zip(found, fewer, strict=True):
        torch.testing.assert_close(got, want, rtol=RELATIVE, atol=1e-6, equal_nan=True)
    assert found.forward_kl.isnan().tolist() == [False, True, False]
    # What one side says alone only that side's NaN spoils.
    assert found.student_entropy.isfinite().all()
    assert stats(given, labels - labels + 7, backend=backend).student_logprob.eq(-torch.inf).all()


def test_any_leading_shape() -> None:
    given = heads((2, 3, 4), bias=True)
    labels = torch.randint(0, 60, (2, 3, 4), device=DEVICE)
    flat = given._replace(
        student_hidden=given.student_hidden.reshape(24, -1),
        teacher_hidden=given.teacher_hidden.reshape(24, -1),
    )
    for got, want in zip(stats(given, labels), stats(flat, labels.reshape(24)), strict=True):
        assert torch.equal(got, want.view(2, 3, 4))


def test_the_same_call_gives_the_same_bits() -> None:
    given = heads((40,), columns=(700, 700), widths=(32, 16))
    first, second = (stats(given, chunk_rows=16, softcap=5.0) for _ in range(2))
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(first, second, strict=True))


def test_opcheck(backend: str) -> None:
    given = heads((4,), bias=True)
    rows = torch.tensor([True, False, True, True], device=DEVICE)
    labels = torch.tensor([3, -100, 56, 0], device=DEVICE)
    sides = *given[:2], given.student_bias, *given[2:4], given.teacher_bias
    call = (torch.float32, 1.0, 0.0, torch.float32, 2.0, 5.0, 57, 3, "forward_kl", 0.0, 0.5, 1.0, backend)
    # Without labels there are NaNs, which opcheck does not take for equal.
    labels[1] = 2
    for valid in (rows, None):
        torch.library.opcheck(torch.ops.kl_gpu.linear_token_stats.default, (*sides, valid, labels, *call))


def test_one_graph_under_compile() -> None:
    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> TokenStats:
        return stats(
            given._replace(student_hidden=hidden, student_weight=weight), labels, shift=True, softcap=4.0
        )

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for time in (5, 8):
        given = heads((2, time), bias=True)
        labels = torch.randint(0, 60, (2, time), device=DEVICE)
        labels = labels.where(torch.rand(2, time, device=DEVICE) > 0.3, -100)
        plain, traced = (f(given.student_hidden, given.student_weight, labels) for f in (run, compiled))
        for want, got in zip(plain, traced, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        assert all(x.abs().max() > 1e-4 for x in plain[:6])


def test_no_gradient_and_inference_mode() -> None:
    given = heads((4,), bias=True).require_grad()
    want = stats(given)
    assert not any(x.requires_grad for x in want)
    with torch.inference_mode():
        for got, exact in zip(stats(given), want, strict=True):
            torch.testing.assert_close(got, exact, rtol=0, atol=0, equal_nan=True)

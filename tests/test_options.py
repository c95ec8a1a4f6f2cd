"""Every row option against the reference, alone and in combination."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kl_gpu
from kl_gpu import reference
from kl_gpu.arguments import validation
from kl_gpu.arguments.options import Options
from support import DEVICE, check_gradients, check_value, expected, is_slow, pair, to_numpy


def test_kl_div_names_the_two_directions(backend: str) -> None:
    student, teacher = pair(4, 50)
    for direction, kind in (("forward", "forward_kl"), ("reverse", "reverse_kl")):
        named = kl_gpu.kl_div(student, teacher, direction=direction, reduction="none", backend=backend)
        assert torch.equal(
            named, kl_gpu.divergence(student, teacher, kind, reduction="none", backend=backend)
        )
        np.testing.assert_allclose(to_numpy(named), expected(student, teacher, kind), rtol=5e-6)


def test_what_names_the_divergence_may_stand_third() -> None:
    student, teacher = pair(4, 50)
    named = kl_gpu.kl_div(student, teacher, direction="reverse"), kl_gpu.js_div(student, teacher, beta=0.2)
    assert named == (kl_gpu.kl_div(student, teacher, "reverse"), kl_gpu.js_div(student, teacher, 0.2))
    assert len({*named, kl_gpu.kl_div(student, teacher), kl_gpu.js_div(student, teacher)}) == 4


def test_forward_is_mode_covering_and_reverse_is_not() -> None:
    # Pins the orientation by a number from outside: KL((½, ½) ‖ (0.7, 0.3)) = ½ ln(0.25/0.21).
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.7, 0.3])
    student, teacher = q.log().to(DEVICE), p.log().to(DEVICE)
    assert kl_gpu.kl_div(student, teacher).item() == pytest.approx(0.0871768, abs=2e-7)
    assert kl_gpu.kl_div(student, teacher, direction="reverse").item() == pytest.approx(0.0822828, abs=2e-7)


def test_the_shared_options_are_those_of_divergence() -> None:
    # In one order, too: it hands them on by place.
    assert list(Options._field_defaults.items()) == list(kl_gpu.divergence.__kwdefaults__.items())


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_reductions(backend: str, kind: str, reduction: str) -> None:
    student, teacher = pair(3, 5, 70)
    rows = expected(student, teacher, kind)
    mask = torch.rand(3, 5, device=DEVICE) > 0.4
    weight = torch.rand(3, 5, device=DEVICE) - 0.2
    kept = rows * to_numpy(mask) * to_numpy(weight)
    want = {
        "none": kept,
        "sum": kept.sum(),
        "mean": kept.sum() / mask.sum().item(),
        "batchmean": kept.sum() / 3,
    }[reduction]
    got = kl_gpu.divergence(
        student, teacher, kind, mask=mask, weight=weight, reduction=reduction, backend=backend
    )
    np.testing.assert_allclose(to_numpy(got), want, rtol=1e-5, atol=1e-7)
    assert got.shape == (rows.shape if reduction == "none" else ())


@pytest.mark.parametrize("as_tensor", [False, True])
def test_normalizer(backend: str, kind: str, as_tensor: bool) -> None:
    student, teacher = pair(6, 70)
    normalizer = torch.tensor(17, device=DEVICE) if as_tensor else 17.0
    got = kl_gpu.divergence(student, teacher, kind, normalizer=normalizer, backend=backend)
    np.testing.assert_allclose(to_numpy(got), expected(student, teacher, kind).sum() / 17, rtol=5e-6)


# 1e-6 and 1e9 are the ends of the range.
TEMPERATURES = [(1e-6, 1e-6), (1e-6, 1.0), (1.0, 1e-6), (1e-6, 1e9), (1e9, 1e-6), (1e9, 1e9), (1.0, 1e9)]


@pytest.mark.parametrize(("temperature", "teacher_temperature"), TEMPERATURES)
def test_the_ends_of_the_range_of_temperatures(
    backend: str, kind: str, temperature: float, teacher_temperature: float
) -> None:
    student, teacher = pair(5, 70)
    options = {"temperature": temperature, "teacher_temperature": teacher_temperature}
    leaves = student.requires_grad_(), teacher.requires_grad_()
    value = kl_gpu.divergence(*leaves, kind, reduction="none", backend=backend, **options)
    grads = torch.autograd.grad(value.sum(), leaves)
    where = f"T = {temperature:g} and {teacher_temperature:g}"
    check_value(value, student, teacher, kind, backend, where, **options)
    check_gradients(student, teacher, grads, kind, backend, where, **options)
    want = expected(student, teacher, kind, **options)
    large = want > 1e2  # past the promise, and still no other number
    np.testing.assert_allclose(to_numpy(value)[large], want[large], rtol=5e-6)
    assert max(float(grad.abs().max()) for grad in grads) > 0 or temperature == teacher_temperature


def test_t_squared_at_the_highest_temperature(backend: str) -> None:
    # The limit of T² KL: half the variance of s − t under the uniform distribution.
    student, teacher = pair(5, 70)
    student.requires_grad_()
    value = kl_gpu.kl_div(
        student, teacher, temperature=1e9, t_squared=True, reduction="none", backend=backend
    )
    (grad,) = torch.autograd.grad(value.sum(), student)
    d = to_numpy(student) - to_numpy(teacher)
    np.testing.assert_allclose(to_numpy(value), d.var(-1) / 2, rtol=5e-6)
    np.testing.assert_allclose(to_numpy(grad), (d - d.mean(-1, keepdims=True)) / 70, rtol=1e-4, atol=1e-7)


def test_t_squared_scales_value_and_gradient(backend: str, kind: str) -> None:
    student, teacher = pair(4, 70)
    student.requires_grad_()
    options = {"temperature": 2.5, "reduction": "sum", "backend": backend}
    plain = kl_gpu.divergence(student, teacher, kind, **options)
    squared = kl_gpu.divergence(student, teacher, kind, t_squared=True, **options)
    assert squared.item() == pytest.approx(6.25 * plain.item(), rel=1e-6)
    (g_plain,) = torch.autograd.grad(plain, student)
    (g_squared,) = torch.autograd.grad(squared, student)
    # Factors of a row may be folded into its probabilities, so what cancels there rounds anew.
    torch.testing.assert_close(g_squared, 6.25 * g_plain, rtol=1e-6, atol=5e-8)
    assert g_squared.abs().max() > 1e-3


def test_labels_combine_with_mask_by_and(backend: str, kind: str) -> None:
    student, teacher = pair(6, 70)
    labels = torch.tensor([1, -100, 2, -100, 3, 4], device=DEVICE)
    mask = torch.tensor([1, 1, 0, 0, 1, 1], dtype=torch.bool, device=DEVICE)
    got = kl_gpu.divergence(
        student, teacher, kind, labels=labels, mask=mask, reduction="none", backend=backend
    )
    assert (got != 0).tolist() == [True, False, False, False, True, True]
    other = kl_gpu.divergence(
        student, teacher, kind, labels=labels, ignore_index=3, reduction="none", backend=backend
    )
    assert (other != 0).tolist() == [True, True, True, True, False, True]


NARROW = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_labels_are_widened_before_they_are_compared(backend: str, dtype: torch.dtype) -> None:
    # −100 as an unsigned number of 8 bits is token 156, of 16 bits 65436.
    student, teacher = pair(3, 300)
    tokens = [120, 5, 7] if dtype == torch.int8 else [156, 5, 255]
    labels = torch.tensor(tokens, device=DEVICE)
    logprobs, ids = teacher.log_softmax(-1).topk(5)
    heads = torch.randn(300, 4, device=DEVICE), torch.randn(300, 4, device=DEVICE)
    hidden = student[:, :4].contiguous()
    entries = {
        "kl_div": lambda **o: kl_gpu.kl_div(student, teacher, reduction="none", **o),
        "topk_div": lambda **o: kl_gpu.topk_div(student, logprobs, ids, reduction="none", **o),
        "linear_div": lambda **o: kl_gpu.linear_div(
            hidden, heads[0], hidden, heads[1], reduction="none", **o
        ),
        "linear_topk_div": lambda **o: kl_gpu.linear_topk_div(
            hidden, heads[0], logprobs, ids, reduction="none", **o
        ),
        "token_stats": lambda **o: torch.stack(kl_gpu.token_stats(student, teacher, **o)),
        "linear_token_stats": lambda **o: torch.stack(
            kl_gpu.linear_token_stats(hidden, heads[0], hidden, heads[1], **o)
        ),
        "token_logprobs": lambda labels, **o: kl_gpu.token_logprobs(student, labels, **o),
        "linear_token_logprobs": lambda labels, **o: kl_gpu.linear_token_logprobs(
            hidden, heads[0], labels, **o
        ),
    }
    for name, entry in entries.items():
        wide = entry(labels=labels, backend=backend)
        assert (wide.reshape(-1, 3)[0] != 0).all(), name
        assert torch.equal(entry(labels=labels.to(dtype), backend=backend), wide), name
        some = entry(labels=labels.to(dtype), ignore_index=5, backend=backend).reshape(-1, 3)
        assert (some[:, 1] == 0).all(), name
        assert (some[0, ::2] != 0).all(), name


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16])
@pytest.mark.parametrize("vocab", [32768, 40000])
def test_labels_narrower_than_the_vocabulary_are_tokens_all_the_same(
    backend: str, dtype: torch.dtype, vocab: int
) -> None:
    if is_slow(backend):
        pytest.skip("what labels are is settled before a backend is asked")
    student, teacher = pair(2, vocab)
    labels = torch.tensor([32767, 3], device=DEVICE)
    got = kl_gpu.token_stats(student, teacher, labels.to(dtype), backend=backend)
    assert torch.equal(
        torch.stack(got), torch.stack(kl_gpu.token_stats(student, teacher, labels, backend=backend))
    )
    assert torch.equal(
        kl_gpu.token_logprobs(student, labels.to(dtype), backend=backend),
        kl_gpu.token_logprobs(student, labels, backend=backend),
    )


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.uint16, torch.uint32])
def test_narrow_ids_of_a_teacher(backend: str, dtype: torch.dtype) -> None:
    student, teacher = pair(3, 250)
    logprobs, ids = teacher.log_softmax(-1).topk(5)
    want = kl_gpu.topk_div(student, logprobs, ids, backend=backend)
    assert want > 0
    assert torch.equal(kl_gpu.topk_div(student, logprobs, ids.to(dtype), backend=backend), want)


def test_shift_pairs_logits_with_the_next_label(backend: str, kind: str) -> None:
    student, teacher = pair(2, 5, 70)
    student.requires_grad_()
    labels = torch.tensor([[7, 1, -100, 2, 3], [-100, -100, 4, 5, -100]], device=DEVICE)
    weight = torch.rand(2, 5, device=DEVICE)
    got = kl_gpu.divergence(
        student, teacher, kind, labels=labels, weight=weight, shift=True, reduction="none", backend=backend
    )
    keep = to_numpy(labels[:, 1:] != -100)
    want = expected(student[:, :-1], teacher[:, :-1], kind) * keep * to_numpy(weight[:, 1:])
    np.testing.assert_allclose(to_numpy(got), want, rtol=5e-6)
    got.sum().backward()
    assert (student.grad[:, -1] == 0).all()
    by_hand = student.detach()[:, :-1].clone().requires_grad_()
    kl_gpu.divergence(
        by_hand,
        teacher[:, :-1],
        kind,
        labels=labels[:, 1:],
        weight=weight[:, 1:],
        reduction="sum",
        backend=backend,
    ).backward()
    assert torch.equal(student.grad[:, :-1], by_hand.grad)


def test_weight_gets_its_gradient(backend: str, kind: str) -> None:
    student, teacher = pair(5, 70)
    weight = torch.rand(5, device=DEVICE, requires_grad=True)
    kl_gpu.divergence(student, teacher, kind, weight=weight, reduction="sum", backend=backend).backward()
    np.testing.assert_allclose(to_numpy(weight.grad), expected(student, teacher, kind), rtol=5e-6)


ENTRIES = ("divergence", "topk_div", "linear_div", "linear_topk_div")


def losses(entry: str, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    """The entry's loss of these logits, which some make of hidden states and unit heads."""
    if entry == "divergence":
        return kl_gpu.divergence(student, teacher, **options)
    one = torch.eye(student.shape[-1], device=DEVICE)
    if entry in ("topk_div", "linear_topk_div"):
        logprobs, ids = teacher.log_softmax(-1).topk(5)
        if entry == "topk_div":
            return kl_gpu.topk_div(student, logprobs, ids, **options)
        return kl_gpu.linear_topk_div(student, one, logprobs, ids, **options)
    return kl_gpu.linear_div(student, one, teacher, one, **options)


@pytest.mark.pairs
@pytest.mark.parametrize("normalizer", [0, 0.0, 7])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("case", ["labels", "mask", "shift", "no rows"])
def test_a_normalizer_where_no_row_counts(
    backend: str, entry: str, case: str, requires_grad: bool, normalizer: float
) -> None:
    """`num_items_in_batch` is 0 then: the loss is 0, attached to the graph."""
    shape = {"shift": (2, 1, 30), "no rows": (0, 30)}.get(case, (3, 30))
    student, teacher = pair(*shape)
    options: dict[str, Any] = {
        "labels": {"labels": torch.full(shape[:1], -100, device=DEVICE)},
        "mask": {"mask": torch.zeros(shape[:1], dtype=torch.bool, device=DEVICE)},
        "shift": {"shift": True},
    }.get(case, {})
    divisor = torch.tensor(normalizer, device=DEVICE)
    if requires_grad:  # the path on which the reduction is differentiated
        divisor = divisor.float().requires_grad_()
    student.requires_grad_()
    loss = losses(entry, student, teacher, normalizer=divisor, backend=backend, **options)
    assert loss.shape == ()
    assert loss.item() == 0
    assert loss.dtype == torch.float32
    loss.backward()
    assert (student.grad == 0).all()
    assert divisor.grad is None or divisor.grad.item() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.uint8, torch.uint16])
def test_a_normalizer_of_any_dtype_leaves_the_result_its_own(backend: str, dtype: torch.dtype) -> None:
    student, teacher = pair(6, 70)
    divisor = torch.tensor(17, dtype=dtype, device=DEVICE)
    for options in ({}, {"weight": torch.ones(6, device=DEVICE)}):
        got = kl_gpu.kl_div(student, teacher, normalizer=divisor, backend=backend, **options)
        assert got.dtype == torch.float32
        np.testing.assert_allclose(to_numpy(got), expected(student, teacher, "forward_kl").sum() / 17, 5e-6)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.uint16])
def test_masks_of_integers(backend: str, entry: str, dtype: torch.dtype) -> None:
    student, teacher = pair(2, 5, 30)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 1]], device=DEVICE)
    for options in ({}, {"labels": torch.tensor([[3, 4, -100, 2, 1]] * 2, device=DEVICE)}, {"shift": True}):
        both = []
        for same in (mask.bool(), mask.to(dtype)):
            leaf = student.clone().requires_grad_()
            loss = losses(entry, leaf, teacher, mask=same, backend=backend, **options)
            loss.backward()
            both.append((loss.detach(), leaf.grad))
        assert torch.equal(both[0][0], both[1][0])
        assert torch.equal(both[0][1], both[1][1])
        assert both[0][1].abs().max() > 1e-3


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_normalizer_of_one_element(backend: str, entry: str) -> None:
    student, teacher = pair(3, 30)
    want = losses(entry, student, teacher, normalizer=7.0, backend=backend)
    for shape in ((1,), (1, 1)):
        divisor = torch.full(shape, 7, device=DEVICE)
        leaf = student.clone().requires_grad_()
        got = losses(entry, leaf, teacher, normalizer=divisor, backend=backend)
        assert got.shape == ()
        torch.testing.assert_close(got, want)
        got.backward()
        assert leaf.grad.abs().max() > 1e-3


def test_a_softcap_of_0_is_none(backend: str) -> None:
    student, teacher = pair(3, 30)
    assert torch.equal(
        losses("linear_div", student, teacher, softcap=0.0, teacher_softcap=0, backend=backend),
        losses("linear_div", student, teacher, backend=backend),
    )


@pytest.mark.parametrize("value", [-3.0, 0.0, math.nan])
def test_a_normalizer_that_cannot_be_looked_at_makes_nan_and_no_flipped_loss(
    backend: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device, where asking for its value would wait."""
    monkeypatch.setattr(validation, "readable", lambda _: False)
    student, teacher = pair(3, 30)
    divisor = torch.tensor(value, device=DEVICE)
    mask = torch.tensor([True, False, True], device=DEVICE)
    for options in ({}, {"mask": mask}):
        for leaf in (student, student.clone().requires_grad_()):
            loss = kl_gpu.kl_div(leaf, teacher, normalizer=divisor, backend=backend, **options)
            assert math.isnan(loss.item())
    divisor = torch.tensor(4.0, device=DEVICE)
    loss = kl_gpu.kl_div(student, teacher, normalizer=divisor, mask=mask, backend=backend)
    want = expected(student, teacher, "forward_kl")[[0, 2]].sum() / 4
    np.testing.assert_allclose(loss.item(), want, rtol=5e-6)


def test_what_torch_func_does_not_let_us_look_at_is_nan(backend: str) -> None:
    student, teacher = pair(2, 3, 30)
    for value in (-3.0, 0.0, math.nan):
        divisor = torch.tensor(value, device=DEVICE)
        loss = torch.func.grad_and_value(
            lambda x, n=divisor: kl_gpu.kl_div(x, teacher, normalizer=n, backend=backend)
        )
        gradient, of = loss(student)
        assert math.isnan(of.item())
        assert torch.isnan(gradient).all()
    labels = torch.tensor([[3, 30, 3], [3, 3, 3]], device=DEVICE)
    found = torch.func.vmap(lambda s, t, x: kl_gpu.token_stats(s, t, x, backend=backend))(
        student, teacher, labels
    )
    for log_p in (found.student_logprob, found.teacher_logprob):
        assert torch.equal(torch.isnan(log_p), labels == 30)


@pytest.mark.pairs
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("reduction", "options"),
    [
        *product(["none", "sum", "mean", "batchmean"], [{}, {"mask": [True, True, True, False, True]}]),
        ("mean", {"normalizer": 3.0}),  # the denominator of a mean
    ],
)
def test_a_row_of_weight_0_is_not_computed(
    backend: str, entry: str, reduction: str, options: dict[str, Any]
) -> None:
    options = {k: torch.tensor(v, device=DEVICE) if k == "mask" else v for k, v in options.items()}
    student, teacher = pair(5, 30)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0, -0.0], device=DEVICE)

    def found(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        leaf = student.clone().requires_grad_()
        got = losses(entry, leaf, teacher, weight=weight, reduction=reduction, backend=backend, **options)
        return got.detach(), torch.autograd.grad(got.sum(), leaf)[0]

    want, want_gradient = found(student, teacher)  # finite rows: a weight of 0 makes them 0 anyhow
    assert want.abs().max() > 0
    student[1], teacher[4] = math.nan, torch.tensor([0.0] + [-math.inf] * 29)
    student[4, 0] = -math.inf  # KL(p‖q) = inf
    got, gradient = found(student, teacher)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-5, atol=1e-8)
    assert (gradient[1] == 0).all()
    assert (gradient[4] == 0).all()
    # Its weight, not the row, is what is 0: a mean divides by the rows that count, as it does for any weight.
    if reduction == "mean" and not options:
        rows = losses(entry, student, teacher, reduction="none", backend=backend)
        total = (rows * weight)[weight != 0].sum()
        torch.testing.assert_close(got, total / 5, rtol=1e-5, atol=0)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_weight_of_0_still_learns(backend: str, entry: str) -> None:
    """Its derivative is the row's divergence, 0 where that is not finite, and never NaN."""
    student, teacher = pair(5, 30)
    rows = losses(entry, student, teacher, reduction="none", backend=backend)
    student[1] = math.nan
    leaf = student.clone().requires_grad_()
    weight = torch.tensor([0.5, 0.0, 0.0, 1.0, 0.0], device=DEVICE, requires_grad=True)
    mask = torch.tensor([True, True, True, True, False], device=DEVICE)
    loss = losses(entry, leaf, teacher, weight=weight, mask=mask, reduction="sum", backend=backend)
    loss.backward()
    torch.testing.assert_close(loss.detach(), 0.5 * rows[0] + rows[3], rtol=1e-5, atol=0)
    want = torch.stack([rows[0], rows[1] * 0, rows[2], rows[3], rows[4] * 0])
    torch.testing.assert_close(weight.grad, want, rtol=1e-5, atol=0)
    assert want[2] > 1e-3
    assert (leaf.grad[[1, 2, 4]] == 0).all()
    assert leaf.grad[0].abs().max() > 1e-3


def test_a_weight_of_0_in_place(backend: str) -> None:
    student, teacher = pair(3, 30)
    student[1] = math.nan
    leaf = student.clone().requires_grad_()
    weight = torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    kl_gpu.kl_div(leaf * 1, teacher, weight=weight, inplace=True, backend=backend).backward()
    assert (leaf.grad[1] == 0).all()
    assert leaf.grad[0].abs().max() > 1e-3


def test_a_weight_of_nan_on_a_masked_row_does_not_count(backend: str, kind: str) -> None:
    student, teacher = pair(3, 70)
    mask = torch.tensor([True, False, True], device=DEVICE)
    weight = torch.tensor([1.0, float("nan"), 2.0], device=DEVICE)
    assert torch.isfinite(
        kl_gpu.divergence(student, teacher, kind, mask=mask, weight=weight, backend=backend)
    )


@pytest.mark.parametrize("sizes", [(151936, 152064), (300, 257), (64, 64)])
def test_unequal_vocabularies(backend: str, kind: str, sizes: tuple[int, int]) -> None:
    vocab_size = min(sizes) - 3
    student, _ = pair(2, sizes[0])
    teacher, _ = pair(2, sizes[1])
    student[:, vocab_size:] = float("nan")
    student.requires_grad_()
    teacher.requires_grad_()
    got = kl_gpu.divergence(student, teacher, kind, vocab_size=vocab_size, reduction="sum", backend=backend)
    narrow = student.detach()[:, :vocab_size], teacher.detach()[:, :vocab_size]
    np.testing.assert_allclose(to_numpy(got), expected(*narrow, kind).sum(), rtol=5e-6)
    got.backward()
    for side in (student, teacher):
        assert (side.grad[:, vocab_size:] == 0).all()
        assert side.grad[:, :vocab_size].abs().max() > 1e-4


def test_module_face_is_the_function(backend: str, kind: str) -> None:
    student, teacher = pair(2, 4, 70)
    labels = torch.tensor([[1, 2, -100, 4], [5, 6, 7, -100]], device=DEVICE)
    options = {"temperature": 2.0, "t_squared": True, "shift": True, "backend": backend}
    module = kl_gpu.DivergenceLoss(kind, **options)
    assert torch.equal(
        module(student, teacher, labels=labels, normalizer=9),
        kl_gpu.divergence(student, teacher, kind, labels=labels, normalizer=9, **options),
    )
    assert "temperature=2.0" in repr(module)
    with pytest.raises(TypeError, match="mask"):
        kl_gpu.DivergenceLoss(kind, mask=None)
    with pytest.raises(ValueError, match="kind"):
        kl_gpu.DivergenceLoss("no_such")


@st.composite
def _cases(draw: st.DrawFn) -> dict:
    equal = draw(st.booleans())
    temperature = draw(st.sampled_from([0.3, 1.0, 1.7, 4.0]))
    return {
        "lead": draw(st.sampled_from([(), (4,), (2, 3), (2, 1, 3)])),
        "vocab": draw(st.integers(1, 300)),
        "extra": draw(st.sampled_from([(0, 0), (0, 5), (9, 0), (3, 4)])),
        "dtypes": draw(st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float64])] * 2)),
        "spread": draw(st.sampled_from([1e-3, 0.1, 1.0, 4.0])),
        "temperatures": (temperature, temperature if equal else draw(st.sampled_from([0.5, 2.0]))),
        "t_squared": equal and draw(st.booleans()),
        "mask": draw(st.booleans()),
        "labels": draw(st.booleans()),
        "weight": draw(st.booleans()),
        "shift": draw(st.booleans()),
        "reduction": draw(st.sampled_from(["none", "sum", "mean", "batchmean"])),
        "normalizer": draw(st.sampled_from([None, 3.5])),
        "holes": draw(st.sampled_from([0.0, 0.2])),
        "seed": draw(st.integers(0, 2**31)),
    }


def test_options_in_combination(backend: str, kind: str) -> None:
    # Options are the host's affair: of seven kinds, a hundred combinations in the interpreter show as much.
    @settings(max_examples=15 if is_slow(backend) else 60, derandomize=True, deadline=None)
    @given(case=_cases())
    def is_as_the_reference(case: dict) -> None:
        _check_combination(backend, kind, case)

    is_as_the_reference()


def _check_combination(backend: str, kind: str, case: dict) -> None:
    torch.manual_seed(case["seed"])
    lead, vocab, (s_extra, t_extra) = case["lead"], case["vocab"], case["extra"]
    student, teacher = pair(*lead, vocab, spread=case["spread"])
    hole = torch.rand(vocab, device=DEVICE) < case["holes"]
    hole[0] = False
    student[..., hole], teacher[..., hole] = -torch.inf, -torch.inf
    student = torch.nn.functional.pad(student, (0, s_extra), value=5.0).to(case["dtypes"][0])
    teacher = torch.nn.functional.pad(teacher, (0, t_extra), value=5.0).to(case["dtypes"][1])
    mask = torch.rand(lead, device=DEVICE) > 0.3 if case["mask"] else None
    labels = torch.randint(-1, 4, lead, device=DEVICE) if case["labels"] else None
    weight = torch.rand(lead, device=DEVICE) if case["weight"] else None
    shift = case["shift"] and len(lead) == 2
    t_s, t_t = case["temperatures"]
    normalizer = case["normalizer"] if case["reduction"] == "mean" else None
    student.requires_grad_()
    got = kl_gpu.divergence(
        student, teacher, kind, temperature=t_s, teacher_temperature=t_t, t_squared=case["t_squared"],
        mask=mask, labels=labels, ignore_index=-1, weight=weight, shift=shift, reduction=case["reduction"],
        normalizer=normalizer, vocab_size=vocab if s_extra or t_extra else None, backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(got.sum(), student)

    part = (slice(None), slice(None, -1)) if shift else (...,)
    later = (slice(None), slice(1, None)) if shift else (...,)
    s, t = to_numpy(student)[..., :vocab][part], to_numpy(teacher)[..., :vocab][part]
    options = {"temperature": t_s, "teacher_temperature": t_t}
    if kind in (
        "tv",
        "nla",
        "lk",
    ):  # its gradient jumps where p = q: on which side such a column lies, last bits say
        with np.errstate(invalid="ignore"):
            gap = np.abs(reference.log_softmax(s, t_s) - reference.log_softmax(t, t_t))
        assume(not ((gap < 1e-9) & (s != t).any(-1, keepdims=True)).any())
    factor = np.full(s.shape[:-1], t_s**2 if case["t_squared"] else 1.0)
    counts = np.ones(s.shape[:-1], bool)
    if mask is not None:
        counts &= mask.cpu().numpy()[later]
    if labels is not None:
        counts &= labels.cpu().numpy()[later] != -1
    factor = factor * counts * (1.0 if weight is None else to_numpy(weight)[later])
    divisor = {
        "none": 1.0,
        "sum": 1.0,
        "mean": normalizer or max(counts.sum(), 1),
        "batchmean": max(s.shape[0], 1) if s.ndim > 1 else 1,
    }[case["reduction"]]
    rows = reference.divergence(s, t, kind, **options) * factor / divisor
    want = rows if case["reduction"] == "none" else rows.sum()
    np.testing.assert_allclose(to_numpy(got), want, rtol=1e-5, atol=2e-12)
    want_gradient = np.zeros(student.shape)
    exact = reference.gradients(s, t, kind, **options)[0] * (factor / divisor)[..., None]
    want_gradient[..., :vocab][part] = exact
    rounding = 2.0**-8 if student.dtype == torch.bfloat16 else 1e-6
    largest = np.abs(exact).max(initial=0.0)
    np.testing.assert_allclose(
        to_numpy(gradient),
        want_gradient,
        rtol=rounding,
        atol=4e-6 * np.abs(factor / divisor).max(initial=0) / t_s,
    )
    assert largest == 0 or np.abs(to_numpy(gradient)).max() > 0

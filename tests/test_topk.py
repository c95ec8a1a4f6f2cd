"""topk_div: every tail and kind against the NumPy reference, its edges, and what each tail promises."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kl_gpu
from kl_gpu import reference
from kl_gpu.ops import complement as complement_ops
from kl_gpu.reference import topk as reference_topk
from kl_gpu.topk.formulas import RESOLUTION, TAIL_KINDS
from support import DEVICE, DTYPES, GRADIENT, RELATIVE, ROUNDING, TINY, is_slow, record, to_numpy

TAILS = [(tail, kind) for tail, kinds in TAIL_KINDS.items() for kind in kinds]
INF, NAN = float("inf"), float("nan")


def known(rows: int, columns: int, k: int, dtype: torch.dtype = torch.float32, spread: float = 0.7):
    """Student logits, and of a teacher near it the log-probabilities and ids of the K best tokens."""
    teacher = 3 * torch.randn(rows, columns, dtype=torch.float64, device=DEVICE)
    student = teacher + spread * torch.randn(rows, columns, dtype=torch.float64, device=DEVICE)
    logprobs, ids = teacher.log_softmax(-1).topk(k)
    return student.to(dtype), logprobs.to(dtype), ids


def check(
    student: Tensor, logprobs: Tensor, ids: Tensor, kind: str, tail: str, backend: str, where: str,
    **options: Any,
) -> None:  # fmt: skip
    """Value, gradient and masses.

    Relative 5e-6 of the value, beside what an error of 2e-7 in the student's remaining mass makes of it;
    elementwise 2e-6 of the larger probability for the gradient, as `divergence` promises.
    """
    leaf = student.detach().requires_grad_()
    value, teacher_mass, student_mass = kl_gpu.topk_div(
        leaf, logprobs, ids, kind, tail=tail, reduction="none", return_mass=True, backend=backend, **options
    )
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    rest = options.pop("teacher_tail_logprob", None)
    options.pop("validate", None)
    x, log_p, where_p = to_numpy(student), to_numpy(logprobs), ids.cpu().numpy()
    want, gradient, *masses = reference_topk.topk_div(
        x, log_p, where_p, kind, tail=tail, resolution=RESOLUTION[logprobs.dtype],
        teacher_tail_logprob=None if rest is None else to_numpy(rest), **options,
    )  # fmt: skip
    wide = student.dtype == logprobs.dtype == torch.float64
    assert value.dtype == (torch.float64 if wide else torch.float32)
    assert grad.dtype == student.dtype
    assert np.abs(gradient).max() > 1e-6, "nothing to compare"

    temperature = options.get("temperature", 1.0)
    inside = np.zeros((*x.shape[:-1], x.shape[-1] + 1), bool)
    present = (where_p >= 0) & (where_p < x.shape[-1])
    np.put_along_axis(inside, np.where(present, where_p, x.shape[-1]), True, -1)
    inside = inside[..., :-1]
    to_rest = np.where(inside, 0.0, gradient).sum(-1) * temperature
    bound = (1e-11 if wide else RELATIVE) * np.abs(want) + 2e-7 * np.abs(to_rest) + 1e-13
    share = (np.abs(to_numpy(value) - want) / bound).max()
    record("topk", backend, f"{tail}, {kind}", float(share), where)
    assert share <= 1, f"{share} of the value's bound at {where}"
    if tail != "truncate":
        assert (value >= 0).all(), where

    log_q = reference.log_softmax(x, 1.0)
    p = np.zeros((*x.shape[:-1], x.shape[-1] + 1))
    np.put_along_axis(p, np.where(present, where_p, x.shape[-1]), np.exp(log_p), -1)
    largest = np.maximum(np.maximum(p[..., :-1], np.exp(log_q)), np.abs(gradient))
    ratio = np.abs(np.log(np.maximum(p[..., :-1], 1e-300)) - log_q)
    ratio = np.where(inside & np.isfinite(ratio), ratio, 1.0)
    size = np.maximum(np.maximum(1.0, ratio), np.abs(want)[..., None])
    slack = np.abs(gradient) * ROUNDING[grad.dtype] + TINY[grad.dtype]
    share = ((np.abs(to_numpy(grad) - gradient) - slack) / (GRADIENT * largest * size / temperature)).max()
    record("gradient", backend, f"{tail}, {kind}", float(share), where)
    assert share <= 1, f"{share} of the gradient's bound at {where}"
    for got, mass in zip((teacher_mass, student_mass), masses, strict=True):
        np.testing.assert_allclose(to_numpy(got), mass, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 8, 64, 1000])
@pytest.mark.parametrize("tail", TAIL_KINDS)
def test_against_the_reference(backend: str, tail: str, k: int, dtype: torch.dtype) -> None:
    columns = 1001 if is_slow(backend) else 32003
    student, logprobs, ids = known(2, columns, k, dtype)
    kinds = TAIL_KINDS[tail]
    for kind in kinds[:1] if is_slow(backend) and k != 8 else kinds:
        # One token conditioned on itself has no divergence at all.
        if k == 1 and tail == "renormalize":
            continue
        check(student, logprobs, ids, kind, tail, backend, f"{tail} K={k} {dtype}")


@pytest.mark.parametrize("columns", [128256, 151936])
def test_large_vocabularies(backend: str, columns: int) -> None:
    if is_slow(backend):
        pytest.skip("the interpreter takes minutes")
    student, logprobs, ids = known(3, columns, 64, torch.bfloat16)
    for tail, kind in (("bucket", "forward_kl"), ("bucket", "reverse_kl"), ("generalized", "js")):
        check(student, logprobs, ids, kind, tail, backend, f"V={columns}")


@pytest.mark.parametrize(("tail", "kind"), TAILS)
def test_ragged_rows(backend: str, tail: str, kind: str) -> None:
    student, logprobs, ids = known(4, 700, 16)
    ids[0, 3:], ids[2, ::2], ids[3, 1:] = -1, -1, -1
    logprobs = torch.where(ids < 0, NAN, logprobs)  # never looked at
    if tail == "renormalize":
        ids[3, 1] = ids[3].max() - 1 if ids[3].max() > 0 else 5
        logprobs[3, 1] = -4.0
    check(student, logprobs, ids, kind, tail, backend, f"ragged {tail}")


@pytest.mark.parametrize("kind", TAIL_KINDS["renormalize"])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature(backend: str, kind: str, temperature: float) -> None:
    student, logprobs, ids = known(3, 900, 20)
    check(student, logprobs, ids, kind, "renormalize", backend, "temperature", temperature=temperature)
    value, scaled = (
        kl_gpu.topk_div(
            student, logprobs, ids, kind, tail="renormalize", temperature=temperature, t_squared=squared,
            backend=backend,
        )
        for squared in (False, True)
    )  # fmt: skip
    torch.testing.assert_close(scaled, value * temperature**2)


@pytest.mark.parametrize("kind", ["jeffreys", "js"])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.7, 1.0])
def test_beta(backend: str, kind: str, beta: float) -> None:
    student, logprobs, ids = known(2, 600, 12)
    check(student, logprobs, ids, kind, "bucket", backend, f"beta={beta}", beta=beta)


def test_a_given_rest_of_the_teacher(backend: str) -> None:
    student, logprobs, ids = known(3, 800, 10)
    rest = torch.log1p(-logprobs.double().exp().sum(-1)).float() - 0.3
    for kind in TAIL_KINDS["bucket"]:
        check(student, logprobs, ids, kind, "bucket", backend, "rest", teacher_tail_logprob=rest)


@pytest.mark.parametrize(("tail", "kind"), TAILS)
@pytest.mark.parametrize("columns", [1, 2, 50, 1024])
def test_all_of_the_vocabulary_is_the_dense_divergence(
    backend: str, tail: str, kind: str, columns: int
) -> None:
    if is_slow(backend) and columns == 1024 and tail != "bucket":
        pytest.skip("what differs between tails is not the backend's")
    # Four orders of magnitude of D; float64, since rounding the teacher would be a divergence of its own.
    for spread in (1.0, 1e-2):
        student, logprobs, ids = known(3, columns, columns, torch.float64, spread)
        ids = ids[:, torch.randperm(columns, device=DEVICE)]
        teacher = torch.zeros_like(student).scatter(-1, ids, logprobs)
        want = reference.divergence(to_numpy(student), to_numpy(teacher), kind)
        got = kl_gpu.topk_div(
            student, logprobs, ids, kind, tail=tail, reduction="none", return_mass=True, backend=backend
        )
        np.testing.assert_allclose(to_numpy(got[0]), want, rtol=RELATIVE, atol=1e-13)
        np.testing.assert_allclose(to_numpy(got[2]), 1, rtol=1e-14)


@pytest.mark.parametrize("kind", TAIL_KINDS["bucket"])
def test_bucket_grows_to_the_dense_value(backend: str, kind: str) -> None:
    columns = 400
    student, logprobs, ids = known(2, columns, columns, torch.float64)
    teacher = torch.zeros_like(student).scatter(-1, ids, logprobs)
    dense = torch.from_numpy(reference.divergence(to_numpy(student), to_numpy(teacher), kind)).to(DEVICE)
    before = torch.zeros_like(dense)
    for k in (1, 4, 16, 64, 256, columns - 1):
        rest = logprobs[:, k:].logsumexp(-1)
        got = kl_gpu.topk_div(
            student, logprobs[:, :k], ids[:, :k], kind, teacher_tail_logprob=rest, reduction="none",
            backend=backend,
        )  # fmt: skip
        # Splitting the bucket can only add (data processing inequality).
        assert (got >= before).all()
        assert (got <= dense * (1 + 1e-12)).all()
        before = got
    torch.testing.assert_close(before, dense, rtol=1e-12, atol=0)


def test_the_rest_is_summed_not_subtracted(backend: str) -> None:
    # The ids hold all but 1e-30 of the student's mass: 1 − Σ q is 0 or noise.
    student = torch.full((2, 600), -70.0, device=DEVICE)
    student[:, :3] = torch.tensor([1.0, 0.5, 0.0], device=DEVICE)
    logprobs = torch.tensor([[-0.5, -1.2, -3.0]] * 2, device=DEVICE)
    ids = torch.arange(3, device=DEVICE).expand(2, 3)
    for kind in ("forward_kl", "reverse_kl"):
        check(student, logprobs, ids, kind, "bucket", backend, "tiny rest")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_teacher_whose_probabilities_round_to_one(backend: str, dtype: torch.dtype) -> None:
    # In 16 and 32 bits Σ p is 1, or a little more: the rest of the vocabulary must not become impossible.
    student, logprobs, ids = known(64, 300, 4, torch.float64)
    logprobs = (logprobs - logprobs.logsumexp(-1, keepdim=True)).to(dtype)
    for kind in ("reverse_kl", "js"):
        value = kl_gpu.topk_div(student.float(), logprobs, ids, kind, reduction="none", backend=backend)
        assert torch.isfinite(value).all()
        assert (value >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tail", "kind"), TAILS)
def test_a_teacher_that_is_certain(backend: str, tail: str, kind: str, dtype: torch.dtype) -> None:
    """Programs that work in float32 give log p = 0 to what is within 2^-24 of certain, or a little above."""
    if tail == "renormalize":
        pytest.skip("needs two tokens to compare, as below")
    student = torch.randn(6, 256, device=DEVICE).to(dtype)
    logprobs = torch.tensor([0.0, -0.0, 1e-3, 1e-7, 0.04, -1e-7], device=DEVICE).to(dtype)[:, None]
    ids = torch.tensor([3, 250, 7, 8, 9, 10], device=DEVICE)[:, None]
    check(student, logprobs, ids, kind, tail, backend, f"certain, {dtype}")
    # The rest is 2^-24 at the least: log Q/P of at most log 2^24 (2^53), never an infinity.
    value = kl_gpu.topk_div(student[:2], logprobs[:2], ids[:2], kind, tail=tail, backend=backend)
    assert 0 < value < (38 if dtype == torch.float64 else 18)


@pytest.mark.parametrize(("tail", "kind"), TAILS)
def test_a_list_that_sums_to_one_or_more(backend: str, tail: str, kind: str) -> None:
    student, logprobs, ids = known(6, 300, 4)
    logprobs[0] = torch.tensor([0.0, -20.0, -21.0, -30.0])
    logprobs[1] = torch.tensor([0.0, -INF, -40.0, -45.0])
    logprobs[2] = torch.tensor([0.0, -4.0, -4.5, -5.0])  # 1.036
    logprobs[3] = torch.tensor([0.03, -9.0, -11.0, -12.0])
    logprobs[4] = torch.tensor([-0.5, -0.9, -9.0, -9.0])  # 1.013
    logprobs[5] = torch.tensor([-1.1920929e-07, -16.2, -17.0, -17.0])
    if kind in ("reverse_kl", "jeffreys"):
        logprobs[1, 1] = -50.0  # a token of probability 0 makes them infinite
    check(student, logprobs, ids, kind, tail, backend, "past one")


@pytest.mark.parametrize("kind", TAIL_KINDS["bucket"])
def test_a_rest_that_is_well_determined_stays(backend: str, kind: str) -> None:
    # 20 to 60 nats peaked, from a softmax that was not computed as a difference.
    student = torch.randn(3, 256, device=DEVICE)
    student[:, 3] += 12
    rest = torch.tensor([-20.0, -40.0, -60.0], device=DEVICE, dtype=torch.float64)
    logprobs, ids = (-rest.exp()).float()[:, None], torch.full((3, 1), 3, device=DEVICE)
    plain, given = (
        kl_gpu.topk_div(
            student, logprobs, ids, kind, teacher_tail_logprob=x, reduction="none", backend=backend
        )
        for x in (None, torch.log(-torch.expm1(logprobs.double()[:, 0])))
    )
    assert (plain > 0).all()
    torch.testing.assert_close(plain, given, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", TAIL_KINDS["bucket"])
@pytest.mark.parametrize("logprob", [0.0, 1e-3, -1e-9])
def test_no_rest_of_rounding_where_the_student_has_none(backend: str, kind: str, logprob: float) -> None:
    # Both sides know one token only, as under a grammar: nothing to learn, and no infinity.
    student = torch.full((2, 256), -INF, device=DEVICE)
    student[:, 3] = 2.0
    ids = torch.full((2, 1), 3, device=DEVICE)
    logprobs = torch.full((2, 1), logprob, device=DEVICE)
    leaf = student.requires_grad_()
    value = kl_gpu.topk_div(leaf, logprobs, ids, kind, reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    if logprob < 0 and kind != "reverse_kl":  # a rest that the teacher does state
        assert kind == "js" or (value == INF).all()
        return
    assert (value >= 0).all()
    assert (value < 1e-6).all()
    assert (grad.abs() < 1e-6).all()


PADDED = [(tail, kind, validate) for tail, kind in TAILS for validate in (False, True)]


@pytest.mark.parametrize(("tail", "kind", "validate"), PADDED)
def test_padding_of_other_programs(backend: str, tail: str, kind: str, validate: bool) -> None:
    """(0, −inf), several times in a row, or −100: the absence that −1 states, bit by bit, gradients too."""
    student, logprobs, ids = known(5, 300, 6)
    ids[0, 0], ids[1, 0] = 0, 250  # token 0 itself among the ids, and not
    absent = torch.zeros_like(ids, dtype=torch.bool)
    absent[0, 3:], absent[1, 4:], absent[2, 1::2], absent[3] = True, True, True, True
    found = []
    for filler, log_filler in ((-1, NAN), (0, -INF), (-100, NAN)):
        leaf = student.clone().requires_grad_()
        value, *masses = kl_gpu.topk_div(
            leaf, torch.where(absent, log_filler, logprobs), torch.where(absent, filler, ids), kind,
            tail=tail, reduction="none", validate=validate, return_mass=True, backend=backend,
        )  # fmt: skip
        found.append((value, *masses, *torch.autograd.grad(value[[0, 1, 2, 4]].sum(), leaf)))
    for want, *others in zip(*found, strict=True):
        for got in others:
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    value, *_, grad = found[1]
    # A row without any entry says nothing.
    assert torch.isnan(value[3]) if tail in ("renormalize", "student_full") else value[3] == 0
    assert grad[[0, 1, 2, 4]].abs().amax(-1).min() > 1e-3
    logprobs, ids = torch.where(absent, -INF, logprobs)[:3], torch.where(absent, 0, ids)[:3]
    check(student[:3], logprobs, ids, kind, tail, backend, "padded")


def test_a_single_entry_without_probability_stays(backend: str) -> None:
    # One (0, −inf) says that token 0 has probability 0; two say nothing.
    student, logprobs, ids = known(2, 300, 4)
    ids[ids == 0] = 299
    ids[0, 3], ids[1, 2:] = 0, 0
    logprobs[0, 3], logprobs[1, 2:] = -INF, -INF
    value = kl_gpu.topk_div(student, logprobs, ids, "reverse_kl", reduction="none", backend=backend)
    assert torch.isinf(value).tolist() == [True, False]


@pytest.mark.parametrize("given", [NAN, 0.1, 5.0, INF])
def test_an_impossible_rest_of_the_teacher(backend: str, given: float) -> None:
    student, logprobs, ids = known(4, 300, 8)
    rest = torch.log1p(-logprobs.double().exp().sum(-1)).float()
    rest[2] = given
    run = {"teacher_tail_logprob": rest, "reduction": "none", "backend": backend, "validate": True}
    with pytest.raises(ValueError, match=r"teacher_tail_logprob.*(nan|inf|\d\.\d)"):
        kl_gpu.topk_div(student, logprobs, ids, **run)
    mask = torch.arange(4, device=DEVICE) != 2
    value = kl_gpu.topk_div(student, logprobs, ids, mask=mask, **run)
    assert (value[mask] > 0).all()
    # Where the ids are all columns there is no rest, whatever was given.
    logprobs, ids = student.log_softmax(-1).topk(300)
    assert (kl_gpu.topk_div(student, logprobs, ids, **run) < 1e-9).all()


@pytest.mark.parametrize("given", [-INF, -30.0, 0.01])
def test_rests_of_the_teacher_that_are_taken_as_given(backend: str, given: float) -> None:
    # With P = −30 the list sums to less than 1: the value is that of two measures, and not below 0.
    student, logprobs, ids = known(3, 300, 8)
    rest = torch.full((3,), given, device=DEVICE)
    if given > 0:
        ids[:, 1:], logprobs[:, 0] = -1, -9.0
    check(student, logprobs, ids, "forward_kl", "bucket", backend, "given", teacher_tail_logprob=rest)


@pytest.mark.parametrize(("tail", "kind"), TAILS)
def test_minus_infinity(backend: str, tail: str, kind: str) -> None:
    """Per row: student −inf at an id, teacher −inf at an id, both, and −inf elsewhere in the student."""
    student, logprobs, ids = known(5, 400, 8)
    student[0, ids[0, 1]] = -INF
    logprobs[1, 2] = -INF
    student[2, ids[2, 3]], logprobs[2, 3] = -INF, -INF
    student[3, (ids[3, 0] + 1) % 400] = -INF if (ids[3, 0] + 1) % 400 not in ids[3] else 0.0
    leaf = student.requires_grad_()
    value = kl_gpu.topk_div(leaf, logprobs, ids, kind, tail=tail, reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    want, gradient, *_ = reference_topk.topk_div(
        to_numpy(student), to_numpy(logprobs), ids.cpu().numpy(), kind, tail=tail, resolution=2.0**-24
    )
    np.testing.assert_allclose(to_numpy(value), want, rtol=2e-5)
    assert np.isinf(want[:2]).any() == (kind != "js")
    assert np.isfinite(want[2:]).all()
    np.testing.assert_allclose(to_numpy(grad), gradient, rtol=2e-5, atol=1e-7)
    if kind in ("reverse_kl", "jeffreys"):
        assert torch.isnan(grad[1]).all()
    assert torch.isfinite(grad[2:]).all()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("at_an_id", [True, False])
def test_nan_in_its_row_only(backend: str, bad: float, at_an_id: bool) -> None:
    student, logprobs, ids = known(3, 500, 6)
    column = ids[1, 0] if at_an_id else next(c for c in range(500) if c not in ids[1])
    student[1, column] = bad
    for tail, kind in (("bucket", "forward_kl"), ("bucket", "js"), ("generalized", "reverse_kl")):
        leaf = student.detach().requires_grad_()
        value = kl_gpu.topk_div(leaf, logprobs, ids, kind, tail=tail, reduction="none", backend=backend)
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        assert torch.isnan(value).tolist() == [False, True, False]
        assert torch.isnan(grad).any(-1).tolist() == [False, True, False]
        assert torch.isnan(grad[1]).all()


def test_rows_without_a_distribution(backend: str) -> None:
    student, logprobs, ids = known(3, 300, 4)
    student[0] = -INF
    ids[1] = -1
    value = kl_gpu.topk_div(student, logprobs, ids, reduction="none", backend=backend)
    assert torch.isnan(value[0])
    assert value[1] == 0  # one outcome, of probability 1 on both sides
    for tail in ("renormalize", "student_full"):
        value = kl_gpu.topk_div(student, logprobs, ids, tail=tail, reduction="none", backend=backend)
        assert torch.isnan(value).tolist() == [True, True, False]


def test_rows_that_do_not_count(backend: str) -> None:
    student, logprobs, ids = known(6, 300, 4)
    labels = torch.tensor([1, -100, 2, -100, 3, 4], device=DEVICE)
    mask = torch.tensor([True, True, False, True, True, True], device=DEVICE)
    student[1], logprobs[2], ids[3] = NAN, NAN, 0  # padding: nothing in it matters, not even the ids
    weight = torch.rand(6, device=DEVICE)
    leaf = student.requires_grad_()
    counts = mask & (labels != -100)
    plain = kl_gpu.topk_div(student[counts], logprobs[counts], ids[counts], reduction="none", backend=backend)
    options = {"mask": mask, "labels": labels, "backend": backend, "return_mass": True}
    value, teacher_mass, student_mass = kl_gpu.topk_div(leaf, logprobs, ids, reduction="none", **options)
    assert torch.equal(value[counts], plain)
    for x in (value, teacher_mass, student_mass):
        assert (x[~counts] == 0).all()
        assert (x[counts] > 0).all()
    mean, *_ = kl_gpu.topk_div(leaf, logprobs, ids, weight=weight, **options)
    torch.testing.assert_close(mean, (plain * weight[counts]).sum() / 3)
    total, *_ = kl_gpu.topk_div(leaf, logprobs, ids, normalizer=7.0, **options)
    torch.testing.assert_close(total, plain.sum() / 7)
    (grad,) = torch.autograd.grad(mean, leaf)
    assert (grad[~counts] == 0).all()
    assert (grad[counts].abs().sum(-1) > 0).all()
    nothing, *_ = kl_gpu.topk_div(leaf, logprobs, ids, **options | {"mask": torch.zeros_like(mask)})
    assert nothing == 0
    assert (torch.autograd.grad(nothing, leaf)[0] == 0).all()


def test_shift_and_vocab_size(backend: str) -> None:
    student, logprobs, ids = (x.view(2, 5, -1) for x in known(10, 300, 4))
    padded = torch.full((2, 5, 310), NAN, device=DEVICE)
    padded[..., :300] = student
    labels = torch.randint(0, 3, (2, 5), device=DEVICE)
    leaf = padded.requires_grad_()
    options = {"reduction": "none", "backend": backend}
    got = kl_gpu.topk_div(
        leaf, logprobs, ids, labels=labels, ignore_index=0, shift=True, vocab_size=300, **options
    )
    want = kl_gpu.topk_div(student[:, :-1], logprobs[:, :-1], ids[:, :-1], **options)
    assert torch.equal(got, torch.where(labels[:, 1:] == 0, 0, want))
    (grad,) = torch.autograd.grad(got.sum(), leaf)
    assert torch.isfinite(grad).all()
    assert (grad[:, -1] == 0).all()
    assert (grad[..., 300:] == 0).all()
    assert grad.abs().max() > 1e-3


@pytest.mark.parametrize(("tail", "kind"), TAILS)
def test_gradcheck(backend: str, tail: str, kind: str) -> None:
    student, logprobs, ids = known(2, 12, 4, torch.float64)
    ids[0, 2] = -1
    leaf = student.requires_grad_()

    def value(x: Tensor) -> Tensor:
        return kl_gpu.topk_div(x, logprobs, ids, kind, tail=tail, reduction="none", backend=backend)

    assert torch.autograd.gradcheck(value, leaf)
    (grad,) = torch.autograd.grad(value(leaf).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.sum().backward()


def test_reference_gradient_is_that_of_its_value() -> None:
    rng = np.random.default_rng(0)
    teacher, student = rng.standard_normal((2, 1, 9))
    log_p = reference.log_softmax(teacher)[:, :3]
    ids = np.array([[0, 1, 2]])
    for tail, kind in TAILS:
        options = {"tail": tail, "temperature": 1.7 if tail == "renormalize" else 1.0}
        _, gradient, *_ = reference_topk.topk_div(student, log_p, ids, kind, **options)
        for j in range(9):
            step = np.zeros_like(student)
            step[0, j] = 1e-6
            up, down = (
                reference_topk.topk_div(student + s, log_p, ids, kind, **options)[0] for s in (step, -step)
            )
            assert gradient[0, j] == pytest.approx((up - down)[0] / 2e-6, abs=1e-8)


@pytest.mark.parametrize("split", [False, True])
def test_ids_outside_never_read_memory(backend: str, split: bool) -> None:
    student, _, _ = known(1 if split else 3, 900, 4)
    ids = torch.tensor([5, 900, -7, 2**40, -(2**62), 899, 2**31 + 5, -1], device=DEVICE)
    ids = ids.expand(len(student), 8)
    given = complement_ops.picked_logits(student, ids, None, False, "teacher_ids")
    assert torch.equal(torch.isneginf(given), (ids < 0) | (ids >= 900))
    rest, _, stats = complement_ops.complement(student, ids, None, 1.0, False, backend)
    left = student.double()
    left[:, [5, 899]] = -INF
    torch.testing.assert_close(rest, left.logsumexp(-1), rtol=1e-6, atol=0)
    grad = torch.empty_like(student)
    flows = torch.ones_like(given), torch.zeros_like(rest)
    complement_ops.complement_gradient(student, ids, None, stats, *flows, None, 1.0, backend, grad)
    assert grad.sum(-1).tolist() == [2] * len(student)


@pytest.mark.parametrize("tail", TAIL_KINDS)
def test_the_same_bits_alone_and_among_others(backend: str, tail: str) -> None:
    student, logprobs, ids = known(23, 2100 if is_slow(backend) else 70001, 33)

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        leaf = student[rows].detach().requires_grad_()
        value = kl_gpu.topk_div(leaf, logprobs[rows], ids[rows], tail=tail, reduction="none", backend=backend)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    alone = run(slice(11, 12))
    for start, stop in ((0, 23), (11, 23), (9, 13), (11, 12)):
        among = run(slice(start, stop))
        assert all(torch.equal(x[0], y[11 - start]) for x, y in zip(alone, among, strict=True))


def test_views_are_read_as_they_lie(backend: str) -> None:
    base = torch.randn(3, 6, 410, device=DEVICE)
    _, logprobs, ids = known(6, 400, 5)
    logprobs, ids = logprobs.view(3, 2, 5), ids.view(3, 2, 5)
    for view in (
        base[:, 1::4, 3:403],
        base[:, :1, 5:405].expand(3, 2, 400),
        base[..., :400].transpose(0, 1)[:2].transpose(0, 1),
    ):
        got = kl_gpu.topk_div(view, logprobs, ids, reduction="none", backend=backend)
        assert torch.equal(
            got, kl_gpu.topk_div(view.clone(), logprobs, ids, reduction="none", backend=backend)
        )
    flipped = torch.randn(400, 3, 2, device=DEVICE).permute(1, 2, 0)
    leaf = flipped.detach().requires_grad_()
    value = kl_gpu.topk_div(
        leaf, logprobs.transpose(-1, -2).contiguous().transpose(-1, -2), ids.int(), backend=backend
    )
    torch.testing.assert_close(value, kl_gpu.topk_div(flipped.contiguous(), logprobs, ids, backend=backend))
    assert torch.autograd.grad(value, leaf)[0].abs().max() > 1e-3


def test_no_rows(backend: str) -> None:
    student, logprobs, ids = (x[:0] for x in known(2, 50, 3))
    leaf = student.requires_grad_()
    assert kl_gpu.topk_div(leaf, logprobs, ids, reduction="none", backend=backend).shape == (0,)
    value = kl_gpu.topk_div(leaf, logprobs, ids, backend=backend)
    assert value == 0
    assert torch.autograd.grad(value, leaf)[0].shape == (0, 50)


@pytest.mark.parametrize("tail", TAIL_KINDS)
def test_inplace_writes_the_gradient_over_the_logits(backend: str, tail: str) -> None:
    source, logprobs, ids = known(5, 2100, 8)

    def run(logits: Tensor, **options: Any) -> Any:
        return kl_gpu.topk_div(logits, logprobs, ids, tail=tail, return_mass=True, backend=backend, **options)

    want, *masses = run(apart := source.clone().requires_grad_())
    (want,) = torch.autograd.grad(want, apart)
    assert want.abs().amax(-1).min() > 1e-3
    logits = source.clone().requires_grad_() * 1
    loss, *found = run(logits, inplace=True)
    assert all(map(torch.equal, masses, found))
    # Asks autograd for the very tensor our backward returned.
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    assert torch.equal(gradient, want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_one_graph(backend: str, tail: str) -> None:
    torch.compiler.reset()

    def loss(student: Tensor, logprobs: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return kl_gpu.topk_div(student, logprobs, ids, tail=tail, mask=mask, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows in (3, 5):
        student, logprobs, ids = known(rows, 90, 4)
        student.requires_grad_()
        mask = torch.arange(rows, device=DEVICE) != 1
        plain, traced = (f(student, logprobs, ids, mask) for f in (loss, compiled))
        torch.testing.assert_close(traced, plain, rtol=1e-6, atol=0)
        want, got = (torch.autograd.grad(x, student)[0] for x in (plain, traced))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
        assert want.abs().max() > 1e-4
    with pytest.raises(ValueError, match="teacher_ids"):
        compiled(student, logprobs, ids + 90, mask)
    padded, filled = ids.clone(), logprobs.clone()
    padded[:, 2:], filled[:, 2:] = 0, -INF
    torch.testing.assert_close(
        compiled(student, filled, padded, mask), loss(student, logprobs[:, :2], ids[:, :2], mask)
    )


def test_one_graph_asks_for_the_rest_of_the_teacher() -> None:
    torch.compiler.reset()

    def loss(student: Tensor, logprobs: Tensor, ids: Tensor, rest: Tensor) -> Tensor:
        return kl_gpu.topk_div(student, logprobs, ids, teacher_tail_logprob=rest, validate=True)

    compiled = torch.compile(loss, fullgraph=True)
    student, logprobs, ids = known(3, 90, 4)
    rest = torch.log1p(-logprobs.double().exp().sum(-1))
    torch.testing.assert_close(
        compiled(student, logprobs, ids, rest), loss(student, logprobs, ids, rest), rtol=1e-6, atol=0
    )
    rest[1] = NAN
    with pytest.raises(ValueError, match=r"teacher_tail_logprob.*nan"):
        compiled(student, logprobs, ids, rest)


@pytest.mark.parametrize("with_rows", [False, True])
def test_opcheck(backend: str, with_rows: bool) -> None:
    student, logprobs, ids = (x.view(2, 3, -1) for x in known(6, 70, 5))
    rows = torch.rand(2, 3, device=DEVICE) > 0.5 if with_rows else None
    torch.library.opcheck(torch.ops.kl_gpu.given_columns.default, (student, ids, rows, True, "teacher_ids"))
    torch.library.opcheck(torch.ops.kl_gpu.check_mass.default, (logprobs.double(), rows, "teacher"))
    torch.library.opcheck(
        torch.ops.kl_gpu.check_tail.default, (logprobs[..., 0].double() - 9, logprobs.double(), rows)
    )
    padded = torch.where(ids % 2 == 0, 0, ids), torch.where(ids % 2 == 0, -INF, logprobs)
    for entries in ((ids, logprobs), padded):
        torch.library.opcheck(torch.ops.kl_gpu.without_padding.default, (*entries, 70))
    arguments = (student, ids, rows, 0.5, True, backend)
    torch.library.opcheck(torch.ops.kl_gpu.remainder.default, arguments)
    *_, stats = complement_ops.complement(*arguments)
    to_given, flow = torch.rand(2, 3, 5, device=DEVICE).double(), torch.rand(2, 3, device=DEVICE).double()
    for to_entropy in (None, flow):
        grad = torch.empty_like(student)
        torch.library.opcheck(
            torch.ops.kl_gpu.remainder_gradient.default,
            (student, ids, rows, stats, to_given, flow, to_entropy, 0.5, backend, grad),
        )


@pytest.mark.parametrize("tail", TAIL_KINDS)
def test_opcheck_of_the_formulas(tail: str) -> None:
    given, log_p = torch.randn(2, 3, 5, device=DEVICE).double(), torch.randn(2, 3, 5, device=DEVICE).double()
    rest, has_rest = torch.randn(2, 3, device=DEVICE).double(), torch.ones(2, 3, device=DEVICE).bool()
    log_p = (log_p - 3).clamp_max(-2)
    for rest_log_p in (None, rest - 4):
        arguments = (given, rest, log_p, rest_log_p, has_rest, "forward_kl", 0.0, tail, 1.0, 2.0**-24)
        torch.library.opcheck(torch.ops.kl_gpu.topk.default, arguments)
    torch.library.opcheck(torch.ops.kl_gpu.token.default, (given[..., 0], rest, rest.abs()))
    torch.library.opcheck(torch.ops.kl_gpu.tokens.default, (given, rest, rest.abs()))
    found = torch.ops.kl_gpu.tokens.default(given, rest, rest.abs())
    torch.library.opcheck(torch.ops.kl_gpu.tokens_gradient.default, (given.exp(), rest, *found))


class _Largest(TorchDispatchMode):
    """The sizes of what operations return, largest first."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace != "kl_gpu":
            tensors = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]
            inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
            new = (x for x in tensors if x.untyped_storage().data_ptr() not in inputs)
            self.bytes += [x.untyped_storage().nbytes() for x in new]
        return out


def test_nothing_of_the_logits_size_but_the_gradient() -> None:
    student, logprobs, ids = known(200, 4000, 8)
    leaf = student.requires_grad_()
    with _Largest() as seen:
        value = kl_gpu.topk_div(leaf, logprobs, ids)
        torch.autograd.grad(value, leaf)
    largest = sorted(seen.bytes)[::-1]
    assert largest[0] == leaf.nbytes
    assert largest[1] <= 200 * 9 * 8


S, P, I = torch.zeros(2, 3, 8), torch.full((2, 3, 2), -2.0), torch.tensor([0, 5]).expand(2, 3, 2)  # noqa: E741
LEAF = S.clone().requires_grad_()
# (what is wrong, arguments that replace the good ones, exception, what the message must name)
CASES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("student a list", {"student_logits": [0.0]}, TypeError, "student_logits.*tensor.*list"),
    ("integer student", {"student_logits": S.long()}, TypeError, "student_logits.*int64"),
    ("ids float", {"teacher_ids": I.float()}, TypeError, "teacher_ids.*integer.*float32"),
    ("ids of another N", {"teacher_ids": I[:1]}, ValueError, r"teacher_ids.*\(2, 3\).*\(1, 3, 2\)"),
    ("ids without K", {"teacher_ids": I[..., 0]}, ValueError, r"teacher_ids.*\[N, K\].*\(2, 3\)"),
    (
        "K = 0",
        {"teacher_ids": I[..., :0], "teacher_logprobs": P[..., :0]},
        ValueError,
        "teacher_ids.*at least 1",
    ),
    ("ids elsewhere", {"teacher_ids": I.to("meta")}, ValueError, "teacher_ids.*cpu.*meta"),
    ("logprobs of another K", {"teacher_logprobs": P[..., :1]}, ValueError, r"teacher_logprobs.*\(2, 3, 1\)"),
    ("logprobs int", {"teacher_logprobs": I}, TypeError, "teacher_logprobs.*int64"),
    ("logprobs elsewhere", {"teacher_logprobs": P.to("meta")}, ValueError, "teacher_logprobs.*meta"),
    (
        "logprobs with a gradient",
        {"teacher_logprobs": P.clone().requires_grad_()},
        ValueError,
        "teacher_logprobs.*detach",
    ),
    (
        "logits for logprobs",
        {"teacher_logprobs": -P},
        ValueError,
        "teacher_logprobs.*log-probabilities.*14.7",
    ),
    ("tail unknown", {"tail": "drop"}, ValueError, "tail.*'bucket'.*'drop'"),
    ("tail None", {"tail": None}, TypeError, "tail.*string"),
    ("kind unknown", {"kind": "kl"}, ValueError, "kind.*'kl'"),
    (
        "kind without such a tail",
        {"kind": "reverse_kl", "tail": "truncate"},
        ValueError,
        "kind.*'forward_kl'.*truncate.*reverse_kl",
    ),
    ("kind without a tail", {"kind": "tv"}, ValueError, "kind.*bucket.*'tv'"),
    ("temperature with bucket", {"temperature": 2.0}, ValueError, "temperature.*renormalize.*2.0.*bucket"),
    ("temperature 0", {"temperature": 0.0}, ValueError, "temperature.*> 0"),
    ("beta of none", {"beta": 0.5}, ValueError, "beta.*forward_kl"),
    (
        "rest of another tail",
        {"teacher_tail_logprob": P[..., 0], "tail": "truncate"},
        ValueError,
        "teacher_tail_logprob.*bucket.*truncate",
    ),
    ("rest of a wrong shape", {"teacher_tail_logprob": P}, ValueError, r"teacher_tail_logprob.*\(2, 3\)"),
    ("rest int", {"teacher_tail_logprob": I[..., 0]}, TypeError, "teacher_tail_logprob.*int64"),
    (
        "rest with a gradient",
        {"teacher_tail_logprob": P[..., 0].clone().requires_grad_()},
        ValueError,
        "teacher_tail_logprob.*detach",
    ),
    ("id past V", {"teacher_ids": I + 3}, ValueError, r"teacher_ids.*\[0, 8\).*8"),
    ("id past vocab_size", {"vocab_size": 5}, ValueError, r"teacher_ids.*\[0, 5\).*5"),
    ("id −2", {"teacher_ids": I - 2}, ValueError, r"teacher_ids.*\[0, 8\).*-2"),
    ("id given twice", {"teacher_ids": I * 0 + 4}, ValueError, "teacher_ids.*different.*4 twice.*id -1"),
    (
        "id given twice, once without probability",
        {
            "teacher_ids": torch.tensor([4, 4, 4]).expand(2, 3, 3),
            "teacher_logprobs": torch.tensor([-2.0, -INF, -2.0]).expand(2, 3, 3),
        },
        ValueError,
        "teacher_ids.*4 twice",
    ),
    (
        "padding outside the vocabulary",
        {"teacher_ids": I * 0 + 8, "teacher_logprobs": torch.full_like(P, -INF)},
        ValueError,
        r"teacher_ids.*\[0, 8\).*8",
    ),
    (
        "rest a NaN",
        {"teacher_tail_logprob": torch.full_like(P[..., 0], NAN)},
        ValueError,
        "teacher_tail_logprob.*nan",
    ),
    (
        "rest past one",
        {"teacher_tail_logprob": torch.zeros_like(P[..., 0])},
        ValueError,
        "teacher_tail_logprob.*1.27067",
    ),
    ("vocab_size past V", {"vocab_size": 9}, ValueError, r"vocab_size.*\[1, 8\].*9"),
    ("mask float", {"mask": S[..., 0]}, TypeError, "mask.*bool"),
    ("weight of a wrong shape", {"weight": S}, ValueError, "weight"),
    (
        "shift of 2-D",
        {"student_logits": S[0], "teacher_logprobs": P[0], "teacher_ids": I[0], "shift": True},
        ValueError,
        "shift.*batch",
    ),
    ("reduction unknown", {"reduction": "avg"}, ValueError, "reduction.*'avg'"),
    ("normalizer with sum", {"reduction": "sum", "normalizer": 2.0}, ValueError, "normalizer.*sum"),
    ("inplace an int", {"inplace": 1}, TypeError, "inplace.*True or False"),
    ("inplace on a leaf", {"student_logits": LEAF, "inplace": True}, ValueError, "inplace.*student.*leaf"),
    ("validate an int", {"validate": 1}, TypeError, "validate.*True or False"),
    ("return_mass an int", {"return_mass": 1}, TypeError, "return_mass.*True or False"),
    ("backend unknown", {"backend": "cuda"}, ValueError, "backend.*cuda"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_refused(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a kernel was started")

    monkeypatch.setattr(complement_ops, "complement", refuse)
    call = {"student_logits": S, "teacher_logprobs": P, "teacher_ids": I}
    with pytest.raises(AssertionError, match="started"):
        kl_gpu.topk_div(**call)
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        kl_gpu.topk_div(**call | arguments)


def known_tails() -> Iterator[tuple[int, list[float]]]:
    """Per K: the probability of the ids, the dense forward KL, and each tail's value."""
    generator = torch.Generator().manual_seed(5)
    teacher = 3 * torch.randn(1, 1000, generator=generator, dtype=torch.float64)
    student = teacher + 0.5 * torch.randn(1, 1000, generator=generator, dtype=torch.float64)
    dense = kl_gpu.kl_div(student, teacher, backend="eager").item()
    for k in (1, 8, 64, 1000):
        logprobs, ids = teacher.log_softmax(-1).topk(k)
        values = [
            kl_gpu.topk_div(student, logprobs, ids, tail=tail, backend="eager").item() for tail in TAIL_KINDS
        ]
        yield k, [logprobs.exp().sum().item(), dense, *values]


def test_the_page_states_what_the_tails_give() -> None:
    page = (Path(__file__).parent.parent / "docs" / "offline-distillation.md").read_text()
    for k, figures in known_tails():
        assert f"| {k} | " + " | ".join(f"{x:.4f}" for x in figures) + " |" in page


@pytest.mark.parametrize("tail", ["bucket", "student_full", "renormalize"])
def test_logits_past_2_to_24(backend: str, tail: str) -> None:
    """In units of ln 2, float32 logits lie a nat apart there; the rest is summed from differences."""
    student = 1.3e7 + torch.randint(-3, 1, (3, 300), device=DEVICE).float()
    _, logprobs, ids = known(3, 300, 5)
    student.scatter_(1, ids, 1.3e7 + torch.randint(0, 4, (3, 5), device=DEVICE).float())
    check(student, logprobs, ids, "forward_kl", tail, backend, "past 2^24")

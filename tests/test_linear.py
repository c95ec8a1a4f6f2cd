"""linear_div against the reference on explicit logits, and in the places where a training step puts it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kl_gpu
from kl_gpu.linear import accumulate, chunks, op
from kl_gpu.linear import heads as of_heads
from linear_heads import Heads, check, expected, heads
from support import DEVICE, is_slow, to_numpy

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias, mask, sum": {"bias": True, "mask": True, "reduction": "sum"},
    "labels, shift, batchmean": {"labels": True, "shift": True, "reduction": "batchmean", "chunk_rows": 3},
    "mask and labels, none": {"mask": True, "labels": True, "reduction": "none", "bias": True},
    "weight, normalizer": {"weight": True, "normalizer": 7.0, "chunk_rows": 4},
    "temperatures": {"temperature": 2.0, "teacher_temperature": 1.5, "logit_scale": 0.5, "reduction": "none"},
    "t_squared": {"temperature": 2.0, "t_squared": True, "teacher_logit_scale": 0.25, "chunk_rows": 1},
    "capped": {"softcap": 4.0, "teacher_softcap": 5.0, "logit_scale": 2.0, "bias": True, "chunk_rows": 7},
    "student capped, none": {"softcap": 3.0, "mask": True, "reduction": "none", "temperature": 2.0},
    "teacher capped": {"teacher_softcap": 3.0, "teacher_logit_scale": 0.5, "labels": True, "shift": True},
    "unequal V": {"columns": (60, 67), "vocab_size": 57, "bias": True, "chunk_rows": 4},
}
SLOW = ("labels, shift, batchmean", "capped")


def _options(case: dict[str, Any], given: Heads) -> tuple[dict[str, Any], np.ndarray]:
    """The call's options, and the factor of each row in the sum of its result."""
    lead = tuple(given.student_hidden.shape[:-1])
    options = {k: v for k, v in case.items() if k not in ("bias", "columns")}
    later = (slice(None), slice(1, None)) if case.get("shift") else ()
    factor = np.ones(lead)[later]
    counts = np.ones(lead, bool)[later]
    if case.get("mask"):
        options["mask"] = torch.rand(lead, device=DEVICE) > 0.4
        counts &= to_numpy(options["mask"])[later].astype(bool)
    if case.get("labels"):
        options["labels"] = torch.randint(0, 3, lead, device=DEVICE)
        options["ignore_index"] = 1
        counts &= to_numpy(options["labels"])[later] != 1
    if case.get("weight"):
        options["weight"] = torch.rand(lead, device=DEVICE)
        factor = factor * to_numpy(options["weight"])[later]
    factor = factor * counts * (case["temperature"] ** 2 if case.get("t_squared") else 1)
    mean = case.get("normalizer") or counts.sum()
    return options, factor / {"mean": mean, "batchmean": lead[0]}.get(case.get("reduction", "mean"), 1)


REFERENCE_OPTIONS = (
    "vocab_size", "softcap", "teacher_softcap", "logit_scale", "teacher_logit_scale", "temperature",
    "teacher_temperature", "beta",
)  # fmt: skip


def _against_the_reference(case: dict[str, Any], kind: str, backend: str, dtype: torch.dtype) -> None:
    given = heads(bias=case.get("bias", False), columns=case.get("columns", (60, 60)), dtype=dtype)
    options, factor = _options(case, given)
    given.require_grad()
    got = given.div(kind, backend=backend, **options)
    grads = torch.autograd.grad(got.sum(), given.leaves)
    cut = given
    if case.get("shift"):
        hidden, weight, teacher_hidden, *rest = given
        cut = Heads(hidden[:, :-1], weight, teacher_hidden[:, :-1], *rest)
        assert (grads[0][:, -1] == 0).all()
        grads = (grads[0][:, :-1], *grads[1:])
    want = expected(cut, kind, factor, **{k: v for k, v in options.items() if k in REFERENCE_OPTIONS})
    check(cut, want, got, list(grads), f"{case}")
    with torch.no_grad():
        np.testing.assert_allclose(to_numpy(given.div(kind, backend=backend, **options)), to_numpy(got), 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(backend: str, kind: str, name: str) -> None:
    if is_slow(backend):
        if name not in SLOW or kind not in ("forward_kl", "js"):
            pytest.skip("the interpreter has been shown two cases")
        return _against_the_reference(CASES[name], kind, backend, torch.float32)
    for dtype in (torch.float32, torch.float64):
        _against_the_reference(CASES[name], kind, backend, dtype)
    return None


@pytest.mark.parametrize("name", ["mask and labels, none", "capped", "bias, mask, sum"])
def test_rows_that_may_not_be_looked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU, where looking would wait for the device: they are computed, and their result is 0.
    monkeypatch.setattr(chunks, "_FINDS_ROWS", frozenset())
    _against_the_reference(CASES[name], "reverse_kl", None, torch.float32)


@pytest.mark.parametrize("name", ["capped", "student capped, none"])
def test_caps_of_two_rows_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A last cache holds all rows of these sizes: here only two, and one of the last chunk.
    monkeypatch.setattr(of_heads, "_CAPPED", {DEVICE.type: 130})
    case = CASES[name] | {"mask": True, "weight": True}
    _against_the_reference(case, "forward_kl", None, torch.float32)


@pytest.mark.parametrize("finds", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_a_masked_row_holds_does_not_matter(
    finds: bool, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not finds:
        monkeypatch.setattr(chunks, "_FINDS_ROWS", frozenset())
    given = heads((6,), bias=True)
    mask = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool, device=DEVICE)
    spoilt = Heads(*(x.clone() if x is not None else None for x in given))
    for hidden in (spoilt.student_hidden, spoilt.teacher_hidden):
        hidden[~mask] = float("nan")
    found = []
    for one in (given.require_grad(), spoilt.require_grad()):
        value = one.div("forward_kl", mask=mask, reduction=reduction)
        found.append((value, *torch.autograd.grad(value.sum(), one.leaves)))
    for ours, want in zip(found[1], found[0], strict=True):
        assert torch.equal(ours, want)
        assert ours.abs().max() > 1e-4
    assert (found[1][1][~mask] == 0).all()


def _plain(given: Heads, kind: str) -> Tensor:
    """Per row as people write it, in the dtype of the heads or of autocast."""
    with torch.no_grad():
        log_p = F.log_softmax(F.linear(given.teacher_hidden, given.teacher_weight).float(), -1)
    log_q = F.log_softmax(F.linear(given.student_hidden, given.student_weight).float(), -1)
    pair = (log_q, log_p) if kind == "forward_kl" else (log_p, log_q)
    return F.kl_div(*pair, reduction="none", log_target=True).sum(-1)


def _random_heads(n: int, v: int, h: int, dtype: torch.dtype) -> Heads:
    shapes = (n, h), (v, h), (n, h), (v, h)
    scales = (1, 2 * h**-0.5) * 2
    return Heads(
        *((s * torch.randn(shape, device=DEVICE)).to(dtype) for s, shape in zip(scales, shapes, strict=True))
    )


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("chunk_rows", [None, 24])
def test_in_bf16_within_twice_the_error_of_pytorch(kind: str, autocast: bool, chunk_rows: int | None) -> None:
    given = _random_heads(160, 500, 64, torch.float32 if autocast else torch.bfloat16).require_grad()
    exact = Heads(*(x.detach().to(torch.bfloat16).double() for x in given[:4])).require_grad()
    want = _plain64(exact, kind)
    truth = want, *torch.autograd.grad(want.mean(), exact.leaves)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        rows = given.div(kind, chunk_rows=chunk_rows, reduction="none")
        loss = given.div(kind, chunk_rows=chunk_rows)
        plain = _plain(given, kind)
    ours = rows, *torch.autograd.grad(loss, given.leaves)
    theirs = plain, *torch.autograd.grad(plain.mean(), given.leaves)
    assert rows.dtype == loss.dtype == torch.float32
    for mine, other, exactly in zip(ours, theirs, truth, strict=True):
        assert mine.dtype == other.dtype
        error, allowed = ((x.double() - exactly).norm() for x in (mine, other))
        assert error <= 2 * allowed
        assert allowed < 0.05 * exactly.norm()  # so that zeros do not pass


def _plain64(given: Heads, kind: str) -> Tensor:
    log_q = (given.student_hidden @ given.student_weight.T).log_softmax(-1)
    log_p = (given.teacher_hidden @ given.teacher_weight.T).log_softmax(-1).detach()
    a, b = (log_p, log_q) if kind == "forward_kl" else (log_q, log_p)
    return (a.exp() * (a - b)).sum(-1)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_loss_scale_saves_gradients_in_float16(autocast: bool) -> None:
    # Without it they are below the smallest float16: computed before the scale is known, they would be 0.
    given = _random_heads(32, 400, 16, torch.float32 if autocast else torch.float16).require_grad()
    exact = Heads(*(x.detach().half().double() for x in given[:4])).require_grad()
    with torch.autocast(DEVICE.type, torch.float16, enabled=autocast):
        loss = given.div("forward_kl", normalizer=1e6, chunk_rows=20)
    grads = torch.autograd.grad(2.0**18 * loss, given.leaves)
    want = torch.autograd.grad(_plain64(exact, "forward_kl").sum() / 1e6, exact.leaves)
    for grad, one in zip(grads, want, strict=True):
        assert (grad.double() / 2**18 - one).norm() < 0.01 * one.norm()


def test_a_float64_side_with_a_narrower_one() -> None:
    given = heads((4,))
    narrow = given._replace(student_hidden=given.student_hidden.float(), student_weight=given.student_weight)
    wide = narrow._replace(
        teacher_hidden=given.teacher_hidden.double(), teacher_weight=given.teacher_weight.double()
    )
    for reduction in ("none", "mean"):
        found = wide.require_grad().div("forward_kl", reduction=reduction)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, narrow.div("forward_kl", reduction=reduction), rtol=5e-6, atol=0)


def test_gradcheck(kind: str) -> None:
    if kind == "lk":
        pytest.skip("no gradient flows through its weight")
    given = heads((5,), (11, 11), (3, 4), bias=True, dtype=torch.float64)
    weight = torch.rand(5, device=DEVICE, dtype=torch.float64)

    def call(hidden: Tensor, head: Tensor, bias: Tensor) -> Tensor:
        one = given._replace(student_hidden=hidden, student_weight=head, student_bias=bias)
        return one.div(kind, weight=weight, reduction="none", chunk_rows=2, softcap=3.0)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in given.leaves], atol=1e-7, rtol=1e-5)


def test_factors_that_need_a_gradient_get_one() -> None:
    given = heads((6,)).require_grad()
    weight = torch.rand(6, device=DEVICE, requires_grad=True)
    normalizer = torch.tensor(3.0, device=DEVICE, requires_grad=True)
    loss = given.div("js", weight=weight, normalizer=normalizer, chunk_rows=4)
    loss.backward()
    rows = given.div("js", reduction="none").detach()
    torch.testing.assert_close(weight.grad, rows / 3, rtol=1e-6, atol=0)
    torch.testing.assert_close(normalizer.grad, -loss.detach() / 3, rtol=1e-6, atol=0)
    assert given.student_weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_asks_gets_a_gradient(which: int, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = heads((6,), bias=True)
    computed: list[list[int]] = []
    linear = op.linear

    def watched(*arguments: Any) -> tuple[Tensor, ...]:
        found = linear(*arguments)
        computed.append([grad.numel() for grad in found[1:]])
        return found

    monkeypatch.setattr(op, "linear", watched)
    leaf = given.leaves[which].requires_grad_()
    given.div("forward_kl", reduction=reduction).sum().backward()
    assert leaf.grad.abs().max() > 1e-4
    assert computed[-1] == [leaf.numel() if i == which else 0 for i in range(3)]
    with torch.no_grad():
        given.div("forward_kl", reduction=reduction)
    assert computed[-1] == [0, 0, 0]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_again_and_scaled(reduction: str, dtype: torch.dtype) -> None:
    given = heads(dtype=dtype).require_grad()
    loss = given.div("forward_kl", reduction=reduction, chunk_rows=4).sum()
    want = torch.autograd.grad(given.div("forward_kl", reduction=reduction, chunk_rows=4).sum(), given.leaves)
    rounding = (3 if dtype == torch.bfloat16 else 16) * torch.finfo(dtype).eps
    for factor in (1.0, 0.3, 1.0, -7.0):
        outer = torch.tensor(factor, device=DEVICE)
        grads = torch.autograd.grad(loss, given.leaves, outer, retain_graph=True)
        for grad, one in zip(grads, want, strict=True):
            torch.testing.assert_close(
                grad, factor * one, rtol=rounding, atol=rounding * abs(factor) * one.abs().max().item()
            )
            assert one.abs().max() > 1e-4
    first = given.div("forward_kl", reduction=reduction, chunk_rows=4).sum()
    # The very first backward scales too, and what it gave away is not scaled by the second.
    one = torch.autograd.grad(2 * first, given.leaves, retain_graph=True)
    kept = [grad.clone() for grad in one]
    torch.autograd.grad(5 * first, given.leaves)
    for grad, before, plain in zip(one, kept, want, strict=True):
        assert torch.equal(grad, before)
        torch.testing.assert_close(
            grad, 2 * plain, rtol=rounding, atol=2 * rounding * plain.abs().max().item()
        )


def test_gradients_accumulate_over_micro_batches() -> None:
    whole, parts = heads((8,)).require_grad(), heads((8,))
    parts = Heads(*(None if x is None else x.detach().clone() for x in whole)).require_grad()
    whole.div("forward_kl", normalizer=8.0).backward()
    for some in (slice(0, 3), slice(3, 8)):
        micro = parts._replace(
            student_hidden=parts.student_hidden[some], teacher_hidden=parts.teacher_hidden[some]
        )
        micro.div("forward_kl", normalizer=8.0).backward()
    for leaf, other in zip(whole.leaves, parts.leaves, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=1e-7)
        assert leaf.grad.abs().max() > 1e-4


def test_tied_embeddings() -> None:
    # One weight as embedding and as head: both gradients reach it.
    given, tokens = heads((7,), widths=(6, 6)), torch.randint(0, 60, (7,), device=DEVICE)
    found = []
    for chunked in (True, False):
        weight = given.student_weight.clone().requires_grad_()
        hidden = F.embedding(tokens, weight).tanh()
        tied = given._replace(student_hidden=hidden, student_weight=weight)
        if chunked:
            tied.div("forward_kl", chunk_rows=3).backward()
        else:
            student = hidden @ weight.T
            kl_gpu.kl_div(student, given.teacher_hidden @ given.teacher_weight.T).backward()
        found.append(weight.grad)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)
    assert found[0].abs().max() > 1e-3


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_activation_checkpointing(use_reentrant: bool) -> None:
    given = heads((6,)).require_grad()
    want = torch.autograd.grad(given.div("forward_kl"), given.leaves)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        one = given._replace(student_hidden=hidden, student_weight=weight)
        return one.div("forward_kl")

    checkpoint(loss, *given.leaves, use_reentrant=use_reentrant).backward()
    for leaf, grad in zip(given.leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_graph_under_compile(reduction: str) -> None:
    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        one = given._replace(student_hidden=hidden, student_weight=weight, student_bias=bias)
        return 3 * one.div("js", labels=labels, shift=True, softcap=4.0, reduction=reduction).sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    given = heads((2, 5), bias=True).require_grad()
    labels = torch.randint(0, 9, (2, 5), device=DEVICE).where(torch.rand(2, 5, device=DEVICE) > 0.3, -100)
    plain, traced = (f(*given.leaves, labels) for f in (loss, compiled))
    torch.testing.assert_close(plain, traced, rtol=1e-6, atol=0)
    grads = (torch.autograd.grad(x, given.leaves) for x in (plain, traced))
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
        assert want.abs().max() > 1e-4


def test_opcheck(backend: str) -> None:
    given = heads((4,), bias=True)
    rows = torch.tensor([True, False, True, True], device=DEVICE)
    call = (torch.float32, 1.0, 0.0, torch.float32, 2.0, 5.0, 57, 3, "forward_kl", 0.0, 0.5, 1.0, backend)
    sides = *given[:2], given.student_bias, *given[2:4], given.teacher_bias, rows
    for row_scale, needs in ((torch.rand(4, device=DEVICE), [True, True, True]), (None, [False] * 3)):
        torch.library.opcheck(torch.ops.kl_gpu.linear.default, (*sides, row_scale, needs, *call))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_raises(reduction: str) -> None:
    given = heads((4,)).require_grad()
    loss = given.div("forward_kl", reduction=reduction).sum()
    gradient = torch.autograd.grad(loss, given.student_hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("which", range(6))
def test_tensors_modified_between_forward_and_backward(reduction: str, which: int) -> None:
    given = heads((4,), bias=True).require_grad()
    changed = Heads(*(x * 1 for x in given))
    changed = Heads(*(x if i in (0, 1, 4) else x.detach() for i, x in enumerate(changed)))
    loss = changed.div("forward_kl", reduction=reduction).sum()
    changed[which].detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_same_call_gives_the_same_bits() -> None:
    given = _random_heads(50, 700, 32, torch.float32).require_grad()
    first, second = (
        (loss, *torch.autograd.grad(loss, given.leaves))
        for loss in (given.div("forward_kl", chunk_rows=16) for _ in range(2))
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_memory_that_was_never_written_is_not_read() -> None:
    # PyTorch then fills what is allocated with NaN.
    given = _random_heads(40, 300, 16, torch.bfloat16).require_grad()
    torch.use_deterministic_algorithms(True)
    try:
        for options in ({}, {"chunk_rows": 9, "vocab_size": 290, "softcap": 5.0}):
            grads = torch.autograd.grad(given.div("forward_kl", **options), given.leaves)
            assert all(torch.isfinite(grad).all() and grad.abs().max() > 1e-4 for grad in grads)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_the_weights_gradient_is_summed_in_float32(chunks: int, weight_dtype: torch.dtype) -> None:
    v, h, rows = 37, 11, 6
    parts = [(torch.randn(rows, v).bfloat16(), torch.randn(rows, h).bfloat16()) for _ in range(chunks)]
    # Some columns past the vocabulary.
    gradient = accumulate.WeightGradient(torch.ones(v + 2, h, dtype=weight_dtype), torch.bfloat16, v, chunks)
    total = torch.zeros(v, h)
    for to_logits, states in parts:
        gradient.add(to_logits, states)
        total += torch.mm(to_logits.t(), states).float()
    result = gradient.result()
    assert result.dtype == weight_dtype
    assert torch.equal(result[:v], total.to(weight_dtype))
    assert not result[v:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_does_not_grow_with_rows(dtype: torch.dtype) -> None:
    memory = pytest.importorskip("bench.harness.memory")
    v, h, beyond = 4000, 32, []
    for n in (256, 2048):
        given = _random_heads(n, v, h, dtype).require_grad()

        def step(given: Heads = given) -> None:
            torch.autograd.grad(given.div("forward_kl", chunk_rows=64), given.leaves)

        step()
        # The gradient of the hidden states, and a few numbers per row.
        beyond.append(memory.peak_extra_bytes(step, DEVICE) - n * (h * dtype.itemsize + 64))
    logits = 256 * v * dtype.itemsize
    # Two chunks of logits, the weight's gradient and, for 16 bits, its sum in float32; the rest is scratch of
    # the products' own.
    assert beyond[0] < 1.2 * (2 * logits / 4 + v * h * (4 if dtype == torch.float32 else 2 + 4 + 2 + 4))
    assert beyond[1] <= beyond[0] * 1.01
    assert beyond[0] > logits / 4


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("finds", [True, False])
def test_no_rows_and_no_rows_that_count(
    backend: str, reduction: str, finds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not finds:
        monkeypatch.setattr(chunks, "_FINDS_ROWS", frozenset())
    for n in (0, 3):
        given = heads((n,), bias=True).require_grad()
        mask = torch.zeros(n, dtype=torch.bool, device=DEVICE)
        value = given.div("forward_kl", mask=mask, reduction=reduction, backend=backend, softcap=3.0)
        assert value.shape == ((n,) if reduction == "none" else ())
        assert (value == 0).all()
        for leaf, grad in zip(given.leaves, torch.autograd.grad(value.sum(), given.leaves), strict=True):
            assert grad.shape == leaf.shape
            assert (grad == 0).all()


def test_columns_of_minus_infinity(backend: str) -> None:
    given = heads((3,), bias=True)
    for bias in (given.student_bias, given.teacher_bias):
        bias[7:20] = -torch.inf
    given.require_grad()
    value = given.div("forward_kl", backend=backend)
    grads = torch.autograd.grad(value, given.leaves)
    keep = [*range(7), *range(20, 60)]
    short = Heads(
        *(x.detach() if i in (0, 2) else x.detach()[keep] for i, x in enumerate(given))
    ).require_grad()
    fewer = short.div("forward_kl", backend=backend)
    torch.testing.assert_close(value, fewer, rtol=5e-6, atol=0)
    for grad, want in zip(grads, torch.autograd.grad(fewer, short.leaves), strict=True):
        if len(grad) == 60:
            assert (grad[7:20] == 0).all()
            grad = grad[keep]
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-7)
        assert want.abs().max() > 1e-4


def test_a_nan_stays_in_its_row(backend: str) -> None:
    given = heads((3,))
    given.student_hidden[1, 2] = float("nan")
    given.require_grad()
    value = given.div("forward_kl", reduction="none", backend=backend)
    assert value.isnan().tolist() == [False, True, False]
    hidden, weight = torch.autograd.grad(value.sum(), given.leaves)
    assert hidden.isnan().all(-1).tolist() == [False, True, False]
    assert weight.isnan().all()  # it sums over all rows


def test_any_leading_shape_and_any_strides() -> None:
    given = heads((2, 3, 4), bias=True)
    want = given.div("forward_kl", reduction="none")
    assert want.shape == (2, 3, 4)
    flat = given._replace(
        student_hidden=given.student_hidden.reshape(24, -1),
        teacher_hidden=given.teacher_hidden.reshape(24, -1),
    )
    torch.testing.assert_close(flat.div("forward_kl", reduction="none").view(2, 3, 4), want)
    strided = given._replace(
        student_weight=given.student_weight.T.contiguous().T,
        teacher_hidden=given.teacher_hidden.transpose(0, 1).contiguous().transpose(0, 1),
    )
    torch.testing.assert_close(strided.div("forward_kl", reduction="none"), want)
    one = given._replace(
        student_hidden=given.student_hidden[0, 0, 0], teacher_hidden=given.teacher_hidden[0, 0, 0]
    )
    torch.testing.assert_close(one.div("forward_kl", reduction="none"), want[0, 0, 0])


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_waits_for_the_device(reduction: str) -> None:
    given = _random_heads(64, 4000, 32, torch.bfloat16).require_grad()
    mask = torch.rand(64, device=DEVICE) > 0.5
    for mode in ("default", "error"):  # the first time compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            given.div("forward_kl", mask=mask, chunk_rows=16, reduction=reduction).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert given.student_weight.grad.abs().max() > 1e-4


def test_rows_of_a_chunk() -> None:
    cpu = torch.device("cpu")

    def rows(n: int, device: torch.device, columns: int = 128256, dtype: torch.dtype = torch.bfloat16) -> int:
        return chunks.chosen_rows(n, 2 * columns * dtype.itemsize, 0, device)

    assert rows(1, cpu) == 1
    assert rows(0, cpu) == 1
    # Both sides within what they may take, whatever N.
    for n in (100, 1000, 2048, 16384):
        chunk = rows(n, cpu, dtype=torch.float32)
        assert chunk * 128256 * 2 * 4 <= 512 << 20
        assert chunk >= min(n, 128)
    assert rows(4097, cpu, 10) <= 2080  # equal chunks, not one of a single row


def test_fewer_rows_where_a_gpu_is_short_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    row_bytes = 2 * 128256 * 2
    monkeypatch.setattr(chunks, "_free_bytes", lambda device: float("inf"))
    usual = chunks.chosen_rows(8192, row_bytes, 0, torch.device("cuda"))
    assert 1024 <= usual <= 4096
    monkeypatch.setattr(chunks, "_free_bytes", lambda device: 2**29)
    few = chunks.chosen_rows(8192, row_bytes, 0, torch.device("cuda"))
    assert few * 128256 * 4 <= 2**28
    assert few < usual


def test_module_face_is_the_function(kind: str) -> None:
    given = heads((2, 4), bias=True)
    labels = torch.tensor([[1, 2, -100, 4], [5, 6, 7, -100]], device=DEVICE)
    options = {"temperature": 2.0, "t_squared": True, "shift": True}
    module = kl_gpu.DivergenceLoss(kind, inplace=True, **options)
    got = module.linear(
        *given[:4], labels=labels, normalizer=9, student_bias=given.student_bias,
        teacher_bias=given.teacher_bias, softcap=4.0,
    )  # fmt: skip
    assert torch.equal(got, given.div(kind, labels=labels, normalizer=9, softcap=4.0, **options))
    assert got > 0

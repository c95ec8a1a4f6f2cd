"""linear_topk_div against the NumPy reference on explicit logits, and where a training step puts it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from linear_rows import Head, check_gradients, head, moved_by_cap, random_head, teacher
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kl_gpu
from kl_gpu import reference
from kl_gpu.linear import chunks, heads, split
from kl_gpu.reference import topk as reference_topk
from kl_gpu.topk.formulas import TAIL_KINDS
from support import DEVICE, RELATIVE, is_slow, to_numpy

TAILS = [(tail, kind) for tail, kinds in TAIL_KINDS.items() for kind in kinds]
NAN = float("nan")
K = 5
CASES: dict[str, dict[str, Any]] = {
    "mean": {"chunk_rows": 3},
    "none, bias, rest": {"reduction": "none", "bias": True, "rest": True, "chunk_rows": 100},
    "mask, labels, shift, sum": {
        "mask": True,
        "labels": True,
        "shift": True,
        "reduction": "sum",
        "bias": True,
    },
    "weight, normalizer": {"weight": True, "normalizer": 7.0, "chunk_rows": 1, "mask": True},
    "cap, batchmean": {"softcap": 4.0, "logit_scale": 2.0, "reduction": "batchmean", "chunk_rows": 4},
    "vocab_size, padding": {"vocab_size": 53, "padded": True, "bias": True, "chunk_rows": 7},
}
SLOW = ("mask, labels, shift, sum", "cap, batchmean")
RESOLUTION = 2.0**-24


def _given(case: dict[str, Any], dtype: torch.dtype) -> tuple[Head, tuple[Tensor, ...], dict[str, Any]]:
    """Rows, what is known of the teacher, and the call's options."""
    given, columns = head(bias=case.get("bias", False), dtype=dtype), case.get("vocab_size", 60)
    lead = given.hidden.shape[:-1]
    logprobs, ids, rest = teacher(lead, columns, K)
    if case.get("padded"):
        ids[0, 0, 3:], ids[1, 2, 2:], logprobs[1, 2, 2:] = -1, 0, -torch.inf
    options = {x: case[x] for x in case if x not in ("bias", "rest", "mask", "labels", "weight", "padded")}
    if case.get("rest"):
        options["teacher_tail_logprob"] = rest
    if case.get("mask"):
        options["mask"] = torch.rand(lead, device=DEVICE) > 0.4
    if case.get("labels"):
        options |= {"labels": torch.randint(0, 3, lead, device=DEVICE), "ignore_index": 1}
    if case.get("weight"):
        options["weight"] = torch.rand(lead, device=DEVICE)
    return given, (logprobs.to(dtype), ids), options


def _factor(lead: tuple[int, ...], options: dict[str, Any]) -> np.ndarray:
    """Of each row in the sum of the result."""
    later = (slice(None), slice(1, None)) if options.get("shift") else ()
    counts = np.ones(lead, bool)[later]
    if "mask" in options:
        counts &= options["mask"][later].cpu().numpy()
    if "labels" in options:
        counts &= (options["labels"] != options["ignore_index"])[later].cpu().numpy()
    factor = counts * (to_numpy(options["weight"])[later] if "weight" in options else 1.0)
    mean = options.get("normalizer") or counts.sum()
    return factor / {"mean": mean, "batchmean": lead[0]}.get(options.get("reduction", "mean"), 1)


def _against_the_reference(
    case: dict[str, Any], tail: str, kind: str, backend: str | None, dtype: torch.dtype
) -> None:
    given, known, options = _given(case, dtype)
    temperature = 1.0
    if tail != "bucket":
        options.pop("teacher_tail_logprob", None)
    if tail == "renormalize":
        temperature = options["temperature"] = 1.5
    lead = given.hidden.shape[:-1]
    factor = _factor(lead, options)
    given.require_grad()
    value, *masses = given.topk(*known, kind, tail=tail, return_mass=True, backend=backend, **options)
    grads = torch.autograd.grad(value.sum(), given.leaves)
    cut = slice(None, -1) if case.get("shift") else slice(None)
    if case.get("shift"):
        assert (grads[0][:, -1] == 0).all()
        grads = (grads[0][:, :-1], *grads[1:])
    rows = given._replace(hidden=given.hidden[:, cut])
    cap = case.get("softcap")
    of_head = {"softcap": cap, "logit_scale": case.get("logit_scale", 1.0)}
    x = rows.logits(case.get("vocab_size", 60), **of_head)
    log_p, ids = to_numpy(known[0])[:, cut], known[1].cpu().numpy()[:, cut]
    rest = options.get("teacher_tail_logprob")
    rounded = RESOLUTION if dtype == torch.float32 else 2.0**-53
    want, flow, *sums = reference_topk.topk_div(
        x, log_p, ids, kind, tail=tail, temperature=temperature, resolution=rounded,
        teacher_tail_logprob=None if rest is None else to_numpy(rest)[:, cut],
    )  # fmt: skip
    wide, moved, where = dtype == torch.float64, moved_by_cap(cap, temperature), f"{case} {tail} {kind}"
    assert value.dtype == (torch.float64 if wide else torch.float32)
    reach = np.abs(flow).sum(-1)
    bound = RELATIVE * np.abs(want) + (2e-7 + 2 * moved) * reach
    got, exact, bound = to_numpy(value), want * factor, (1e-6 if wide else 1) * bound * np.abs(factor)
    if not value.dim():
        exact, bound = exact.sum(), bound.sum()
    assert (np.abs(got - exact) <= bound).all(), where
    assert np.abs(exact).max() > 1e-3
    for mass, sum_ in zip(masses, sums, strict=True):
        np.testing.assert_allclose(to_numpy(mass), sum_ * (factor != 0), rtol=2e-6 + 4 * moved)

    q, p = np.exp(reference.log_softmax(x)), np.zeros((*x.shape[:-1], x.shape[-1] + 1))
    np.put_along_axis(p, np.where(ids < 0, x.shape[-1], ids), np.exp(log_p), -1)
    p = p[..., :-1]
    largest = np.maximum(np.maximum(p, q), np.abs(flow))
    with np.errstate(divide="ignore"):
        ratio = np.where(p > 0, np.abs(np.log(p) - np.log(q)), 1.0)
    size = np.maximum(np.maximum(1.0, ratio), np.abs(want)[..., None])
    off = largest * size / temperature * (1 + 8 * moved / 2e-6) * np.abs(factor)[..., None]
    check_gradients(rows, list(grads), flow * factor[..., None], off, where, **of_head)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("tail", "kind"), TAILS)
def test_value_and_gradients(backend: str, tail: str, kind: str, name: str) -> None:
    if is_slow(backend) and (name not in SLOW or kind not in ("forward_kl", "js")):
        pytest.skip("the interpreter has been shown two cases")
    for dtype in (torch.float32,) if is_slow(backend) else (torch.float32, torch.float64):
        _against_the_reference(CASES[name], tail, kind, backend, dtype)


@pytest.mark.parametrize("name", ["mask, labels, shift, sum", "weight, normalizer"])
@pytest.mark.parametrize("tail", TAIL_KINDS)
def test_rows_that_may_not_be_looked_for(name: str, tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU, where looking would wait for the device: they are computed, and their result is 0.
    monkeypatch.setattr(chunks, "_FINDS_ROWS", frozenset())
    _against_the_reference(CASES[name], tail, "forward_kl", None, torch.float32)


@pytest.mark.parametrize("tail", TAIL_KINDS)
def test_caps_of_two_rows_at_a_time(tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A last cache holds all rows of these sizes: here only two, and one of the last chunk.
    monkeypatch.setattr(heads, "_CAPPED", {DEVICE.type: 130})
    case = CASES["cap, batchmean"] | {"chunk_rows": 7, "mask": True}
    _against_the_reference(case, tail, "forward_kl", None, torch.float32)


@pytest.mark.parametrize("finds", [True, False])
@pytest.mark.parametrize("tail", TAIL_KINDS)
def test_what_a_masked_row_holds_does_not_matter(
    finds: bool, tail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not finds:
        monkeypatch.setattr(chunks, "_FINDS_ROWS", frozenset())
    given, mask = head((6,), bias=True), torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool, device=DEVICE)
    logprobs, ids, _ = teacher((6,), 60, K)
    spoilt = given.copied()
    spoilt.hidden[~mask] = NAN
    others = logprobs.where(mask[:, None], NAN), ids.where(mask[:, None], 7)
    found = []
    for one, known in ((given, (logprobs, ids)), (spoilt, others)):
        value, *masses = one.require_grad().topk(
            *known, "forward_kl", tail=tail, mask=mask, return_mass=True, validate=True
        )
        found.append((value, *masses, *torch.autograd.grad(value, one.leaves)))
    for ours, want in zip(found[1], found[0], strict=True):
        assert torch.equal(ours, want)
        assert ours.abs().max() > 1e-4
    assert (found[1][3][~mask] == 0).all()


def _explicit(given: Head, logprobs: Tensor, ids: Tensor, **options: Any) -> Tensor:
    """In float64, through all logits."""
    return kl_gpu.topk_div(torch.nn.functional.linear(given.hidden, given.weight), logprobs, ids, **options)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_rows", [None, 24])
def test_in_16_bits_within_twice_the_error_of_explicit_logits(
    autocast: bool, half: torch.dtype, chunk_rows: int | None
) -> None:
    given = random_head(160, 500, 64, torch.float32 if autocast else half).require_grad()
    logprobs, ids, _ = teacher((160,), 500, 16)
    exact = Head(*(x.detach().to(half).double() for x in given.leaves)).require_grad()
    want = _explicit(exact, logprobs, ids, reduction="none")
    truth = want, *torch.autograd.grad(want.sum(), exact.leaves)
    with torch.autocast(DEVICE.type, half, enabled=autocast):
        rows = given.topk(logprobs, ids, "forward_kl", reduction="none", chunk_rows=chunk_rows)
        plain = _explicit(given, logprobs, ids, reduction="none")
    assert rows.dtype == torch.float32
    ours = rows, *torch.autograd.grad(rows.sum(), given.leaves)
    theirs = plain, *torch.autograd.grad(plain.sum(), given.leaves)
    for mine, other, exactly in zip(ours, theirs, truth, strict=True):
        assert mine.dtype == other.dtype
        error, allowed = ((x.double() - exactly).norm() for x in (mine, other))
        assert error <= 2 * allowed
        assert allowed < 0.05 * exactly.norm()  # so that zeros do not pass


@pytest.mark.parametrize(("tail", "kind"), TAILS)
def test_gradcheck(tail: str, kind: str) -> None:
    given = Head(*(x.double() for x in random_head(3, 11, 4, bias=True))).require_grad()
    logprobs, ids, _ = teacher((3,), 11, 4)
    mask = torch.tensor([True, False, True], device=DEVICE)

    def call(*leaves: Tensor) -> Tensor:
        options = {"softcap": 3.0, "chunk_rows": 2, "mask": mask, "reduction": "none"}
        return Head(*leaves).topk(logprobs.double(), ids, kind, tail=tail, **options)

    assert torch.autograd.gradcheck(call, given.leaves, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [True, False])
def test_memory_does_not_grow_with_rows(dtype: torch.dtype, frozen: bool) -> None:
    memory = pytest.importorskip("bench.harness.memory")
    v, h, k, beyond = 4000, 32, 4, []
    for n in (256, 2048):
        given = random_head(n, v, h, dtype).require_grad()
        logprobs, ids, _ = teacher((n,), v, k)
        if frozen:
            given.weight.requires_grad_(False)
        leaves = [x for x in given.leaves if x.requires_grad]

        def step(given: Head = given, known: Any = (logprobs, ids), leaves: list[Tensor] = leaves) -> None:
            torch.autograd.grad(given.topk(*known, "forward_kl", chunk_rows=64), leaves)

        step()
        # The gradient of the hidden states, and O(K) float64 numbers a row.
        beyond.append(memory.peak_extra_bytes(step, DEVICE) - n * (h * dtype.itemsize + 8 * 24 * (k + 1)))
    logits = 64 * v * dtype.itemsize
    of_weight = v * h * (4 if dtype == torch.float32 else 2 + 4 + 2 + 4)
    # A frozen head has no buffer of the weight's size.
    assert beyond[0] < 1.2 * (logits + (0 if frozen else of_weight))
    assert beyond[1] <= beyond[0] * 1.05


def test_memory_does_not_hold_the_logits_of_all_rows() -> None:
    memory = pytest.importorskip("bench.harness.memory")
    n, v = 1024, 4000
    given = random_head(n, v, 32).require_grad()
    logprobs, ids, _ = teacher((n,), v, 4)
    call = lambda: torch.autograd.grad(given.topk(logprobs, ids, "js", chunk_rows=64), given.leaves)  # noqa: E731
    call()
    assert v * 64 * 4 < memory.peak_extra_bytes(call, DEVICE) < n * v * 4 / 4


@pytest.mark.parametrize("which", [0, 1, 2])
def test_only_what_asks_gets_a_gradient(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given, computed = head((6,), bias=True), []
    logprobs, ids, _ = teacher((6,), 60, K)
    gradient = split._gradient

    def watched(*arguments: Any) -> tuple[Tensor, ...]:
        found = gradient(*arguments)
        computed.append([grad.numel() for grad in found])
        return found

    monkeypatch.setattr(split, "_gradient", watched)
    leaf = given.leaves[which].requires_grad_()
    given.topk(logprobs, ids, "js").backward()
    assert leaf.grad.abs().max() > 1e-4
    assert computed == [[leaf.numel() if i == which else 0 for i in range(3)]]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_activation_checkpointing(use_reentrant: bool) -> None:
    given = head((6,), bias=True).require_grad()
    logprobs, ids, _ = teacher((6,), 60, K)
    want = torch.autograd.grad(given.topk(logprobs, ids, "js"), given.leaves)

    def loss(*x: Tensor) -> Tensor:
        return Head(*x).topk(logprobs, ids, "js")

    checkpoint(loss, *given.leaves, use_reentrant=use_reentrant).backward()
    for leaf, grad in zip(given.leaves, want, strict=True):
        assert torch.equal(leaf.grad, grad)
        assert grad.abs().max() > 1e-4


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_one_graph_under_compile(tail: str) -> None:
    def loss(
        hidden: Tensor, weight: Tensor, bias: Tensor, logprobs: Tensor, ids: Tensor, labels: Tensor
    ) -> Any:
        return Head(hidden, weight, bias).topk(
            logprobs, ids, "js", tail=tail, labels=labels, shift=True, softcap=4.0, return_mass=True
        )

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for time in (5, 8):
        given = head((2, time), bias=True).require_grad()
        logprobs, ids, _ = teacher((2, time), 60, K)
        labels = torch.randint(0, 9, (2, time), device=DEVICE)
        labels = labels.where(torch.rand(2, time, device=DEVICE) > 0.3, -100)
        plain, traced = (f(*given.leaves, logprobs, ids, labels) for f in (loss, compiled))
        for want, got in zip(plain, traced, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        grads = (torch.autograd.grad(x[0], given.leaves) for x in (plain, traced))
        for want, got in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
            assert want.abs().max() > 1e-4


def test_second_derivative_raises() -> None:
    given = head((4,)).require_grad()
    logprobs, ids, _ = teacher((4,), 60, K)
    gradient = torch.autograd.grad(given.topk(logprobs, ids, "js"), given.hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("which", range(3))
def test_tensors_modified_between_forward_and_backward(which: int) -> None:
    given = head((4,), bias=True).require_grad()
    logprobs, ids, _ = teacher((4,), 60, K)
    changed = [x * 1 for x in given]
    loss = Head(*changed).topk(logprobs, ids, "forward_kl")
    changed[which].detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_same_call_gives_the_same_bits() -> None:
    given = random_head(50, 700, 32, bias=True).require_grad()
    logprobs, ids, _ = teacher((50,), 700, 16)
    first, second = (
        (loss, *torch.autograd.grad(loss, given.leaves))
        for loss in (given.topk(logprobs, ids, "js", chunk_rows=16) for _ in range(2))
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("finds", [True, False])
def test_no_rows_and_no_rows_that_count(
    backend: str, reduction: str, finds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not finds:
        monkeypatch.setattr(chunks, "_FINDS_ROWS", frozenset())
    for n in (0, 3):
        given = head((n,), bias=True).require_grad()
        logprobs, ids, _ = teacher((n,), 60, K)
        mask = torch.zeros(n, dtype=torch.bool, device=DEVICE)
        value = given.topk(logprobs, ids, "js", mask=mask, reduction=reduction, backend=backend, softcap=3.0)
        assert value.shape == ((n,) if reduction == "none" else ())
        assert (value == 0).all()
        for leaf, grad in zip(given.leaves, torch.autograd.grad(value.sum(), given.leaves), strict=True):
            assert grad.shape == leaf.shape
            assert (grad == 0).all()


def test_one_column(backend: str) -> None:
    given = head((3,), columns=1, bias=True).require_grad()
    logprobs, ids = torch.zeros(3, 1, device=DEVICE), torch.zeros(3, 1, dtype=torch.int64, device=DEVICE)
    for tail in TAIL_KINDS:
        value = given.topk(logprobs, ids, "forward_kl", tail=tail, backend=backend)
        assert value == 0
        assert all((x == 0).all() for x in torch.autograd.grad(value, given.leaves))


@pytest.mark.parametrize("tail", TAIL_KINDS)
def test_columns_of_minus_infinity(backend: str, tail: str) -> None:
    given = head((3,), bias=True)
    gone = slice(7, 20)
    given.bias[gone] = -torch.inf
    given.require_grad()
    logprobs, ids, _ = teacher((3,), 47, K)
    there = ids + 13 * (ids >= 7)
    value = given.topk(logprobs, there, "forward_kl", tail=tail, backend=backend)
    grads = torch.autograd.grad(value, given.leaves)
    keep = [*range(7), *range(20, 60)]
    short = Head(given.hidden.detach(), given.weight.detach()[keep], given.bias.detach()[keep]).require_grad()
    fewer = short.topk(logprobs, ids, "forward_kl", tail=tail, backend=backend)
    torch.testing.assert_close(value, fewer, rtol=RELATIVE, atol=0)
    for grad, want in zip(grads, torch.autograd.grad(fewer, short.leaves), strict=True):
        if len(grad) == 60:
            assert (grad[gone] == 0).all()
            grad = grad[keep]
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-6)
        assert want.abs().max() > 1e-3
    # A token that the teacher knows and the student excludes.
    ids[0, 0] = 8
    apart = given.topk(logprobs, ids, "forward_kl", tail=tail, reduction="none", backend=backend)
    assert apart[0] == torch.inf


@pytest.mark.parametrize("tail", TAIL_KINDS)
def test_a_nan_stays_in_its_row(backend: str, tail: str) -> None:
    given = head((3,))
    given.hidden[1] = NAN
    given.require_grad()
    logprobs, ids, _ = teacher((3,), 60, K)
    value = given.topk(logprobs, ids, "forward_kl", tail=tail, reduction="none", backend=backend)
    assert value.isnan().tolist() == [False, True, False]
    hidden, weight = torch.autograd.grad(value.sum(), given.leaves)
    assert hidden.isnan().all(-1).tolist() == [False, True, False]
    assert weight.isnan().any(-1).all() or tail == "renormalize"


@pytest.mark.parametrize(("tail", "kind"), TAILS)
def test_it_is_topk_div_of_the_logits(backend: str, tail: str, kind: str) -> None:
    given = head((4,), bias=True)
    logprobs, ids, _ = teacher((4,), 60, K)
    explicit = given.hidden @ given.weight.T + given.bias
    options = {"tail": tail, "reduction": "none", "return_mass": True, "backend": backend}
    found = given.topk(logprobs, ids, kind, **options)
    for got, exact in zip(found, kl_gpu.topk_div(explicit, logprobs, ids, kind, **options), strict=True):
        assert torch.equal(got, exact)
    ids[1, 0] = 60
    with pytest.raises(ValueError, match="teacher_ids"):
        given.topk(logprobs, ids, kind, validate=True, **options)


def test_under_inference_mode() -> None:
    given = head((4,), bias=True)
    logprobs, ids, _ = teacher((4,), 60, K)
    want = given.topk(logprobs, ids, "js")
    with torch.inference_mode():
        assert torch.equal(given.copied().topk(logprobs.clone(), ids.clone(), "js"), want)

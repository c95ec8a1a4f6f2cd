"""topk_logprobs: values against NumPy and mpmath, its edges, and what topk_div makes of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kl_gpu
from kl_gpu.ops import complement as complement_ops
from kl_gpu.reference import topk as reference_topk
from kl_gpu.topk import formulas
from support import DEVICE, DTYPES, RELATIVE, is_slow, record, to_numpy

INF, NAN = float("inf"), float("nan")


def peaked(rows: int, columns: int, gap: float) -> Tensor:
    """A token `gap` nats above a broad floor, and two others not far from it."""
    logits = torch.randn(rows, columns, device=DEVICE)
    logits[:, 7], logits[:, columns // 2], logits[:, -1] = gap, gap / 2, gap - 15
    return logits


def check(logits: Tensor, k: int, backend: str, where: str, temperature: float = 1.0) -> None:
    """Values relative to themselves; columns those of torch.topk."""
    found = kl_gpu.topk_logprobs(logits, k, temperature=temperature, backend=backend)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert (found.logprobs.dtype, found.ids.dtype, found.tail_logprob.dtype) == (dtype, torch.int64, dtype)
    assert torch.equal(found.ids, logits.topk(k).indices)
    want, _, tail = reference_topk.topk_logprobs(to_numpy(logits), k, temperature)
    for name, got, exact in (("list", found.logprobs, want), ("tail", found.tail_logprob, tail)):
        assert got.shape == exact.shape
        assert (exact < 0).all()
        share = (np.abs(to_numpy(got) - exact) / (RELATIVE * np.abs(exact))).max()
        record("logprob", backend, name, float(share), where)
        assert share <= 1, f"{share} of the bound of the {name} at {where}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_against_the_reference(backend: str, dtype: torch.dtype, temperature: float) -> None:
    for columns, k in ((33, 8), (2100, 64)) if is_slow(backend) else ((33, 8), (2100, 64), (32000, 300)):
        logits = (3 * torch.randn(3, columns, device=DEVICE)).to(dtype)
        check(logits, k, backend, f"V={columns} K={k} {dtype} T={temperature}", temperature)


def exact_rows(logits: Tensor, ids: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """log p of the ids and of all others, in 60 digits."""
    logprobs, tail = [], []
    with mpmath.workdps(60):
        for row, chosen in zip(to_numpy(logits), ids.tolist(), strict=True):
            weights = [mpmath.exp(mpmath.mpf(float(x))) for x in row]
            total = mpmath.fsum(weights)
            logprobs.append([float(mpmath.log(weights[j] / total)) for j in chosen])
            others = mpmath.fsum(w for j, w in enumerate(weights) if j not in set(chosen))
            tail.append(float(mpmath.log(others / total)))
    return np.array(logprobs), np.array(tail)


@pytest.mark.parametrize("gap", [25.0, 30.0, 40.0, 80.0])
@pytest.mark.parametrize("k", [1, 2, 64])
def test_peaked_rows(backend: str, gap: float, k: int) -> None:
    # log1p(−Σ p) of rounded log-probabilities is NaN in half of such rows; log p of the best is −e^−gap · V.
    logits = peaked(3, 700, gap)
    found = kl_gpu.topk_logprobs(logits, k, backend=backend)
    logprobs, tail = exact_rows(logits, found.ids)
    assert (found.ids[:, 0] == 7).all()
    assert (logprobs < 0).all()
    np.testing.assert_allclose(to_numpy(found.logprobs), logprobs, rtol=RELATIVE)
    np.testing.assert_allclose(to_numpy(found.tail_logprob), tail, rtol=RELATIVE)


@pytest.mark.parametrize("columns", [1, 2, 3, 2000])
def test_a_tail_that_is_all_but_certain(backend: str, columns: int) -> None:
    # log P = log(1 − 1/V), which a log-normaliser taken from a log-sum rounds to 0 for a large V.
    logits = torch.full((2, columns), -3.5, device=DEVICE)
    logits[1, 0] += 1e-3
    if columns > 1:
        check(logits, 1, backend, "flat")
        logits[:, 0] = -40.0
        check(logits, columns - 1, backend, "all but one")
    whole = kl_gpu.topk_logprobs(logits, columns, backend=backend)
    assert (whole.tail_logprob == -INF).all()
    torch.testing.assert_close(whole.logprobs.double().exp().sum(-1), torch.ones_like(logits[:, 0]).double())
    if columns == 1:
        assert (whole.logprobs == 0).all()


@pytest.mark.parametrize("offset", [-3000.0, 1000.0])
def test_a_common_offset(backend: str, offset: float) -> None:
    check(3 * torch.randn(3, 600, device=DEVICE) + offset, 5, backend, f"offset={offset}")


@pytest.mark.parametrize("gap", [25.0, 30.0, 40.0])
def test_what_topk_div_makes_of_it(backend: str, gap: float) -> None:
    """The K + 1 outcomes of both sides, from float64 logits: nothing of the teacher is lost on the way."""
    teacher = peaked(64 if not is_slow(backend) else 3, 500, gap)
    student = teacher + 0.3 * torch.randn_like(teacher)
    found = kl_gpu.topk_logprobs(teacher, 16, backend=backend)
    leaf = student.requires_grad_()
    for kind in ("forward_kl", "reverse_kl", "js"):
        value = kl_gpu.topk_div(
            leaf, found.logprobs, found.ids, kind, teacher_tail_logprob=found.tail_logprob, reduction="none",
            backend=backend,
        )  # fmt: skip
        log_p, _, tail = reference_topk.topk_logprobs(to_numpy(teacher), 16)
        want, gradient, *_ = reference_topk.topk_div(
            to_numpy(student), log_p, found.ids.cpu().numpy(), kind, teacher_tail_logprob=tail
        )
        assert (want > 0).all()
        # 1e-6: what rounding log p ≈ −gap to float32 moves log p/q by.
        np.testing.assert_allclose(to_numpy(value), want, rtol=RELATIVE + 1e-6 * gap, atol=1e-15)
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        np.testing.assert_allclose(to_numpy(grad), gradient, rtol=1e-4, atol=1e-12)


def test_the_recipe_of_the_page() -> None:
    page = (Path(__file__).parent.parent / "docs" / "offline-distillation.md").read_text()
    # Behind the page's own logits and labels.
    code = (
        "import torch\nfrom kl_gpu import topk_div, topk_logprobs\n"
        + re.findall(r"```python\n.*?(with torch.no_grad\(\).*?)loss.backward", page, re.DOTALL)[0]
    )
    for gap in (25.0, 30.0, 40.0):
        teacher = peaked(256, 300, gap).view(4, 64, 300)
        student = (teacher + 0.1 * torch.randn_like(teacher)).requires_grad_()
        labels = torch.zeros(4, 64, dtype=torch.long, device=DEVICE)
        given = {"teacher_logits": teacher, "student_logits": student, "labels": labels}
        exec(code, given)  # a page of this repository
        dense = kl_gpu.kl_div(student, teacher, shift=True)
        assert given["logprobs"].shape == (4, 64, 64)
        assert 0 < given["loss"] <= dense * (1 + 1e-5 * gap)
        assert torch.isfinite(torch.autograd.grad(given["loss"], student)[0]).all()


def test_minus_infinity(backend: str) -> None:
    logits = torch.full((3, 300), -INF, device=DEVICE)
    logits[0, [4, 9]] = torch.tensor([1.0, 3.0], device=DEVICE)
    logits[1, 5] = 2.0
    logits[2] = torch.randn(300, device=DEVICE)
    logits[2, ::3] = -INF
    found = kl_gpu.topk_logprobs(logits, 4, backend=backend)
    want, _, tail = reference_topk.topk_logprobs(to_numpy(logits), 4)
    np.testing.assert_allclose(to_numpy(found.logprobs), want, rtol=RELATIVE)
    np.testing.assert_allclose(to_numpy(found.tail_logprob), tail, rtol=RELATIVE)
    assert found.ids[0, :2].tolist() == [9, 4]
    assert (found.logprobs[0, 2:] == -INF).all()
    assert found.logprobs[1].tolist() == [0.0, -INF, -INF, -INF]
    assert (found.tail_logprob[:2] == -INF).all()
    assert ((found.ids >= 0) & (found.ids < 300)).all()
    assert all(len(set(row)) == 4 for row in found.ids.tolist())
    assert torch.isfinite(found.logprobs[2]).all()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_row_without_a_distribution(backend: str, bad: float) -> None:
    logits = torch.randn(3, 300, device=DEVICE)
    logits[1, 299] = bad
    if bad == -INF:
        logits[1] = bad
    found = kl_gpu.topk_logprobs(logits, 4, backend=backend)
    assert torch.isnan(found.logprobs).sum(-1).tolist() == [0, 4, 0]
    assert torch.isnan(found.tail_logprob).tolist() == [False, True, False]


@pytest.mark.parametrize("kind", formulas.TAIL_KINDS["bucket"])
def test_a_student_of_such_a_row(backend: str, kind: str) -> None:
    logits, student = (torch.randn(3, 300, device=DEVICE) for _ in range(2))
    logits[1, 299] = NAN
    found = kl_gpu.topk_logprobs(logits, 4, backend=backend)
    run = {"reduction": "none", "validate": True, "backend": backend}
    value = kl_gpu.topk_div(
        student, found.logprobs, found.ids, kind, teacher_tail_logprob=found.tail_logprob, **run
    )
    assert torch.isnan(value).tolist() == [False, True, False]
    # A NaN of its own is refused as before.
    found.tail_logprob[0] = NAN
    with pytest.raises(ValueError, match=r"teacher_tail_logprob.*nan"):
        kl_gpu.topk_div(
            student, found.logprobs, found.ids, kind, teacher_tail_logprob=found.tail_logprob, **run
        )


def test_rows_that_do_not_count(backend: str) -> None:
    logits = torch.randn(2, 3, 300, device=DEVICE)
    mask = torch.tensor([[True, False, True], [True, True, False]], device=DEVICE)
    plain = kl_gpu.topk_logprobs(logits, 4, backend=backend)
    logits[0, 1], logits[1, 2] = NAN, INF
    found = kl_gpu.topk_logprobs(logits, 4, mask=mask, backend=backend)
    for got, want, filler in zip(found, plain, (0, -1, 0), strict=True):
        assert torch.equal(got[mask], want[mask])
        assert (got[~mask] == filler).all()
    # A teacher of whom nothing is known says nothing, whether or not the mask is given again.
    value = kl_gpu.topk_div(
        torch.randn(2, 3, 300, device=DEVICE), found.logprobs, found.ids,
        teacher_tail_logprob=found.tail_logprob, reduction="none", backend=backend,
    )  # fmt: skip
    assert (value[~mask] == 0).all()
    assert (value[mask] > 0.1).all()


def test_vocab_size_and_views(backend: str) -> None:
    base = torch.full((3, 6, 410), NAN, device=DEVICE)
    base[..., 3:403] = torch.randn(3, 6, 400, device=DEVICE)
    for view in (base[:, 1::4, 3:], base[:, :1, 3:].expand(3, 2, 407), base[:, :4, 3:].transpose(0, 1)):
        found = kl_gpu.topk_logprobs(view, 5, vocab_size=400, backend=backend)
        apart = kl_gpu.topk_logprobs(view[..., :400].clone(), 5, backend=backend)
        assert all(map(torch.equal, found, apart))
    flipped = torch.randn(400, 3, device=DEVICE).T
    assert all(
        map(
            torch.equal,
            kl_gpu.topk_logprobs(flipped, 5, backend=backend),
            kl_gpu.topk_logprobs(flipped.contiguous(), 5, backend=backend),
        )
    )


class _Largest(TorchDispatchMode):
    """The bytes of what operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        new = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]
        self.bytes += [
            x.untyped_storage().nbytes() for x in new if x.untyped_storage().data_ptr() not in inputs
        ]
        return out


def test_nothing_of_the_logits_size() -> None:
    logits = torch.randn(200, 4010, device=DEVICE)[:, 3:4003]
    with _Largest() as seen:
        kl_gpu.topk_logprobs(logits, 8)
    assert 0 < max(seen.bytes) <= 200 * 8 * 8


@pytest.mark.parametrize("lead", [(0,), (2, 0), ()])
def test_leading_shapes(backend: str, lead: tuple[int, ...]) -> None:
    found = kl_gpu.topk_logprobs(torch.randn(*lead, 50, device=DEVICE), 3, backend=backend)
    assert found.logprobs.shape == found.ids.shape == (*lead, 3)
    assert found.tail_logprob.shape == lead
    assert found._fields == ("logprobs", "ids", "tail_logprob")


def test_the_same_bits_alone_and_among_others(backend: str) -> None:
    logits = 3 * torch.randn(23, 2100 if is_slow(backend) else 70001, device=DEVICE)
    alone = kl_gpu.topk_logprobs(logits[11:12], 33, backend=backend)
    for start, stop in ((0, 23), (11, 23), (9, 13), (11, 12)):
        among = kl_gpu.topk_logprobs(logits[start:stop], 33, backend=backend)
        assert all(torch.equal(x[0], y[11 - start]) for x, y in zip(alone, among, strict=True))


def test_no_gradient_and_inference_mode(backend: str) -> None:
    logits = torch.randn(3, 200, device=DEVICE, requires_grad=True)
    plain = kl_gpu.topk_logprobs(logits, 4, backend=backend)
    assert not any(x.requires_grad for x in plain)
    with torch.inference_mode():
        inside = kl_gpu.topk_logprobs(logits * 1, 4, backend=backend)
    assert all(map(torch.equal, plain, inside))
    student = torch.randn(3, 200, device=DEVICE, requires_grad=True)
    value = kl_gpu.topk_div(
        student, inside.logprobs, inside.ids, teacher_tail_logprob=inside.tail_logprob, backend=backend
    )
    assert torch.autograd.grad(value, student)[0].abs().max() > 1e-3


def test_one_graph(backend: str) -> None:
    torch.compiler.reset()

    def known(logits: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return kl_gpu.topk_logprobs(logits, 4, mask=mask, temperature=0.8, backend=backend)

    compiled = torch.compile(known, fullgraph=True, dynamic=True)
    for rows in (3, 5):
        logits, mask = torch.randn(rows, 90, device=DEVICE), torch.arange(rows, device=DEVICE) != 1
        for want, got in zip(known(logits, mask), compiled(logits, mask), strict=True):
            assert torch.equal(want, got)


def test_opcheck() -> None:
    given, rest = torch.randn(2, 3, 5, device=DEVICE).double(), torch.randn(2, 3, device=DEVICE).double()
    torch.library.opcheck(torch.ops.kl_gpu.best.default, (given, rest))


X = torch.zeros(2, 3, 8)
CASES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("logits a list", {"logits": [0.0]}, TypeError, "logits.*tensor.*list"),
    ("logits int", {"logits": X.long()}, TypeError, "logits.*int64"),
    ("no columns", {"logits": X[..., :0]}, ValueError, "logits.*column"),
    ("0-d", {"logits": X[0, 0, 0]}, ValueError, r"logits.*\(\)"),
    ("nested", {"logits": torch.nested.nested_tensor([X[0], X[1, :2]])}, TypeError, "logits.*nested"),
    ("shared", {"logits": X.as_subclass(type("DTensor", (Tensor,), {}))}, TypeError, "logits.*full_tensor"),
    ("k 0", {"k": 0}, ValueError, r"\bk must.*\[1, 8\], got 0"),
    ("k negative", {"k": -1}, ValueError, r"\bk must.*-1"),
    ("k past V", {"k": 9}, ValueError, r"\bk must.*\[1, 8\], got 9"),
    ("k past vocab_size", {"k": 8, "vocab_size": 7}, ValueError, r"\bk must.*\[1, 7\], got 8"),
    ("k a float", {"k": 2.0}, TypeError, r"\bk must.*int.*float"),
    ("k a bool", {"k": True}, TypeError, r"\bk must.*int.*bool"),
    ("k None", {"k": None}, TypeError, r"\bk must.*int.*NoneType"),
    ("temperature 0", {"temperature": 0}, ValueError, "temperature.*> 0"),
    ("mask float", {"mask": X[..., 0]}, TypeError, "mask.*float32"),
    ("mask of a wrong shape", {"mask": X.bool()}, ValueError, r"mask.*\(2, 3\).*\(2, 3, 8\)"),
    ("vocab_size 0", {"vocab_size": 0}, ValueError, r"vocab_size.*\[1, 8\]"),
    ("backend unknown", {"backend": "cuda"}, ValueError, "backend.*cuda"),
    ("backend an int", {"backend": 1}, TypeError, "backend.*string"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_refused(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a kernel was started")

    monkeypatch.setattr(complement_ops, "complement", refuse)
    with pytest.raises(AssertionError, match="started"):
        kl_gpu.topk_logprobs(X, 2)
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        kl_gpu.topk_logprobs(**{"logits": X, "k": 2} | arguments)

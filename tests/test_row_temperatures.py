"""A temperature of each row's own: the float64 reference, and the bits of the same row with a float."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import kl_gpu
from kl_gpu import reference
from realistic_rows import raised_token, tops_on_a_floor
from support import DEVICE, check_gradients, check_value, is_slow, to_numpy

# Of a student and of a teacher; no row has the same on both sides, which a float's kernel would know.
STUDENT = (0.7, 1.0, 2.0, 0.6, 1.7, 1.0)
TEACHER = (1.3, 0.6, 1.0, 0.5, 1.1, 2.5)
N = len(STUDENT)


def own(temperatures: tuple[float, ...]) -> Tensor:
    return torch.tensor(temperatures, device=DEVICE)


def sides(columns: int, dtype: torch.dtype = torch.float32, rows: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    parts = [family(rows // 2, columns, generator) for family in (tops_on_a_floor, raised_token)]
    return tuple(torch.cat(side).to(DEVICE, dtype) for side in zip(*parts, strict=True))  # type: ignore[return-value]


def with_gradients(function: Any, *leaves: Tensor, **options: Any) -> tuple[Tensor, ...]:
    leaves = tuple(x.detach().clone().requires_grad_() for x in leaves)
    found = function(*leaves, **options)
    value = found if isinstance(found, Tensor) else sum(found)
    value.sum().backward()
    return value.detach(), *(x.grad for x in leaves)


def row_by_row(function: Any, *leaves: Tensor, per_row: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """The same of each row alone, with its entry of what is given per row; temperatures as floats."""
    found = []
    for i in range(len(leaves[0])):
        mine = {name: x[i].item() if "temperature" in name else x[i : i + 1] for name, x in per_row.items()}
        found.append(with_gradients(function, *(x[i : i + 1] for x in leaves), **mine, **options))
    return [torch.cat(x) for x in zip(*found, strict=True)]


def same_bits(got: Any, want: Any) -> None:
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y), (x - y).abs().max()


@pytest.mark.parametrize("two", [False, True], ids=["one temperature", "two"])
def test_within_the_promised_bounds(backend: str, kind: str, two: bool) -> None:
    student, teacher = sides(70 if is_slow(backend) else 5000)
    options = {"temperature": own(STUDENT)} | ({"teacher_temperature": own(TEACHER)} if two else {})
    value, *grads = with_gradients(
        kl_gpu.divergence, student, teacher, kind=kind, reduction="none", backend=backend, **options
    )
    numbers: Any = {name: to_numpy(x)[:, None] for name, x in options.items()}
    check_value(value, student, teacher, kind, backend, f"two {two}", **numbers)
    check_gradients(student, teacher, tuple(grads), kind, backend, f"two {two}", **numbers)


@pytest.mark.parametrize(
    ("dtype", "reduction", "two"),
    [(torch.float32, "none", True), (torch.bfloat16, "sum", False), (torch.float64, "sum", True)],
)
def test_a_row_has_the_bits_that_it_has_with_a_float(
    backend: str, kind: str, dtype: torch.dtype, reduction: str, two: bool
) -> None:
    if is_slow(backend) and kind not in ("forward_kl", "js", "tv"):
        pytest.skip("Triton's interpreter is slow, and the other formulas are given their scales alike")
    student, teacher = sides(64, dtype)
    options = {"temperature": own(STUDENT)} | ({"teacher_temperature": own(TEACHER)} if two else {})
    more = {"kind": kind, "backend": backend, "per_row": options}
    value, *grads = with_gradients(
        kl_gpu.divergence, student, teacher, kind=kind, backend=backend, reduction=reduction, **options
    )
    want = row_by_row(kl_gpu.divergence, student, teacher, reduction="none", **more)
    if reduction == "none":
        same_bits([value], want[:1])
    same_bits(grads, want[1:])


def test_rows_split_over_threads_and_programs(backend: str) -> None:
    """Rows longer than a block of the CPU's or a split of the GPU's, fewer than threads."""
    columns = 16384 + 40 if is_slow(backend) else 40_000
    student, teacher = sides(columns, rows=2)
    temperature = own((0.5, 2.0))
    for kind in ("js",) if is_slow(backend) else ("reverse_kl", "js"):
        more = {"kind": kind, "backend": backend, "reduction": "none"}
        got = with_gradients(kl_gpu.divergence, student, teacher, temperature=temperature, **more)
        want = row_by_row(kl_gpu.divergence, student, teacher, per_row={"temperature": temperature}, **more)
        same_bits(got, want)


def test_t_squared_is_the_rows_own(backend: str) -> None:
    student, teacher = sides(64)
    options = {"temperature": own(STUDENT), "weight": torch.rand(N, device=DEVICE) + 0.5}
    more = {"kind": "js", "t_squared": True, "reduction": "none", "backend": backend}
    got = with_gradients(kl_gpu.divergence, student, teacher, **options, **more)
    same_bits(got, row_by_row(kl_gpu.divergence, student, teacher, per_row=options, **more))
    without = kl_gpu.divergence(student, teacher, **options, **(more | {"t_squared": False}))
    torch.testing.assert_close(got[0], without * own(STUDENT) ** 2, rtol=1e-6, atol=0)
    # At once, with the gradient.
    del options["weight"]
    total, *grads = with_gradients(
        kl_gpu.divergence, student, teacher, **options, **(more | {"reduction": "sum"})
    )
    value, *later = with_gradients(kl_gpu.divergence, student, teacher, **options, **more)
    torch.testing.assert_close(total, value.sum())
    same_bits(grads, later)


def test_a_row_does_not_depend_on_others(backend: str) -> None:
    student, teacher = sides(64)
    temperature = own(STUDENT)
    whole = kl_gpu.js_div(student, teacher, temperature=temperature, reduction="none", backend=backend)
    some = kl_gpu.js_div(
        student[2:5], teacher[2:5], temperature=temperature[2:5], reduction="none", backend=backend
    )
    assert torch.equal(whole[2:5], some)


def test_statistics_and_log_probabilities(backend: str) -> None:
    student, teacher = sides(64)
    labels = torch.arange(N, device=DEVICE) * 7
    both = {"temperature": own(STUDENT), "teacher_temperature": own(TEACHER)}
    got = kl_gpu.token_stats(student, teacher, labels, **both, backend=backend)
    for i in range(N):
        floats = {name: x[i].item() for name, x in both.items()}
        one = slice(i, i + 1)
        want = kl_gpu.token_stats(student[one], teacher[one], labels[one], **floats, backend=backend)
        same_bits([x[one] for x in got], want)
    per_row = {"temperature": own(STUDENT)}
    for ids in (labels, torch.stack((labels, labels + 1, labels), -1)):
        got = with_gradients(
            lambda x, **o: _columns(kl_gpu.token_logprobs(x, entropy=True, **o)), student, token_ids=ids,
            backend=backend, **per_row,
        )  # fmt: skip
        want = row_by_row(
            lambda x, **o: _columns(kl_gpu.token_logprobs(x, entropy=True, **o)), student,
            per_row=per_row | {"token_ids": ids}, backend=backend,
        )  # fmt: skip
        same_bits(got, want)
    log_q = reference.log_softmax(to_numpy(student), to_numpy(own(STUDENT))[:, None])
    logprob = kl_gpu.token_logprobs(student, labels, **per_row, backend=backend)
    want = torch.from_numpy(log_q).gather(-1, labels.cpu()[:, None])[:, 0]
    torch.testing.assert_close(logprob.cpu().double(), want, rtol=5e-6, atol=0)


def _columns(found: tuple[Tensor, Tensor]) -> Tensor:
    logprobs, entropy = found
    return torch.cat((logprobs.reshape(len(entropy), -1), entropy[:, None]), -1)


def test_top_k(backend: str) -> None:
    student, teacher = sides(64)
    best = kl_gpu.topk_logprobs(teacher, 5, temperature=own(TEACHER), backend=backend)
    for i in range(N):
        one = slice(i, i + 1)
        same_bits(
            [x[one] for x in best],
            kl_gpu.topk_logprobs(teacher[one], 5, temperature=own(TEACHER)[i].item(), backend=backend),
        )
    logprobs, ids = torch.log_softmax(teacher, -1).topk(5)
    more = {"tail": "renormalize", "t_squared": True, "reduction": "none", "backend": backend}
    per_row = {"teacher_logprobs": logprobs, "teacher_ids": ids, "temperature": own(STUDENT)}
    got = with_gradients(kl_gpu.topk_div, student, **per_row, **more)
    want = row_by_row(kl_gpu.topk_div, student, per_row=per_row, **more)
    assert want[0].min() > 0
    same_bits(got, want)
    with pytest.raises(ValueError, match=r"needs tail='renormalize'.* got a temperature of shape \(6,\)"):
        kl_gpu.topk_div(student, logprobs, ids, temperature=own(STUDENT), backend=backend)
    # Both sides known by K tokens, which PyTorch compares.
    known, places = torch.log_softmax(student, -1).topk(40)
    per_row |= {"student_ids": places}
    del more["backend"]
    got = with_gradients(kl_gpu.sparse_div, known, **per_row, **more)
    same_bits(got, row_by_row(kl_gpu.sparse_div, known, per_row=per_row, **more))


def test_shift_and_mask(backend: str) -> None:
    """Temperatures belong to the logits, what masks hold to the next time; a row that does not count may have
    any temperature."""
    student, teacher = (x.view(2, 3, -1) for x in sides(64))
    temperature = own((0.7, 1.0, 0.0, 0.3, float("nan"), -1.0)).view(2, 3)
    mask = torch.tensor([[False, True, True], [True, True, False]], device=DEVICE)
    got = with_gradients(
        kl_gpu.js_div, student, teacher, temperature=temperature, mask=mask, shift=True, reduction="mean",
        t_squared=True, backend=backend,
    )  # fmt: skip
    kept = torch.tensor([True, True, True, False], device=DEVICE)
    flat = [x[:, :-1].reshape(4, -1) for x in (student, teacher)]
    safe = torch.where(kept, temperature[:, :-1].reshape(4), 1.0)
    want = with_gradients(kl_gpu.js_div, *flat, temperature=safe, mask=kept, t_squared=True, backend=backend)
    assert torch.equal(got[0], want[0])
    for grad, other in zip(got[1:], want[1:], strict=True):
        assert torch.equal(grad[:, :-1].reshape(4, -1), other)
        assert (grad[:, -1] == 0).all()


def heads() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = (N, 8), (90, 8), (N, 12), (90, 12)
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


@pytest.mark.parametrize("how", [{}, {"softcap": 4.0}, {"logit_scale": 0.5, "teacher_logit_scale": 2.0}])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_hidden_states(backend: str, how: dict[str, float], reduction: str) -> None:
    if is_slow(backend) and how:
        pytest.skip("Triton's interpreter is slow, and caps and factors are not its affair")
    student_hidden, student_weight, teacher_hidden, teacher_weight = heads()
    mask = torch.tensor([True, True, False, True, True, True], device=DEVICE)
    options = {
        "temperature": own(STUDENT), "teacher_temperature": own(TEACHER), "mask": mask, "backend": backend,
        "reduction": reduction, "kind": "js",
    }  # fmt: skip

    def linear(*leaves: Tensor) -> Tensor:
        hidden, weight = leaves
        return kl_gpu.linear_div(
            hidden, weight, teacher_hidden, teacher_weight, chunk_rows=2, **how, **options
        )

    def dense(hidden: Tensor, weight: Tensor) -> Tensor:
        s = (hidden @ weight.t()) * how.get("logit_scale", 1.0)
        s = how["softcap"] * torch.tanh(s / how["softcap"]) if "softcap" in how else s
        t = (teacher_hidden @ teacher_weight.t()) * how.get("teacher_logit_scale", 1.0)
        return kl_gpu.divergence(s, t, **options)

    got = with_gradients(linear, student_hidden, student_weight)
    want = with_gradients(dense, student_hidden, student_weight)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_statistics_of_hidden_states(backend: str) -> None:
    student_hidden, student_weight, teacher_hidden, teacher_weight = heads()
    s, t = student_hidden @ student_weight.t(), teacher_hidden @ teacher_weight.t()
    both = {"temperature": own(STUDENT), "teacher_temperature": own(TEACHER), "backend": backend}
    labels = torch.arange(N, device=DEVICE)
    got = kl_gpu.linear_token_stats(*heads(), labels, logit_scale=0.5, chunk_rows=4, **both)
    torch.testing.assert_close(
        tuple(got), tuple(kl_gpu.token_stats(0.5 * s, t, labels, **both)), rtol=1e-4, atol=1e-5
    )
    del both["teacher_temperature"]
    got = kl_gpu.linear_token_logprobs(
        student_hidden, student_weight, labels, logit_scale=0.5, chunk_rows=4, entropy=True, **both
    )
    want = kl_gpu.token_logprobs(0.5 * s, labels, entropy=True, **both)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    logprobs, ids = torch.log_softmax(t, -1).topk(5)
    how = {"tail": "renormalize", "kind": "reverse_kl", **both}
    got = kl_gpu.linear_topk_div(student_hidden, student_weight, logprobs, ids, chunk_rows=4, **how)
    torch.testing.assert_close(got, kl_gpu.topk_div(s, logprobs, ids, **how), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("two", [False, True], ids=["one temperature", "two"])
def test_compiled_once(backend: str, two: bool) -> None:
    if is_slow(backend):
        pytest.skip("Triton's interpreter is slow, and the graph is not its affair")
    student, teacher = sides(64)
    labels = torch.arange(N, device=DEVICE)

    def loss(s: Tensor, temperature: Tensor, other: Tensor | None) -> Tensor:
        value = kl_gpu.kl_div(
            s, teacher, temperature=temperature, teacher_temperature=other, t_squared=other is None,
            backend=backend,
        )  # fmt: skip
        return value + kl_gpu.token_logprobs(s, labels, temperature=temperature, backend=backend).sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for by in (1.0, 1.5, 0.25):
        temperatures = by * own(STUDENT), by * own(TEACHER) if two else None
        got = with_gradients(compiled, student, temperature=temperatures[0], other=temperatures[1])
        want = with_gradients(loss, student, temperature=temperatures[0], other=temperatures[1])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert counter.frame_count == 1


def test_hidden_states_compiled(backend: str) -> None:
    def loss(hidden: Tensor, temperature: Tensor) -> Tensor:
        more = {"temperature": temperature, "backend": backend}
        value = kl_gpu.linear_div(hidden, *heads_[1:], **more)
        return value + kl_gpu.linear_token_logprobs(hidden, heads_[1], labels, **more).mean()

    heads_, labels = heads(), torch.arange(N, device=DEVICE)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = with_gradients(compiled, heads_[0], temperature=own(STUDENT))
    torch.testing.assert_close(
        got, with_gradients(loss, heads_[0], temperature=own(STUDENT)), rtol=1e-5, atol=1e-7
    )


def test_mapped_with_the_rows(backend: str) -> None:
    student, teacher = (x.view(2, 3, -1) for x in sides(64))
    temperature = own(STUDENT).view(2, 3)

    def total(s: Tensor, t: Tensor, temperature: Tensor) -> Tensor:
        return kl_gpu.kl_div(s, t, temperature=temperature, reduction="sum", backend=backend)

    got = torch.func.vmap(torch.func.grad(total))(student, teacher, temperature)
    _, want, _ = with_gradients(total, student, teacher, temperature=temperature)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
    shared = torch.func.vmap(torch.func.grad(total), in_dims=(0, 0, None))(student, teacher, temperature[0])
    torch.testing.assert_close(shared[0], want[0], rtol=1e-6, atol=1e-8)


def test_one_out_of_range_is_nan_where_it_cannot_be_looked_at(backend: str) -> None:
    student, teacher = sides(64)
    labels = torch.arange(N, device=DEVICE)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def values(temperature: Tensor) -> tuple[Tensor, ...]:
        more = {"temperature": temperature, "backend": backend}
        forward = kl_gpu.kl_div(student, teacher, reduction="none", **more)
        mixture = kl_gpu.js_div(student, teacher, reduction="none", **more)
        return forward, mixture, kl_gpu.token_logprobs(student, labels, **more)

    for bad in (0.0, float("nan")) if is_slow(backend) else (0.0, -1.0, float("nan"), float("inf"), 1e-7):
        for found in values(own((*STUDENT[:3], bad, *STUDENT[4:]))):
            assert found.isnan().tolist() == [False, False, False, True, False, False], bad


@pytest.mark.parametrize(
    ("temperature", "error", "message"),
    [
        (
            torch.ones(N, dtype=torch.int64),
            TypeError,
            r"temperature must be a float or a floating tensor \[N\]",
        ),
        (torch.ones(N - 1), ValueError, r"temperature must have .* leading shape \(6,\), got \(5,\)"),
        (torch.tensor(1.0), ValueError, r"temperature must have .* leading shape \(6,\), got \(\)"),
        (torch.ones(N).requires_grad_(), ValueError, r"temperature gets no gradient.*detach"),
    ],
)
def test_refused(temperature: Tensor, error: type[Exception], message: str) -> None:
    student, teacher = sides(64)
    labels, temperature = torch.arange(N, device=DEVICE), temperature.to(DEVICE)
    more = {"temperature": temperature}
    logprobs, ids = torch.log_softmax(teacher, -1).topk(5)
    for call in (
        lambda: kl_gpu.kl_div(student, teacher, **more),
        lambda: kl_gpu.token_stats(student, teacher, **more),
        lambda: kl_gpu.token_logprobs(student, labels, **more),
        lambda: kl_gpu.topk_logprobs(teacher, 5, **more),
        lambda: kl_gpu.topk_div(student, logprobs, ids, tail="renormalize", **more),
        lambda: kl_gpu.linear_div(*heads(), **more),
        lambda: kl_gpu.linear_token_stats(*heads(), **more),
        lambda: kl_gpu.linear_token_logprobs(*heads()[:2], labels, **more),
    ):
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(error, match="teacher_" + message.removeprefix("teacher_")):
        kl_gpu.kl_div(student, teacher, teacher_temperature=temperature)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a device looking at them would wait")
@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), 1e-7, 1e10])
def test_refused_where_the_row_counts(bad: float) -> None:
    student, teacher = sides(64)
    temperature = own((*STUDENT[:3], bad, *STUDENT[4:]))
    with pytest.raises(ValueError, match=r"temperature must be > 0, within \[1e-06, 1e\+09\]"):
        kl_gpu.kl_div(student, teacher, temperature=temperature)
    mask = torch.arange(N) != 3
    assert kl_gpu.kl_div(student, teacher, temperature=temperature, mask=mask).isfinite()
    with pytest.raises(ValueError, match="logit_scale"):
        kl_gpu.linear_div(*heads(), temperature=own(STUDENT) * 1e-5, logit_scale=1e3)
    hidden, weight, *_ = heads()
    both = {"temperature": own(STUDENT) * 1e-5, "logit_scale": 1e3}
    ids = torch.zeros(N, dtype=torch.int64)
    with pytest.raises(ValueError, match="logit_scale"):
        kl_gpu.linear_token_logprobs(hidden, weight, ids, **both)
    with pytest.raises(ValueError, match="logit_scale"):
        kl_gpu.linear_topk_div(hidden, weight, torch.zeros(N, 1), ids[:, None], tail="renormalize", **both)


def test_t_squared_wants_one_temperature() -> None:
    student, teacher = sides(64)
    one, other = own(STUDENT), own(TEACHER)
    with pytest.raises(ValueError, match="t_squared needs one temperature"):
        kl_gpu.kl_div(student, teacher, temperature=one, teacher_temperature=other, t_squared=True)
    same = kl_gpu.kl_div(student, teacher, temperature=one, teacher_temperature=one, t_squared=True)
    assert torch.equal(same, kl_gpu.kl_div(student, teacher, temperature=one, t_squared=True))


def test_module() -> None:
    student, teacher = sides(64)
    loss = kl_gpu.DivergenceLoss("reverse_kl", temperature=3.0)
    got = loss(student, teacher, temperature=own(STUDENT))
    assert torch.equal(got, kl_gpu.divergence(student, teacher, "reverse_kl", temperature=own(STUDENT)))
    assert torch.equal(
        loss(student, teacher), kl_gpu.divergence(student, teacher, "reverse_kl", temperature=3.0)
    )
    got = loss.linear(*heads(), temperature=own(STUDENT))
    assert torch.equal(got, kl_gpu.linear_div(*heads(), "reverse_kl", temperature=own(STUDENT)))

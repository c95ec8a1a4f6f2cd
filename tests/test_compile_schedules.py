"""Numbers that change from step to step under torch.compile: a graph for the first value, one for others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.testing import CompileCounterWithBackend

import kl_gpu
from kl_gpu.backends import registry
from support import DEVICE, pair

ROWS, COLUMNS, HIDDEN, STEPS = 3, 33, 8, 12
SHARES = [0.05 + 0.075 * i for i in range(STEPS)]
# Down to 1 and on: 1 is where T² and p^(1/T) have nothing to do.
TEMPERATURES = [3.0 - 0.25 * i for i in range(STEPS - 1)] + [0.75]
COUNTS = list(range(7, 7 + STEPS))


def _token_ids(logits: Tensor) -> Tensor:
    return torch.arange(len(logits), device=DEVICE)


def _known(teacher: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = torch.log_softmax(teacher, -1).topk(4)
    return values, ids


def _heads(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    states = student[:, :HIDDEN], teacher[:, :HIDDEN]
    weights = (x[:1].repeat(HIDDEN, 1).cumsum(0).t() / HIDDEN for x in (student, teacher))
    return tuple(x for side in zip(states, weights, strict=True) for x in side)


Case = tuple[Callable[..., Any], list[tuple[float, ...]]]

# By what changes: a function of both sides, of the numbers of a step, and of the backend; and the steps.
CASES: dict[str, Case] = {
    "kl_div: temperature, T²": (
        lambda s, t, temperature, **o: kl_gpu.kl_div(s, t, temperature=temperature, t_squared=True, **o),
        [(x,) for x in TEMPERATURES],
    ),
    "kl_div: both temperatures, alike": (
        lambda s, t, one, two, **o: kl_gpu.kl_div(
            s, t, direction="reverse", temperature=one, teacher_temperature=two, t_squared=True, **o
        ),
        [(x, x) for x in TEMPERATURES],
    ),
    "js_div: beta, both temperatures, normalizer": (
        lambda s, t, beta, one, two, n, **o: kl_gpu.js_div(
            s, t, beta=beta, temperature=one, teacher_temperature=two, normalizer=n, **o
        ),
        [(b, x, x / 2 + 1, x) for b, x in zip(SHARES, TEMPERATURES, strict=True)],
    ),
    "divergence per row: beta, temperature": (
        lambda s, t, beta, temperature, **o: kl_gpu.divergence(
            s, t, "skew_reverse_kl", beta=beta, temperature=temperature, reduction="none", **o
        ),
        list(zip(SHARES, TEMPERATURES, strict=True)),
    ),
    "token_logprobs: temperature": (
        lambda s, t, temperature, **o: kl_gpu.token_logprobs(
            s, _token_ids(s), temperature=temperature, entropy=True, **o
        ),
        [(x,) for x in TEMPERATURES],
    ),
    "token_stats: both temperatures": (
        lambda s, t, one, two, **o: kl_gpu.token_stats(
            s, t, _token_ids(s), temperature=one, teacher_temperature=two, **o
        ),
        [(x, x / 2 + 1) for x in TEMPERATURES],
    ),
    "topk_div: beta, normalizer": (
        lambda s, t, beta, n, **o: kl_gpu.topk_div(s, *_known(t), "js", beta=beta, normalizer=n, **o),
        list(zip(SHARES, COUNTS, strict=True)),
    ),
    "topk_div: temperature, T²": (
        lambda s, t, temperature, **o: kl_gpu.topk_div(
            s, *_known(t), tail="renormalize", temperature=temperature, t_squared=True, **o
        ),
        [(x,) for x in TEMPERATURES],
    ),
    "linear_div: beta, temperature, normalizer": (
        lambda s, t, beta, temperature, n, **o: kl_gpu.linear_div(
            *_heads(s, t), "jeffreys", beta=beta, temperature=temperature, t_squared=True, normalizer=n, **o
        ),
        list(zip(SHARES, TEMPERATURES, COUNTS, strict=True)),
    ),
    "linear_div per row: soft cap, logit scales": (
        lambda s, t, cap, one, two, **o: kl_gpu.linear_div(
            *_heads(s, t), softcap=cap, logit_scale=one, teacher_logit_scale=two, reduction="none", **o
        ),
        [(5 * x, x, x / 2 + 1) for x in TEMPERATURES],
    ),
    "linear_token_logprobs: temperature, soft cap, logit scale": (
        lambda s, t, temperature, cap, one, **o: kl_gpu.linear_token_logprobs(
            *_heads(s, t)[:2], _token_ids(s) % HIDDEN, temperature=temperature, softcap=cap, logit_scale=one,
            entropy=True, **o,
        ),
        [(x, 5 * x, x / 2 + 1) for x in TEMPERATURES],
    ),
    "linear_token_stats: both temperatures, logit scale": (
        # All but whether the tops agree, which may be 0 in every row.
        lambda s, t, one, two, scale, **o: kl_gpu.linear_token_stats(
            *_heads(s, t), _token_ids(s) % HIDDEN, temperature=one, teacher_temperature=two,
            logit_scale=scale, **o,
        )[:6],
        [(x, x / 2 + 1, x / 3) for x in TEMPERATURES],
    ),
    "linear_topk_div: beta, normalizer, soft cap": (
        lambda s, t, beta, n, cap, **o: kl_gpu.linear_topk_div(
            *_heads(s, t)[:2], *_known(t[:, :HIDDEN]), "js", beta=beta, normalizer=n, softcap=cap, **o
        ),
        list(zip(SHARES, COUNTS, TEMPERATURES, strict=True)),
    ),
}  # fmt: skip
PENALTY: Case = (
    lambda s, t, clamp: [kl_gpu.kl_penalty(s, t, name, clamp=clamp) for name in ("k1", "k2", "k3", "abs")],
    [(x / 4,) for x in TEMPERATURES],
)


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _compare(
    plain: Callable[..., Any], traced: Callable[..., Any], numbers: tuple[float, ...], rows: int = ROWS
) -> None:
    """Values and gradients of both, to what sums in another order may change."""
    student, teacher = pair(rows, COLUMNS)
    student.requires_grad_()
    want, got = (_tensors(f(student, teacher, *numbers)) for f in (plain, traced))
    for x, y in zip(want, got, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-9)
        assert x.abs().max() > 1e-5
    if want[0].requires_grad:
        x, y = (torch.autograd.grad(sum(z.sum() for z in found), student)[0] for found in (want, got))
        # Not compiled, the gradient may come in forward: other last bits of q − p.
        torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-7)
        assert x.abs().max() > 1e-4


def _compile(function: Callable[..., Any], compiler: str = "aot_eager", **options: Any) -> tuple[Any, Any]:
    """The compiled function, and what counts its graphs in `frame_count`."""
    counter = CompileCounterWithBackend(compiler)
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


def _follow(case: Case, compiler: str = "aot_eager", **options: Any) -> None:
    torch.compiler.reset()
    function, steps = case
    traced, counter = _compile(lambda *arguments: function(*arguments, **options), compiler)
    for numbers in steps:
        _compare(lambda *arguments: function(*arguments, **options), traced, numbers)
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_two_graphs(backend: str, name: str) -> None:
    if backend == "native" and not registry._has_native():
        pytest.skip("installed without compiled kernels")
    _follow(CASES[name], backend=backend)


def test_two_graphs_in_triton() -> None:
    function, steps = CASES["js_div: beta, both temperatures, normalizer"]
    _follow((function, steps[:4]), backend="triton")


def test_two_graphs_of_a_penalty() -> None:
    _follow(PENALTY)


@pytest.mark.parametrize(
    "name", ["js_div: beta, both temperatures, normalizer", "linear_div: beta, temperature, normalizer"]
)
def test_two_graphs_in_inductor(name: str) -> None:
    function, steps = CASES[name]
    _follow((function, steps[:5]), "inductor", backend=None)


def test_two_graphs_of_a_penalty_in_inductor() -> None:
    function, steps = PENALTY
    _follow((function, steps[:5]), "inductor")


@pytest.mark.parametrize("dynamic", [None, True])
def test_two_graphs_where_the_rows_change_too(dynamic: bool | None) -> None:
    torch.compiler.reset()
    function, steps = CASES["js_div: beta, both temperatures, normalizer"]
    traced, counter = _compile(function, dynamic=dynamic)
    for i, numbers in enumerate(steps[:6]):
        _compare(function, traced, numbers, rows=2 + i)
    assert counter.frame_count <= 2


class _Config:
    def __init__(self) -> None:
        self.temperature, self.shares = 2.0, {"beta": 0.5}


class _Trainer(torch.nn.Module):
    """Numbers where programs keep them: a module's attribute, another object's, a dict, a loss's options."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.config = 2.0, _Config()
        self.loss = kl_gpu.DivergenceLoss("skew_forward_kl", beta=0.5, temperature=2.0)

    def set(self, temperature: float, beta: float) -> None:
        self.temperature, self.config.temperature = temperature, temperature
        self.config.shares["beta"] = beta
        self.loss.options.update(beta=beta, temperature=temperature)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        own = kl_gpu.kl_div(student, teacher, temperature=self.temperature, t_squared=True)
        config, beta = self.config, self.config.shares["beta"]
        return own + kl_gpu.js_div(student, teacher, beta=beta, temperature=config.temperature) + self.loss(
            student, teacher
        )  # fmt: skip


def test_two_graphs_where_the_numbers_are_attributes() -> None:
    torch.compiler.reset()
    trainer = _Trainer()
    traced, counter = _compile(trainer)
    for temperature, beta in zip(TEMPERATURES, SHARES, strict=True):
        trainer.set(temperature, beta)
        _compare(trainer, traced, ())
    assert counter.frame_count == 2


def test_an_end_of_beta_has_a_graph_of_its_own_and_no_more() -> None:
    """The kind there is another. Nor does it make constants of what comes after, by that name or in this
    function: PyTorch remembers which symbols were not used."""
    torch.compiler.reset()

    def loss(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
        return kl_gpu.js_div(student, teacher, beta=beta)

    def another(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
        return kl_gpu.divergence(student, teacher, "jeffreys", beta=beta)

    traced, counter = _compile(loss)
    for beta in (0.3, 0.2, 0.0, 0.1, 1.0, 0.7, 0.0, 1.0, 0.9):
        _compare(loss, traced, (beta,))
    assert counter.frame_count == 4
    traced, counter = _compile(another)
    for beta in SHARES[:4]:
        _compare(another, traced, (beta,))
    assert counter.frame_count == 2


@pytest.mark.parametrize("temperature", [-1.0, 0.0])
def test_a_bad_number_still_raises(temperature: float) -> None:
    torch.compiler.reset()
    function, steps = CASES["kl_div: temperature, T²"]
    traced, _ = _compile(function)
    for numbers in steps[:2]:
        _compare(function, traced, numbers)
    # In one graph Dynamo cannot write our message, and quotes the line that would have.
    with pytest.raises((ValueError, TorchDynamoException)):
        traced(*pair(ROWS, COLUMNS), temperature)
    with pytest.raises(ValueError, match=f"temperature must be .* got {temperature}"):
        torch.compile(function, backend="aot_eager")(*pair(ROWS, COLUMNS), temperature)


def test_the_overload_is_the_operator(backend: str) -> None:
    student, teacher = pair(ROWS, COLUMNS)
    numbers = torch.tensor([0.3, 0.5, 0.25], dtype=torch.float64, device="cpu")
    packet = torch.ops.kl_gpu.value
    want = packet.default(student, teacher, None, "js", *numbers.tolist(), backend)
    arguments = numbers, student, teacher, None, "js", backend
    torch.testing.assert_close(packet.numbers(*arguments), want, rtol=0, atol=0)
    torch.library.opcheck(packet.numbers, arguments)
    row_scale, to_student = torch.ones(ROWS, device=DEVICE), torch.empty_like(student)
    gradient = torch.ops.kl_gpu.gradient.numbers
    arguments = numbers, student, teacher, None, want[1], row_scale, None, "js", backend, to_student, None
    torch.library.opcheck(gradient, arguments)
    if hasattr(torch.Tag, "cudagraph_unsafe"):  # a recorded graph would repeat the numbers of the recording
        assert torch.Tag.cudagraph_unsafe in gradient.tags
        assert torch.Tag.cudagraph_unsafe not in torch.ops.kl_gpu.gradient.default.tags

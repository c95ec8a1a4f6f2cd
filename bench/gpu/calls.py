"""Calls of every kernel on a few rows: each result is right, and has the same bits again.

`python -m bench.gpu.calls NAME` makes the calls of that name, in --processes processes at once. That compiles
a session's kernels, and is what compute-sanitizer watches.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import Tensor

import kl_gpu
from kl_gpu.backends import registry
from kl_gpu.backends.interface import RowPair

from ..harness.cases import Case, Problem
from ..harness.check import check
from ..harness.options import at_least, usual_device
from ..harness.options import device as device_of
from ..harness.systems import WORKLOADS, Output, ours
from ..suite.plan import PLANS

_K = 64  # tokens of a teacher of whom the best are known
WRONG = "wrong: "  # what begins a line that says so
SHARED = 40001  # columns of a row that three programs share, in no whole number of accesses
_FEW, _SOME = 3, 16  # rows

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Call(Case):
    """`what` is a workload of the suite, or one of `OTHERS`."""

    what: str

    def __str__(self) -> str:
        return f"{super().__str__()}, {self.what}"


class OtherBits(Exception):
    """The same call gave other bits."""


def _both_sides(problem: Problem, backend: str | None) -> Results:
    """One row does not count; gradients of both sides, after the value."""
    student, teacher = (x.detach().requires_grad_() for x in problem.turn(0)[:2])
    mask = torch.arange(problem.case.rows, device=student.device) != 1
    value = kl_gpu.divergence(
        student, teacher, problem.case.kind, mask=mask, reduction="none", backend=backend
    )
    return value.detach(), *torch.autograd.grad(value, (student, teacher), problem.row_gradient)


def _in_place(problem: Problem, backend: str | None) -> Results:
    student, teacher, _ = problem.turn(0)
    leaf = student.detach().requires_grad_()
    value = kl_gpu.divergence(leaf * 1, teacher, problem.case.kind, inplace=True, backend=backend)
    return value.detach(), *torch.autograd.grad(value, leaf)


def _labels(problem: Problem) -> Tensor:
    rows, vocab = problem.case.rows, problem.case.vocab
    return (torch.arange(rows, device=problem.row_gradient.device) * 7919 + 11) % vocab


def _token_stats(problem: Problem, backend: str | None) -> Results:
    student, teacher, _ = problem.turn(0)
    return tuple(kl_gpu.token_stats(student, teacher, _labels(problem), backend=backend))


def _token_logprobs(problem: Problem, backend: str | None) -> Results:
    student = problem.turn(0)[0].detach().requires_grad_()
    found = kl_gpu.token_logprobs(student, _labels(problem), entropy=True, backend=backend)
    weights = (problem.row_gradient.to(found[0].dtype),) * 2
    return *(x.detach() for x in found), *torch.autograd.grad(found, student, weights)


def _topk_div(problem: Problem, backend: str | None) -> Results:
    student, teacher, _ = problem.turn(0)
    student = student.detach().requires_grad_()
    best, ids = teacher.float().log_softmax(-1).topk(min(_K, problem.case.vocab))
    value = kl_gpu.topk_div(student, best, ids, problem.case.kind, reduction="none", backend=backend)
    assert isinstance(value, Tensor)
    return value.detach(), *torch.autograd.grad(value, student, problem.row_gradient)


def _formula_sums(problem: Problem, backend: str | None) -> Results:
    student, teacher, _ = problem.turn(0)
    given = kl_gpu.KINDS[problem.case.kind].at(None)
    p = RowPair.of(student[None], teacher[None], None, *given, 1.0, 1.0)
    does = registry.load(registry.resolve(backend, student.device))
    return (does.formula_sums(p, does.value(p)[1]),)


OTHERS: dict[str, Callable[[Problem, str | None], Results]] = {
    "both sides": _both_sides,
    "in place": _in_place,
    "token_stats": _token_stats,
    "token_logprobs": _token_logprobs,
    "topk_div": _topk_div,
    "formula_sums": _formula_sums,
}


def make(call: Call, device: torch.device, backend: str | None = None) -> None:
    """Makes a call twice.

    Raises:
        OtherBits: the second result is not the first.
        WrongOutput, AssertionError: the first is not what float64 says, or the eager backend.
    """
    problem = Problem(call, device, cache_bytes=0)
    if call.what in OTHERS:
        of = OTHERS[call.what]
        first, second = of(problem, backend), of(problem, backend)
        for found, wanted in zip(first, of(problem, "eager"), strict=True):
            close = {2: 1e-2, 4: 2e-5, 8: 1e-5}[found.element_size()]  # 16 bits are rounded
            torch.testing.assert_close(found.double(), wanted.double(), rtol=close, atol=1e-9)
    else:
        entry = ours("kl_gpu", backend).enter(call.kind)
        logits = (*problem.turn(0)[:2], problem.row_gradient)
        outputs = [WORKLOADS[call.what](entry, *logits) for _ in range(2)]
        check(entry, call.what, problem, 0, outputs[0])
        first, second = map(_tensors, outputs)
    if not all(map(torch.equal, first, second)):
        raise OtherBits(f"{call}: other bits the second time")


def _tensors(output: Output) -> Results:
    return (output.value,) if output.gradient is None else (output.value, output.gradient)


def smoke_calls() -> Iterator[Call]:
    """Every kernel once, the longest to compile first."""
    for kind in sorted(kl_gpu.KINDS, key=lambda kind: kind.endswith("_kl")):
        for what in ("value_grad", "forward_backward", "both sides"):
            yield Call(kind, "bf16", _FEW, SHARED, what)
    for kind, what in (
        ("forward_kl", "token_stats"), ("forward_kl", "token_logprobs"), ("forward_kl", "topk_div"),
        ("js", "formula_sums"), ("forward_kl", "in place"), ("forward_kl", "value"),
    ):  # fmt: skip
        yield Call(kind, "bf16", _FEW, SHARED, what)


def sanitizer_calls() -> Iterator[Call]:
    """Few and small, since the sanitizer takes its time. Whole tiles; a shared row, with a ragged tail."""
    for vocab, dtype, kind in itertools.product((4096, SHARED), ("bf16", "fp32"), ("forward_kl", "js")):
        for what in ("value_grad", "both sides"):
            yield Call(kind, dtype, _FEW, vocab, what)
    for what in ("token_stats", "token_logprobs"):
        yield Call("forward_kl", "bf16", _FEW, SHARED, what)


def session_calls() -> Iterator[Call]:
    """What a session times of ours, on few rows: their number compiles nothing anew."""
    points = (point for plan in ("kl", "kinds") for point in PLANS[plan]())
    timed = (Call(p.kind, p.dtype, _SOME, p.vocab, what) for p in points for what in p.workloads)
    yield from dict.fromkeys(timed)
    yield from sanitizer_calls()


CALLS: dict[str, Callable[[], Iterator[Call]]] = {
    "smoke": smoke_calls,
    "sanitizer": sanitizer_calls,
    "session": session_calls,
}


def calls_of(phase: str) -> str:
    """The name of the calls that a session's phase makes, if it makes any."""
    return {"compile": "session"}.get(phase, phase)


def new_first(calls: Iterable[Call], variants: Callable[[Call], frozenset[object]]) -> list[Call]:
    """Those in front that compile what none before them does: else two processes would compile the same."""
    seen: set[object] = set()
    front: list[Call] = []
    rest: list[Call] = []
    for call in calls:
        mine = variants(call)
        (rest if mine <= seen else front).append(call)
        seen |= mine
    return front + rest


def _made(call: Call, device: torch.device, backend: str | None) -> str:
    """What is wrong, or nothing."""
    try:
        make(call, device, backend)
    except Exception as error:
        return f"{type(error).__name__}: {error}".strip().partition("\n")[0]
    return ""


def wrong(
    calls: Sequence[Call], device: torch.device, processes: int = 1, backend: str | None = None
) -> Iterator[str]:
    """Makes the calls; what went wrong, one line for each."""
    if processes == 1:
        found = ((call, _made(call, device, backend)) for call in calls)
        yield from (f"{call}: {why}" for call, why in found if why)
        return
    # Not forked: a process cannot use a GPU that its parent has used.
    with ProcessPoolExecutor(min(processes, len(calls)), get_context("spawn")) as pool:
        begun = {pool.submit(_made, call, device, backend): call for call in calls}
        yield from (f"{begun[done]}: {done.result()}" for done in as_completed(begun) if done.result())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.calls", description=__doc__)
    parser.add_argument("name", choices=tuple(CALLS))
    parser.add_argument("--processes", type=at_least(1), default=1, metavar="N", help="default: 1")
    parser.add_argument("--device", type=device_of, default=usual_device())
    options = parser.parse_args(arguments)
    calls = list(CALLS[options.name]())
    if options.processes > 1:
        from .variants import variants

        calls = new_first(calls, variants)
    start, found = time.monotonic(), 0
    for line in wrong(calls, options.device, options.processes):
        found += 1
        print(f"{WRONG}{line}", flush=True)
    print(f"{len(calls)} calls, {found} of them wrong, {time.monotonic() - start:.0f} s")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())

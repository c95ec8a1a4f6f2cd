"""Who is timed: each system as functions of logits, and what each workload asks of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kl_gpu
from kl_gpu.backends import registry

from . import baselines

Divergence = Callable[[Tensor, Tensor], Tensor]  # of student and teacher


def _log_softmaxes(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    # float() first, as people do: in bf16, log-probabilities near −12 come in steps of 1/16.
    return F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p‖q) from log-probabilities."""
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def _plain_forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return _kl(*_log_softmaxes(student, teacher))


def _plain_jeffreys(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = _log_softmaxes(student, teacher)
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def plain_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """log(βp + (1−β)q) from log-probabilities."""
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))


def _plain_js(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = _log_softmaxes(student, teacher)
    log_m = plain_mixture(log_p, log_q, 0.5)
    return 0.5 * (_kl(log_m, log_p) + _kl(log_m, log_q))


def _plain_skew(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = _log_softmaxes(student, teacher)
    return _kl(plain_mixture(log_p, log_q, 0.1), log_p)


def _plain_tv(student: Tensor, teacher: Tensor) -> Tensor:
    return 0.5 * (F.softmax(student.float(), -1) - F.softmax(teacher.float(), -1)).abs().sum(-1)


# What is written without this library, per kind at its default β. The kinds that can be timed are these.
PLAIN: dict[str, Divergence] = {
    "forward_kl": _plain_forward_kl,
    "reverse_kl": lambda student, teacher: _plain_forward_kl(teacher, student),
    "jeffreys": _plain_jeffreys,
    "js": _plain_js,
    "skew_forward_kl": _plain_skew,
    "skew_reverse_kl": lambda student, teacher: _plain_skew(teacher, student),
    "tv": _plain_tv,
}


@dataclass(frozen=True)
class System:
    """A contestant. Past the tolerances its output is wrong, and the run stops.

    `value_tolerance` is relative, `gradient_tolerance` in units of max(p, q); a baseline's are loose on
    purpose: how inaccurate one is belongs in the table. One that fails to run at all is left out, with its
    reason, unless it is `required`: torch.compile needs a compiler on the machine.
    """

    name: str
    divergences: Callable[[str], tuple[Divergence, Divergence]]  # of a kind: per row, and their mean
    value_tolerance: float = 1e-3
    gradient_tolerance: float = 1e-3
    required: bool = False
    kinds: frozenset[str] = frozenset(PLAIN)
    workloads: frozenset[str] = frozenset(("value", "value_grad", "forward_backward"))

    def does(self, kind: str, workload: str | None = None) -> bool:
        return kind in self.kinds and (workload is None or workload in self.workloads)

    def enter(self, kind: str) -> Entry:
        return Entry(self, *self.divergences(kind))


@dataclass(frozen=True)
class Entry:
    """A system made ready for one kind."""

    system: System
    per_row: Divergence  # [N]
    mean: Divergence  # 0-d


def ours(name: str, backend: str | None) -> System:
    def divergences(kind: str) -> tuple[Divergence, Divergence]:
        ours = partial(kl_gpu.divergence, kind=kind, backend=backend)
        return partial(ours, reduction="none"), partial(ours, reduction="mean")

    # The library's promises, not what it happens to reach.
    return System(name, divergences, value_tolerance=5e-6, gradient_tolerance=2e-6, required=True)


def _baseline(name: str, per_row_of: Callable[[str], Divergence]) -> System:
    def divergences(kind: str) -> tuple[Divergence, Divergence]:
        per_row = per_row_of(kind)
        return per_row, lambda student, teacher: per_row(student, teacher).mean()

    return System(name, divergences)


def _library(name: str, means: dict[str, baselines.Mean]) -> System:
    """Another library's loss, which gives a mean alone: no workload asks for more."""
    kinds, workloads = frozenset(means), baselines.WORKLOADS
    return System(name, lambda kind: (means[kind], means[kind]), kinds=kinds, workloads=workloads)


def _compiled(kind: str) -> Divergence:
    # Static shapes are its best case. fullgraph, because past Dynamo's recompile limit it would silently go
    # on as plain PyTorch; and reset(), so that each case starts with no compiled shapes to count towards it.
    torch.compiler.reset()
    return torch.compile(PLAIN[kind], fullgraph=True, dynamic=False)


def available(device: torch.device) -> dict[str, System]:
    """Every system that can run on `device`, by its name on the command line and in the JSON."""
    systems = [
        ours("kl_gpu", None),
        *(ours(f"kl_gpu[{backend}]", backend) for backend in kl_gpu.BACKENDS if _runs(backend, device)),
        _baseline("torch", PLAIN.__getitem__),
        _baseline("torch.compile", _compiled),
        *([_library("liger", baselines.liger())] if not absent(device) else []),
    ]
    return {system.name: system for system in systems}


@cache
def absent(device: torch.device) -> dict[str, str]:
    """The other libraries that cannot be timed here, and why."""
    if device.type != "cuda":
        return {"liger": "its kernels need a GPU"}
    try:
        baselines.liger()
    except ImportError as error:
        return {"liger": str(error)}
    return {}


def usual(device: torch.device) -> list[str]:
    """Whom to time unless told otherwise: on the CPU every backend, none of them twice."""
    names = list(available(device))
    own = f"kl_gpu[{registry.resolve(None, device)}]"  # what "kl_gpu" is here
    return [name for name in names if name != own and (device.type == "cpu" or "[" not in name)]


def _runs(backend: str, device: torch.device) -> bool:
    if backend == "triton" and device.type == "cpu":
        return False  # through its interpreter, whose speed means nothing
    try:
        registry.resolve(backend, device)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Output:
    value: Tensor  # [N], or 0-d where the workload reduces
    gradient: Tensor | None = None  # [N, V]


def _value(entry: Entry, student: Tensor, teacher: Tensor, row_gradient: Tensor) -> Output:
    with torch.no_grad():
        return Output(entry.per_row(student, teacher))


# Gradients by autograd.grad, not .backward(): logits are an inner tensor of a model, whose gradient flows on
# to the LM head. A leaf's .grad may cost one more copy, which no training step pays.
def _value_grad(entry: Entry, student: Tensor, teacher: Tensor, row_gradient: Tensor) -> Output:
    student = student.detach().requires_grad_()
    loss = entry.mean(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    return Output(loss.detach(), gradient)


def _forward_backward(entry: Entry, student: Tensor, teacher: Tensor, row_gradient: Tensor) -> Output:
    student = student.detach().requires_grad_()
    value = entry.per_row(student, teacher)
    (gradient,) = torch.autograd.grad(value, student, row_gradient)
    return Output(value.detach(), gradient)


WORKLOADS: dict[str, Callable[[Entry, Tensor, Tensor, Tensor], Output]] = {
    "value": _value,
    "value_grad": _value_grad,
    "forward_backward": _forward_backward,
}

"""A case is what is compared; its problem is the logits, and the truth about them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kl_gpu import reference

from .options import DTYPES

# N rows are built from this many distinct pairs of rows, so that a float64 reference of a few rows checks
# all N of them. Memory sees N different rows all the same.
DISTINCT = 8


@dataclass(frozen=True)
class Case:
    """One comparison: every contestant does every workload on the same logits."""

    kind: str
    dtype: str
    rows: int
    vocab: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def tensor_bytes(self) -> int:
        """U."""
        return self.rows * self.vocab * self.torch_dtype.itemsize

    def __str__(self) -> str:
        return f"{self.kind} {self.dtype} N={self.rows} V={self.vocab}"


class Problem:
    """Several sets of logits `[N, V]`, used in turn so that no cache holds what the last run touched.

    Row i of set k is the distinct pair (i + k) mod 8. Neighbouring sets, the last and the first included,
    differ in every row: an output that a system failed to write, and that still holds the previous
    system's result, is a wrong one.
    """

    def __init__(self, case: Case, device: torch.device, cache_bytes: int) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(case.vocab)
        teacher = 3 * torch.randn(DISTINCT, case.vocab, generator=generator)
        student = teacher + torch.randn(DISTINCT, case.vocab, generator=generator)
        student, teacher = student.to(device, case.torch_dtype), teacher.to(device, case.torch_dtype)

        # Four caches' worth: replacement that is not strictly LRU keeps some old lines.
        sets = _enough(4 * cache_bytes, 2 * case.tensor_bytes, at_least=2)
        targets = _enough(4 * cache_bytes, case.tensor_bytes, at_least=1)
        self.pairs = [(torch.arange(case.rows, device=device) + k) % DISTINCT for k in range(sets)]
        self.students = [student[pairs] for pairs in self.pairs]
        self.teachers = [teacher[pairs] for pairs in self.pairs]
        self.copy_targets = [torch.zeros_like(self.students[0]) for _ in range(targets)]
        self.row_gradient = (0.5 + torch.rand(case.rows, generator=generator)).to(device)

        # The truth of the distinct rows, as they are after rounding to the case's dtype.
        q, p = student.double().cpu().numpy(), teacher.double().cpu().numpy()
        self.value = torch.from_numpy(reference.divergence(q, p, case.kind)).to(device)
        self.gradient = torch.from_numpy(reference.gradients(q, p, case.kind)[0]).to(device)
        self.gradient_unit = _gradient_unit(student, teacher, case.kind)

    def turn(self, turn: int) -> tuple[Tensor, Tensor, Tensor]:
        """Student, teacher, and the distinct pair in each row."""
        k = turn % len(self.pairs)
        return self.students[k], self.teachers[k], self.pairs[k]

    def copy(self, turn: int) -> None:
        """The yardstick: the device copies one tensor of logits, into memory that exists already."""
        self.copy_targets[turn % len(self.copy_targets)].copy_(self.students[turn % len(self.students)])


def _gradient_unit(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """What gradient errors are measured in, elementwise: max(p, q), times a log-ratio where there is one."""
    log_q, log_p = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    unit = torch.maximum(log_q, log_p).exp()
    return unit if kind in ("forward_kl", "tv") else unit * (log_q - log_p).abs().clamp(min=1)


def _enough(wanted: int, each: int, *, at_least: int) -> int:
    """How many buffers reach `wanted` bytes: a power of two, lest the last and the first set be equal."""
    count = at_least
    while count * each < wanted:
        count *= 2
    return count

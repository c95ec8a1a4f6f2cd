"""Which points are timed, the most important first, and against whom at each.

A session's time may run out, so its points come in parts: ours for the KLs at every V, ours for the other
kinds, then baselines, each beside ours once more. Baselines do not run everywhere: plain PyTorch takes twenty
times as long as a fused kernel, and torch.compile, which is last, compiles for many seconds at every size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..harness.cases import Case
from ..harness.systems import PLAIN, WORKLOADS

VOCABS = (32000, 50257, 65536, 128256, 151936, 262144)
ROWS = 8192
FEW_ROWS = (1, 16, 132, 1024)
USUAL = 128256

OURS = ("kl_gpu",)
PYTORCH = ("kl_gpu", "torch")
LIBRARIES = ("kl_gpu", "liger")
BOTH = ("kl_gpu", "torch", "liger")
COMPILED = ("kl_gpu", "torch.compile")

_PASSES = 3
# How often a system runs at a workload of a point, in all passes together.
REPEATS = {"kl": 21, "kinds": 9, "baselines": 9, "compile": 9, "smoke": 21, "cpu": 3, "tiny": 3}

_KLS = ("forward_kl", "reverse_kl")
_MIXED = tuple(kind for kind in PLAIN if kind not in _KLS)


@dataclass(frozen=True)
class Point(Case):
    """One case, all workloads, by these systems. `rows` is what is wanted: memory may allow fewer."""

    systems: tuple[str, ...]
    workloads: tuple[str, ...] = tuple(WORKLOADS)

    def __str__(self) -> str:
        others = [name for name in self.systems if name != "kl_gpu"]
        return super().__str__() + (f" beside {', '.join(others)}" if others else "")


def passes_of(repeats: int) -> tuple[int, int]:
    """How many passes go through everybody, and how many rounds each has in a pass."""
    passes = min(_PASSES, repeats)
    return passes, -(-repeats // passes)


def kl_plan() -> list[Point]:
    """What the targets speak of: the KLs at every V, and at few rows."""
    vocabs = (USUAL, *(vocab for vocab in VOCABS if vocab != USUAL))
    cases = [("bf16", ROWS, vocab) for vocab in vocabs]
    cases += [("bf16", rows, USUAL) for rows in FEW_ROWS]
    cases += [("fp32", ROWS, vocab) for vocab in vocabs]
    return [Point(kind, *case, OURS) for kind in _KLS for case in cases]


def kinds_plan() -> list[Point]:
    """The other kinds."""
    cases = [("bf16", ROWS, vocab) for vocab in (USUAL, 32000, 50257, 262144)] + [("fp32", ROWS, USUAL)]
    points = [Point(kind, *case, OURS) for case in cases for kind in _MIXED]
    return points + [Point("js", "bf16", rows, USUAL, OURS) for rows in FEW_ROWS]


def baselines_plan() -> list[Point]:
    """Plain PyTorch and Liger, beside ours: a ratio is of the same passes."""
    points = [Point(kind, "bf16", ROWS, USUAL, BOTH) for kind in ("forward_kl", "js")]
    points += [Point("forward_kl", "bf16", rows, USUAL, PYTORCH) for rows in FEW_ROWS]
    points += [Point("forward_kl", "bf16", ROWS, vocab, PYTORCH) for vocab in (32000, 50257)]
    points += [Point("js", "bf16", ROWS, 32000, LIBRARIES), Point("forward_kl", "fp32", ROWS, USUAL, PYTORCH)]
    points += [Point(kind, "bf16", ROWS, USUAL, PYTORCH) for kind in ("reverse_kl", "tv")]
    return [*points, Point("forward_kl", "bf16", ROWS, 262144, PYTORCH)]


def compile_plan() -> list[Point]:
    """torch.compile, which compiles anew for every point and workload."""
    first = Point("forward_kl", "bf16", ROWS, USUAL, COMPILED)
    others = [("js", "bf16", USUAL), ("forward_kl", "bf16", 32000), ("forward_kl", "fp32", USUAL)]
    return [first, *(Point(kind, dtype, ROWS, V, COMPILED, ("value_grad",)) for kind, dtype, V in others)]


def smoke_plan() -> list[Point]:
    """One timing."""
    return [Point("forward_kl", "bf16", ROWS, USUAL, OURS)]


def cpu_plan() -> list[Point]:
    """Without a GPU: enough to see every part at work. Speeds of CPUs are `make bench`'s business."""
    cases = [(dtype, 64, vocab) for dtype in ("bf16", "fp32") for vocab in (32000, USUAL)]
    cases += [("bf16", rows, USUAL) for rows in FEW_ROWS[:2]]
    return [Point("forward_kl", *case, PYTORCH) for case in cases]


def tiny_plan() -> list[Point]:
    """To try the command itself."""
    sizes = ((4, 1000), (1, 2055))
    return [Point("forward_kl", "bf16", rows, vocab, ("kl_gpu", "torch", "liger")) for rows, vocab in sizes]


PLANS: dict[str, Callable[[], list[Point]]] = {
    "kl": kl_plan,
    "kinds": kinds_plan,
    "baselines": baselines_plan,
    "compile": compile_plan,
    "smoke": smoke_plan,
    "cpu": cpu_plan,
    "tiny": tiny_plan,
}

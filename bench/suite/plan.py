"""Which points are timed, the most important first, and against whom at each.

Ours runs at every point, and first. Baselines do not run everywhere: plain PyTorch takes twenty times as long
as a fused kernel, and torch.compile compiles anew at every size. All run at V = 128256 in bf16, and the two
that say what a user has without this library, plain PyTorch and torch.compile, over all V for forward KL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..harness.cases import Case
from ..harness.systems import PLAIN, WORKLOADS

VOCABS = (32000, 50257, 65536, 128256, 151936, 262144)
ROWS = 8192
FEW_ROWS = (1, 16, 132, 1024)
USUAL = 128256

OURS = ("kl_gpu",)
PYTORCH = ("kl_gpu", "torch")
COMPILED = ("kl_gpu", "torch", "torch.compile")
EVERYBODY = ("kl_gpu", "torch", "torch.compile", "liger")
LIBRARIES = ("kl_gpu", "liger")

_KLS = ("forward_kl", "reverse_kl")
_MIXED = tuple(kind for kind in PLAIN if kind not in _KLS)


@dataclass(frozen=True)
class Point(Case):
    """One case, all workloads, by these systems. `rows` is what is wanted: memory may allow fewer."""

    systems: tuple[str, ...]
    workloads: tuple[str, ...] = tuple(WORKLOADS)

    def __str__(self) -> str:
        return f"{super().__str__()}{'' if self.systems == OURS else ' among others'}"


def gpu_plan() -> list[Point]:
    """Ours everywhere, then baselines, each beside ours once more: a ratio is of the same passes."""
    return [*dict.fromkeys(_ours()), *_others()]


def _ours() -> Iterator[Point]:
    # What the targets speak of.
    for kind in _KLS:
        for dtype in ("bf16", "fp32"):
            for vocab in (USUAL, *VOCABS):
                yield Point(kind, dtype, ROWS, vocab, OURS)
    for kind in (*_KLS, "js"):
        for rows in FEW_ROWS:
            yield Point(kind, "bf16", rows, USUAL, OURS)
    for dtype, vocabs in (("bf16", (USUAL, 32000, 50257, 262144)), ("fp32", (USUAL,))):
        for vocab in vocabs:
            for kind in _MIXED:
                yield Point(kind, dtype, ROWS, vocab, OURS)


def _others() -> Iterator[Point]:
    yield Point("forward_kl", "bf16", ROWS, USUAL, EVERYBODY)
    yield Point("js", "bf16", ROWS, USUAL, EVERYBODY)
    yield Point("reverse_kl", "bf16", ROWS, USUAL, COMPILED)
    for rows in FEW_ROWS:
        yield Point("forward_kl", "bf16", rows, USUAL, PYTORCH)
    for vocab in VOCABS:
        if vocab != USUAL:
            yield Point("forward_kl", "bf16", ROWS, vocab, COMPILED)
    yield Point("forward_kl", "fp32", ROWS, USUAL, EVERYBODY)
    for kind in _MIXED:
        if kind != "js":
            yield Point(kind, "bf16", ROWS, USUAL, PYTORCH)
    for vocab in (32000, 262144):
        yield Point("js", "bf16", ROWS, vocab, LIBRARIES)


def cpu_plan() -> list[Point]:
    """Without a GPU: enough to see every part at work. Speeds of CPUs are `make bench`'s business."""
    cases = [(dtype, 64, vocab) for dtype in ("bf16", "fp32") for vocab in (32000, USUAL)]
    cases += [("bf16", rows, USUAL) for rows in FEW_ROWS[:2]]
    return [Point("forward_kl", *case, PYTORCH) for case in cases]


def tiny_plan() -> list[Point]:
    """To try the command itself."""
    sizes = ((4, 1000), (1, 2055))
    return [Point("forward_kl", "bf16", rows, vocab, ("kl_gpu", "torch", "liger")) for rows, vocab in sizes]


PLANS: dict[str, Callable[[], list[Point]]] = {"gpu": gpu_plan, "cpu": cpu_plan, "tiny": tiny_plan}

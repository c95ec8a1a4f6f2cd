"""The kernels that are audited, one `Entry` for each thing that Triton compiles, and the works made of them.

This is the only list: a new kernel is one more entry here, and a work that it serves names it in `steps`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kl_gpu.kinds import KINDS
from kl_gpu.problem import Problem
from kl_gpu.triton import gradients, kl, launch, sums

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What the compiler may know of V and the row strides: that 16 divides them, or nothing.
V_CLASSES = {"aligned": 128256, "odd": 50257}


@dataclass(frozen=True)
class Entry:
    """One kernel with the constants of one variant, and what it moves.

    Attributes:
        kernel, kind: its names in the table.
        function: the Triton function.
        shapes: columns and registers of a thread, by the wider logit's bytes.
        constants: compile-time arguments besides those of `launch.configuration`.
        types: Triton types of arguments whose name does not tell (see `compiled.signature`).
        reads, writes: tensors of logits read from and written to memory.
        l2_reads: tensors read once more while the L2 still holds them.
        programs: programs of a row, or "row" for one that loops over it, "tile" for one a tile.
        ahead: tiles that a program's loop loads before it needs them.
    """

    kernel: str
    kind: str
    function: Any
    shapes: dict[int, launch.ProgramShape]
    constants: dict[str, object] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    reads: int = 2
    writes: int = 0
    l2_reads: int = 0
    programs: str | int = "row"
    ahead: int = 0

    def configuration(self, dtype: str, V: int) -> dict[str, Any]:
        """Every compile-time argument and option, as the launcher would choose them."""
        example = torch.empty(1, 1, V, dtype=DTYPES[dtype], device="meta")
        problem = Problem(example, example, None, "kl", 0.0, 1.0, 1.0)
        return {**launch.configuration(problem, self.shapes), "HAS_ROWS": True, **self.constants}

    def columns(self, configuration: Mapping[str, Any]) -> int:
        """Columns of a tile: what one pass through the loop, or a program without one, covers."""
        return int(configuration["R"] * configuration["VEC"])


def _gradient(family: str, side: str) -> Entry:
    to_a, to_b = side in ("a", "both"), side in ("b", "both")
    return Entry(
        "gradient", f"{family}, to {side}", gradients._gradient_kernel, gradients.GRADIENT_SHAPES,
        {"FAMILY": family, "TO_A": to_a, "TO_B": to_b}, writes=to_a + to_b, programs="tile",
    )  # fmt: skip


def _student(kind: str) -> str:
    return "a" if KINDS[kind].weights == "student" else "b"


def entries() -> Iterator[Entry]:
    yield Entry("value", "kl", kl._value_kernel, kl.VALUE_SHAPES)
    families = dict.fromkeys(kind.family for kind in KINDS.values())
    for family in families:
        if family != "kl":
            constants = {"FAMILY": family, "EXACT": False}
            yield Entry("sums", family, sums._sums_kernel, sums.SUMS_SHAPES, constants)
    for family in families:
        # The student's gradient of each kind; "both" where the teacher asks for one too.
        sides = sorted({_student(name) for name, kind in KINDS.items() if kind.family == family})
        for side in (*sides, "both"):
            yield _gradient(family, side)


def steps(kind: str, work: str) -> list[tuple[str, str]]:
    """(kernel, kind) of each launch that a work of `bench.traffic.PASSES` takes, in order."""
    family = KINDS[kind].family
    value = [("value", "kl")] + ([("sums", family)] if family != "kl" else [])
    return value if work == "value" else [*value, ("gradient", f"{family}, to {_student(kind)}")]

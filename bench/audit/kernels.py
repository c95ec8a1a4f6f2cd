"""The variants of the kernels that are audited. This is the only list: each is an entry here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kl_gpu.arguments.reduction import compute_dtype
from kl_gpu.backends.interface import RowPair
from kl_gpu.backends.triton import fast_formulas, launch, pair, shard
from kl_gpu.backends.triton.complement import SHAPES as COMPLEMENT_SHAPES
from kl_gpu.backends.triton.complement import complement_gradient_kernel, complement_kernel, program
from kl_gpu.backends.triton.token_stats import SHAPES as TOKEN_STATS_SHAPES
from kl_gpu.backends.triton.token_stats import token_stats_splits_kernel
from kl_gpu.kinds import KINDS


@dataclass(frozen=True)
class Entry:
    """One variant of a kernel.

    Attributes:
        kernel, kind: its names in the table.
        formula, sweeps_value, side: what it is compiled for; side is "a", "b", "both" or "".
        loops: which of its main loops do the work, counted among those that load and exponentiate: the first
            sweep's is the first, the gradient's the last, and between them lie the fallback's. Later
            sweeps and gradients are there twice: for rows of the fast path, which counts, comes first.
        tensors: of logits' size, that are read or written.
        gcn_loops: the same in AMD's code, where the last stage comes first and rows of the fast path behind
            the others.
    """

    kernel: str
    kind: str
    formula: str
    sweeps_value: bool
    side: str
    loops: tuple[int, ...]
    tensors: int = 2
    gcn_loops: tuple[int, ...] = (0,)

    function: ClassVar[Any] = pair.pair_kernel
    types: ClassVar[dict[str, str]] = dict.fromkeys(
        (
            *("n_rows", "num_splits", "split_columns", "lag"),
            *("inner_magic", "inner_shift", "splits_magic", "splits_shift"),
        ),
        "i32",
    )

    def configuration(self, logits: torch.Tensor, lanes: int) -> dict[str, Any]:
        """Every compile-time argument and option, as the launcher would choose them."""
        problem, config = self._launch(logits, lanes)
        return {
            **config,
            "OUT_LAYOUT": launch.gradient_layout(config["LAYOUT"], problem.a) if self.side else 0,
            "HAS_VALID": True,
            "HAS_INCOMING": False,
            "FORMULA": self.formula,
            "VALUE": self.sweeps_value,
            "STAGE": pair.ALL_STAGES.value,
            "TO_A": self.side in ("a", "both"),
            "TO_B": self.side in ("b", "both"),
            "SPLITS": launch.room_for(self.programs(logits, lanes)),
            "LOG2": fast_formulas.logarithm(self.formula, torch.float32, lanes == 32),
        }

    def columns(self, logits: torch.Tensor, lanes: int) -> tuple[int, ...]:
        """Columns that one pass through each of the loops covers."""
        problem, config = self._launch(logits, lanes)
        tile = int(config["R"] * config["VEC"])
        step = self._step(problem, config)
        return tuple(step if self.sweeps_value and not at else tile for at in range(len(self.loops)))

    def loops_on(self, arch: str) -> tuple[int, ...]:
        return self.gcn_loops if arch.startswith("gfx") else self.loops

    def programs(self, logits: torch.Tensor, lanes: int) -> int:
        """Programs of a row; those of several stages count as one that does them all."""
        return launch.splits_of(logits.shape[-1], self._step(*self._launch(logits, lanes))).number

    def _step(self, problem: RowPair, config: dict[str, Any]) -> int:
        return launch.step_of(problem, config)

    @property
    def _shapes(self) -> dict[int, launch.ProgramShape]:
        return pair.SHAPES if self.formula == "kl" else pair.FORMULA_SHAPES

    def _launch(self, logits: torch.Tensor, lanes: int) -> tuple[RowPair, dict[str, Any]]:
        problem = RowPair(
            logits, logits, None, self.formula, 0.0, 1.0, 1.0, compute_dtype(logits.dtype, logits.dtype)
        )
        return problem, launch.configuration(problem, self._shapes, lanes)


# Of sums and of gradients, where not 3: nla has no fast path, lk takes that of tv for its sums.
_FORMS = {"nla": (1, 1), "lk": (3, 1)}


def _entry(formula: str, sweeps_value: bool, side: str) -> Entry:
    sweeps = (1 if formula == "kl" else 2) if sweeps_value else 0
    # Forms of each stage: of plain rows, of others on the fast path, and of the fallback; or of all rows.
    of_sums, of_gradient = _FORMS.get(formula, (3, 3))
    forms = (*(3, of_sums)[:sweeps], *(of_gradient,) * bool(side))
    last = (-of_gradient,) if side else ()
    return Entry(
        kernel="value_grad" if sweeps and side else "gradient" if side else "value",
        kind=f"{formula}, to {side}" if side else formula,
        formula=formula,
        sweeps_value=sweeps_value,
        side=side,
        loops=(*((0,), (0, -of_sums + sum(last)))[sweeps - 1], *last) if sweeps else last,
        tensors=4 if side == "both" else 3 if side else 2,
        gcn_loops=tuple(
            sum(forms[at + 1 :]) + (here - 1) * (at > 0 or not sweeps) for at, here in enumerate(forms)
        ),
    )


@dataclass(frozen=True)
class StatsEntry(Entry):
    """The sweep of token statistics; what merges a row's splits reads a few numbers and is not counted."""

    function: ClassVar[Any] = token_stats_splits_kernel

    def configuration(self, logits: torch.Tensor, lanes: int) -> dict[str, Any]:
        _, config = self._launch(logits, lanes)
        splits = self.programs(logits, lanes)
        return {**config, "HAS_VALID": True, "SPLITS": launch.room_for(splits)}

    def _step(self, problem: RowPair, config: dict[str, Any]) -> int:
        return int(config["R"] * config["VEC"])

    @property
    def _shapes(self) -> dict[int, launch.ProgramShape]:
        return TOKEN_STATS_SHAPES


@dataclass(frozen=True)
class ComplementEntry(Entry):
    """One of the kernels of `backends.triton.complement`, at 64 ids a row: one tensor of logits."""

    types: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("n_rows", "n_ids", "words", "num_splits", "split_columns"), "i32"),
        **dict.fromkeys(("stats_ptr", "grad_picked_ptr", "grad_rest_ptr", "grad_entropy_ptr"), "*fp64"),
        "ids_ptr": "*i64",
        "words_ptr": "*i32",
        "marks_ptr": "*u8",
    }

    @property
    def function(self) -> Any:
        return complement_kernel if self.sweeps_value else complement_gradient_kernel

    def configuration(self, logits: torch.Tensor, lanes: int) -> dict[str, Any]:
        config = program(logits, 64, lanes)
        if not self.sweeps_value:
            config["LAYOUT"] = launch.gradient_layout(config["LAYOUT"], logits)
        return {**config, "HAS_VALID": True, "HAS_SCALES": False, "ENTROPY": self.kind.endswith("entropy")}

    def programs(self, logits: torch.Tensor, lanes: int) -> int:
        return 1 if self.sweeps_value else super().programs(logits, lanes)

    def _step(self, problem: RowPair, config: dict[str, Any]) -> int:
        return int(config["R"] * config["VEC"])

    @property
    def _shapes(self) -> dict[int, launch.ProgramShape]:
        return COMPLEMENT_SHAPES


@dataclass(frozen=True)
class ShardEntry(Entry):
    """The formula's sums over a shard, given the whole row's statistics: no launch of its own."""

    types: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("n_rows", "n_inner", "num_splits", "split_columns"), "i32"),
        "out_ptr": "*fp64",
    }
    function: ClassVar[Any] = shard.formula_sums_kernel

    def configuration(self, logits: torch.Tensor, lanes: int) -> dict[str, Any]:
        _, config = self._launch(logits, lanes)
        return {**config, "HAS_VALID": True, "FORMULA": self.formula}


def shard_entries() -> Iterator[Entry]:
    """Compiled by tests/test_shards_code.py, and no part of the table."""
    for formula in ("js", "skew", "tv"):
        yield ShardEntry("formula_sums", formula, formula, True, "", loops=(0,))


def _student(kind: str) -> str:
    return "a" if KINDS[kind].expectation_under == "student" else "b"


def entries() -> Iterator[Entry]:
    formulas = dict.fromkeys(kind.formula for kind in KINDS.values())
    for formula in formulas:
        sides = sorted({_student(name) for name, kind in KINDS.items() if kind.formula == formula})
        yield _entry(formula, True, "")
        for side in (*sides, "both"):
            yield _entry(formula, False, side)
        for side in sides:
            yield _entry(formula, True, side)
    yield StatsEntry("token_stats", "both kl", "kl", True, "", loops=(0,))
    for kind in ("remainder", "remainder, entropy"):
        yield ComplementEntry("value", kind, "remainder", True, "", (0,), tensors=1)
        yield ComplementEntry("gradient", kind, "remainder", False, "", (-1,), tensors=2, gcn_loops=(0,))

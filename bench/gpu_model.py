"""Predicts a kernel's speed from its machine code: docs/gpu-model.md states the lines, this computes them.

Every line is the time that one resource alone would need; the prediction is the longest of them, as if all
others overlapped with it perfectly. Predicted, not measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .gpus import Gpu

ROWS = 8192  # N of the predictions; V is the row's own
_REGISTER_UNIT = 8  # registers of a thread are allotted in eights
_SCHEDULERS = 4  # of a core
_PROGRAM_SHARED = 1024  # bytes of shared memory that a program takes besides its own, on NVIDIA


@dataclass(frozen=True)
class Counts:
    """A kernel as the model sees it: one element is one column of a row, that is, a pair of logits.

    Attributes:
        itemsize: bytes of a logit.
        V: columns of a row.
        aligned: whether rows start at multiples of 16 bytes.
        columns: of a tile; warps, warp: of a program, and threads of a warp.
        registers: of a thread; shared_bytes: of a program.
        store_bits: width of a thread's store, 0 without one.
        instructions, fma, alu, special, lsu: lane operations per element in the body.
        exchanges: shuffles and barriers of a tile that wait for one another; a tile is one pass's columns.
        overhead_instructions: of a warp, per program, outside the body.
        finish_instructions: of a warp, of one program a row.
        reads, writes, l2_reads: tensors of logits.
        programs: of a row.
        ahead: tiles loaded before they are needed.
    """

    itemsize: int
    V: int
    aligned: bool
    columns: int
    warps: int
    warp: int
    registers: int
    shared_bytes: int
    store_bits: int
    instructions: float
    fma: float
    alu: float
    special: float
    lsu: float
    exchanges: int
    overhead_instructions: int
    finish_instructions: int
    reads: int
    writes: int
    l2_reads: int
    programs: int
    ahead: int


def resident_programs(counts: Counts, gpu: Gpu) -> int:
    """Programs that one core holds at a time."""
    registers = math.ceil(counts.registers / _REGISTER_UNIT) * _REGISTER_UNIT * counts.warp
    warps = _SCHEDULERS * min(
        int(gpu.registers.value / _SCHEDULERS // registers), int(gpu.warps.value / _SCHEDULERS)
    )
    shared = counts.shared_bytes + _PROGRAM_SHARED
    return min(warps // counts.warps, int(gpu.shared_kb.value * 1024 // shared), int(gpu.programs.value))


def _tiles(counts: Counts) -> int:
    """Tiles of a row; a ragged last one costs a whole one."""
    return math.ceil(counts.V / counts.columns)


def lines(counts: Counts, gpu: Gpu, rows: int = ROWS) -> dict[str, float]:
    """Seconds that each resource alone would take for `rows` rows."""
    tensor = rows * counts.V * counts.itemsize
    clocks = gpu.cores.value * gpu.ghz.value * 1e9
    elements = rows * _tiles(counts) * counts.columns
    around = counts.programs * counts.overhead_instructions + counts.finish_instructions
    overhead = rows * around * counts.warps * counts.warp
    moved = tensor * (counts.reads + counts.writes)
    through_l2 = tensor * (counts.reads + counts.l2_reads + counts.writes * _sectors(counts))
    found = {"memory": moved / (gpu.copy_tbps.value * 1e12), "L2": through_l2 / (gpu.l2_tbps.value * 1e12)}
    for name, operations, lanes in (
        ("issue", counts.instructions * elements + overhead, gpu.issue),
        ("fma", counts.fma * elements, gpu.fma),
        ("alu", counts.alu * elements, gpu.alu),
        ("ex2", counts.special * elements, gpu.special),
        ("lsu", counts.lsu * elements, gpu.lsu),
    ):
        if lanes.value:
            found[name] = operations / (lanes.value * clocks)
    found["latency"] = _latency(counts, gpu, rows)
    return found


def _sectors(counts: Counts) -> float:
    """Sectors of 32 bytes that a warp's store touches, over those it would touch if it were aligned."""
    span = counts.warp * counts.store_bits / 8
    return 1.0 if counts.aligned or not span else 1 + 32 / span


def _latency(counts: Counts, gpu: Gpu, rows: int) -> float:
    """Waves of resident programs, each waiting for its loads and then computing on them alone."""
    own = counts.instructions * counts.columns / (counts.warps * counts.warp) * gpu.clocks_alone.value
    own = (own + counts.exchanges * gpu.clocks_exchange.value) / gpu.ghz.value
    wait = gpu.latency_ns.value
    tile = max(own, (wait + own) / (counts.ahead + 1))
    prologue = wait + counts.overhead_instructions * gpu.clocks_alone.value / gpu.ghz.value
    program = prologue + math.ceil(_tiles(counts) / counts.programs) * tile
    waves = rows * counts.programs / (gpu.cores.value * resident_programs(counts, gpu))
    # Many short programs refill a core as they end; a few long ones end in waves.
    return (math.ceil(waves) if waves < 100 else waves) * program * 1e-9


def bound(counts: Counts, gpu: Gpu) -> tuple[str, float]:
    """The slowest line, and the predicted share of copy speed at the bytes that the kernel moves."""
    found = lines(counts, gpu)
    slowest = max(found, key=lambda name: found[name])
    return slowest, found["memory"] / found[slowest]

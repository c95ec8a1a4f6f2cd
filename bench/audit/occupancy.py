"""What a core holds: programs of a kernel at a time, and instructions while memory is the limit."""

from __future__ import annotations

from dataclasses import dataclass

_REGISTER_UNIT = 8  # registers of a thread are allotted in eights
_SCHEDULERS = 4  # of a core
_PROGRAM_SHARED = 1024  # bytes of shared memory that a program takes besides its own, on NVIDIA


@dataclass(frozen=True)
class Core:
    """What programs share: an SM, or AMD's compute unit. Figures are the vendors' own, of their data sheets.

    `registers` are of 32 bits; `warps` and `programs` are the most that are resident; `shared` is in bytes.
    """

    registers: int
    warps: int
    warp: int
    shared: int
    programs: int = 32


CORES = {
    "sm_80": Core(65536, 64, 32, 164 * 1024),
    "sm_90": Core(65536, 64, 32, 228 * 1024),
    "sm_100": Core(65536, 64, 32, 228 * 1024),
    "gfx942": Core(131072, 32, 64, 64 * 1024),
}


def resident_programs(core: Core, registers: int, warps: int, shared_bytes: int) -> int:
    """Programs of `warps` warps whose threads take so many registers."""
    allotted = -(-registers // _REGISTER_UNIT) * _REGISTER_UNIT * core.warp
    # Registers belong to a scheduler: what is left over at one of them is no use to another's warps.
    fitting = _SCHEDULERS * min(core.registers // _SCHEDULERS // allotted, core.warps // _SCHEDULERS)
    return min(fitting // warps, core.shared // (shared_bytes + _PROGRAM_SHARED), core.programs)


# An H200 has 132 SMs with 4 issue slots of 32 lanes at about 1.7 GHz, and moves 4.3 TB/s.
_SLOTS_PER_BYTE = 132 * 4 * 32 * 1.7e9 / 4.3e12


def budget(tensors: int, itemsize: int) -> float:
    """Instructions per column that leave memory the limit, where so many tensors of logits are moved.

    tests/test_machine_code.py holds kernels to other bounds where they do better, or cannot reach these.
    """
    return round(_SLOTS_PER_BYTE * tensors * itemsize, 1)

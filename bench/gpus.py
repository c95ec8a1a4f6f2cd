"""The GPUs that predictions are made for: their figures, and where each comes from. None was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Known(NamedTuple):
    """A figure and its origin."""

    value: float
    origin: str


_SHEET = "data sheet"
_GUIDE = "CUDA programming guide, throughput of arithmetic instructions"
_LATENCY = Known(600, "assumption: twice the latency that published microbenchmarks find on an idle GPU")
_OWN = Known(2, "assumption: one warp by itself issues every other clock")
_EXCHANGE = Known(25, "assumption: one shuffle or barrier, the wait for its result included")


@dataclass(frozen=True)
class Gpu:
    """One GPU. A core is an SM, or a compute unit of AMD's; rates are results per clock and core.

    Attributes:
        cores: number of SMs or compute units.
        ghz: clock under this load.
        copy_tbps: bytes read and written per second by a plain device copy, 10¹².
        l2_tbps: 10¹² bytes per second between the L2 and the cores.
        issue, fma, alu, special, lsu: lanes served per clock by the schedulers, the multiply-add pipe, the
            pipe of compares, selects and logic, the unit of exp2, and the load/store unit. 0: no limit known.
        registers: of a core, 32 bits each; warps: that fit a core; programs: that fit a core.
        shared_kb: shared memory of a core.
        latency_ns: from a load to its data while the memory is busy.
        clocks_alone: clocks between two instructions of a warp that has a scheduler to itself.
        clocks_exchange: clocks that a program waits for one shuffle or barrier.
    """

    name: str
    arch: str
    cores: Known
    ghz: Known
    copy_tbps: Known
    l2_tbps: Known
    issue: Known
    fma: Known
    alu: Known
    special: Known
    lsu: Known
    registers: Known
    warps: Known
    programs: Known
    shared_kb: Known
    latency_ns: Known = _LATENCY
    clocks_alone: Known = _OWN
    clocks_exchange: Known = _EXCHANGE


def _nvidia(
    name: str, arch: str, cores: int, ghz: float, copy: Known, l2: Known, fma: int, shared_kb: int
) -> Gpu:
    return Gpu(
        name,
        arch,
        Known(cores, _SHEET),
        Known(ghz, _SHEET if arch == "sm_80" else "assumption: below the boost clock, under full load"),
        copy,
        l2,
        issue=Known(128, "4 schedulers of 32 lanes, CUDA programming guide"),
        fma=Known(fma, _GUIDE),
        alu=Known(64, _GUIDE),
        special=Known(16, _GUIDE),
        lsu=Known(32, _GUIDE),
        registers=Known(65536, _SHEET),
        warps=Known(64, _SHEET),
        programs=Known(32, _SHEET),
        shared_kb=Known(shared_kb, _SHEET),
    )


GPUS = (
    _nvidia(
        "A100 80GB SXM", "sm_80", 108, 1.41,
        Known(1.75, "assumption: 86 % of the data sheet's 2.04"),
        Known(4.5, "assumption: about 60 % of the white paper's 5120 bytes per clock"), 64, 164,
    ),
    _nvidia(
        "H100 SXM", "sm_90", 132, 1.7,
        Known(3.0, "published: torch.clone, Dao-AILab/quack"),
        Known(5.5, "assumption: after published microbenchmarks of the PCIe version"), 128, 228,
    ),
    _nvidia(
        "H200 SXM", "sm_90", 132, 1.7,
        Known(4.3, "assumption: 90 % of the data sheet's 4.8, as on H100"),
        Known(5.5, "assumption: the same chip as H100"), 128, 228,
    ),
    _nvidia(
        "B200", "sm_100", 148, 1.8,
        Known(7.0, "assumption: 88 % of the data sheet's 8.0"),
        Known(10.0, "assumption: two dies of somewhat less than H100's each"), 128, 228,
    ),
    Gpu(
        "MI300X", "gfx942", Known(304, _SHEET), Known(2.1, _SHEET),
        Known(4.0, "assumption: 75 % of the data sheet's 5.3"),
        Known(10.0, "assumption: 60 % of the Infinity Cache's peak; a die's L2 serves only itself"),
        issue=Known(0, "scalar, vector and memory instructions of different waves issue side by side"),
        fma=Known(0, "part of the vector unit, under alu"),
        alu=Known(64, "4 vector units of 16 lanes, CDNA 3 ISA document; a special function counts 4 times"),
        special=Known(16, "assumption: a quarter of the vector rate"),
        lsu=Known(0, "not modelled"),
        registers=Known(131072, "4 × 512 × 64, CDNA 3 ISA document"),
        warps=Known(32, "8 waves a vector unit, CDNA 3 ISA document"),
        programs=Known(32, "assumption"), shared_kb=Known(64, _SHEET),
        latency_ns=Known(800, "assumption: published microbenchmarks find a longer way than on H100"),
        clocks_alone=Known(4, "a wave of 64 takes its 16-lane vector unit for 4 clocks, CDNA 3 ISA document"),
    ),
)  # fmt: skip

# The GPU that an architecture's row in the audit is predicted for.
USUAL = {"sm_80": "A100 80GB SXM", "sm_90": "H100 SXM", "sm_100": "B200", "gfx942": "MI300X"}


def gpu(name: str) -> Gpu:
    return next(gpu for gpu in GPUS if gpu.name == name)

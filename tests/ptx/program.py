"""A kernel that can be launched: its decoded code, and what one launch of it is told and tells."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from . import library
from .decoder import Decoder, Instruction
from .parser import Parameter, Statement, parse

_LANES = 32
# Worst errors of the approximations: none, all up, all down, anything in the bound by a hash of the input.
ERRORS = ("none", "up", "down", "hashed")


class ExecutionError(Exception):
    """What a GPU would not survive, or would answer differently each time: the message says where."""


@dataclass
class Settings:
    """How a launch is run.

    Attributes:
        seed: of all that is random: which warp is next and for how long, when stores arrive, hashed errors.
        resident: blocks that run at a time.
        quantum: the most instructions a warp executes before another's turn.
        shuffle: blocks start in a random order.
        weak: other blocks see stores late and in any order, unless a release puts them before it.
        error: of the approximate instructions, one of ERRORS.
        hazards: accesses of shared memory that no barrier orders are errors.
        races: accesses of global memory that nothing orders are errors.
        patience: instructions of all warps, without progress, that are taken for a deadlock.
    """

    seed: int = 0
    resident: int = 8
    quantum: int = 200
    shuffle: bool = False
    weak: bool = False
    error: str = "none"
    hazards: bool = True
    races: bool = False
    patience: int = 20_000_000


class Buffer(NamedTuple):
    """Memory that a kernel may touch."""

    address: int
    bytes: int
    writable: bool = True


@dataclass
class Report:
    """What a launch executed.

    Attributes:
        instructions: by all warps.
        warps, lanes: executions of each of the program's instructions, by warps and by lanes; where counted.
        traffic: bytes loaded and stored of each buffer, and how many different ones; where counted.
    """

    instructions: int
    warps: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    lanes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    traffic: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.uint64))


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("begin", ctypes.c_uint64), ("end", ctypes.c_uint64),
        ("writable", ctypes.c_int32), ("pad", ctypes.c_int32),
    ]  # fmt: skip


class _Launch(ctypes.Structure):
    """core/program.h describes it."""

    _fields_ = [
        ("code", ctypes.c_void_p), ("registers", ctypes.c_void_p), ("register_bytes", ctypes.c_int64),
        ("tid", ctypes.c_int32), ("ctaid_x", ctypes.c_int32), ("ctaid_y", ctypes.c_int32),
        ("ctaid_z", ctypes.c_int32), ("nctaid_x", ctypes.c_int32), ("warps", ctypes.c_int32),
        ("grid_x", ctypes.c_int64), ("grid_y", ctypes.c_int64), ("grid_z", ctypes.c_int64),
        ("shared_bytes", ctypes.c_int64), ("buffers", ctypes.c_void_p), ("n_buffers", ctypes.c_int64),
        ("resident", ctypes.c_int64), ("quantum", ctypes.c_int64), ("patience", ctypes.c_int64),
        ("seed", ctypes.c_uint64), ("shuffle", ctypes.c_int32), ("weak", ctypes.c_int32),
        ("error", ctypes.c_int32), ("hazards", ctypes.c_int32),
        ("races", ctypes.c_int32), ("pad", ctypes.c_int32),
        ("executed", ctypes.c_void_p), ("traffic", ctypes.c_void_p), ("message", ctypes.c_void_p),
        ("message_bytes", ctypes.c_int64),
    ]  # fmt: skip


class Program:
    """One kernel of a PTX module."""

    def __init__(self, ptx: str) -> None:
        self.ptx = ptx
        kernel = parse(ptx)
        decoder = Decoder(kernel)
        self.name = kernel.name
        self.parameters = kernel.parameters
        self.warps = kernel.warps
        self.statements: list[Statement] = decoder.statements
        self._code = (Instruction * len(decoder.code))(*decoder.code)
        self._places = decoder.registers.places
        # Registers that nothing has written are NaN, and far from any address.
        self._registers = np.full(-(-decoder.registers.bytes // 64) * 64, 0xFF, np.uint8)
        for place, (value, bytes_) in decoder.registers.constants.items():
            self._registers[place : place + _LANES * bytes_].view(f"u{bytes_}")[:] = value

    def _with_parameters(self, values: Sequence[float]) -> np.ndarray:
        registers = self._registers.copy()
        for parameter, value in zip(self.parameters, values, strict=True):
            raw = _raw(parameter, value)
            for bytes_ in (4, 8):
                place = self._places.get(f"{bytes_} of parameter {parameter.name}")
                if place is not None:
                    number = int.from_bytes(raw[:bytes_], "little")
                    registers[place : place + _LANES * bytes_].view(f"u{bytes_}")[:] = number
        return registers

    def run(
        self, grid: tuple[int, int, int], values: Sequence[float], buffers: Sequence[Buffer],
        shared_bytes: int, settings: Settings, counted: bool = False,
    ) -> Report:  # fmt: skip
        """Launch it.

        Args:
            values: the parameters, numbers or addresses; `buffers` are those that addresses may point into.
            counted: whether the report has more than the number of instructions.

        Raises:
            ExecutionError: an access out of bounds, a race, a deadlock, and the like.
        """
        registers = self._with_parameters(values)
        table = (_Buffer * len(buffers))(
            *(_Buffer(b.address, b.address + b.bytes, b.writable, 0) for b in buffers)
        )
        executed = np.zeros((len(self._code), 2), np.uint64)
        traffic = np.zeros((len(buffers), 4), np.uint64)
        message = ctypes.create_string_buffer(1024)
        place, s = self._places, settings
        launch = _Launch(
            ctypes.addressof(self._code), registers.ctypes.data, len(registers),
            place["tid.x"], place["ctaid.x"], place["ctaid.y"], place["ctaid.z"], place["nctaid.x"],
            self.warps, *grid, shared_bytes, ctypes.addressof(table), len(buffers),
            s.resident, s.quantum, s.patience, s.seed, s.shuffle, s.weak, ERRORS.index(s.error), s.hazards,
            s.races, 0,
            executed.ctypes.data if counted else None, traffic.ctypes.data if counted else None,
            ctypes.addressof(message), len(message),
        )  # fmt: skip
        instructions = library.load().ptx_run(ctypes.byref(launch))
        if instructions < 0:
            raise ExecutionError(f"{self.name}: {message.value.decode()}")
        return Report(instructions, executed[:, 0], executed[:, 1], traffic)


def _raw(parameter: Parameter, value: float) -> bytes:
    if parameter.kind in ("f32", "f64"):
        return struct.pack("<f" if parameter.kind == "f32" else "<d", value).ljust(8, b"\0")
    return int(value).to_bytes(8, "little", signed=value < 0)

"""Triton's driver for a GPU that is not there: kernels are compiled for it, and launches execute its PTX."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from . import library
from .program import Buffer, Program, Report, Settings

_SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}


@cache
def _program(ptx: str) -> Program:
    return Program(ptx)


@dataclass
class Launch:
    """One launch that ran: what, over which tensors, and what it executed."""

    program: Program
    grid: tuple[int, int, int]
    tensors: dict[str, Tensor]
    buffers: tuple[Buffer, ...]
    report: Report


class Driver:
    """What Triton asks of a driver, and how launches are run.

    Attributes:
        settings: of the launches to come.
        rewrite: changes a kernel's PTX before it is run.
        counted: whether launches count what they execute.
        launches: what ran, where `counted`.
    """

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.settings = Settings()
        self.rewrite: Callable[[str], str] | None = None
        self.counted = False
        self.launches: list[Launch] = []
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.get_current_device(), 32)

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels by device: those of each architecture apart.
        return int(self.arch.removeprefix("sm_"))

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED_BYTES[self.arch]}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Module, function, registers, spills and the most threads of a block."""
        return None, kernel.decode(), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What launches one compiled kernel."""
        names = [name for name, kind in source.signature.items() if kind != "constexpr"]
        given = [n for n, kind in enumerate(source.signature.values()) if kind != "constexpr"]

        def launch(x: int, y: int, z: int, stream: int, ptx: str, *arguments: Any) -> None:
            # Before the kernel's arguments: metadata and hooks.
            values = arguments[len(arguments) - len(source.signature) :]
            self._launch(
                ptx, (x, y, z), dict(zip(names, (values[n] for n in given), strict=True)), metadata.shared
            )

        return launch

    def _launch(self, ptx: str, grid: tuple[int, int, int], arguments: dict[str, Any], shared: int) -> None:
        program = _program(self.rewrite(ptx) if self.rewrite else ptx)
        tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
        values = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments.values()]
        values += [0] * (len(program.parameters) - len(values))  # scratch memory, which no kernel here uses
        buffers = merged([_extent(x) for x in tensors.values()])
        report = program.run(grid, values, buffers, shared, self.settings, self.counted)
        if self.counted:
            self.launches.append(Launch(program, grid, tensors, tuple(buffers), report))


def _extent(x: Tensor) -> Buffer:
    """The bytes from a tensor's first element to its last, not the allocation around them.

    But from the 32-bit word that the first one lies in: allocations begin with one, and kernels read 16-bit
    logits in words.
    """
    if x.numel() == 0:
        return Buffer(x.data_ptr(), 0)
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    word = x.data_ptr() // 4 * 4
    return Buffer(word, x.data_ptr() + (last + 1) * x.element_size() - word)


def merged(buffers: Sequence[Buffer]) -> list[Buffer]:
    """Those that share memory as one: a kernel may be given a tensor twice, and views of one."""
    found: list[Buffer] = []
    for buffer in sorted(buffers):
        if found and buffer.address < found[-1].address + found[-1].bytes:
            end = max(buffer.address + buffer.bytes, found[-1].address + found[-1].bytes)
            found[-1] = Buffer(found[-1].address, end - found[-1].address)
        elif buffer.bytes:
            found.append(buffer)
    return found


def _ptx_alone(self: CUDABackend, ptx: str, *_: Any) -> bytes:
    """In place of ptxas, which takes longer than all that comes before it."""
    return ptx.encode()


@contextmanager
def active(driver: Driver) -> Iterator[Driver]:
    """Triton compiles for this driver's architecture, and launches through it."""
    from triton import knobs
    from triton.runtime.driver import driver as drivers

    before = drivers._active
    assemble = CUDABackend.make_cubin
    drivers.set_active(driver)
    CUDABackend.make_cubin = _ptx_alone
    try:
        # A cache of its own: what it calls a cubin is PTX.
        with knobs.cache.scope(), knobs.runtime.scope():
            knobs.cache.dir = str(library.BUILD / "triton")
            knobs.runtime.interpret = False
            yield driver
    finally:
        CUDABackend.make_cubin = assemble
        drivers._active = before

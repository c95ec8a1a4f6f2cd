"""How the Triton backend launches, without a GPU: on which device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kl_gpu.backends.triton import launch


class DeviceModule:
    """What torch.cuda and torch.xpu say of the current device."""

    def __init__(self) -> None:
        self.current = 0

    def current_device(self) -> int:
        return self.current

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        before, self.current = self.current, index
        yield
        self.current = before


class Kernel:
    """A compiled kernel that says where it ran, and with what."""

    def __init__(self, devices: DeviceModule) -> None:
        self.devices = devices
        self.runs: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> None:
            self.runs.append((self.devices.current, grid, arguments, options))

        return run


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> DeviceModule:
    modules = DeviceModule()
    monkeypatch.setattr(
        torch, "get_device_module", lambda device: {"cuda": modules, "xpu": modules}[device.type]
    )
    return modules


@pytest.mark.parametrize("name", ["cuda:0", "cuda:1", "xpu:1"])
def test_a_kernel_runs_on_its_tensors_device(devices: DeviceModule, name: str) -> None:
    # Triton takes the context and the stream of the current device, whatever its tensors lie on.
    kernel, device = Kernel(devices), torch.device(name)
    launch.enqueue(kernel, 5, device, 1, 2, num_warps=4)
    ((where, grid, arguments, options),) = kernel.runs
    assert (where, grid, arguments) == (device.index, (5,), (1, 2))
    assert options == {"num_warps": 4, "enable_fp_fusion": False}
    assert devices.current == 0


def test_the_interpreter_has_no_device_to_make_current() -> None:
    kernel = Kernel(DeviceModule())
    launch.enqueue(kernel, 1, torch.device("cpu"))
    assert len(kernel.runs) == 1

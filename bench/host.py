"""What a call costs on the host, without a GPU: launches of the Triton kernels end where the driver begins.

It prints microseconds of the quickest call, and of the median. The tensors lie on the CPU: PyTorch's own
operators, of which a call has two to ten, take longer to queue on a GPU than so small ones take to run here.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch

from .harness.clock import interleaved


class Driver:
    """Triton's driver of an sm_90 that is not there: it compiles to PTX, and launches nothing."""

    def __init__(self) -> None:
        self.utils = self

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[object, ...]:
        """Module, function, registers, spills and the most threads of a block."""
        return self, kernel, 0, 0, 1024

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *_: None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calls", type=int, default=2000, help="of each kind, taking turns")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    # Interpreted kernels are not launched, and which they are is settled as they are imported.
    os.environ.pop("TRITON_INTERPRET", None)
    from triton.runtime.driver import driver

    import kl_gpu
    from kl_gpu import autograd
    from kl_gpu.backends import registry

    # A device's number is not looked at: backward launches a kernel that finds an incoming gradient of 1.
    autograd.readable = lambda tensor: False
    driver.set_active(Driver())
    registry._TRITON_DEVICES = frozenset({*registry._TRITON_DEVICES, "cpu"})
    student, teacher = torch.randn(2, 4, 4096, dtype=torch.bfloat16)
    leaf = student.clone().requires_grad_()

    def backward() -> None:
        leaf.grad = None
        kl_gpu.kl_div(leaf, teacher, backend="triton").backward()

    calls: dict[str, Callable[[], object]] = {
        "value": lambda: kl_gpu.kl_div(student, teacher, reduction="none", backend="triton"),
        "forward and backward": backward,
        "token_stats": lambda: kl_gpu.token_stats(student, teacher, backend="triton"),
    }
    for name, seconds in interleaved(calls, options.calls).items():
        least, median = min(seconds), statistics.median(seconds)
        print(f"{name:22}{least * 1e6:7.1f} us, median {median * 1e6:.1f}")
    return 0

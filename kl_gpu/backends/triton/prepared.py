"""Launches that all calls of the same sizes share: kernels with all that they are launched with but tensors.

With every launch Triton asks anew what its arguments are, finds the compiled kernel for them and binds it, in
20 µs. It goes by their types, by compile-time constants and by settings of its own: a launch that has these
in common with an earlier one may take its kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from triton import JITFunction, knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from .launch import FP_FUSION

# Plans kept of each operation: the latest of them serve batches of changing sizes.
_PLANS = 1024
_WIDEST_ACCESS = 16
# Triton's settings that a compiled kernel depends on, by those of its versions that have them.
_SETTINGS = (
    "runtime.debug",
    "runtime.add_stages_inspection_hook",
    "compilation.instrumentation_mode",
    "compilation.fpsan_homomorphic_casts",
)


def _known(setting: str) -> bool:
    group, _, name = setting.partition(".")
    return hasattr(getattr(knobs, group, None), name)


_settings = attrgetter(*filter(_known, _SETTINGS))


class Place(NamedTuple):
    """All of a tensor that a plan may depend on. It answers as the tensor does.

    A plan is made from places alone, so it cannot depend on what it is not found by.
    """

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    address: int  # modulo the widest access

    def stride(self) -> tuple[int, ...]:
        return self.strides

    def data_ptr(self) -> int:
        return self.address

    def element_size(self) -> int:
        return self.dtype.itemsize


def place(tensor: Tensor) -> Tensor:
    """The tensor's place, in the tensor's type."""
    found = Place(
        tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % _WIDEST_ACCESS
    )
    return cast(Tensor, found)


def place_if_any(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else place(tensor)


Function = TypeVar("Function", bound=Callable[..., Any])
_kept: list[Any] = []


def plan(function: Function) -> Function:
    """Keep what the function makes of places, numbers and names, none of them a tensor."""
    kept = lru_cache(maxsize=_PLANS)(function)
    _kept.append(kept)
    return cast(Function, kept)


def forget_plans() -> None:
    """For who changes what plans are made from, which only tests do."""
    for kept in _kept:
        kept.cache_clear()


class PreparedLaunch:
    """A kernel with all that it is launched with but its tensors.

    Args:
        device: its tensors'.
        numbers: the kernel's parameters between its tensors and its constants.
        constants: the kernel's, and the compiler's options, by name.
    """

    def __init__(
        self, kernel: Any, programs: int, device: torch.device, numbers: tuple[Any, ...], **constants: Any
    ) -> None:
        self._kernel, self._grid, self._device = kernel, (programs, 1, 1), device
        # Every option is named whose default is Triton's to change.
        self._numbers, self._constants = numbers, {"enable_fp_fusion": FP_FUSION, **constants}
        names = getattr(kernel, "arg_names", ())
        self._behind_tensors = (*numbers, *(constants[name] for name in names if name in constants))
        self._bound: dict[tuple[object, ...], Callable[..., None]] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch it. Two calls of one launch must agree in their tensors' dtypes, and in which are there."""
        if not isinstance(self._kernel, JITFunction):  # interpreted
            self._launch(tensors)
            return
        current = driver.active.get_current_device()
        # Triton takes context and stream from the current device. The CPU has no index.
        if self._device.index is not None and self._device.index != current:
            with torch.get_device_module(self._device).device(self._device.index):
                self(*tensors)
            return
        key = current, _settings(knobs)
        bound = self._bound.get(key)
        if bound is None or self._kernel.pre_run_hooks:
            compiled = self._launch(tensors)
            # None where a hook took the launch over, and the promise of a kernel where it is compiled aside.
            if isinstance(compiled, CompiledKernel):
                self._bound[key] = compiled[self._grid]
        else:
            # It calls the hooks that profilers put around a launch, as Triton itself does.
            bound(*tensors, *self._behind_tensors)

    def _launch(self, tensors: tuple[Tensor | None, ...]) -> object:
        return self._kernel[self._grid](*tensors, *self._numbers, **self._constants)

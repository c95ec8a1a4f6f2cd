"""The Triton backend a second time: compiled, where the one that was imported may be interpreted.

Triton settles as it decorates a kernel whether it will be interpreted. So that one process can run the same
tests both ways, the package is loaded again from its files, and put in the place of the other for as long as
a test asks for it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from kl_gpu import backends
from kl_gpu.backends import registry

from .driver import Driver, active
from .language import compiled_language

NAME = "kl_gpu.backends.triton"
SOURCES = Path(backends.__path__[0]) / "triton"
Modules = dict[str, ModuleType]


def _loaded() -> Modules:
    return {name: module for name, module in sys.modules.items() if f"{name}.".startswith(f"{NAME}.")}


@contextmanager
def _in_place(modules: Modules) -> Iterator[None]:
    """`modules` in place of the backend's own, for imports and for the registry."""
    before, attribute = _loaded(), getattr(backends, "triton", None)
    usable, loaded = dict(registry._usable), dict(registry._loaded)

    def replace(old: Modules, new: Modules, package: ModuleType | None) -> None:
        for name in old:
            sys.modules.pop(name, None)
        sys.modules.update(new)
        if package is not None:
            setattr(backends, "triton", package)  # noqa: B010
        elif hasattr(backends, "triton"):
            delattr(backends, "triton")

    replace(before, modules, modules.get(NAME))
    registry._loaded.pop("triton", None)
    try:
        yield
    finally:
        replace(_loaded(), before, attribute)
        registry._loaded.clear()
        registry._loaded.update(loaded)
        registry._usable.clear()
        registry._usable.update(usable)


def _path_alone() -> Any:
    """Imports by folders: an editable install's finder would give the package's own modules for a copy's."""
    finders = [one for one in sys.meta_path if one in (BuiltinImporter, FrozenImporter, PathFinder)]
    return mock.patch.object(sys, "meta_path", finders)


@cache
def load(folder: Path = SOURCES) -> Modules:
    """The package's modules from `folder`, with kernels that will be compiled."""
    from triton import knobs

    with _in_place({}), compiled_language(), knobs.runtime.scope(), _path_alone():
        knobs.runtime.interpret = False
        spec = importlib.util.spec_from_file_location(
            NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules[NAME] = package
        spec.loader.exec_module(package)
        modules = _loaded()
    # The host chooses NVIDIA's logarithm by where the tensors are.
    pair = vars(modules[f"{NAME}.pair"])
    choose = pair["logarithm"]
    pair["logarithm"] = lambda formula, dtype, nvidia: choose(formula, dtype, True)
    return modules


@contextmanager
def executed(arch: str, folder: Path = SOURCES) -> Iterator[Driver]:
    """backend="triton" runs the PTX of the kernels in `folder`, compiled for `arch`."""
    with _in_place(load(folder)), compiled_language(), active(Driver(arch)) as driver:
        # CPU tensors are refused where kernels are not interpreted.
        devices = frozenset({*registry._TRITON_DEVICES, "cpu"})
        with mock.patch.object(registry, "_TRITON_DEVICES", devices):
            yield driver


def is_executed() -> bool:
    """Whether backend="triton" means that now."""
    from triton.runtime.driver import driver

    return isinstance(driver._active, Driver)

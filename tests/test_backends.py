"""Every backend offers what the interface lists, with its parameters, and a formula for every kind."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from kl_gpu.arguments.reduction import wide_dtype
from kl_gpu.backends import registry
from kl_gpu.backends.eager.pair import worker_for
from kl_gpu.backends.interface import Backend, Joining
from kl_gpu.kinds import KINDS

MEMBERS = [name for name in vars(Backend) if not name.startswith("_")]


@pytest.mark.parametrize("backend", registry.BACKENDS)
def test_a_backend_offers_the_interface(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    module = registry.load(backend)
    assert all(hasattr(module, name) for name in MEMBERS)
    assert isinstance(module.fuses, bool)
    assert isinstance(module.viewless, bool)


def test_a_backend_that_joins_functions_offers_all_of_them() -> None:
    assert registry.joining("eager") is None
    with pytest.raises(TypeError, match="eager is no backend: it lacks value_and_beside"):
        registry.check(registry.load("eager"), Joining)
    if importlib.util.find_spec("kl_gpu._native"):
        assert registry.joining("native") is registry.load("native")


def incomplete(**changes: object) -> ModuleType:
    module = ModuleType("half_a_backend")
    for name in MEMBERS:
        setattr(module, name, getattr(registry.load("eager"), name))
    for name, member in changes.items():
        if member is None:
            delattr(module, name)
        else:
            setattr(module, name, member)
    return module


def test_a_module_that_lacks_a_member_is_refused() -> None:
    registry.check(incomplete())
    for name in MEMBERS:
        with pytest.raises(TypeError, match=f"half_a_backend is no backend: it lacks {name}"):
            registry.check(incomplete(**{name: None}))


def test_other_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match=r"half_a_backend\.value takes \['p', 'more'\], .* says \['p'\]"):
        registry.check(incomplete(value=lambda p, more: None))


def test_eager_is_loaded_without_the_others() -> None:
    """What a machine without Triton or a compiler imports."""
    code = (
        "import sys, torch, kl_gpu\n"
        "kl_gpu.kl_div(torch.zeros(1, 2), torch.zeros(1, 2), backend='eager')\n"
        "print({'kl_gpu.backends.triton', 'kl_gpu.backends.native.pair'} & set(sys.modules))"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_formula_is_known_to_every_backend() -> None:
    from kl_gpu import formulas, reference

    names = {kind.formula for kind in KINDS.values()}
    assert names == set(formulas._FORMULAS)
    with pytest.raises(NotImplementedError, match="no formula 'forgotten'"):
        reference.column_terms([0.5], "forgotten", 0.5)


@pytest.mark.parametrize("has_fp64", [True, False])
def test_a_gpu_without_float64_is_not_given_to_triton(
    has_fp64: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of Intel's compute in float32 alone: Triton's kernels would not compile there."""
    pytest.importorskip("triton")
    arc = torch.device("xpu", 0)
    properties = SimpleNamespace(name="a GPU of Intel's", has_fp64=has_fp64)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: properties)
    if has_fp64:
        assert registry.resolve(None, arc) == registry.resolve("triton", arc) == "triton"
        assert worker_for(arc) == arc
        assert wide_dtype(arc) == torch.float64
    else:
        assert registry.resolve(None, arc) == registry.resolve("eager", arc) == "eager"
        with pytest.raises(ValueError, match=r"backend='triton' computes in float64.* xpu:0 does not have"):
            registry.resolve("triton", arc)
        # As on Apple's GPUs.
        assert worker_for(arc) == torch.device("cpu")
        assert wide_dtype(arc) == torch.float32

"""What launches that were prepared by an earlier call launch, without compiling or running any.

Run as a program, without TRITON_INTERPRET. Triton's own code chooses the compiled kernels; they are stand-ins
that note how they are run. It prints as JSON what tests/test_launch.py asks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from bench.host import Driver
from kl_gpu.backends.interface import ComplementArgs, RowPair
from kl_gpu.kinds import KINDS


class Device(Driver):
    current = 0

    def get_current_device(self) -> int:
        return self.current


DEVICE = Device()
driver.set_active(DEVICE)
COMPILED: list[str] = []
# Of every launch: the compiled kernel, the current device, the grid and the arguments.
LAUNCHED: list[tuple[str, int, tuple[int, ...], list[str]]] = []


def described(argument: object) -> str:
    if isinstance(argument, Tensor):
        return f"{argument.dtype} {tuple(argument.shape)} {argument.stride()}"
    return repr(argument)


class StandIn(CompiledKernel):
    module = function = metadata = packed_metadata = None

    def __init__(self, source: Any, options: dict[str, Any]) -> None:
        self.src, self.name = source, source.fn.__name__
        self.what = f"{self.name} {source.signature} {source.constants} {sorted(options.items(), key=str)}"

    def _init_handles(self) -> None:
        pass

    @property
    def run(self) -> Callable[..., None]:
        def note(*given: Any) -> None:
            x, y, z, _, _, _, metadata, enter, leave, *arguments = given
            enter(metadata)
            LAUNCHED.append((self.what, DEVICE.current, (x, y, z), [*map(described, arguments)]))
            leave(metadata)

        return note


def stand_in(source: Any, *, options: dict[str, Any], **_: Any) -> StandIn:
    COMPILED.append(source.fn.__name__)
    return StandIn(source, options)


triton.compiler.compile = stand_in

from kl_gpu.backends import triton as backend  # noqa: E402
from kl_gpu.backends.triton import launch, pair, prepared  # noqa: E402

_PLACES = ("place", "place_if_any")
BOUND: list[str] = []
_run = triton.JITFunction.run


def bind(kernel: triton.JITFunction, *arguments: Any, **options: Any) -> Any:
    BOUND.append(kernel.__name__)
    return _run(kernel, *arguments, **options)


triton.JITFunction.run = bind


def rows(V: int, dtype: torch.dtype, n: int, apart: int, first: int) -> Tensor:
    """`[1, n, V]`, so many columns apart, the first at this column of its buffer."""
    # The buffer's own address must not decide how its rows are loaded.
    buffer = torch.empty(n * apart + first + 64, dtype=dtype)
    first += -(buffer.data_ptr() // buffer.element_size()) % 64
    return buffer.as_strided((1, n, V), (n * apart, apart, 1), first)


BASE: dict[str, Any] = {
    "what": "value", "kind": "forward_kl", "beta": None, "V": 2048, "n": 3, "masked": False,
    "temperatures": (1.0, 1.0), "dtypes": (torch.bfloat16, torch.bfloat16), "apart": (2048, 2048),
    "first": (0, 0), "gradient_first": 0, "gradient_apart": 2048, "to": (True, False),
}  # fmt: skip


def call(**different: Any) -> None:
    at = BASE | different
    V, n = at["V"], at["n"]
    sides = [rows(V, dtype, n, max(apart, V), first) for dtype, apart, first in zip(
        at["dtypes"], at["apart"], at["first"], strict=True
    )]  # fmt: skip
    valid = torch.ones(1, n, dtype=torch.bool) if at["masked"] else None
    kind, beta = KINDS[at["kind"]].at(at["beta"])
    p = RowPair.of(*sides, valid, kind, beta, *at["temperatures"])
    stats, scale = torch.empty(n, 12, dtype=p.dtype), torch.empty(n, dtype=p.dtype)
    grads = [
        rows(V, x.dtype, n, max(at["gradient_apart"], V), at["gradient_first"]) if wanted else None
        for x, wanted in zip((p.a, p.b), at["to"], strict=True)
    ]
    args = ComplementArgs(sides[0], torch.zeros(n, 3, dtype=torch.int64), valid, at["temperatures"][0])
    grad = rows(V, sides[0].dtype, n, V, at["gradient_first"])
    per_row = torch.empty(n, dtype=torch.float64)
    calls: dict[str, Callable[[], object]] = {
        "value": lambda: backend.value(p),
        "both": lambda: backend.value_and_gradient(p, scale, *grads),
        "gradient": lambda: backend.gradient(p, stats, scale, *grads),
        "incoming": lambda: backend.gradient(p, stats, scale, *grads, torch.ones((), dtype=p.dtype)),
        "formula_sums": lambda: backend.formula_sums(p, stats),
        "token_stats": lambda: backend.token_stats(p, None),
        "tokens": lambda: backend.token_stats(p, torch.zeros(1, n, dtype=torch.int64)),
        "complement": lambda: backend.complement(args, False),
        "entropy": lambda: backend.complement(args, True),
        "complement_gradient": lambda: backend.complement_gradient(
            args, torch.empty(n, 4, dtype=torch.float64), torch.empty(n, 3, dtype=torch.float64), per_row,
            per_row if at["masked"] else None, grad,
        ),
    }  # fmt: skip
    calls[at["what"]]()


HALF, SINGLE = torch.float16, torch.float32
# What one call may differ in from another, each beside the base of its operation.
DIFFERENT: dict[str, tuple[Any, ...]] = {
    "kind": ("reverse_kl", "js", "jeffreys"), "V": (2047, 2056, 40000), "n": (1, 5), "masked": (True,),
    "temperatures": ((2.0, 2.0), (1.0, 2.0)), "dtypes": ((HALF, HALF), (SINGLE, HALF), (HALF, SINGLE)),
    "apart": ((2056, 2048), (2049, 2048), (2048, 2049)),
    "first": ((8, 0), (4, 0), (2, 0), (1, 0), (0, 1), (1, 1)),
}  # fmt: skip
OF_GRADIENTS: dict[str, tuple[Any, ...]] = {
    "gradient_first": (8, 1), "gradient_apart": (2056, 2049), "to": ((False, True), (True, True)),
}  # fmt: skip


def variants() -> Iterator[dict[str, Any]]:
    one_side = ("complement", "entropy", "complement_gradient")
    for what in ("value", "both", "gradient", "incoming", "formula_sums", "token_stats", "tokens", *one_side):
        yield {"what": what}
        of_gradients = OF_GRADIENTS if what in ("both", "gradient", "incoming") else {}
        for name, values in (DIFFERENT | of_gradients).items():
            yield from ({"what": what, name: value} for value in values)
    for what in ("value", "both", "formula_sums"):
        yield from ({"what": what, "kind": "js", "beta": beta} for beta in (0.25, 0.75))
    yield {"what": "complement_gradient", "gradient_first": 1}


def launches(different: dict[str, Any]) -> list[Any]:
    LAUNCHED.clear()
    call(**different)
    return list(LAUNCHED)


@contextmanager
def plans_of_tensors() -> Iterator[None]:
    """Plans are made from the tensors themselves, not from what is kept of them."""
    modules = [
        import_module(f"{backend.__name__}.{x}") for x in ("pair", "token_stats", "complement", "shard")
    ]
    before = [
        (module, name, getattr(module, name))
        for module in modules
        for name in _PLACES
        if hasattr(module, name)
    ]
    for module, name, _ in before:
        setattr(module, name, lambda tensor: tensor)
    yield
    for module, name, function in before:
        setattr(module, name, function)


def differences() -> dict[str, Any]:
    """Every call as Triton launches it by itself, and behind all the others."""
    alone = []
    with plans_of_tensors():
        for variant in variants():
            prepared.forget_plans()
            alone.append(launches(variant))
    prepared.forget_plans()
    wrong = [
        str(v) for _ in range(2) for v, want in zip(variants(), alone, strict=True) if launches(v) != want
    ]
    return {"differences": len({str(x) for x in alone}), "wrong": wrong}


def bound(calls: Callable[[], object]) -> int:
    BOUND.clear()
    calls()
    return len(BOUND)


def bound_again() -> dict[str, Any]:
    prepared.forget_plans()
    everything = list({str(v): v for v in variants() if v.get("gradient_first") != 1}.values())

    def all_of_them() -> None:
        for variant in everything:
            call(**variant)

    first = bound(all_of_them)
    LAUNCHED.clear()
    return {"bound": {"first": first, "again": bound(all_of_them)}, "calls": len(LAUNCHED)}


@contextmanager
def setting(name: str, value: object) -> Iterator[None]:
    group, _, name = name.partition(".")
    before = getattr(getattr(knobs, group), name)
    setattr(getattr(knobs, group), name, value)
    yield
    setattr(getattr(knobs, group), name, before)


def settings() -> dict[str, dict[str, int]]:
    found = {}
    for name, value in (("runtime.debug", True), ("compilation.instrumentation_mode", "another")):
        call()
        COMPILED.clear()
        with setting(name, value):
            call()
        compiled = len(COMPILED)
        found[name] = {"compiled": compiled, "and back": bound(call) + len(COMPILED) - compiled}
    return found


def hooks() -> dict[str, int]:
    seen = {"enter": 0, "exit": 0, "pre_run": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: object, **__: object) -> None:
            seen[name] += 1

        return hook

    enter, leave = count("enter"), count("exit")
    call()
    knobs.runtime.launch_enter_hook.add(enter)
    knobs.runtime.launch_exit_hook.add(leave)
    for _ in range(3):
        call()
    knobs.runtime.launch_enter_hook.remove(enter)
    knobs.runtime.launch_exit_hook.remove(leave)
    pair.pair_kernel.add_pre_run_hook(count("pre_run"))
    for _ in range(3):
        call()
    pair.pair_kernel.pre_run_hooks.clear()
    return seen


@launch.kernel
def nothing(x_ptr, n, ONE: tl.constexpr):
    pass


class DeviceModule:
    """What torch.cuda and torch.xpu do to the current device."""

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        before, DEVICE.current = DEVICE.current, index
        yield
        DEVICE.current = before


def devices() -> dict[str, dict[str, Any]]:
    torch.get_device_module = lambda device: DeviceModule()
    found = {}
    for name in ("cuda:0", "cuda:1", "xpu:1"):
        launch = prepared.PreparedLaunch(nothing, 1, torch.device(name), (3,), ONE=1)
        LAUNCHED.clear()
        launch(torch.empty(1))
        launch(torch.empty(1))
        on = [device for _, device, *_ in LAUNCHED]
        found[name] = {"launched on": on, "current after": DEVICE.current}
    return found


def main() -> None:
    found = differences() | bound_again() | {"settings": settings(), "hooks": hooks(), "devices": devices()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

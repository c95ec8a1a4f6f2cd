"""How the Triton backend launches, without a GPU: on which device, and which compiled kernel with what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kl_gpu.backends.triton.launch import divisor
from kl_gpu.backends.triton.prepared import PreparedLaunch

ROOT = Path(__file__).parent.parent


def test_rows_are_divided_without_a_division() -> None:
    """What `device_math.quotient` computes, in 32 bits, is n // d up to the largest grid."""
    for d in (1, 2, 3, 5, 31, 32, 33, 1000, 4097, 2**20, 2**31 - 1):
        magic, shift = divisor(d)
        assert -(2**31) <= magic < 0
        for n in {0, 1, d - 1, d, d + 1, 7 * d - 1, 7 * d, 2**31 - 1 - 2**31 % d, 2**31 - 2, 2**31 - 1}:
            if n < 2**31:
                assert ((2 * n * (magic % 2**32)) >> 32) >> shift == n // d, (n, d)


def test_the_interpreter_launches_with_every_option_and_no_device() -> None:
    runs = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: runs.append((grid, arguments, options))

    PreparedLaunch(Kernel(), 5, torch.device("cpu"), (1, 2.0), VEC=8, num_warps=4)(None)
    options = {"VEC": 8, "num_warps": 4, "enable_fp_fusion": False}
    assert runs == [((5, 1, 1), (None, 1, 2.0), options)]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the program beside this test says: launches are compiled there, not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "prepared_launches.py")],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_calls_that_differ_in_one_thing_launch_what_triton_would(found: dict[str, Any]) -> None:
    assert found["differences"] > 20
    assert found["wrong"] == []


def test_a_call_like_an_earlier_one_is_not_bound_again(found: dict[str, Any]) -> None:
    # Calls that differ in what nothing depends on, as where an aligned row starts, share what was bound.
    assert 0 < found["bound"]["first"] < found["calls"]
    assert found["bound"]["again"] == 0


@pytest.mark.parametrize("name", ["runtime.debug", "compilation.instrumentation_mode"])
def test_a_setting_of_triton_is_heeded(found: dict[str, Any], name: str) -> None:
    # Set between two launches, as a profiler does.
    assert found["settings"][name] == {"compiled": 1, "and back": 0}


def test_hooks_see_every_launch(found: dict[str, Any]) -> None:
    assert found["hooks"] == {"enter": 3, "exit": 3, "pre_run": 3}


@pytest.mark.parametrize("name", ["cuda:0", "cuda:1", "xpu:1"])
def test_a_kernel_runs_on_its_tensors_device(found: dict[str, Any], name: str) -> None:
    # Triton takes the context and the stream of the current device, whatever its tensors lie on.
    index = torch.device(name).index
    assert found["devices"][name] == {"launched on": [index, index], "current after": 0}

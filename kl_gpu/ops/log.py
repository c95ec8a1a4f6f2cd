"""`KL_GPU_LOG=1`: a line on stderr for every operator that runs, for bug reports."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

ENVIRONMENT = "KL_GPU_LOG"


def logged(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """The operator's function, which reports each call where the environment asked for that at import.

    A line has shapes, strides, dtypes and devices of the tensors, the kind and the backend, and the
    milliseconds until the call returned: on a GPU that is the time of the launch, since nothing here waits.
    """
    if os.environ.get(ENVIRONMENT, "0") == "0":
        return run

    @wraps(run)
    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        outcome = "raised"
        try:
            found = run(*arguments)
            outcome = "returned"
            return found
        finally:
            milliseconds = (time.perf_counter() - start) * 1e3
            shown = ", ".join(
                _shown(x) for x in arguments if isinstance(x, Tensor) or (isinstance(x, str) and x)
            )
            print(f"kl_gpu.{name}({shown}) {outcome} after {milliseconds:.3f} ms", file=sys.stderr)

    return timed


def _shown(argument: Tensor | str) -> str:
    if isinstance(argument, str):
        return argument
    dtype = str(argument.dtype).removeprefix("torch.")
    return f"{dtype}{list(argument.shape)} strides {argument.stride()} on {argument.device}"

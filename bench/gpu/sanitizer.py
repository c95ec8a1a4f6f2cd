"""compute-sanitizer over some of `calls`: accesses out of bounds, races in shared memory."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from .correctness import ROOT
from .limited import run
from .phases import CUT_SHORT, DONE, FAILED, SKIPPED, Ending

NAME = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")

_NO_SUPPORT = "Device not supported"  # as under some virtual machines
_ERROR = 86  # the exit status that says "found something", unlike any of Python's


def tool() -> str | None:
    """Where it is: on PATH, or where CUDA's installer puts it."""
    return shutil.which(NAME) or shutil.which(NAME, path="/usr/local/cuda/bin")


def command(program: str, check: str) -> list[str]:
    options = ["--tool", check, "--error-exitcode", str(_ERROR), "--target-processes", "application-only"]
    return [program, *options, sys.executable, "-m", "bench.gpu.calls", "sanitizer"]


def summary_of(output: str) -> str:
    """The tool's own last word: `ERROR SUMMARY: 0 errors`, `RACECHECK SUMMARY: 0 hazards displayed (…)`."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    return found[-1].strip() if found else ""


def sanitize(program: str, check: str, limit: float, log: Path, variables: Mapping[str, str]) -> Ending:
    # PyTorch's cache of memory would hide what lies past the end of a tensor.
    finished = run(
        command(program, check), limit, log, ROOT, {**variables, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    )
    summary = summary_of(finished.output)
    if finished.timed_out:
        return Ending(CUT_SHORT, summary or "no summary in time")
    if finished.code == 0 and re.search(r"\b0 (errors|hazards)", summary):
        return Ending(DONE, summary)
    if _NO_SUPPORT in finished.output:
        return Ending(SKIPPED, f"{NAME}: {_NO_SUPPORT}")
    last = (finished.output.strip().splitlines() or [""])[-1]
    return Ending(FAILED, summary if finished.code == _ERROR and summary else last)

"""compute-sanitizer runs over a few calls of every kernel: accesses out of bounds, races in shared memory."""

from __future__ import annotations

import itertools
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import kl_gpu

from .correctness import ROOT
from .limited import run
from .phases import CUT_SHORT, DONE, FAILED, SKIPPED, Ending

NAME = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")

_VOCABS = (1000, 4097, 16384)  # small enough: a whole tile, a ragged tail
_NO_SUPPORT = "Device not supported"  # as under some virtual machines
_ERROR = 86  # the exit status that says "found something", unlike any of Python's


def tool() -> str | None:
    """Where it is: on PATH, or where CUDA's installer puts it."""
    return shutil.which(NAME) or shutil.which(NAME, path="/usr/local/cuda/bin")


def command(program: str, check: str) -> list[str]:
    options = ["--tool", check, "--error-exitcode", str(_ERROR), "--target-processes", "application-only"]
    return [program, *options, sys.executable, "-m", "bench.gpu.sanitizer"]


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


def calls(device: torch.device, vocabs: Sequence[int] = _VOCABS) -> int:
    """Value, and gradient of both sides, now and later. Returns how many kinds, dtypes and sizes it called.

    Inputs are made on the CPU, so that nearly every kernel that runs on the device is this library's.
    """
    number = 0
    for kind, dtype, vocab in itertools.product(kl_gpu.KINDS, (torch.bfloat16, torch.float32), vocabs):
        generator = torch.Generator().manual_seed(vocab)
        teacher = 3 * torch.randn(3, vocab, generator=generator)
        student = teacher + torch.randn(3, vocab, generator=generator)
        student, teacher = (x.to(dtype).to(device).requires_grad_() for x in (student, teacher))
        mask = torch.tensor([True, False, True]).to(device)
        value = kl_gpu.divergence(student, teacher, kind, mask=mask, reduction="none")
        later = torch.autograd.grad(value, (student, teacher), torch.ones(3).to(device))
        loss = kl_gpu.divergence(student, teacher, kind)
        at_once = torch.autograd.grad(loss, student)
        for result in (value.detach(), loss.detach(), *later, *at_once):
            if not bool(result.cpu().isfinite().all()):
                raise ArithmeticError(f"{kind}, {dtype}, V = {vocab}: not finite")
        number += 1
    return number


if __name__ == "__main__":
    print(f"{calls(torch.device('cuda'))} calls")

"""What a loss costs on given logits, or hidden states: time, forward and backward, and the peak of memory."""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]  # (what it takes of the student, of the teacher) -> scalar
Work = Callable[[], float]

_REPEATS = 7
_MEMORY_METHODS = {
    "cpu": "peak of the running sum of torch.profiler's allocation events",
    "cuda": "torch.cuda.max_memory_allocated, less what was allocated before",
}


@dataclass(frozen=True)
class Cost:
    value: float
    seconds: float  # forward and backward
    peak_bytes: int  # beyond what it is given, the gradients included


@dataclass(frozen=True)
class Comparison:
    """Of several losses on the same logits, or hidden states."""

    takes: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]  # of the student's and the teacher's
    student_bytes: int
    repeats: int
    memory_method: str
    costs: dict[str, Cost]


def compare(takes: str, losses: dict[str, Loss], student: Tensor, teacher: Tensor) -> Comparison:
    return Comparison(
        takes=takes,
        shape=tuple(student.shape),
        dtypes=(_name(student.dtype), _name(teacher.dtype)),
        student_bytes=student.numel() * student.element_size(),
        repeats=_REPEATS,
        memory_method=_MEMORY_METHODS[student.device.type],
        costs=_measured(losses, student, teacher),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _measured(losses: dict[str, Loss], student: Tensor, teacher: Tensor) -> dict[str, Cost]:
    device = student.device
    works = {name: partial(_forward_and_backward, loss, student, teacher) for name, loss in losses.items()}
    values = {name: work() for name, work in works.items()}  # also warms up
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(_REPEATS):  # interleaved, so that a busy moment of the machine falls on all alike
        for name, work in works.items():
            seconds[name].append(_seconds(work, device))
    return {
        name: Cost(values[name], statistics.median(seconds[name]), _peak_bytes(work, device))
        for name, work in works.items()
    }


def _forward_and_backward(loss: Loss, student: Tensor, teacher: Tensor) -> float:
    leaf = student.detach().requires_grad_()
    value = loss(leaf, teacher)
    value.backward()
    return value.item()  # waits for the device


def _seconds(work: Work, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _peak_bytes(work: Work, device: torch.device) -> int:
    gc.collect()
    return _cuda_peak(work, device) if device.type == "cuda" else _cpu_peak(work)


def _cuda_peak(work: Work, device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(work: Work) -> int:
    """From the exported trace, because the profiler's own tables hide a peak within an operator."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    sizes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(itertools.accumulate(size for _, size in sizes))  # a release is a negative size

"""linear_div on a GPU against its four products alone, plain PyTorch and Liger's fused linear JSD.

bf16, value and the gradients of the student's hidden states and weight. Contenders take turns in
every round; milliseconds are medians. Memory is the allocator's peak beyond the inputs, and beyond the
gradients that are returned. "products" multiply all rows at once where the logits fit: 8·N·H·V operations are
counted for everybody. Leaves linear.json in DIR. Part of `make gpu`; a CPU is for trying the command itself.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kl_gpu

from ..harness import baselines, machine
from ..harness.clock import interleaved
from ..harness.linear import Loss, plain
from ..harness.memory import peak_extra_bytes
from ..harness.options import add_sizes, usual_device

# Of the contender "kl_gpu js" against "liger js", and of "kl_gpu forward_kl" alone.
MOST_MS, MOST_BYTES, TIMES_LIGER = 62.0, 3e9, 2.5

@dataclass(frozen=True)
class Row:
    """A line of linear.json."""

    contender: str
    ms: float
    tflops: float
    peak_extra_bytes: int  # beyond inputs and gradients
    value: float


def products(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """Both sides' logits, and by autograd the two products of the student's gradient; no divergence."""
    with torch.no_grad():
        F.linear(teacher_hidden, teacher_weight)
    logits = F.linear(hidden, weight)
    return _PassOn.apply(logits)


class _PassOn(torch.autograd.Function):
    """A number whose gradient to the logits is the logits: nothing is computed between the products."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return logits


def contenders(device: torch.device) -> tuple[dict[str, Loss], dict[str, str]]:
    """By name, and why some are not there."""
    found: dict[str, Loss] = {
        "products": products,
        "kl_gpu forward_kl": kl_gpu.linear_div,
        "kl_gpu js": partial(kl_gpu.linear_div, kind="js"),
        "torch forward_kl": plain,
    }
    if device.type != "cuda":
        return found, {"liger js": "its kernels need a GPU"}
    try:
        return found | {"liger js": baselines.liger_linear()}, {}
    except ImportError as error:
        return found, {"liger js": str(error)}


def problem(rows: int, hidden: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
    """Both models' hidden states and weights; logits of standard deviation 3, correlated between the two."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device, generator=generator)).bfloat16()

    states, weight = normal(rows, hidden), normal(columns, hidden, scale=3 * hidden**-0.5)
    teacher_weight = weight + normal(columns, hidden, scale=hidden**-0.5)
    return states.requires_grad_(), weight.requires_grad_(), states.detach().clone(), teacher_weight


def measure(
    losses: dict[str, Loss], given: tuple[Tensor, ...], repeats: int, left_out: dict[str, str]
) -> list[Row]:
    device, leaves = given[0].device, given[:2]

    def both_ways(loss: Loss) -> tuple[Tensor, ...]:
        value = loss(*given)
        return value.detach(), *torch.autograd.grad(value, leaves)

    calls, peaks, values = {}, {}, {}
    returned = sum(x.numel() * x.element_size() for x in leaves)
    for name, loss in losses.items():
        call = partial(both_ways, loss)
        try:
            values[name] = call()[0].item()  # compiles and warms up
            gc.collect()
            peaks[name] = peak_extra_bytes(call, device) - returned
        except Exception as error:
            if name.startswith("kl_gpu"):
                raise
            left_out[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            calls[name] = call
    times = interleaved(calls, repeats, device=device)
    rows, hidden = given[0].shape
    operations = 8 * rows * hidden * len(given[1])
    return [
        Row(name, 1e3 * median(each), operations / median(each) / 1e12, peaks[name], values[name])
        for name, each in times.items()
    ]


def worded(rows: Sequence[Row]) -> list[str]:
    """The targets, and what was measured of each."""
    by_name = {row.contender: row for row in rows}
    ours, js = by_name["kl_gpu forward_kl"], by_name["kl_gpu js"]
    liger = by_name.get("liger js")
    against = "not measured" if liger is None else f"{liger.ms / js.ms:.2f} ×"
    return [
        f"time (≤ {MOST_MS:.0f} ms): {ours.ms:.1f} ms, {ours.tflops:.0f} TFLOP/s",
        f"peak extra memory (< {MOST_BYTES / 1e9:.0f} GB): {ours.peak_extra_bytes / 1e9:.2f} GB",
        f"js against Liger's fused linear JSD (≥ {TIMES_LIGER} ×): {against}",
        f"of the products alone: {ours.ms / by_name['products'].ms:.2f} ×" if "products" in by_name else "",
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), metavar="DIR")
    add_sizes(parser, rows=8192, hidden=4096, columns=128256, repeats=10)


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    device = usual_device()
    losses, left_out = contenders(device)
    given = problem(options.rows, options.hidden, options.columns, device)
    rows = measure(losses, given, options.repeats, left_out)
    sizes = {name: getattr(options, name) for name in ("rows", "hidden", "columns")}
    record = {
        "device": machine.name(device), "torch": torch.__version__, **sizes,
        "contenders": [asdict(row) for row in rows], "left_out": left_out,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "linear.json").write_text(json.dumps(record, indent=1) + "\n")
    for row in rows:
        extra = f"{row.peak_extra_bytes / 1e9:6.2f} GB"
        print(f"{row.contender:20}{row.ms:9.1f} ms{row.tflops:7.0f} TFLOP/s{extra:>12}   {row.value:.6f}")
    for name, why in left_out.items():
        print(f"{name} is left out: {why}")
    print("; ".join(line for line in worded(rows) if line))
    return 0

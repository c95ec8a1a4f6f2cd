"""linear_div against its four products alone, plain PyTorch, torch.compile (CPU), TRL, and Liger (GPU).

Value, and gradients of the student's hidden states and weight. Contestants take turns in every round, each on
a CPU right after a call of its own that is not timed: a training loop finds the memory that its last step
gave back, not what another's gigabytes left of it. "products" are the same calls of the same library on the
same chunks, and nothing else; 8·N·H·V operations are counted for everybody. Memory is the allocator's peak
beyond the inputs and the gradients that are returned, without what a library takes elsewhere for scratch.
Leaves linear.json.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kl_gpu
from kl_gpu.backends.native.memory import on_huge_pages
from kl_gpu.linear import accumulate, chunks

from .harness import baselines, machine
from .harness.clock import interleaved
from .harness.memory import peak_extra_bytes
from .harness.options import DTYPES, add_sizes, usual_device

# On a GPU: of "kl_gpu forward_kl" alone, and of "kl_gpu js" against "liger js".
MOST_MS, MOST_BYTES, TIMES_LIGER = 62.0, 3e9, 2.5

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Row = dict[str, Any]  # a line of linear.json; memory is beyond inputs and gradients


class Heads(NamedTuple):
    """Both models' hidden states and weights."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    @property
    def returned(self) -> int:
        """Bytes of the gradients."""
        return self.hidden.nbytes + self.weight.nbytes


def plain(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """Forward KL as people write it."""
    with torch.no_grad():
        log_p = F.log_softmax(F.linear(teacher_hidden, teacher_weight).float(), -1)
    log_q = F.log_softmax(F.linear(hidden, weight).float(), -1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()


def losses(device: torch.device) -> tuple[dict[str, Loss], dict[str, str]]:
    """Whose time is taken, by name, and why some are not there."""
    found: dict[str, Loss] = {
        "kl_gpu forward_kl": kl_gpu.linear_div,
        "kl_gpu js": partial(kl_gpu.linear_div, kind="js"),
        "torch forward_kl": plain,
    }
    left_out: dict[str, str] = {}
    others = {"trl forward_kl": baselines.trl_divergence}
    if device.type == "cuda":
        others["liger js"] = baselines.liger_linear
    else:
        found["torch.compile forward_kl"] = torch.compile(plain, dynamic=False)
        left_out["liger js"] = "its kernels need a GPU"
    for name, make in others.items():
        try:
            found[name] = make()
        except ImportError as error:
            left_out[name] = str(error)
    return found, left_out


def problem(options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> Heads:
    """Logits of standard deviation 3, correlated between the two models."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device, generator=generator)).to(dtype)

    hidden = options.hidden
    states, weight = normal(options.rows, hidden), normal(options.columns, hidden, scale=3 * hidden**-0.5)
    teacher_weight = weight + normal(options.columns, hidden, scale=hidden**-0.5)
    return Heads(states.requires_grad_(), weight.requires_grad_(), states.detach().clone(), teacher_weight)


def both_ways(loss: Loss, heads: Heads) -> tuple[Tensor, ...]:
    value = loss(*heads)
    return value.detach(), *torch.autograd.grad(value, heads[:2])


def products(heads: Heads) -> Callable[[], tuple[Tensor, ...]]:
    """The four products of every chunk, as `linear_div` calls them, into memory that exists already."""
    hidden, weight, teacher_hidden, teacher_weight = (x.detach() for x in heads)
    n, v, device = len(hidden), len(weight), hidden.device
    rows = chunks.chosen_rows(n, 2 * v * hidden.dtype.itemsize, hidden.dtype.itemsize, 0, device)
    buffers = [*(hidden.new_empty(rows, v) for _ in range(2)), torch.empty_like(weight)]
    if device.type == "cpu":
        buffers = [on_huge_pages(x) for x in buffers]
    student, teacher, to_weight = (x.zero_() for x in buffers)
    to_hidden = torch.zeros_like(hidden)

    def run() -> tuple[Tensor, ...]:
        for start in range(0, n, rows):
            chunk = slice(start, min(start + rows, n))
            s, t = (x[: chunk.stop - start] for x in (student, teacher))
            torch.mm(hidden[chunk], weight.t(), out=s)
            torch.mm(teacher_hidden[chunk], teacher_weight.t(), out=t)
            torch.mm(s, weight, out=to_hidden[chunk])
            if hidden.dtype == torch.float32:
                torch.addmm(to_weight, s.t(), hidden[chunk], beta=float(start > 0), out=to_weight)
            else:
                for block in accumulate.product_blocks(v, weight.shape[1], device.type):
                    torch.mm(s.t()[block], hidden[chunk], out=to_weight[block])
        return torch.zeros(()), to_hidden, to_weight

    return run


def measure(heads: Heads, dtype: str, repeats: int, left_out: dict[str, str]) -> list[Row]:
    device = heads.hidden.device
    found, absent = losses(device)
    left_out.update(absent)
    makers: dict[str, Callable[[], Callable[[], tuple[Tensor, ...]]]] = {"products": lambda: products(heads)}
    makers |= {name: lambda loss=loss: partial(both_ways, loss, heads) for name, loss in found.items()}  # type: ignore[misc]
    calls, peaks, values = {}, {}, {}
    for name, make in makers.items():
        try:
            values[name] = make()()[0].item()  # compiles and warms up
            gc.collect()
            peaks[name] = peak_extra_bytes(lambda make=make: make()(), device) - heads.returned  # type: ignore[misc]
            calls[name] = make()
        except Exception as error:
            if name.startswith("kl_gpu"):
                raise
            left_out[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    times = interleaved(calls, repeats, calls if device.type == "cpu" else None, device)
    operations = 8 * len(heads.hidden) * heads.weight.numel()
    rows = []
    for name, each in times.items():
        row = {"contender": name, "dtype": dtype, "ms": 1e3 * median(each)}
        row |= {"tflops": operations / median(each) / 1e12, "peak_extra_bytes": peaks[name]}
        rows.append(row | {"value": values[name]})
    return rows


def worded(rows: Sequence[Row]) -> str:
    """The targets, and what was measured of each."""
    by_name = {row["contender"]: row for row in rows}
    ours, js = by_name["kl_gpu forward_kl"], by_name["kl_gpu js"]
    liger = by_name.get("liger js")
    against = "not measured" if liger is None else f"{liger['ms'] / js['ms']:.2f} ×"
    found = [
        f"time (≤ {MOST_MS:.0f} ms): {ours['ms']:.1f} ms, {ours['tflops']:.0f} TFLOP/s",
        f"peak extra memory (< {MOST_BYTES / 1e9:.0f} GB): {ours['peak_extra_bytes'] / 1e9:.2f} GB",
        f"js against Liger's fused linear JSD (≥ {TIMES_LIGER} ×): {against}",
    ]
    if "products" in by_name:
        found.append(f"of the products alone: {ours['ms'] / by_name['products']['ms']:.2f} ×")
    return "; ".join(found)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sizes(parser, rows=8192, hidden=4096, columns=128256, repeats=10, threads=2)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), nargs="+", default=["bf16"])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), metavar="DIR")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    torch.set_num_threads(options.threads)
    device, left_out, rows = usual_device(), dict[str, str](), list[Row]()
    for dtype in options.dtype:
        rows += measure(problem(options, DTYPES[dtype], device), dtype, options.repeats, left_out)
    sizes = {name: getattr(options, name) for name in ("rows", "hidden", "columns")}
    about = {"device": machine.name(device), "torch": torch.__version__, **sizes}
    record = {**about, "contenders": rows, "left_out": left_out}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "linear.json").write_text(json.dumps(record, indent=1) + "\n")
    for row in rows:
        figures = "{ms:9.1f} ms{tflops:7.1f} TFLOP/s{mib:9.0f} MiB   {value:.6f}"
        figures = figures.format(**row, mib=row["peak_extra_bytes"] / 2**20)
        print(f"{row['dtype']} {row['contender']:25}{figures}")
    for name, why in left_out.items():
        print(f"{name} is left out: {why}")
    print(worded(rows))
    return 0

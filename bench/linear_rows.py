"""linear_token_logprobs, linear_topk_div and linear_token_stats against their products alone, and TRL's own.

Value, and for the first two gradients of hidden states and weight. "products" are the same calls of the same
library on the same chunks, into memory that exists already: four where a gradient is asked for (the logits
once in forward and once in backward, and what carries their gradient to hidden states and weight), two for
the statistics. Contestants take turns in every round, and both the
clock's and the cores' time is taken. Memory is the allocator's peak beyond the inputs and
the gradients that are returned; with --memory-rows it is also taken at other N. Errors are against float64 on
the very inputs, of --checked rows: the largest relative one of a value, and that of the norm of the hidden
states' gradient. With --json the record goes there.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kl_gpu
from kl_gpu.backends.native.memory import on_huge_pages
from kl_gpu.linear import accumulate, chunks

from .harness import baselines, machine
from .harness.clock import ratio, timer_of
from .harness.memory import peak_extra_bytes
from .harness.options import DTYPES, add_sizes, at_least, usual_device

ENTRIES = ("linear_token_logprobs", "linear_topk_div", "linear_token_stats")
MOST_BYTES, MOST_TIMES = 640 << 20, 1.25
_ENTROPY = 0.1  # what the entropy counts for in the loss

Row = dict[str, Any]  # of one contestant; memory is beyond inputs and gradients


class Given(NamedTuple):
    """Both models' hidden states and heads, the tokens sampled, and what is known of the teacher."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    ids: Tensor
    logprobs: Tensor
    best: Tensor
    row_scale: Tensor

    @property
    def returned(self) -> int:
        """Bytes of the gradients."""
        return self.hidden.nbytes + self.weight.nbytes


Values = tuple[Tensor, ...]  # per row
Entry = Callable[[Given], Values]


def problem(options: argparse.Namespace, rows: int, dtype: torch.dtype, device: torch.device) -> Given:
    """Logits of standard deviation 3, correlated between the two models; tokens drawn from the teacher."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device, generator=generator)).to(dtype)

    width, k = options.hidden, options.k
    states, weight = normal(rows, width), normal(options.columns, width, scale=3 * width**-0.5)
    teacher_weight = weight + normal(options.columns, width, scale=width**-0.5)
    logprobs, best = (torch.empty(rows, k, device=device, dtype=x) for x in (torch.float32, torch.int64))
    for some in range(0, rows, 64):
        part = slice(some, some + 64)
        logits = torch.mm(states[part], teacher_weight.t()).float()
        logprobs[part], best[part] = logits.log_softmax(-1).topk(k)
    pick = torch.multinomial(logprobs.exp(), 1, generator=generator)
    row_scale = 0.5 + torch.rand(rows, device=device, generator=generator)
    return Given(
        states.requires_grad_(), weight.requires_grad_(), states.detach().clone(), teacher_weight,
        best.gather(1, pick)[:, 0], logprobs, best, row_scale,
    )  # fmt: skip


def _token_logprobs(given: Given) -> Values:
    both = given.hidden, given.weight, given.ids
    return tuple(kl_gpu.linear_token_logprobs(*both, entropy=True))


def _topk_div(given: Given) -> Values:
    known = given.hidden, given.weight, given.logprobs, given.best
    return (kl_gpu.linear_topk_div(*known, reduction="none"),)  # type: ignore[return-value]


def _token_stats(given: Given) -> Values:
    return tuple(kl_gpu.linear_token_stats(*given[:4], given.ids))


OURS: dict[str, Entry] = dict(zip(ENTRIES, (_token_logprobs, _topk_div, _token_stats), strict=True))


def _exact(entry: str, given: Given) -> Values:
    """The values in float64, through all logits of some rows."""
    logits = given.hidden @ given.weight.t()
    if entry == "linear_token_logprobs":
        log_q = logits.log_softmax(-1)
        return log_q.gather(1, given.ids[:, None])[:, 0], -(log_q.exp() * log_q).sum(-1)
    if entry == "linear_topk_div":
        return (kl_gpu.topk_div(logits, given.logprobs, given.best, reduction="none", backend="eager"),)  # type: ignore[return-value]
    teacher = given.teacher_hidden @ given.teacher_weight.t()
    return tuple(kl_gpu.token_stats(logits, teacher, given.ids, backend="eager"))


def loss_of(values: Values, given: Given) -> Tensor:
    total = sum(x * share for x, share in zip(values, (1.0, _ENTROPY), strict=False))
    assert isinstance(total, Tensor)
    return (total * given.row_scale.to(total.dtype)).sum()


def step(entry: Entry, given: Given) -> Values:
    """Values, and the gradients of hidden states and weight where there are any."""
    values = entry(given)
    if not values[0].requires_grad:
        return values
    grads = torch.autograd.grad(loss_of(values, given), given[:2])
    return *(x.detach() for x in values), *grads


def products(entry: str, given: Given) -> Callable[[], None]:
    """The products of every chunk as the entry calls them."""
    hidden, weight, teacher_hidden, teacher_weight = (x.detach() for x in given[:4])
    n, v, two = len(hidden), len(weight), entry == "linear_token_stats"
    itemsize = hidden.dtype.itemsize
    rows = chunks.chosen_rows(n, (1 + two) * v * itemsize, itemsize, 0, hidden.device)
    buffers = [hidden.new_empty(rows, v), hidden.new_empty(rows, v) if two else torch.empty_like(weight)]
    if hidden.device.type == "cpu":
        buffers = [on_huge_pages(x) for x in buffers]
    logits, other = (x.zero_() for x in buffers)
    to_hidden = torch.zeros_like(hidden)
    parts = [slice(start, min(start + rows, n)) for start in range(0, n, rows)]

    def forward() -> None:
        for part in parts:
            torch.mm(hidden[part], weight.t(), out=logits[: part.stop - part.start])
            if two:
                torch.mm(teacher_hidden[part], teacher_weight.t(), out=other[: part.stop - part.start])

    def backward() -> None:
        for part in parts:
            z = logits[: part.stop - part.start]
            torch.mm(hidden[part], weight.t(), out=z)
            torch.mm(z, weight, out=to_hidden[part])
            if hidden.dtype == torch.float32:
                torch.addmm(other, z.t(), hidden[part], beta=float(part.start > 0), out=other)
                continue
            for block in accumulate.product_blocks(v, weight.shape[1], hidden.device.type):
                torch.mm(z.t()[block], hidden[part], out=other[block])

    def run() -> None:
        forward()
        if not two:
            backward()

    return run


def errors(entry: str, found: Values, given: Given, checked: int) -> Row:
    """Against float64 on the very inputs, of some rows."""
    some = torch.linspace(0, len(given.hidden) - 1, checked, device=given.hidden.device).long().unique()
    wide = given.weight.detach().double(), given.teacher_weight.double()
    exact = Given(
        given.hidden.detach()[some].double().requires_grad_(), wide[0], given.teacher_hidden[some].double(),
        wide[1], *(x[some] for x in given[4:]),
    )  # fmt: skip
    values = _exact(entry, exact)
    off = max(
        float(((x[some] - want.detach()).abs() / want.detach().abs().clamp_min(1e-12)).max())
        for x, want in zip(found, values[: 1 if entry == "linear_topk_div" else 2], strict=False)
    )
    if not values[0].requires_grad:
        return {"value_error": off}
    (grad,) = torch.autograd.grad(loss_of(values, exact), exact.hidden)
    return {
        "value_error": off,
        "hidden_gradient_error": float((found[len(values)][some] - grad).norm() / grad.norm()),
    }


def contestants(entry: str, left_out: dict[str, str]) -> dict[str, Entry]:
    found = {"kl_gpu": OURS[entry]}
    if entry != "linear_token_logprobs":
        return found
    try:
        logprobs = baselines.trl_logprobs()
    except ImportError as error:
        left_out["trl"] = str(error)
        return found
    return found | {"trl": lambda given: logprobs(given.hidden, given.weight, given.ids)}


def measure(entry: str, given: Given, options: argparse.Namespace, left_out: dict[str, str]) -> list[Row]:
    device, rows = given.hidden.device, []
    returned = 0 if entry == "linear_token_stats" else given.returned
    calls: dict[str, Callable[[], object]] = {"products": products(entry, given)}
    for name, call in contestants(entry, left_out).items():
        found: list[Values] = []
        # The call that is not timed: it warms up, and is checked.
        peak = peak_extra_bytes(lambda call=call, found=found: found.append(step(call, given)), device)  # type: ignore[misc]
        row: Row = {"contestant": name, "peak_extra_bytes": peak - returned}
        rows.append(row | (errors(entry, found.pop(), given, options.checked) if options.checked else {}))
        gc.collect()
        calls[name] = lambda call=call: step(call, given)  # type: ignore[misc]
    times = _timed(calls, options.repeats, device)
    for row in rows:
        own, alone = times[row["contestant"]], times["products"]
        row |= {"ms": 1e3 * median(wall for wall, _ in own), "cpu_ms": 1e3 * median(cpu for _, cpu in own)}
        for name, which in (("of_products", 0), ("cpu_of_products", 1)):
            row[name] = ratio([x[which] for x in own], [x[which] for x in alone])
    return rows


def _timed(
    calls: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each call by the clock and of this process's cores, round by round.

    Where others take the cores too, a single thread's own time is what can be told.
    """
    timer, times = timer_of(device), {name: list[tuple[float, float]]() for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, cpu = timer(), time.process_time()
            call()
            times[name].append((timer() - start, time.process_time() - cpu))
    return times


def worded(row: Row) -> str:
    text = (
        f"{row['entry']:22}{row['contestant']:8}{row['dtype']:5}N={row['rows']:<6}{row['threads']} thread(s)"
    )
    if "ms" in row:
        text += f"{row['ms']:10.0f} ms {row['of_products']:6.3f} × its products, "
        text += f"{row['cpu_of_products']:.3f} × by the cores' time"
    text += f"{row['peak_extra_bytes'] / 2**20:8.0f} MiB"
    for name in ("value_error", "hidden_gradient_error"):
        text += f"  {name} {row[name]:.1e}" if name in row else ""
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sizes(parser, rows=1024, hidden=1024, columns=128256, k=64, repeats=5)
    parser.add_argument("--checked", type=int, default=32, metavar="N", help="default: 32; 0 for none")
    parser.add_argument("--threads", type=at_least(1), nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--entry", choices=ENTRIES, nargs="+", default=list(ENTRIES))
    parser.add_argument("--memory-rows", type=at_least(1), nargs="*", default=[], metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")


def _peaks(options: argparse.Namespace, entry: str, dtype: str, device: torch.device) -> list[Row]:
    """Our memory at other numbers of rows."""
    rows = []
    for n in options.memory_rows:
        given = problem(options, n, DTYPES[dtype], device)
        peak = peak_extra_bytes(lambda given=given: step(OURS[entry], given), device)  # type: ignore[misc]
        returned = 0 if entry == "linear_token_stats" else given.returned
        rows.append({"contestant": "kl_gpu", "rows": n, "peak_extra_bytes": peak - returned})
    return rows


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    device, left_out, rows = usual_device(), dict[str, str](), list[Row]()
    for dtype in options.dtype:
        for entry in options.entry:
            for threads in options.threads:
                torch.set_num_threads(threads)
                given = problem(options, options.rows, DTYPES[dtype], device)
                found = measure(entry, given, options, left_out)
                del given
                if threads == options.threads[-1]:
                    found += _peaks(options, entry, dtype, device)
                shared = {"entry": entry, "dtype": dtype, "threads": threads, "rows": options.rows}
                for row in found:
                    rows.append(shared | row)
                    print(worded(rows[-1]), flush=True)
                if options.json:  # at once: the next may take long
                    _write(options, device, rows, left_out)
    for name, why in left_out.items():
        print(f"{name} is left out: {why}")
    print(verdict(rows))
    return 0


def _write(options: argparse.Namespace, device: torch.device, rows: list[Row], left_out: Row) -> None:
    about: Row = {
        "device": machine.name(device), "busy": machine.is_busy(), "date": str(datetime.date.today()),
        "torch": torch.__version__, "kl_gpu": kl_gpu.__version__, "trl": baselines.version("trl"),
        "hidden": options.hidden, "columns": options.columns, "k": options.k, "repeats": options.repeats,
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({**about, "found": rows, "left_out": left_out}, indent=1) + "\n")


def verdict(rows: Sequence[Row]) -> str:
    """The targets, and the worst that was measured of each."""
    ours = [row for row in rows if row["contestant"] == "kl_gpu"]
    slowest = max(row["of_products"] for row in ours if "of_products" in row)
    most = max(row["peak_extra_bytes"] for row in ours)
    return (
        f"time (≤ {MOST_TIMES} × the products): {slowest:.3f} ×; "
        f"peak extra memory (≤ {MOST_BYTES >> 20} MiB): {most / 2**20:.0f} MiB"
    )

"""Times kl_gpu against plain PyTorch and torch.compile on the device at hand.

Every output is compared with float64 while it is timed: a wrong one ends the run with an error.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from kl_gpu.ops import resolve_backend

from . import machine
from .cases import DTYPES, Case
from .check import WrongOutput
from .measure import measure_case
from .report import case_table, new_report, summary_table
from .systems import PLAIN, WORKS, available, usual


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and int(text) >= least):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be timed; cpu and cuda devices can")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r}: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


KLS = ["forward_kl", "reverse_kl"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", type=_device, help="cpu, cuda, cuda:1, …; default: a GPU if there is one")
    add("--vocab", type=_at_least(2), nargs="+", metavar="V", help="default: 32000 50257 128256 151936")
    add("--dtype", choices=tuple(DTYPES), nargs="+", default=["fp32", "bf16"], help="default: fp32 bf16")
    add("--kind", choices=tuple(PLAIN), nargs="+", default=KLS, help="default: the KLs")
    add("--work", choices=tuple(WORKS), nargs="+", default=list(WORKS), help="default: all")
    add("--rows", type=_at_least(1), nargs="+", metavar="N", help="default: 512; on a GPU 8192, or what fits")
    add(
        "--repeats", type=_at_least(1), metavar="K", help="runs, of which the median counts; default: 5 or 30"
    )
    add(
        "--systems",
        nargs="+",
        metavar="NAME",
        help="default: all; on a GPU its default backend",
    )
    add("--out", type=Path, default=Path("out/bench"), metavar="DIR", help="for the JSON; default: out/bench")
    add("--quick", action="store_true", help="one vocabulary, few rows, 3 repeats, unless given")
    return parser


def _cases(options: argparse.Namespace, device: torch.device) -> list[Case]:
    on_gpu = device.type == "cuda"
    vocabs = options.vocab or ([32000] if options.quick else [32000, 50257, 128256, 151936])
    rows = (1024 if on_gpu else 16) if options.quick else (8192 if on_gpu else 512)
    cases = []
    for vocab, dtype in itertools.product(vocabs, options.dtype):
        fitting = machine.rows_that_fit(rows, vocab, DTYPES[dtype].itemsize, device) if on_gpu else rows
        for n, kind in itertools.product(options.rows or [fitting], options.kind):
            cases.append(Case(kind, dtype, n, vocab))
    return cases


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # the clock's events and Triton's launches go to the current device

    known = available(device)
    chosen = options.systems or usual(device)
    for name in chosen:
        if name not in known:
            parser.error(f"argument --systems: {name!r} is not one of {', '.join(known)}")
    report = new_report(device)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        partial = report.save(options.out, complete=False)
    except OSError as error:
        parser.error(f"argument --out: {error}")

    cache = machine.cache_bytes(device)
    repeats = options.repeats or (3 if options.quick else 30 if device.type == "cuda" else 5)
    cases = _cases(options, device)
    systems = [known[name] for name in chosen]
    console = Console()
    backend = resolve_backend(None, device)
    console.print(f"{report.device}; torch {report.torch}, triton {report.triton}; kl_gpu: {backend}")
    console.print("U: one tensor of logits. 2U, 3U, 5U: the least to move, which GB/s counts.")
    console.print("±: distance of a typical run from the median run. share: of the copy's GB/s.")
    console.print("peak MB: beyond the inputs, the gradient included. error: relative, largest.\n")
    if device.type == "cpu" and machine.is_busy():
        console.print(
            "This machine is busy: figures will be off, and not by the same factor.\n", style="yellow"
        )
    try:
        for number, case in enumerate(cases, 1):
            with console.status(f"{number} of {len(cases)}: {case}"):
                measured = measure_case(case, systems, options.work, device, cache, repeats)
            report.add(measured)
            partial = report.save(options.out, complete=False)
            console.print(case_table(case, measured))
    except WrongOutput as error:
        console.print(str(error), style="bold red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print(f"Stopped. What was measured is in {partial}", markup=False, soft_wrap=True)
        return 130
    console.print(summary_table(report.rows))
    console.print(str(report.save(options.out, complete=True)), markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

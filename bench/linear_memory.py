"""Memory of linear_div against the number of rows, beside plain PyTorch and torch.compile.

Value, and gradients of the student's hidden states and weight, forward KL. A figure is the allocator's peak
beyond the inputs and the gradients that are returned, so it does not depend on what else the machine does.
Systems are given up at --most-mib of logits of one side, where plain PyTorch holds five times as much.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
from pathlib import Path
from typing import Any

import torch

import kl_gpu

from .harness import machine
from .harness.memory import peak_extra_bytes
from .harness.options import DTYPES, add_sizes, at_least, usual_device
from .linear import Loss, both_ways, plain, problem


def systems(device: torch.device) -> dict[str, Loss]:
    found: dict[str, Loss] = {"kl_gpu": kl_gpu.linear_div, "plain PyTorch": plain}
    return found | {"torch.compile": torch.compile(plain, dynamic=False)} if device.type == "cpu" else found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sizes(parser, hidden=512, columns=128256, most_mib=2048, threads=2)
    parser.add_argument("--rows", type=at_least(1), nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--json", type=Path, metavar="FILE")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    torch.set_num_threads(options.threads)
    device, dtype, found = usual_device(), DTYPES[options.dtype], list[dict[str, Any]]()
    for rows in options.rows:
        heads = problem(argparse.Namespace(**vars(options) | {"rows": rows}), dtype, device)
        logits = rows * options.columns * dtype.itemsize
        for system, loss in systems(device).items():
            if system != "kl_gpu" and logits > options.most_mib << 20:
                continue
            both_ways(loss, heads)  # compiles
            gc.collect()
            peak = peak_extra_bytes(lambda loss=loss, heads=heads: both_ways(loss, heads), device)  # type: ignore[misc]
            found.append({"system": system, "rows": rows, "peak_extra_bytes": peak - heads.returned})
            print(f"{rows:6} rows {system:16}{found[-1]['peak_extra_bytes'] / 2**20:9.0f} MiB", flush=True)
    if options.json:
        about = {"device": machine.name(device), "date": datetime.date.today().isoformat()}
        about |= {"torch": torch.__version__, "kl_gpu": kl_gpu.__version__, "dtype": options.dtype}
        sizes = {"hidden": options.hidden, "columns": options.columns}
        options.json.write_text(json.dumps({**about, **sizes, "found": found}, indent=1) + "\n")
    return 0

"""Loss and gradient of a training step on the CPU, every system in fresh processes of its own.

What `python -m bench cpu table` calls "value + gradient", where contestants share one process and find the
memory that others left. Here each finds what its own last step gave back, in the environment as it is: what
a training loop sees. Systems, dtypes, widths and threads take turns in random order; a figure is the median
over processes of the medians within each. "kernel" writes into memory that is there, and is what the machine
allows. CPU time is of all threads, page faults included, and says more than the clock where others use the
cores. With --json the record goes there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import kl_gpu

from .cpu.races import table
from .harness import machine
from .harness.options import DTYPES, add_sizes, at_least

SYSTEMS = ("kernel", "kl_div", "kl_div, inplace", "torch.compile", "plain PyTorch")
_WARM = 4
_ROOT = Path(__file__).parents[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sizes(parser, rows=256, repeats=9, processes=3)
    parser.add_argument("--columns", type=at_least(2), nargs="+", default=[49152, 128256], metavar="V")
    parser.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--threads", type=at_least(1), nargs="+", default=[1, 2])
    parser.add_argument("--system", choices=SYSTEMS, nargs="+", default=list(SYSTEMS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--here", action="store_true", help="time the first of each, in this process")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if options.here:
        print(json.dumps(_timed(options)))
        return 0
    keys = [
        (system, dtype, columns, threads)
        for system in options.system
        for dtype in options.dtype
        for columns in options.columns
        for threads in options.threads
    ]
    found: dict[Any, list[dict[str, float]]] = {key: [] for key in keys}
    busy = False
    for _ in range(options.processes):
        random.shuffle(keys)
        for key in keys:
            busy = busy or machine.is_busy()
            found[key].append(_in_a_process(key, options))
    rows = [_row(key, times) for key, times in sorted(found.items())]
    _print(rows)
    if options.json:
        about = {
            "device": machine.name(torch.device("cpu")).partition(",")[0],
            "busy": busy,
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "torch": torch.__version__,
            "kl_gpu": kl_gpu.__version__,
            "rows": options.rows,
            "repeats": options.repeats,
            "processes": options.processes,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**about, "found": rows}, indent=1) + "\n")
    return 0


def _in_a_process(key: tuple[str, str, int, int], options: argparse.Namespace) -> dict[str, float]:
    system, dtype, columns, threads = key
    command = [
        *(sys.executable, "-m", "bench", "steps", "--here", "--system", system, "--dtype", dtype),
        *("--columns", str(columns), "--threads", str(threads)),
        *("--rows", str(options.rows), "--repeats", str(options.repeats)),
    ]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{system} failed: {done.stderr}")
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return times


def _timed(options: argparse.Namespace) -> dict[str, float]:
    """Medians of milliseconds, of the clock and of all cores, of the first system, dtype and so on."""
    (threads, *_), (columns, *_), (dtype, *_), (system, *_) = (
        options.threads, options.columns, options.dtype, options.system
    )  # fmt: skip
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    _, race = table(argparse.Namespace(rows=options.rows, columns=columns, threads=threads), DTYPES[dtype])
    call, prepare = race.calls[system], race.before.get(system, lambda: None)
    clock, cores = [], []
    for _ in range(_WARM + options.repeats):
        prepare()
        start, start_cores = time.perf_counter(), time.process_time()
        result = call()
        clock.append(1e3 * (time.perf_counter() - start))
        cores.append(1e3 * (time.process_time() - start_cores))
        del result
    return {"ms": median(clock[_WARM:]), "cpu_ms": median(cores[_WARM:])}


def _row(key: tuple[str, str, int, int], times: list[dict[str, float]]) -> dict[str, Any]:
    system, dtype, columns, threads = key
    middle = {name: median(each[name] for each in times) for name in ("ms", "cpu_ms")}
    return {"system": system, "dtype": dtype, "columns": columns, "threads": threads, **middle}


def _print(rows: list[dict[str, Any]]) -> None:
    """Each system's time, and how many times as long as `kl_div` it takes."""
    of = {(r["system"], r["dtype"], r["columns"], r["threads"]): r for r in rows}
    print(f"{'':34}{'ms':>10}{'× kl_div':>10}{'CPU ms':>10}{'× kl_div':>10}")
    for (system, *case), row in of.items():
        ours = of.get(("kl_div", *case), row)
        ratios = row["ms"] / ours["ms"], row["cpu_ms"] / ours["cpu_ms"]
        title = f"{system}, {', '.join(map(str, case))}"
        print(f"{title:34}{row['ms']:10.2f}{ratios[0]:10.2f}{row['cpu_ms']:10.2f}{ratios[1]:10.2f}")

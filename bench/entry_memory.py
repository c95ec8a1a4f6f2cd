"""Memory of each function on logits, beside plain PyTorch and torch.compile.

Value and gradient, or the value alone where a function has no gradient. A figure is the allocator's peak
beyond the inputs, the gradient included, in units of one tensor of logits, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kl_gpu

from .cpu.races import plain_bucket, plain_stats
from .harness import machine
from .harness.memory import peak_extra_bytes
from .harness.options import DTYPES, add_sizes, usual_device
from .harness.systems import PLAIN

Call = Callable[[Tensor], Any]  # of the student's logits
_K = 64


def contests(teacher: Tensor, labels: Tensor) -> dict[str, tuple[Call, Call]]:
    """Ours and what is written without this library, by function."""
    known = kl_gpu.topk_logprobs(teacher, _K)
    logprobs, ids = known.logprobs, known.ids

    def ours_logprobs(logits: Tensor) -> Tensor:
        found = kl_gpu.token_logprobs(logits, labels)
        assert isinstance(found, Tensor)  # without the entropy
        return found

    def plain_logprobs(logits: Tensor) -> Tensor:
        return F.log_softmax(logits.float(), -1).gather(-1, labels[:, None])[:, 0]

    return {
        "kl_div": (lambda s: kl_gpu.kl_div(s, teacher), lambda s: PLAIN["forward_kl"](s, teacher).mean()),
        "js_div": (lambda s: kl_gpu.js_div(s, teacher), lambda s: PLAIN["js"](s, teacher).mean()),
        "token_logprobs": (
            lambda s: ours_logprobs(s).sum(),
            lambda s: plain_logprobs(s).sum(),
        ),
        "topk_div": (
            lambda s: kl_gpu.topk_div(s, logprobs, ids),
            lambda s: plain_bucket(s, logprobs, ids).mean(),
        ),
        "token_stats": (
            lambda s: kl_gpu.token_stats(s, teacher, labels, overlap=False),
            lambda s: plain_stats(s, teacher, labels),
        ),
    }


def _run(call: Call, logits: Tensor) -> None:
    found = call(logits)
    if isinstance(found, Tensor):
        torch.autograd.grad(found, logits)


def measure(rows: int, columns: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    device, generator = usual_device(), torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(rows, columns, generator=generator)
    student = (teacher + 0.5 * torch.randn(rows, columns, generator=generator)).to(dtype).to(device)
    teacher, labels = teacher.to(dtype).to(device), torch.randint(columns, (rows,), generator=generator)
    found = []
    for name, (ours, plain) in contests(teacher, labels.to(device)).items():
        logits = student if name == "token_stats" else student.detach().requires_grad_()
        systems = {
            "kl_gpu": ours,
            "torch.compile": torch.compile(plain, dynamic=False),
            "plain PyTorch": plain,
        }
        for system, call in systems.items():
            with torch.set_grad_enabled(logits.requires_grad):
                _run(call, logits)  # compiles
                gc.collect()
                peak = peak_extra_bytes(lambda call=call, logits=logits: _run(call, logits), device)  # type: ignore[misc]
            found.append({"function": name, "system": system, "tensors_of_logits": peak / student.nbytes})
            print(f"{name:16}{system:16}{found[-1]['tensors_of_logits']:6.2f} U", flush=True)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sizes(parser, rows=256, columns=128256, threads=2)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--json", type=Path, metavar="FILE")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    torch.set_num_threads(options.threads)
    found = measure(options.rows, options.columns, DTYPES[options.dtype])
    if options.json:
        about: dict[str, Any] = {
            "device": machine.name(usual_device()),
            "date": datetime.date.today().isoformat(),
        }
        about |= {"torch": torch.__version__, "kl_gpu": kl_gpu.__version__, "dtype": options.dtype}
        about |= {"rows": options.rows, "columns": options.columns, "k": _K}
        options.json.write_text(json.dumps({**about, "found": found}, indent=1) + "\n")
    return 0

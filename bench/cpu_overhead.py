"""What a call costs where the logits cost nothing: `[1, 32]`, beside an operator that does nothing.

    python -m bench.cpu_overhead [--rows 1] [--columns 32] [--dtype float32] [--threads 2] [--rounds 200]

"empty operator" is a `torch.library` operator in Python that takes two tensors and allocates its result,
registered by `Library.impl`, as ours are; "empty custom_op" is the same through the decorator. Every
candidate makes its calls in every round; figures are medians, in microseconds a call, and "beyond" is the
median over the rounds of what a call takes more than the empty operator.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import kl_gpu

from .cpu_roofline import interleaved

CALLS = 50  # a round: long against the clock's own steps, short against a slow spell of the machine


def _nothing(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.empty(len(student))


# Its operators go with the library: it must outlive the calls.
_library = torch.library.Library("kl_gpu_bench", "DEF")
_library.define("nothing(Tensor student, Tensor teacher) -> Tensor")
_library.impl("nothing", _nothing, "CompositeExplicitAutograd")
_decorated = torch.library.custom_op("kl_gpu_bench::decorated", _nothing, mutates_args=())


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def candidates(student: Tensor, teacher: Tensor) -> dict[str, Callable[[], object]]:
    leaf = student.clone().requires_grad_()
    nothing = torch.ops.kl_gpu_bench.nothing.default

    def backward(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def run() -> None:
            leaf.grad = None
            loss(leaf, teacher).backward()

        return run

    return {
        "empty operator": lambda: nothing(student, teacher),
        "empty custom_op": lambda: _decorated(student, teacher),
        "kl_div, per token": lambda: kl_gpu.kl_div(student, teacher, reduction="none"),
        "kl_div": lambda: kl_gpu.kl_div(student, teacher),
        "kl_div and backward": backward(kl_gpu.kl_div),
        "divergence, js": lambda: kl_gpu.divergence(student, teacher, "js"),
        "token_stats": lambda: kl_gpu.token_stats(student, teacher),
        "F.kl_div": lambda: plain(student, teacher),
        "F.kl_div and backward": backward(plain),
    }


def repeated(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--columns", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sides = torch.randn(2, args.rows, args.columns).to(getattr(torch, args.dtype)).unbind()
    runs = {name: repeated(call) for name, call in candidates(*sides).items()}
    seconds = interleaved(runs, args.rounds)
    nothing = seconds["empty operator"]
    print(f"{'':24}{'µs a call':>12}{'beyond':>10}")
    for name, times in seconds.items():
        beyond = statistics.median(t - e for t, e in zip(times, nothing, strict=True))
        print(f"{name:24}{statistics.median(times) / CALLS * 1e6:12.1f}{beyond / CALLS * 1e6:10.1f}")


if __name__ == "__main__":
    main()

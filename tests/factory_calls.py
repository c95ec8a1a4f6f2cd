"""Every entry of the package on CPU tensors while another device is the default; run as a program."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import kl_gpu
from kl_gpu import distributed
from kl_gpu.rl import ESTIMATORS

V, H = 40, 6


def run(backend: str) -> int:
    """The number of calls, each of value and backward; all results lie where the inputs do."""
    torch.set_default_device("cpu")
    torch.manual_seed(0)
    student, teacher = torch.randn(3, V), torch.randn(3, V)
    labels, mask = torch.tensor([1, 2, -100]), torch.tensor([True, False, True])
    weight = torch.rand(3)
    row = {
        "labels": labels,
        "mask": mask,
        "weight": weight,
        "normalizer": torch.tensor(2),
        "backend": backend,
    }
    states, heads = (torch.randn(3, H), torch.randn(3, H)), (torch.randn(V, H), torch.randn(V, H))
    bias = torch.randn(V)
    logprobs, ids = teacher.log_softmax(-1).topk(4)
    torch.set_default_device("meta")
    calls = 0

    def call(entry: Callable[..., Any], *leaves: Tensor, **options: Any) -> None:
        nonlocal calls
        sides = [x.clone().requires_grad_() for x in leaves]
        found = entry(*sides, **options)
        results = [x for x in (found if isinstance(found, tuple) else (found,)) if isinstance(x, Tensor)]
        assert all(x.device.type == "cpu" for x in results), entry
        if results[0].requires_grad:
            grads = torch.autograd.grad(results[0].sum(), sides, allow_unused=True)
            assert all(x.device.type == "cpu" and x.isfinite().all() for x in grads), entry
            assert any(x.any() for x in grads), entry
        calls += 1

    # Triton's interpreter is slow, and families differ in what they call, not in what they allocate.
    for kind in ("forward_kl", "jeffreys", "js") if backend == "triton" else kl_gpu.KINDS:
        for options in (row, {"backend": backend}, {"reduction": "none", "backend": backend}):
            for entry in (kl_gpu.divergence, distributed.vocab_parallel_div):
                call(entry, student, teacher, kind=kind, **options)
            for entry in (kl_gpu.linear_div, distributed.vocab_parallel_linear_div):
                call(
                    lambda h, w, entry=entry, **o: entry(h, w, states[1], heads[1], student_bias=bias, **o),
                    states[0], heads[0], kind=kind, softcap=5.0, **options,
                )  # fmt: skip
    for tail in kl_gpu.TAILS:
        for entry in (kl_gpu.topk_div, distributed.vocab_parallel_topk_div):
            call(
                lambda s, entry=entry, **o: entry(s, logprobs, ids, **o),
                student, tail=tail, return_mass=True, **row,
            )  # fmt: skip
        for entry in (kl_gpu.linear_topk_div, distributed.vocab_parallel_linear_topk_div):
            call(
                lambda h, w, b, entry=entry, **o: entry(h, w, logprobs, ids, student_bias=b, **o),
                states[0], heads[0], bias, tail=tail, return_mass=True, softcap=5.0, **row,
            )  # fmt: skip
    one = {"backend": backend, "mask": mask}
    for entry in (kl_gpu.linear_token_logprobs, distributed.vocab_parallel_linear_token_logprobs):
        call(
            lambda h, w, b, entry=entry: entry(h, w, labels, entropy=True, bias=b, softcap=5.0, **one),
            states[0], heads[0], bias,
        )  # fmt: skip
    for entry in (kl_gpu.linear_token_stats, distributed.vocab_parallel_linear_token_stats):
        for given in (labels, None):
            teacher_side = states[1], heads[1], given
            call(
                lambda h, w, entry=entry, other=teacher_side: entry(h, w, *other, softcap=5.0, **one),
                states[0], heads[0],
            )  # fmt: skip
    for entry in (kl_gpu.token_logprobs, distributed.vocab_parallel_token_logprobs):
        call(lambda s, entry=entry: entry(s, labels, entropy=True, **one), student)
    for entry in (kl_gpu.token_stats, distributed.vocab_parallel_token_stats):
        call(lambda s, t, entry=entry: entry(s, t, labels, **one), student, teacher)
        call(lambda s, t, entry=entry: entry(s, t, **one), student, teacher)
    kl_gpu.token_stats(student, teacher, labels, **one).summary()
    for estimator in ESTIMATORS:
        for through in (False, True):
            call(
                lambda p, r, e=estimator, t=through: kl_gpu.kl_penalty(
                    p, r, e, clamp=3.0, straight_through=t, mask=mask
                ),
                -student[:, 0].abs(), -teacher[:, 0].abs(),
            )  # fmt: skip
    assert distributed.global_count(mask).device.type == "cpu"
    return calls


if __name__ == "__main__":
    folder, *backends = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'group'}", rank=0, world_size=1)
    for name in backends:
        print(name, run(name), flush=True)
    dist.destroy_process_group()

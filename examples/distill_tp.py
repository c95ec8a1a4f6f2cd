"""Distil one language model into another where no process holds all columns of the logits.

    torchrun --standalone --nproc-per-node 2 examples/distill_tp.py

On every rank: a small Llama-style teacher and student, both LM heads sharded over the vocabulary, the
student's body by FSDP2. `kl_gpu.kl_div` takes the DTensors where they are: 24 bytes a token and rank cross
between the processes, where gathering the logits would take 4 V. Rank 0 first runs the same thing alone.
"""

import argparse
import copy
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import _language_models as lm
import _report as report
import torch
import torch.distributed as dist
from _report import BadInput, Parser, at_least
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from kl_gpu import kl_div


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="distill_tp.py", description="Distil through sharded LM heads, under torchrun.")
    add = parser.add_argument
    add("--steps", metavar="N", type=at_least(1), default=40, help="default: %(default)s")
    add("--batch", metavar="N", type=at_least(1), default=2, help="windows a step; default: %(default)s")
    add("--sequence", metavar="N", type=at_least(2), default=128, help="tokens each; default: %(default)s")
    add("--rate", metavar="R", type=at_least(1e-9, float), default=1e-3, help="default: %(default)s")
    add("--text", metavar="PATH", type=Path, help="a file, or a folder of *.py, *.md and *.txt")
    add("--seed", metavar="N", type=at_least(0), default=0, help="default: %(default)s")
    add("--timeout", metavar="S", type=at_least(1e-3, float), default=120.0, help="of a collective, seconds")
    add("--skip-alone", action="store_true", help="leave out the run of one process to compare with")
    return parser.parse_args(arguments)


TEACHER, STUDENT = (128, 2), (64, 2)  # hidden, layers
TEACHER_STEPS = 20
TOLERANCE = 1e-5


def study(options: argparse.Namespace, rank: int, ranks: int) -> int:
    """The exit code: 0 where the losses of one process and of all ranks agree."""
    documents, _ = lm.read(options.text)
    tokeniser = lm.trained_tokeniser(documents)
    training = lm.windows(tokeniser, documents, options.sequence)
    columns = len(tokeniser)
    teacher = lm.small_llama(TEACHER, columns, options.sequence, options.seed)
    student = lm.small_llama(STUDENT, columns, options.sequence, options.seed + 1)

    def distillation_loss(model: Any, rows: Tensor) -> Tensor:
        student_logits, teacher_logits = lm.forward(model, rows).logits, lm.forward(teacher, rows).logits
        loss = kl_div(student_logits, teacher_logits, labels=rows, shift=True)
        # Of DTensors it is one too, the same number on every rank already.
        return loss.full_tensor() if isinstance(loss, DTensor) else loss

    def fit(model: Any, objective: lm.Objective, steps: int, show: bool = False) -> list[float]:
        """The losses of the steps."""
        # foreach would mix the sharded parameters with the others in one call.
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, eps=1e-4, foreach=False)
        losses: list[float] = []
        for rows in lm.batches(training, options.batch, steps, options.seed):
            loss = objective(model, rows)
            losses.append(loss.item())
            if show:
                print(f"step {len(losses)}: {losses[-1]:.6f}", flush=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return losses

    if rank == 0:
        tokens = options.batch * options.sequence
        print(f"{ranks} ranks, {columns} columns, {tokens} tokens a step", flush=True)
        fit(teacher, lm.label_loss, TEACHER_STEPS)
    teacher.requires_grad_(False)
    compares = rank == 0 and not options.skip_alone
    alone = fit(copy.deepcopy(student), distillation_loss, options.steps) if compares else []
    for parameter in teacher.parameters():
        dist.broadcast(parameter, 0)

    mesh = init_device_mesh("cpu", (ranks,))
    for model in (teacher, student):
        # The logits stay sharded: each rank makes the columns of its part of the head.
        head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        parallelize_module(model, mesh, {"lm_head": head})
    fully_shard(student.model, mesh=mesh)
    together = fit(student, distillation_loss, options.steps, show=rank == 0)
    dist.destroy_process_group()
    if not alone:
        return 0
    print("step   one process   together   difference")
    rows = list(enumerate(zip(alone, together, strict=True)))
    for step, (one, both) in [*rows[: -1 : max(1, len(rows) // 10)], rows[-1]]:
        print(f"{step:4d}   {one:11.7f}   {both:10.7f}   {both - one:+.1e}")
    apart = max(abs(one - both) for _, (one, both) in rows)
    print(f"KL(teacher‖student) fell from {together[0]:.4f} to {together[-1]:.4f} nats a token")
    print(f"largest difference of the losses: {apart:.1e} (allowed: {TOLERANCE:.0e})", flush=True)
    return 0 if apart <= TOLERANCE else 1


@report.one_line_errors("distill_tp.py")
def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    if "RANK" not in os.environ:
        raise BadInput("start it with torchrun --standalone --nproc-per-node 2 examples/distill_tp.py")
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=options.timeout))
    try:
        return study(options, rank, ranks)
    except RuntimeError as error:
        # What the group's other ranks do to this one: they died, or stopped answering.
        print(f"distill_tp.py: rank {rank} of {ranks} ends: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # not by the usual way out, which waits for the ranks that are gone


if __name__ == "__main__":
    sys.exit(main())

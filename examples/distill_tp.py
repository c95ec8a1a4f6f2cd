"""Distil one language model into another where no process holds all columns of the logits.

    torchrun --standalone --nproc-per-node 2 examples/distill_tp.py

On every rank: a small Llama-style teacher and student on the text of Python's own library, both LM heads
sharded over the vocabulary by `parallelize_module`, the student's body sharded by FSDP2. The loss is

    kl_gpu.kl_div(student_logits, teacher_logits, labels=labels, shift=True)

on DTensors that stay where they are: 24 bytes a token and rank cross between the processes, where gathering
the logits would take 4 V. Rank 0 first runs the same thing alone, and prints both loss curves side by side.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import _report as report
from _report import BadInput, Parser, positive_number, whole


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="distill_tp.py", description="Distil through sharded LM heads, under torchrun.")
    add = parser.add_argument
    add("--steps", metavar="N", type=whole(1), default=40, help="default: %(default)s")
    add("--batch", metavar="N", type=whole(1), default=2, help="windows of text a step; default: %(default)s")
    add("--sequence", metavar="N", type=whole(2), default=128, help="tokens a window; default: %(default)s")
    add("--rate", metavar="R", type=positive_number, default=1e-3, help="default: %(default)s")
    add("--text", metavar="PATH", type=Path, help="a file, or a folder of *.py, *.md and *.txt")
    add("--seed", metavar="N", type=whole(0), default=0, help="default: %(default)s")
    add("--timeout", metavar="S", type=positive_number, default=120.0, help="of a collective, in seconds")
    alone = "leave out the run of one process that this is held against"
    add("--skip-alone", action="store_true", help=alone)
    return parser.parse_args(arguments)


with report.imports("distill_tp.py", parsed, __name__):
    import _language_models as lm
    import torch
    import torch.distributed as dist
    from torch import Tensor
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    from kl_gpu import kl_div

TEACHER, STUDENT = lm.Size(128, 2), lm.Size(64, 2)
TEACHER_STEPS = 20
TOLERANCE = 1e-5


def study(options: argparse.Namespace, rank: int, ranks: int) -> int:
    """The exit code: 0 where the losses of one process and of all ranks agree."""
    text = lm.read(options.text)
    tokeniser = lm.trained_tokeniser(text.training)
    training = lm.windows(tokeniser, text.training, options.sequence)
    columns = len(tokeniser)
    teacher = lm.small_llama(TEACHER, columns, options.sequence, options.seed)
    student = lm.small_llama(STUDENT, columns, options.sequence, options.seed + 1)

    def distillation_loss(model: Any, batch: lm.Windows) -> Tensor:
        student_logits = lm.logits_of(model, batch)
        with torch.no_grad():
            teacher_logits = lm.logits_of(teacher, batch)
        loss = kl_div(student_logits, teacher_logits, labels=batch.labels, shift=True)
        # Of DTensors it is one too, the same number on every rank already.
        return loss.redistribute(placements=[Replicate()]).to_local() if isinstance(loss, DTensor) else loss

    def fit(model: Any, objective: lm.Objective, steps: int, show: bool = False) -> list[float]:
        """The losses of the steps."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # foreach would mix the sharded parameters with the others in one call.
        optimizer = torch.optim.AdamW(parameters, lr=options.rate, eps=1e-4, foreach=False)
        losses: list[float] = []
        for batch in training.shuffled(options.batch, steps, options.seed):
            loss = objective(model, batch)
            losses.append(loss.item())
            if show:
                print(f"step {len(losses)}: {losses[-1]:.6f}", flush=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return losses

    alone: list[float] = []
    if rank == 0:
        tokens = options.batch * options.sequence
        print(f"{ranks} ranks, {columns} columns, {tokens} tokens a step", flush=True)
        fit(teacher, lm.label_loss, TEACHER_STEPS)
        if not options.skip_alone:
            alone = fit(copy.deepcopy(student), distillation_loss, options.steps)
    for parameter in teacher.parameters():
        dist.broadcast(parameter.data, 0)

    mesh = init_device_mesh("cpu", (ranks,))
    for model in (teacher, student):
        model.requires_grad_(model is student)
        # The logits stay sharded: each rank makes the columns of its part of the head.
        head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        parallelize_module(model, mesh, {"lm_head": head})
    fully_shard(student.model, mesh=mesh)
    together = fit(student, distillation_loss, options.steps, show=rank == 0)
    dist.destroy_process_group()
    return compare(alone, together) if alone else 0


def compare(alone: list[float], together: list[float]) -> int:
    print("step   one process   together   difference")
    every = max(1, len(alone) // 10)
    for step in [*range(0, len(alone) - 1, every), len(alone) - 1]:
        difference = together[step] - alone[step]
        print(f"{step:4d}   {alone[step]:11.7f}   {together[step]:10.7f}   {difference:+.1e}")
    apart = max(abs(a - b) for a, b in zip(alone, together, strict=True))
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
        # Not by the usual way out, which waits for the ranks that are gone.
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())

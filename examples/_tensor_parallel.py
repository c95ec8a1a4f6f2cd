"""The run behind `distill_tp.py`: the same steps alone and over all ranks, and how far the losses part."""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _corpus import Windows, read, trained_tokeniser, windows
from _models import small_llama
from _settings import BadInput, Size
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from kl_gpu import kl_div

_TEACHER, _STUDENT = Size(128, 2), Size(64, 2)
_TEACHER_STEPS = 20
_TOLERANCE = 1e-5


def study(options: argparse.Namespace) -> int:
    if "RANK" not in os.environ:
        raise BadInput("start it with torchrun --standalone --nproc-per-node 2 examples/distill_tp.py")
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=options.timeout))
    try:
        return _study(options, rank, ranks)
    except RuntimeError as error:
        # What the group's other ranks do to this one: they died, or stopped answering.
        print(f"distill_tp.py: rank {rank} of {ranks} ends: {error}", file=sys.stderr, flush=True)
        # Not by the usual way out, which waits for the ranks that are gone.
        os._exit(1)


def _study(options: argparse.Namespace, rank: int, ranks: int) -> int:
    text = read(None if options.text is None else Path(options.text))
    tokeniser = trained_tokeniser(text.training)
    training = windows(tokeniser, text.training, options.sequence)
    columns = len(tokeniser)
    teacher = small_llama(_TEACHER, columns, options.sequence, options.seed)
    student = small_llama(_STUDENT, columns, options.sequence, options.seed + 1)

    def batches(steps: int) -> Iterator[Windows]:
        return training.shuffled(options.batch, steps, options.seed)

    alone: list[float] = []
    if rank == 0:
        print(
            f"{ranks} ranks, {columns} columns, {options.batch * options.sequence} tokens a step", flush=True
        )
        _fit(teacher, batches(_TEACHER_STEPS), options.rate, lambda logits, batch: _label_loss(logits, batch))
    if rank == 0 and not options.skip_alone:
        reference = copy.deepcopy(student)
        alone = _fit(reference, batches(options.steps), options.rate, _distillation(teacher))
    for parameter in teacher.parameters():
        dist.broadcast(parameter.data, 0)

    mesh = init_device_mesh("cpu", (ranks,))
    for model in (teacher, student):
        model.requires_grad_(model is student)
        # The logits stay sharded: each rank makes the columns of its part of the head.
        head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        parallelize_module(model, mesh, {"lm_head": head})
    fully_shard(student.model, mesh=mesh)
    objective = _distillation(teacher, [] if rank == 0 else None)
    together = _fit(student, batches(options.steps), options.rate, objective)
    dist.destroy_process_group()
    if rank != 0:
        return 0
    return _compare(alone, together) if alone else 0


def _logits(model: Any, batch: Windows) -> Tensor:
    logits: Tensor = model(input_ids=batch.ids, use_cache=False).logits
    return logits


def _label_loss(logits: Tensor, batch: Windows) -> Tensor:
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100
    )


def _distillation(teacher: Any, seen: list[float] | None = None) -> Any:
    def loss(logits: Tensor, batch: Windows) -> Tensor:
        with torch.no_grad():
            teacher_logits = _logits(teacher, batch)
        value = kl_div(logits, teacher_logits, labels=batch.labels, shift=True)
        if isinstance(value, DTensor):
            # The same number on every rank already.
            value = value.redistribute(placements=[Replicate()]).to_local()
        if seen is not None:
            seen.append(value.item())
            print(f"step {len(seen)}: {seen[-1]:.6f}", flush=True)
        return value

    return loss


def _fit(model: Any, batches: Iterator[Windows], rate: float, loss_of: Any) -> list[float]:
    # foreach would mix the sharded parameters with the others in one call.
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, eps=1e-4, foreach=False
    )
    losses = []
    for batch in batches:
        loss = loss_of(_logits(model, batch), batch)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def _compare(alone: list[float], together: list[float]) -> int:
    print("step   one process   together   difference")
    every = max(1, len(alone) // 10)
    for step in [*range(0, len(alone) - 1, every), len(alone) - 1]:
        difference = together[step] - alone[step]
        print(f"{step:4d}   {alone[step]:11.7f}   {together[step]:10.7f}   {difference:+.1e}")
    apart = max(abs(a - b) for a, b in zip(alone, together, strict=True))
    print(f"KL(teacher‖student) fell from {together[0]:.4f} to {together[-1]:.4f} nats a token")
    print(f"largest difference of the losses: {apart:.1e} (allowed: {_TOLERANCE:.0e})", flush=True)
    return 0 if apart <= _TOLERANCE else 1

"""`divergence` of DTensors, without moving a logit: rows stay, columns go through `vocab_parallel_div`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..arguments import validation
from ..arguments.options import REDUCTIONS, Options
from ..arguments.reduction import Reduction, valid_rows
from ..dense import run_divergence
from .divergence import vocab_parallel_div

_PER_ROW = ("mask", "labels", "weight", "support", "temperature", "teacher_temperature")


def _mesh_of_columns(placements: tuple[Placement, ...], columns: int) -> int | None:
    """The mesh dimension that shares the vocabulary; None where every rank has whole rows."""
    for placement in placements:
        if not isinstance(placement, (Replicate, Shard)) or type(placement) not in (Replicate, Shard):
            raise ValueError(
                f"student_logits must be Shard or Replicate on every mesh dimension, got {placement}: "
                "redistribute it before, where its sum is cheapest"
            )
    found = [k for k, placement in enumerate(placements) if placement == Shard(columns)]
    if len(found) > 1:
        raise ValueError(
            f"student_logits must be sharded on the vocabulary by one mesh dimension, got {placements}: "
            "flatten the two mesh dimensions into one, or redistribute"
        )
    return found[0] if found else None


def _check_sides(student: Any, teacher: Any) -> None:
    for argument, side, other in (
        ("student_logits", student, "teacher_logits"), ("teacher_logits", teacher, "student_logits")
    ):  # fmt: skip
        if not isinstance(side, DTensor):
            raise TypeError(
                f"{argument} must be a DTensor where {other} is, got {type(side).__name__}: "
                "DTensor.from_local says how its ranks share it"
            )
    if student.device_mesh != teacher.device_mesh or student.placements != teacher.placements:
        raise ValueError(
            "student_logits and teacher_logits must have one mesh and the same placements, got "
            f"{student.placements} and {teacher.placements}: one of them would have to be gathered whole; "
            "redistribute the smaller of the two, or shard both LM heads alike"
        )


def _local_rows(argument: str, value: Any, student: DTensor, rows_of: tuple[Placement, ...]) -> Any:
    """What this rank's rows have of a per-row option."""
    if value is None or not isinstance(value, Tensor):
        return value
    if isinstance(value, DTensor):
        if value.device_mesh != student.device_mesh or tuple(value.placements) != rows_of:
            raise ValueError(
                f"{argument} must be placed as the logits' rows are, {rows_of}, got {value.placements}"
            )
        return value.to_local()
    if any(isinstance(placement, Shard) for placement in rows_of):
        raise ValueError(
            f"{argument} must be a DTensor placed as the logits' rows are, {rows_of}, got a plain tensor"
        )
    return value


def divergence(student: Any, teacher: Any, kind: str, **options: Any) -> Any:
    """`kl_gpu.divergence` of two DTensors with one mesh and the same placements; the result is a DTensor.

    Raises:
        TypeError: only one of the two is a DTensor.
        ValueError: a placement would force logits to move; the message says what to do.
    """
    _check_sides(student, teacher)
    columns = student.dim() - 1
    across = _mesh_of_columns(tuple(student.placements), columns)
    rows_of = tuple(Replicate() if k == across else p for k, p in enumerate(student.placements))
    for argument in _PER_ROW:
        options[argument] = _local_rows(argument, options[argument], student, rows_of)
    if options["shift"] and Shard(1) in rows_of:
        raise ValueError("shift=True needs whole sequences on every rank: labels are of the next position")
    validation.name("reduction", options["reduction"], REDUCTIONS)
    validation.normalizer(options["normalizer"], options["reduction"], student.device, shared=True)
    reduction, normalizer = options.pop("reduction"), options.pop("normalizer")

    sides = student.to_local(), teacher.to_local()
    if across is None:
        local = run_divergence(*sides, kind, Options(reduction="none", **options))
    else:
        group = student.device_mesh.get_group(across)
        # Told, so that vocab_size costs no collective; DTensor cuts as torch.chunk does.
        width = -(-student.shape[-1] // student.device_mesh.size(across))
        start = min(student.device_mesh.get_local_rank(across) * width, student.shape[-1])
        local = vocab_parallel_div(*sides, kind, group=group, vocab_start=start, reduction="none", **options)
    shape = student.shape[:-1]
    lead = torch.Size((shape[0], shape[1] - 1)) if options["shift"] else shape
    # Not `run_check`: it would compare the ranks' values with a collective of its own.
    as_rows = partial(
        DTensor.from_local, device_mesh=student.device_mesh, placements=rows_of, run_check=False, shape=lead,
        stride=torch.empty(lead, device="meta").stride(),
    )  # fmt: skip
    value = as_rows(local[0] if options["return_entropy"] else local)
    entropy = as_rows(local[1]) if options["return_entropy"] else None
    if reduction == "none":
        return value if entropy is None else (value, entropy)
    valid, _ = valid_rows(options["mask"], options["labels"], options["ignore_index"], None, options["shift"])
    if valid is not None:
        valid = as_rows(valid)
    result = Reduction(valid, None, None, reduction, normalizer).reduced(value)
    return result if entropy is None else (result, entropy)

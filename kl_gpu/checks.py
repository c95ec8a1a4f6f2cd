"""What the public functions accept. Every refusal names the argument, what was expected and what came."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .kinds import KINDS

LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# 1/T and its product with a logit must stay finite and non-zero in float32.
TEMPERATURE_RANGE = (1e-30, 1e30)
# So must β and its products with a probability that counts.
SMALLEST_BETA = 1e-30


def _type_name(x: object) -> str:
    return f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def name(argument: str, value: object, allowed: Collection[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{argument} must be a string, got {_type_name(value)}")
    if value not in allowed:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def boolean(argument: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{argument} must be True or False, got {_type_name(value)}")


def backend(value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"backend must be a string or None, got {_type_name(value)}")


def beta(value: Any, kind: str) -> None:
    of = KINDS[kind]
    if value is None:
        return
    if of.beta is None:
        raise ValueError(f"beta is not a parameter of kind {kind!r}, got {value!r}")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"beta must be a float, got {_type_name(value)}")
    one = of.ends[1] is not None
    if not (0 <= float(value) < 1 or (one and float(value) == 1)):  # NaN fails every comparison
        raise ValueError(f"beta must be within [0, 1{']' if one else ')'} for kind {kind!r}, got {value}")
    if 0 < float(value) < SMALLEST_BETA:
        raise ValueError(f"beta must be 0 or at least {SMALLEST_BETA:g}, got {value}")


def temperature(argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{argument} must be a float, got {_type_name(value)}")
    low, high = TEMPERATURE_RANGE
    if not low <= float(value) <= high:  # NaN fails every comparison
        raise ValueError(f"{argument} must be a number > 0, within [{low:g}, {high:g}], got {value}")


def _integer(argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral | torch.SymInt):
        raise TypeError(f"{argument} must be an int, got {_type_name(value)}")


def scales(student: Any, teacher: Any) -> tuple[float, float]:
    """Check both temperatures, a teacher's None being the student's; returns what multiplies each side."""
    temperature("temperature", student)
    if teacher is None:
        teacher = student
    temperature("teacher_temperature", teacher)
    return 1.0 / float(student), 1.0 / float(teacher)


def options_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of what it takes by name only."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def known(function: str, options: Collection[str], allowed: Collection[str]) -> None:
    if unknown := sorted(set(options) - set(allowed)):
        raise TypeError(f"{function} takes {', '.join(allowed)}; got {', '.join(unknown)}")


def whole(argument: str, value: Any, low: int) -> None:
    _integer(argument, value)
    if value < low:
        raise ValueError(f"{argument} must be at least {low}, got {value}")


def _tensor(argument: str, value: object, dtypes: Collection[torch.dtype], what: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {_type_name(value)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{argument} must be {what}, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{argument} must be a dense tensor, got layout {value.layout}")


def beside_each_other(sides: dict[str, Any], columns: int = 1) -> None:
    """Check two tensors of logits against each other but for V; each has so many columns at least."""
    for argument, side in sides.items():
        one_side(argument, side, columns)
    names, (student, teacher) = " and ".join(sides), sides.values()
    if student.device != teacher.device:
        raise ValueError(f"{names} must be on one device, got {student.device} and {teacher.device}")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"{names} must have the same leading shape, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def logits(student: Any, teacher: Any, vocab_size: Any, shift: bool) -> int:
    """Check both sides against each other; returns the number of columns that count."""
    beside_each_other({"student_logits": student, "teacher_logits": teacher})
    shifted("logits", student, shift)
    columns: int = student.shape[-1]
    if vocab_size is None:
        if columns != teacher.shape[-1]:
            raise ValueError(
                f"vocab_size must be given where the vocabularies differ: student_logits has {columns} "
                f"columns, teacher_logits {teacher.shape[-1]}"
            )
        return columns
    _integer("vocab_size", vocab_size)
    largest = min(columns, teacher.shape[-1])
    if not 1 <= vocab_size <= largest:
        raise ValueError(f"vocab_size must be within [1, {largest}], got {vocab_size}")
    return int(vocab_size)


def one_side(argument: str, side: Any, columns: int = 0) -> None:
    """Check that these are logits, of so many columns at least."""
    _tensor(argument, side, LOGIT_DTYPES, "float16, bfloat16, float32 or float64")
    if side.dim() < 1 or side.shape[-1] < columns:
        least = " with at least one column" if columns else ""
        raise ValueError(f"{argument} must be [N, V]{least}, got {tuple(side.shape)}")


def shifted(argument: str, side: Tensor, shift: bool) -> None:
    if shift and side.dim() != 3:
        raise ValueError(f"shift=True needs {argument} [batch, time, V], got {tuple(side.shape)}")
    if shift and side.shape[1] < 1:
        raise ValueError(f"shift=True needs at least one time step, got {tuple(side.shape)}")


def one_sided_logits(argument: str, value: Any, vocab_size: Any, shift: bool) -> int:
    """Check logits that stand alone; returns the number of columns that count."""
    one_side(argument, value, columns=1)
    shifted(argument, value, shift)
    columns: int = value.shape[-1]
    if vocab_size is None:
        return columns
    _integer("vocab_size", vocab_size)
    if not 1 <= vocab_size <= columns:
        raise ValueError(f"vocab_size must be within [1, {columns}], got {vocab_size}")
    return int(vocab_size)


def _beside(argument: str, value: Tensor, shape: tuple[int, ...], what: str, device: torch.device) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{argument} must have {what} {shape}, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{argument} must be on {device}, as the logits are, got {value.device}")


def token_ids(logits: Tensor, value: Any) -> None:
    _tensor("token_ids", value, LABEL_DTYPES, "an integer tensor")
    _beside("token_ids", value, tuple(logits.shape[:-1]), "the logits' leading shape", logits.device)


def topk(student: Tensor, logprobs: Any, ids: Any, tail_logprob: Any, tail: str) -> None:
    """Check what is known of the teacher against the student's logits, before any shift."""
    _tensor("teacher_ids", ids, LABEL_DTYPES, "an integer tensor")
    lead = tuple(student.shape[:-1])
    if ids.dim() != student.dim() or tuple(ids.shape[:-1]) != lead or ids.shape[-1] < 1:
        raise ValueError(
            f"teacher_ids must be [N, K] with the logits' leading shape {lead} and K at least 1, "
            f"got {tuple(ids.shape)}"
        )
    if ids.device != student.device:
        raise ValueError(f"teacher_ids must be on {student.device}, as the logits are, got {ids.device}")
    _tensor("teacher_logprobs", logprobs, LOGIT_DTYPES, "float16, bfloat16, float32 or float64")
    _beside("teacher_logprobs", logprobs, tuple(ids.shape), "the shape of teacher_ids", student.device)
    if tail_logprob is not None:
        if tail != "bucket":
            raise ValueError(f"teacher_tail_logprob belongs to tail='bucket', got tail={tail!r}")
        _tensor("teacher_tail_logprob", tail_logprob, LOGIT_DTYPES, "a floating tensor")
        _beside("teacher_tail_logprob", tail_logprob, lead, "the logits' leading shape", student.device)
    for argument, value in (("teacher_logprobs", logprobs), ("teacher_tail_logprob", tail_logprob)):
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{argument} gets no gradient here, got one that requires it: detach it")


def rows(student: Tensor, mask: Any, labels: Any, ignore_index: Any, weight: Any) -> None:
    """Check what is given per row against the logits' leading shape, before any shift."""
    _integer("ignore_index", ignore_index)
    for argument, value, dtypes, what in (
        ("mask", mask, (torch.bool,), "bool"),
        ("labels", labels, LABEL_DTYPES, "an integer tensor"),
        ("weight", weight, LOGIT_DTYPES, "a floating tensor"),
    ):
        if value is None:
            continue
        _tensor(argument, value, dtypes, what)
        if value.shape != student.shape[:-1]:
            raise ValueError(
                f"{argument} must have the logits' leading shape {tuple(student.shape[:-1])}, "
                f"got {tuple(value.shape)}"
            )
        if value.device != student.device:
            raise ValueError(f"{argument} must be on {student.device}, as the logits are, got {value.device}")


def labels_are_columns(labels: Tensor, counts: Tensor, columns: int) -> None:
    """Refuse labels that are no column, where rows count. Looks at their values, so CPU tensors only."""
    wrong = counts & ((labels < 0) | (labels >= columns))
    if wrong.any():
        raise ValueError(
            f"labels must be within [0, {columns}) or be ignore_index in rows that count, "
            f"got {labels[wrong][0].item()}"
        )


def positive(argument: str, value: Any, expected: str = "a number") -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{argument} must be {expected}, got {_type_name(value)}")
    if not (float(value) > 0 and math.isfinite(value)):
        raise ValueError(f"{argument} must be a finite number > 0, got {value}")


def log_probabilities(policy: Any, ref: Any) -> None:
    """Check the policy's and the reference's log-probabilities of the same tokens against each other."""
    for argument, value in (("policy_logprobs", policy), ("ref_logprobs", ref)):
        _tensor(argument, value, LOGIT_DTYPES, "float16, bfloat16, float32 or float64")
    for what, ours, theirs in (
        ("the same shape", tuple(policy.shape), tuple(ref.shape)),
        ("one device", policy.device, ref.device),
    ):
        if ours != theirs:
            raise ValueError(f"policy_logprobs and ref_logprobs must have {what}, got {ours} and {theirs}")


def normalizer(value: Any, reduction: str, device: torch.device) -> None:
    if value is None:
        return
    if reduction != "mean":
        raise ValueError(f"normalizer is the denominator of reduction='mean', got reduction={reduction!r}")
    if isinstance(value, Tensor):
        _tensor("normalizer", value, (*LOGIT_DTYPES, *LABEL_DTYPES), "a real number")
        if value.dim() != 0:
            raise ValueError(f"normalizer must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
        if value.device != device and value.device.type != "cpu":
            raise ValueError(f"normalizer must be on {device} or the CPU, got {value.device}")
        return
    positive("normalizer", value, "a number or a 0-d tensor")


def inplace(student: Tensor, teacher: Tensor) -> None:
    """Refuse to write the gradient where the logits' memory is needed or shared."""
    if not (torch.is_grad_enabled() and student.requires_grad):
        return
    owner = student if student._base is None else student._base
    if owner.is_leaf and owner.requires_grad:
        raise ValueError(
            "inplace=True would overwrite student_logits, a leaf that requires grad or a view of one; "
            "give the output of a model"
        )
    if student.stride(-1) != 1 and student.shape[-1] > 1:
        raise ValueError("inplace=True needs student_logits with a contiguous last dimension")
    if any(step == 0 and size > 1 for size, step in zip(student.shape, student.stride(), strict=True)):
        raise ValueError("inplace=True needs student_logits with memory of its own, got an expanded view")
    if student.untyped_storage().data_ptr() == teacher.untyped_storage().data_ptr():
        raise ValueError("inplace=True would overwrite teacher_logits, which shares student_logits' memory")

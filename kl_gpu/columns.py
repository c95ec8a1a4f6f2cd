"""A part of the vocabulary: sets of columns kept in each row, and the columns that two models share.

Both are a gather of the columns that count, `[N, K]` of `[N, V]`, from which everything goes on as from
logits of K columns: what lies outside is never read, and its gradient is 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import transforms
from .arguments import validation
from .arguments.options import Options
from .inference_tensors import ordinary_rows
from .ops.complement import check_ids

# Maps that were looked at once, with the version and the number of columns they were good for: on a device
# every look waits, and a map stays the same through a training.
_good: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _gathered(call: None, logits: Tensor, ids: Tensor) -> tuple[Tensor]:
    found = logits.gather(-1, ids.clamp_min(0))
    return (torch.where(ids < 0, -torch.inf, found),)


def _scattered(call: None, needs: Any, incoming: Any, tensors: Any, kept: Any) -> Any:
    logits, ids = tensors
    flow = torch.where(ids < 0, 0.0, incoming[0])
    # Columns are given once, so nothing is added but the zeros of absent ids, and the order does not matter.
    return torch.zeros_like(logits).scatter_add_(-1, ids.clamp_min(0), flow.to(logits.dtype)), None


# From logits `[*, V]` and ids `[*, K]` to these columns `[*, K]`, −inf where an id is below 0.
_STEP = transforms.Step(_gathered, _scattered)


def gather(logits: Tensor, ids: Tensor) -> Tensor:
    found: Tensor = transforms.apply(_STEP, None, logits, ids)[0]
    return found


def _selected(call: None, logits: Tensor, columns: Tensor) -> tuple[Tensor]:
    return (logits.index_select(-1, columns),)


def _put_back(call: None, needs: Any, incoming: Any, tensors: Any, kept: Any) -> Any:
    logits, columns = tensors
    return torch.zeros_like(logits).index_copy_(-1, columns, incoming[0].to(logits.dtype)), None


# From logits `[*, V]` and columns `[V']`, none of which is absent or given twice, to these columns `[*, V']`.
# Ids of each row's own would take eight bytes an element, a third of the time on a CPU.
_MAP_STEP = transforms.Step(_selected, _put_back, rowwise=False)


def check_map(argument: str, value: Any, width: int, device: torch.device) -> None:
    """Check columns `[V']` against the V they are taken of: in range, each once."""
    validation.column_map(argument, value, device)
    if not validation.askable(value) or _good.get(value) == (value._version, width):
        return
    validation.different_columns(argument, value, width)
    _good[value] = (value._version, width)


def mapped(argument: str, logits: Tensor, columns: Tensor | None) -> Tensor:
    """The columns of logits `[*, V]` that a map `[V']` names, in its order; all where there is none."""
    if columns is None:
        return logits
    check_map(argument, columns, logits.shape[-1], logits.device)
    found: Tensor = transforms.apply(_MAP_STEP, None, logits, ordinary_rows(columns).long())[0]
    return found


def support_ids(support: Tensor, lead: torch.Size, columns: int, valid: Tensor | None) -> Tensor:
    """A kept set as ids `[*, K]`, −1 where absent, from ids or from a mask `[*, V]`.

    A mask's K is the size of its largest set; to learn it waits for the device.
    """
    validation.support(support, lead, columns)
    if support.dtype != torch.bool:
        ids = ordinary_rows(support).long()
        if validation.readable(ids):
            check_ids(ids, valid, columns, "support")
        return ids
    kept = support.reshape(-1, columns)
    row, column = _true_entries(kept)
    counts = torch.bincount(row, minlength=len(kept))
    place = torch.arange(len(row), device=kept.device) - (counts.cumsum(0) - counts)[row]
    most = max(1, int(counts.max())) if len(kept) else 1
    ids = torch.full((len(kept), most), -1, dtype=torch.int64, device=kept.device)
    ids[row, place] = column
    return ids.view(*lead, most)


def _kept(student: Tensor, teacher: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides in a kept set's columns, or with −inf in all others where the sets are large."""
    lead, columns = student.shape[:-1], student.shape[-1]
    validation.support(support, lead, columns)
    if support.dtype == torch.bool and _is_large(support):
        nothing = torch.tensor(-torch.inf, device=support.device)
        return torch.where(support, student, nothing), torch.where(support, teacher, nothing)
    ids = support_ids(support, lead, columns, None)
    return gather(student, ids), gather(teacher, ids)


def _is_large(support: Tensor) -> bool:
    """Whether a gather would move more than the whole rows: an id takes eight bytes. Waits for the device;
    under torch.compile, which cannot wait, the answer is yes."""
    if not validation.askable(support):
        return True
    if support.numel() == 0:
        return False
    # As bytes: PyTorch adds booleans up twenty times as slowly on a CPU.
    sizes = support.view(torch.uint8).sum(-1, dtype=torch.int32)
    return int(sizes.max()) > support.shape[-1] // 8


def _true_entries(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of a mask's true entries, row by row."""
    if not validation.readable(mask):
        row, column = mask.nonzero(as_tuple=True)
        return row, column
    # Fifteen times as fast as PyTorch's on a CPU.
    flat = torch.from_numpy(np.flatnonzero(mask.numpy()))
    return flat // mask.shape[1], flat % mask.shape[1]


def selected(student: Tensor, teacher: Tensor, options: Options) -> tuple[Tensor, Tensor, Options]:
    """Both sides' logits in the columns that count, and the options without what said so."""
    validation.booleans(shift=options.shift)
    validation.beside_each_other({"student_logits": student, "teacher_logits": teacher})
    maps = {"student_columns": options.student_columns, "teacher_columns": options.teacher_columns}
    if any(x is not None for x in maps.values()):
        if options.vocab_size is not None:
            raise ValueError(
                "vocab_size must be None where student_columns or teacher_columns say which columns count, "
                f"got {options.vocab_size}"
            )
        student, teacher = (
            mapped(name, x, of) for (name, of), x in zip(maps.items(), (student, teacher), strict=True)
        )
        if student.shape[-1] != teacher.shape[-1]:
            raise ValueError(
                "student_columns and teacher_columns must name as many columns on both sides, "
                f"got {student.shape[-1]} of the student's and {teacher.shape[-1]} of the teacher's"
            )
    columns = options.vocab_size
    if options.support is not None:
        sizes = {"student_logits": student.shape[-1], "teacher_logits": teacher.shape[-1]}
        columns = validation.vocabulary(sizes, "columns", options.vocab_size)
        student, teacher = (x[..., :columns] for x in (student, teacher))
        student, teacher = _kept(student, teacher, options.support)
        columns = None
    return (
        student,
        teacher,
        options._replace(support=None, student_columns=None, teacher_columns=None, vocab_size=columns),
    )

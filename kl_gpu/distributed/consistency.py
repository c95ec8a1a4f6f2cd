"""Whether all ranks make the same call: asked by one small collective, by default the first time.

Ranks that disagree on N would wait in collectives of different sizes, and ranks that disagree on the kind or
a temperature would merge numbers of different meaning. Neither may end in a hang or in a plausible loss.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .. import transforms
from ..arguments import validation
from . import collectives

MODES = ("first", "always", "never")
ENVIRONMENT = "KL_GPU_DISTRIBUTED_CHECK"

# One order for all entries: ranks in different functions must find that out, too.
_FIELDS = (
    "entry", "dim", "rows", "student_dtype", "teacher_dtype", "kind", "beta", "temperature",
    "teacher_temperature", "t_squared", "mask", "labels", "ignore_index", "shift", "weight", "reduction",
    "normalizer", "vocab_size", "backend", "overlap", "vocab_start", "widths", "tail", "teacher_ids",
    "teacher_logprobs", "teacher_tail_logprob", "token_ids", "entropy", "return_mass", "hidden_sizes",
    "softcap", "teacher_softcap", "logit_scale", "teacher_logit_scale", "chunk_rows", "sequence_dim",
    "gradients",
    "support", "student_columns", "teacher_columns", "return_entropy", "hard_weight", "outside_logprob",
)  # fmt: skip
# What the message calls them.
_NAMES = {
    "entry": "the function called", "dim": "the number of the logits' dimensions",
    "rows": "N, the logits' leading shape,", "student_dtype": "the dtype of the student's logits",
    "teacher_dtype": "the dtype of the teacher's logits", "vocab_start": "whether vocab_start is given",
    "widths": "whether the student's shard is as wide as the teacher's",
    "hidden_sizes": "H, the sizes of the hidden states,", "gradients": "what requires a gradient",
}  # fmt: skip

_checked: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def _mode(check: str | None) -> str:
    mode = os.environ.get(ENVIRONMENT, "first") if check is None else check
    if mode not in MODES:
        name = "check" if check is not None else f"the environment's {ENVIRONMENT}"
        raise ValueError(f"{name} must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    return mode


def is_plain(value: Any) -> bool:
    """Whether it has a shape and numbers here: of others the checks that follow say what is wrong."""
    return isinstance(value, Tensor) and not value.is_nested and not validation.is_shared(value)


def _digest(value: Any) -> int:
    """64 bits that say which value it is, whatever its type: the arguments are not validated yet."""
    if is_plain(value):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        text = f"{value.dtype}{tuple(value.shape)}{value.requires_grad}".encode() + content
    else:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        shown = type(value).__name__ if isinstance(value, Tensor) else value
        text = repr(float(value) if number else shown).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def _check_spans(start: np.ndarray, width: np.ndarray) -> None:
    """Shards must lie one behind the other, in any order of ranks, without a gap or an overlap."""
    held = [(int(s), int(w), rank) for rank, (s, w) in enumerate(zip(start, width, strict=True)) if w > 0]
    expected = 0
    for s, w, rank in sorted(held):
        if s != expected:
            raise ValueError(
                "vocab_start must put the ranks' columns side by side from 0 on, "
                f"got {s} on rank {rank} where column {expected} was expected"
            )
        expected = s + w


def agree(
    entry: str,
    group: Any,
    check: str | None,
    logits: tuple[Any, ...],
    vocab_start: Any,
    columns: int | None = None,
    **options: Any,
) -> Any:
    """The process group meant, whose ranks agree: raise on every one of them where their arguments differ.

    Args:
        entry: the function that was called.
        group: as given, see `collectives.resolve`.
        check: "first" (the first call of each function in a group), "always" or "never"; None asks the
            environment variable KL_GPU_DISTRIBUTED_CHECK, and is "first" without it.
        logits: the student's shard, and the teacher's where there is one.
        vocab_start: this rank's first column, or None.
        columns: how many it holds, where that is not the logits' last size.
        **options: what must be the same on every rank.

    Raises:
        ValueError: the ranks disagree; the message names the argument and the ranks.
    """
    group = collectives.resolve(group)
    transforms.refuse(entry)
    mode = _mode(check)
    entries = _checked.setdefault(group, set())
    if mode == "never" or (mode == "first" and entry in entries):
        return group
    tensors = [x for x in logits if is_plain(x)]
    of = {"entry": entry, "vocab_start": vocab_start is not None} | options
    for name, x in zip(("student_dtype", "teacher_dtype"), logits, strict=False):
        of[name] = x.dtype if is_plain(x) else type(x).__name__
    if tensors:
        of |= {"dim": tensors[0].dim(), "rows": tuple(tensors[0].shape[:-1])}
        # Past vocab_size the two may end where they will.
        cut = vocab_start is not None and options.get("vocab_size") is not None
        of["widths"] = cut or len({x.shape[-1] for x in tensors if x.dim()}) <= 1
    if unknown := set(of) - set(_FIELDS):
        raise TypeError(f"{entry} has no option {', '.join(sorted(unknown))}")
    start = vocab_start if isinstance(vocab_start, int) else -1
    width = tensors[0].shape[-1] if tensors and tensors[0].dim() else 0
    width = width if columns is None else columns
    row = [_digest(of.get(name)) for name in _FIELDS] + [start, width]
    device = next((x.device for x in logits if isinstance(x, Tensor)), torch.device("cpu"))
    local = torch.tensor(row, dtype=torch.int64, device=device)
    found = collectives.gather(local, group, f"the arguments of {entry}").cpu().numpy()
    for column, name in enumerate(_FIELDS):
        if other := [rank for rank, x in enumerate(found[:, column]) if x != found[0, column]]:
            value: Any = of.get(name)
            shown = f"a tensor {tuple(value.shape)}" if is_plain(value) else repr(value)
            raise ValueError(
                f"{_NAMES.get(name, name)} must be the same on every rank: rank "
                f"{', '.join(map(str, other))} differs from rank 0, "
                f"got {shown} on rank {dist.get_rank(group)}"
            )
    if start >= 0:
        _check_spans(found[:, -2], found[:, -1])
    # Only now: a rank that remembered a call which was refused would not ask next time, where others do.
    entries.add(entry)
    return group

"""What the public functions accept. Every refusal names the argument, what was expected and what came."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import transforms
from ..kinds import KINDS

LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABEL_DTYPES = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64
)  # fmt: skip
# Trainers keep masks as int64.
_MASK_DTYPES = (torch.bool, *LABEL_DTYPES)
_MASKS = "bool, or integers 0 and 1"
_FLOATS = "float16, bfloat16, float32 or float64"
_INTEGERS = "an integer tensor, of int8 to int64 or uint8 to uint64"
# Below, the float32 kernels' exponents of logits that models have overflow; above, T² times a divergence that
# shrinks with 1/T² loses its digits. Within, every backend keeps the promises.
TEMPERATURE_RANGE = (1e-6, 1e9)
# β and its products with a probability that counts must stay non-zero in float32.
SMALLEST_BETA = 1e-30
# So must T² over it, whatever T is, stay finite in float32.
SMALLEST_NORMALIZER = 1e-20


_ORDINARY = (Tensor, torch.nn.Parameter)
_OURS, _LEAD = "the logits are", "the logits' leading shape"


def readable(tensor: Tensor) -> bool:
    """Whether its numbers can be looked at here and now: they exist, and no device has to be waited for.

    A traced, fake or mapped tensor stands for numbers that are not there.
    """
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(tensor) in _ORDINARY
        and not transforms.are_active()
    )


def _type_name(x: object) -> str:
    return f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def name(argument: str, value: object, allowed: Collection[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{argument} must be a string, got {_type_name(value)}")
    if value not in allowed:
        # Nobody pays for this import but who is wrong.
        from difflib import get_close_matches

        close = get_close_matches(value, allowed, 1)
        raise ValueError(
            f"{argument} must be one of {', '.join(map(repr, allowed))}, got {value!r}"
            f"{f'; did you mean {close[0]!r}?' if close else ''}"
        )


def booleans(**flags: object) -> None:
    for argument, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{argument} must be True or False, got {_type_name(value)}")


def _is_real(value: object) -> bool:
    # The plain type first: asking an abstract class takes four times as long.
    return type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))


def _as_float(value: Any) -> float:
    """A real number as a float: infinite where it is too large for one, an integer of 400 digits."""
    if type(value) is float:
        return value
    if abs(value) > sys.float_info.max:
        return math.inf if value > 0 else -math.inf
    return float(value)


def backend(value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"backend must be a string or None, got {_type_name(value)}")


def outside_logprob(value: Any, tail: str) -> None:
    if not _is_real(value):
        raise TypeError(f"outside_logprob must be a float or None, got {_type_name(value)}")
    if not -math.inf < _as_float(value) <= 0:  # NaN fails every comparison
        raise ValueError(f"outside_logprob must be a finite number <= 0, got {value}")
    if tail not in ("truncate", "student_full"):
        raise ValueError(f"outside_logprob belongs to tail='truncate' and 'student_full', got tail={tail!r}")


def hard_weight(value: Any, labels: Any, support: Any) -> None:
    if not _is_real(value):
        raise TypeError(f"hard_weight must be a float, got {_type_name(value)}")
    if not 0 <= _as_float(value) < math.inf:  # NaN fails every comparison
        raise ValueError(f"hard_weight must be a finite number >= 0, got {value}")
    if value > 0 and labels is None:
        raise ValueError("hard_weight weighs the labels' negative log-probabilities: labels must be given")
    if value > 0 and support is not None:
        raise ValueError("hard_weight goes with whole rows: support must be None")


def beta(value: Any, kind: str) -> None:
    if value is None:
        return
    of = KINDS[kind]
    if of.beta is None:
        raise ValueError(f"beta is not a parameter of kind {kind!r}, got {value!r}")
    if not _is_real(value):
        raise TypeError(f"beta must be a float, got {_type_name(value)}")
    most = 1 if of.beta_most is None else of.beta_most
    closed = of.beta_most is not None or of.limits[1] is not None
    if not (0 <= value <= most if closed else 0 <= value < most):  # NaN fails every comparison
        raise ValueError(
            f"beta must be within [0, {most:g}{']' if closed else ')'} for kind {kind!r}, got {value}"
        )
    if 0 < value < SMALLEST_BETA:
        raise ValueError(f"beta must be 0 or at least {SMALLEST_BETA:g}, got {value}")


def temperature(argument: str, value: Any) -> None:
    """Check a temperature; of a tensor, what can be said without its rows."""
    if not _is_real(value):
        if not isinstance(value, Tensor) or value.dtype not in LOGIT_DTYPES:
            raise TypeError(f"{argument} must be a float or a floating tensor [N], got {_type_name(value)}")
        _tensor(argument, value, LOGIT_DTYPES, _FLOATS)
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{argument} gets no gradient, got a tensor that requires one: give {argument}.detach()"
            )
        return
    low, high = TEMPERATURE_RANGE
    if not low <= _as_float(value) <= high:  # NaN fails every comparison
        raise ValueError(f"{argument} must be a number > 0, within [{low:g}, {high:g}], got {value}")


def shown_temperature(value: float | Tensor) -> str:
    """A temperature as a message says it."""
    return (
        f"a temperature of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"temperature={value}"
    )


def temperature_of_rows(argument: str, value: Tensor, rows: Tensor) -> None:
    """Check a temperature of each row against the rows, before any shift."""
    _beside(argument, value, tuple(rows.shape[:-1]), "one number, or the rows' leading shape", rows.device)


def temperatures_in_range(argument: str, value: Tensor, good: Tensor) -> None:
    """Refuse temperatures of which some are not good."""
    if not bool(good.all()):
        low, high = TEMPERATURE_RANGE
        raise ValueError(
            f"{argument} must be > 0, within [{low:g}, {high:g}], in rows that count, also over logit_scale, "
            f"got {value[~good][0].item()}"
        )


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for tensors there; of devices that it does not know it will not be asked."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def temperatures(temperature_: Any, teacher_temperature: Any, t_squared: bool = False) -> None:
    """Check both sides' temperatures and what T² means for them."""
    temperature("temperature", temperature_)
    if teacher_temperature is None:
        return
    temperature("teacher_temperature", teacher_temperature)
    if isinstance(temperature_, Tensor) or isinstance(teacher_temperature, Tensor):
        if t_squared and teacher_temperature is not temperature_:
            raise ValueError(
                "t_squared needs one temperature: where it is a tensor, teacher_temperature must be None or "
                "that same tensor"
            )
        return
    # Not `!=`: torch.compile would take two symbols that are equal once for two constants.
    if t_squared and (temperature_ < teacher_temperature or temperature_ > teacher_temperature):
        raise ValueError(
            "t_squared needs one temperature: T² has no meaning for "
            f"temperature={temperature_} with teacher_temperature={teacher_temperature}"
        )


def _integer(argument: str, value: object) -> None:
    if type(value) is int:  # as in _is_real
        return
    if isinstance(value, bool) or not isinstance(value, Integral | torch.SymInt):
        raise TypeError(f"{argument} must be an int, got {_type_name(value)}")


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """What it takes by name only, with the defaults, which all have."""
    return dict(function.__kwdefaults__ or {})


def known(function: str, options: Collection[str], allowed: Collection[str]) -> None:
    if unknown := sorted(set(options) - set(allowed)):
        raise TypeError(f"{function} takes {', '.join(allowed)}; got {', '.join(unknown)}")


def whole(argument: str, value: Any, low: int, otherwise: str = "") -> None:
    _integer(argument, value)
    if value < low:
        raise ValueError(f"{argument} must be at least {low}{otherwise}, got {value}")


def count(argument: str, value: Any, most: int) -> None:
    _integer(argument, value)
    if not 1 <= value <= most:
        raise ValueError(f"{argument} must be within [1, {most}], got {value}")


def dimension(argument: str, value: Any, dimensions: int) -> None:
    _integer(argument, value)
    if not 0 <= value < dimensions:
        raise ValueError(f"{argument} must be within [0, {dimensions}), got {value}")


def is_shared(value: object) -> bool:
    """Whether this is a DTensor; by name, since importing it takes a second."""
    return type(value).__name__ == "DTensor"


def of_one_rank(entry: str, *tensors: object) -> None:
    """Refuse DTensors where the entry does not hand them on."""
    for value in tensors:
        if is_shared(value):
            raise TypeError(
                f"{entry} must be given plain tensors, got a DTensor: pass each rank's to_local(), or, where "
                f"the vocabulary is sharded, call kl_gpu.distributed.vocab_parallel_{entry}"
            )


def _tensor(
    argument: str, value: object, dtypes: Collection[torch.dtype], what: str, shared: bool = False
) -> None:
    """Check a tensor's kind and dtype; `shared`: a DTensor will do."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {_type_name(value)}")
    if value.is_nested:  # asked first: it has no shape, and one of its two layouts calls itself strided
        raise TypeError(f"{argument} must be a dense tensor, got a nested one: pad it, and mask the padding")
    if not shared and is_shared(value):
        raise TypeError(f"{argument} must be a plain tensor, got a DTensor: give its to_local()")
    if value.dtype not in dtypes:
        raise TypeError(f"{argument} must be {what}, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{argument} must be a dense tensor, got layout {value.layout}")


def _same_rows(sides: dict[str, Tensor]) -> None:
    student, teacher = sides.values()
    if student.device != teacher.device:
        raise ValueError(
            f"{' and '.join(sides)} must be on one device, got {student.device} and {teacher.device}"
        )
    if student.shape != teacher.shape and student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"{' and '.join(sides)} must have the same leading shape, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def shifted(needed: str, value: Tensor, shift: bool) -> None:
    if shift and value.dim() != 3:
        raise ValueError(f"shift=True needs {needed}, got {tuple(value.shape)}")
    if shift and value.shape[1] < 1:
        raise ValueError(f"shift=True needs at least one time step, got {tuple(value.shape)}")


def beside_each_other(sides: dict[str, Any], columns: int = 1) -> None:
    """Check two tensors of logits against each other but for V; each has so many columns at least."""
    for argument, side in sides.items():
        one_side(argument, side, columns)
    _same_rows(sides)


def logits(student: Any, teacher: Any, vocab_size: Any, shift: bool) -> int:
    """Check both sides against each other; returns the number of columns that count."""
    beside_each_other({"student_logits": student, "teacher_logits": teacher})
    shifted("logits [batch, time, V]", student, shift)
    if vocab_size is None and student.shape == teacher.shape:
        columns: int = student.shape[-1]
        return columns
    sizes = {"student_logits": student.shape[-1], "teacher_logits": teacher.shape[-1]}
    return vocabulary(sizes, "columns", vocab_size)


def vocabulary(sizes: dict[str, int], unit: str, vocab_size: Any) -> int:
    """Check what one or both sides have against vocab_size; returns the number of columns that count."""
    if vocab_size is not None:
        count("vocab_size", vocab_size, min(sizes.values()))
        return int(vocab_size)
    columns, *other = sizes.values()
    if other and other[0] != columns:
        argument, other_argument = sizes
        raise ValueError(
            f"vocab_size must be given where the vocabularies differ: {argument} has {columns} "
            f"{unit}, {other_argument} {other[0]}"
        )
    return columns


def one_side(argument: str, side: Any, columns: int = 0) -> None:
    """Check that these are logits, of so many columns at least."""
    _tensor(argument, side, LOGIT_DTYPES, _FLOATS)
    if side.dim() < 1 or side.shape[-1] < columns:
        least = " with at least one column" if columns else ""
        raise ValueError(f"{argument} must be [N, V]{least}, got {tuple(side.shape)}")


def one_sided_logits(argument: str, value: Any, vocab_size: Any, shift: bool) -> int:
    """Check logits that stand alone; returns the number of columns that count."""
    one_side(argument, value, columns=1)
    shifted(f"{argument} [batch, time, V]", value, shift)
    return vocabulary({argument: value.shape[-1]}, "columns", vocab_size)


def head(side: str, hidden: Any, weight: Any, bias: Any, shift: bool, least: int = 1) -> None:
    """Check one model's hidden states against its LM head, of so many rows at least.

    `side` is what the arguments' names begin with.
    """
    names = f"{side}hidden", f"{side}weight", f"{side}bias"
    expected = (names[0], hidden, "[N, H]"), (names[1], weight, "[V, H]"), (names[2], bias, "[V]")
    for argument, value, shape in expected[: 2 if bias is None else 3]:
        _tensor(argument, value, LOGIT_DTYPES, _FLOATS)
        few = value.dim() < 1 if argument == names[0] else value.dim() != shape.count(",") + 1
        narrow = few or value.shape[-1] < (least if value is bias else 1)
        if narrow or (value is weight and len(value) < least):
            what = "neither V nor H 0" if least else "H not 0"
            raise ValueError(f"{argument} must be {shape}, {what}, got {tuple(value.shape)}")
        _same_device(argument, value, hidden.device, f"{names[0]} is")
        # What autocast casts may differ; it leaves float64 alone.
        cast = autocasts(hidden.device) and torch.float64 not in (value.dtype, hidden.dtype)
        if value.dtype != hidden.dtype and not cast:
            raise TypeError(
                f"{argument} must have {names[0]}'s dtype, {hidden.dtype}, got {value.dtype}: cast one of "
                "them, or call under torch.autocast, which casts both"
            )
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{names[1]} must be [V, {hidden.shape[-1]}], as {names[0]} has {hidden.shape[-1]} columns, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and len(bias) != len(weight):
        raise ValueError(
            f"{names[2]} must be [{len(weight)}], a number per row of {names[1]}, got [{len(bias)}]"
        )
    shifted("hidden states [batch, time, H]", hidden, shift)


def matrix(argument: str, value: Any) -> None:
    """Check that this is a weight `[V, H]`."""
    _tensor(argument, value, LOGIT_DTYPES, _FLOATS)
    if value.dim() != 2:
        raise ValueError(f"{argument} must be [V, H], neither V nor H 0, got {tuple(value.shape)}")


def heads(sides: tuple[Any, ...], shift: bool, least: int = 1) -> None:
    """Check both models' hidden states, weights and biases, of so many rows at least."""
    student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias = sides
    head("student_", student_hidden, student_weight, student_bias, False, least)
    head("teacher_", teacher_hidden, teacher_weight, teacher_bias, False, least)
    _same_rows({"student_hidden": student_hidden, "teacher_hidden": teacher_hidden})
    shifted("hidden states [batch, time, H]", student_hidden, shift)
    _constant("teacher_hidden", teacher_hidden)
    _constant("teacher_weight", teacher_weight)
    _constant("teacher_bias", teacher_bias)


def softcap(argument: str, value: Any) -> float:
    """Returns the cap, 0 where there is none: None, or a configuration's 0."""
    if value is None or (_is_real(value) and value == 0):
        return 0.0
    positive(argument, value, "a number or None")
    return float(value)


def logit_scale(argument: str, value: Any, temperature: float | Tensor) -> float:
    """Check a factor of the logits against the temperature, but for that of each row."""
    positive(argument, value)
    if isinstance(temperature, Tensor):
        return float(value)
    low, high = TEMPERATURE_RANGE
    if not low <= float(temperature) / float(value) <= high:
        raise ValueError(
            f"the temperature over {argument} must be within [{low:g}, {high:g}], "
            f"got {temperature} over {value}"
        )
    return float(value)


def _beside(
    argument: str,
    value: Tensor,
    shape: tuple[int, ...],
    what: str,
    device: torch.device,
    whose: str = _OURS,
) -> None:
    """Check that a tensor has the shape of `what`, and lies where it does."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{argument} must have {what} {shape}, got {tuple(value.shape)}")
    _same_device(argument, value, device, whose)


def _same_device(argument: str, value: Tensor, device: torch.device, whose: str = _OURS) -> None:
    if value.device != device:
        raise ValueError(f"{argument} must be on {device}, as {whose}, got {value.device}")


def _constant(argument: str, value: Tensor | None) -> None:
    if value is not None and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{argument} gets no gradient here, got one that requires it: give {argument}.detach(), or "
            "freeze the model with requires_grad_(False)"
        )


def token_ids(rows: Tensor, value: Any) -> bool:
    """Check tokens `[N]` or `[N, K]` against the rows, before any shift; returns whether there are K."""
    _tensor("token_ids", value, LABEL_DTYPES, _INTEGERS)
    lead = tuple(rows.shape[:-1])
    several = value.dim() == rows.dim() and tuple(value.shape[:-1]) == lead and value.shape[-1] > 0
    if not several and tuple(value.shape) != lead:
        raise ValueError(
            f"token_ids must have {_LEAD} {lead}, or that and K, at least 1, got {tuple(value.shape)}"
        )
    _same_device("token_ids", value, rows.device)
    return several


def tokens_are_columns(ids: Tensor, valid: Tensor | None, columns: int, lowest: int = -1) -> None:
    """Refuse ids `[N, K]` that are no column, nor −1, where rows count, if their values can be looked at."""
    if not readable(ids):
        return
    wrong = (ids < lowest) | (ids >= columns)
    if valid is not None:
        wrong &= valid[..., None]
    if wrong.any():
        raise ValueError(
            f"token_ids must be within [0, {columns}), or -1 or ignore_index for an absent entry, "
            f"got {ids[wrong][0].item()}"
        )


def column_map(argument: str, value: Any, device: torch.device) -> None:
    _tensor(argument, value, LABEL_DTYPES, _INTEGERS)
    if value.dim() != 1 or len(value) < 1:
        raise ValueError(f"{argument} must be [V'], V' at least 1, got {tuple(value.shape)}")
    _same_device(argument, value, device)


def askable(tensor: Tensor) -> bool:
    """Whether its numbers exist here and now, be it that a device has to be waited for."""
    return not torch.compiler.is_compiling() and type(tensor) in _ORDINARY and not transforms.are_active()


def different_columns(argument: str, value: Tensor, width: int) -> None:
    """Refuse columns out of range or given twice. Waits for the device."""
    ordered = value.long().sort().values
    if ordered[0] < 0 or ordered[-1] >= width:
        wrong = ordered[0] if ordered[0] < 0 else ordered[-1]
        raise ValueError(f"{argument} must be within [0, {width}), got {int(wrong)}")
    twice = ordered[1:] == ordered[:-1]
    if twice.any():
        raise ValueError(f"{argument} must name each column once, got {int(ordered[1:][twice][0])} twice")


def support(value: Any, lead: torch.Size, columns: int) -> None:
    """Check a kept set: a mask of all columns, or ids."""
    _tensor("support", value, _MASK_DTYPES, "bool [N, V], or an integer tensor [N, K]")
    of_mask = value.dtype == torch.bool
    good = value.dim() == len(lead) + 1 and value.shape[:-1] == lead and value.shape[-1] > 0
    if not good or (of_mask and value.shape[-1] != columns):
        shape = f"[N, {columns}] as a mask" if of_mask else "[N, K] as ids, K at least 1"
        raise ValueError(f"support must be {shape}, with {_LEAD} {tuple(lead)}, got {tuple(value.shape)}")


def topk(rows: Tensor, logprobs: Any, ids: Any, tail_logprob: Any, tail: str, side: str = "teacher") -> None:
    """Check what is known of one side, by default the teacher, against the rows, before any shift."""
    names = f"{side}_ids", f"{side}_logprobs", f"{side}_tail_logprob"
    _tensor(names[0], ids, LABEL_DTYPES, _INTEGERS)
    lead = tuple(rows.shape[:-1])
    if ids.dim() != rows.dim() or tuple(ids.shape[:-1]) != lead or ids.shape[-1] < 1:
        raise ValueError(
            f"{names[0]} must be [N, K] with {_LEAD} {lead} and K at least 1, got {tuple(ids.shape)}"
        )
    _same_device(names[0], ids, rows.device)
    _tensor(names[1], logprobs, LOGIT_DTYPES, _FLOATS)
    _beside(names[1], logprobs, tuple(ids.shape), f"the shape of {names[0]}", rows.device)
    if tail_logprob is not None:
        if tail != "bucket":
            raise ValueError(f"{names[2]} belongs to tail='bucket', got tail={tail!r}")
        _tensor(names[2], tail_logprob, LOGIT_DTYPES, "a floating tensor")
        _beside(names[2], tail_logprob, lead, _LEAD, rows.device)
    if side == "teacher":
        _constant(names[1], logprobs)
        _constant(names[2], tail_logprob)


def rows(student: Tensor, mask: Any, labels: Any, ignore_index: Any, weight: Any) -> None:
    """Check what is given per row against the logits' leading shape, before any shift."""
    _integer("ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must be within int64, got {ignore_index}")
    if mask is None and labels is None and weight is None:
        return
    lead = tuple(student.shape[:-1])
    for argument, value, dtypes, what in (
        ("mask", mask, _MASK_DTYPES, _MASKS),
        ("labels", labels, LABEL_DTYPES, _INTEGERS),
        ("weight", weight, LOGIT_DTYPES, "a floating tensor"),
    ):
        if value is not None:
            _tensor(argument, value, dtypes, what)
            _beside(argument, value, lead, _LEAD, student.device)
    if mask is not None:
        _zeros_and_ones(mask)


def _zeros_and_ones(mask: Tensor) -> None:
    """Refuse other numbers, if they can be looked at: a tensor of lengths or of labels is no mask."""
    if mask.dtype == torch.bool or not readable(mask):
        return
    numbers = mask.long()
    wrong = (numbers != 0) & (numbers != 1)
    if wrong.any():
        raise ValueError(f"mask must be {_MASKS}, got {numbers[wrong][0].item()}")


def labels_are_columns(labels: Tensor, counts: Tensor, columns: int) -> None:
    """Refuse labels that are no column, where rows count, if their values can be looked at."""
    if not readable(labels):
        return
    labels = labels.long()  # lest the number of columns wrap around in a narrower type
    wrong = counts & ((labels < 0) | (labels >= columns))
    if wrong.any():
        raise ValueError(
            f"labels must be within [0, {columns}) or be ignore_index in rows that count, "
            f"got {labels[wrong][0].item()}"
        )


def positive(argument: str, value: Any, expected: str = "a number") -> None:
    if not _is_real(value):
        raise TypeError(f"{argument} must be {expected}, got {_type_name(value)}")
    if not 0 < _as_float(value) < math.inf:  # NaN fails every comparison; isfinite does not trace
        raise ValueError(f"{argument} must be a finite number > 0, got {value}")


def log_probabilities(policy: Any, ref: Any, mask: Any, weight: Any) -> None:
    """Check the policy's and the reference's log-probabilities of the same tokens against each other."""
    for argument, value in (("policy_logprobs", policy), ("ref_logprobs", ref)):
        _tensor(argument, value, LOGIT_DTYPES, _FLOATS, shared=True)
    for what, ours, theirs in (
        ("the same shape", tuple(policy.shape), tuple(ref.shape)),
        ("one device", policy.device, ref.device),
    ):
        if ours != theirs:
            raise ValueError(f"policy_logprobs and ref_logprobs must have {what}, got {ours} and {theirs}")
    if mask is not None:
        _tensor("mask", mask, _MASK_DTYPES, _MASKS, shared=True)
        _beside("mask", mask, tuple(policy.shape), "the log-probabilities' shape", policy.device, "they are")
        _zeros_and_ones(mask)
    if weight is not None:
        _tensor("weight", weight, LOGIT_DTYPES, "a floating tensor", shared=True)
        _beside(
            "weight", weight, tuple(policy.shape), "the log-probabilities' shape", policy.device, "they are"
        )


def normalizer(value: Any, reduction: str, device: torch.device, shared: bool = False) -> None:
    """Check the denominator of a mean; `shared`: it may be a DTensor."""
    if value is None:
        return
    if reduction != "mean":
        of_batch = ": 'batchmean' has one, the first dimension's size" if reduction == "batchmean" else ""
        raise ValueError(
            f"normalizer is the denominator of reduction='mean', got reduction={reduction!r}{of_batch}"
        )
    if isinstance(value, Tensor):
        _tensor("normalizer", value, (*LOGIT_DTYPES, *LABEL_DTYPES), "a real number", shared)
        if value.numel() != 1:
            raise ValueError(
                f"normalizer must be a number or a tensor of one element, got shape {tuple(value.shape)}"
            )
        if value.device != device and value.device.type != "cpu":
            raise ValueError(f"normalizer must be on {device} or the CPU, got {value.device}")
        if readable(value) and not 0 <= value.item() < math.inf:  # NaN fails every comparison
            raise ValueError(f"normalizer must be a finite number > 0, got a tensor of {value.item()}")
        if readable(value) and 0 < value.item() < SMALLEST_NORMALIZER:
            raise ValueError(
                f"normalizer must be 0 or at least {SMALLEST_NORMALIZER:g}, got a tensor of {value.item()}"
            )
        return
    positive("normalizer", value, "a number or a tensor of one element")
    if value < SMALLEST_NORMALIZER:
        raise ValueError(f"normalizer must be a number of at least {SMALLEST_NORMALIZER:g}, got {value}")


def divides(normalizer_: Any, counts: Tensor | None, lead: torch.Size, shift: bool) -> None:
    """Refuse a normalizer of 0 where rows count, if both can be looked at."""
    if not isinstance(normalizer_, Tensor) or not readable(normalizer_) or normalizer_.item() != 0:
        return
    if counts is not None and not readable(counts):
        return
    of_all = math.prod(lead) - (lead[0] if shift else 0)
    if of_all > 0 if counts is None else bool(counts.any()):
        raise ValueError("normalizer may be 0 only where no row counts, got a tensor of 0 for rows that do")


def inplace(argument: str, logits: Tensor, other: str = "", also_needed: Tensor | None = None) -> None:
    """Refuse to write the gradient where the logits' memory is needed or shared."""
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return
    owner = logits if logits._base is None else logits._base
    if owner.is_leaf and owner.requires_grad:
        raise ValueError(
            f"inplace=True would overwrite {argument}, a leaf that requires grad or a view of one; "
            "give the output of a model"
        )
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(f"inplace=True needs {argument} with a contiguous last dimension")
    if any(step == 0 and size > 1 for size, step in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError(f"inplace=True needs {argument} with memory of its own, got an expanded view")
    if also_needed is None or isinstance(logits, FakeTensor):
        return
    # Null where there is no memory to share: no rows, the meta device.
    memory = logits.untyped_storage().data_ptr()
    if memory and memory == also_needed.untyped_storage().data_ptr():
        raise ValueError(f"inplace=True would overwrite {other}, which shares {argument}' memory")

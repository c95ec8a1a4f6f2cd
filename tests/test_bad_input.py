"""Every refusal: the right exception, naming the argument, before any kernel starts."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kl_gpu
from kl_gpu.ops import pair as ops

S, T = torch.zeros(2, 3, 8), torch.ones(2, 3, 8)
ROWS = torch.ones(2, 3)
INF, NAN = math.inf, math.nan

# (what is wrong, arguments that replace the good ones, exception, what the message must name)
CASES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("student a list", {"student_logits": [[0.0]]}, TypeError, "student_logits.*tensor.*list"),
    ("teacher None", {"teacher_logits": None}, TypeError, "teacher_logits.*tensor.*NoneType"),
    ("integer student", {"student_logits": S.long()}, TypeError, "student_logits.*float16.*int64"),
    ("bool teacher", {"teacher_logits": T.bool()}, TypeError, "teacher_logits.*torch.bool"),
    ("complex student", {"student_logits": S.to(torch.complex64)}, TypeError, "student_logits.*complex64"),
    ("float8 student", {"student_logits": S.to(torch.float8_e4m3fn)}, TypeError, "student_logits.*float8"),
    ("sparse teacher", {"teacher_logits": T.to_sparse()}, TypeError, "teacher_logits.*sparse"),
    ("0-d student", {"student_logits": S[0, 0, 0]}, ValueError, r"student_logits.*\(\)"),
    (
        "no columns",
        {"student_logits": S[..., :0], "teacher_logits": T[..., :0]},
        ValueError,
        "student_logits.*0",
    ),
    ("another N", {"teacher_logits": T[:1]}, ValueError, r"student_logits.*teacher_logits.*\(1, 3, 8\)"),
    ("N would broadcast", {"teacher_logits": T[0]}, ValueError, r"leading shape.*\(3, 8\)"),
    ("another device", {"teacher_logits": T.to("meta")}, ValueError, "one device.*cpu.*meta"),
    ("V differs", {"teacher_logits": torch.ones(2, 3, 9)}, ValueError, "vocab_size.*8.*9"),
    ("vocab_size float", {"vocab_size": 8.0}, TypeError, "vocab_size.*int.*float"),
    ("vocab_size bool", {"vocab_size": True}, TypeError, "vocab_size.*bool"),
    ("vocab_size 0", {"vocab_size": 0}, ValueError, r"vocab_size.*\[1, 8\].*0"),
    ("vocab_size past V", {"vocab_size": 9}, ValueError, r"vocab_size.*\[1, 8\].*9"),
    ("vocab_size negative", {"vocab_size": -1}, ValueError, "vocab_size.*-1"),
    ("temperature 0", {"temperature": 0.0}, ValueError, "temperature.*> 0.*0.0"),
    ("temperature negative", {"temperature": -1.0}, ValueError, "temperature.*-1.0"),
    ("temperature NaN", {"temperature": NAN}, ValueError, "temperature.*nan"),
    ("temperature inf", {"temperature": INF}, ValueError, "temperature.*inf"),
    ("temperature below the floor", {"temperature": 9.9e-7}, ValueError, "temperature.*1e-06.*9.9e-07"),
    ("temperature past all use", {"temperature": 1.1e9}, ValueError, r"temperature.*1e\+09.*1100000000"),
    ("teacher_temperature below it", {"teacher_temperature": 1e-16}, ValueError, "_temp.*1e-06.*1e-16"),
    ("temperature a string", {"temperature": "1"}, TypeError, "temperature.*float.*str"),
    ("temperature of no row", {"temperature": torch.tensor(2.0)}, ValueError, r"temperature.*shape.*\(\)"),
    (
        "temperature of ints",
        {"temperature": torch.tensor([2])},
        TypeError,
        "temperature.*float.*tensor.*int64",
    ),
    ("temperature bool", {"temperature": True}, TypeError, "temperature.*bool"),
    ("temperature None", {"temperature": None}, TypeError, "temperature.*NoneType"),
    ("teacher_temperature 0", {"teacher_temperature": 0}, ValueError, "teacher_temperature.*0"),
    ("teacher_temperature a list", {"teacher_temperature": [1.0]}, TypeError, "teacher_temperature.*list"),
    (
        "t_squared with two",
        {"t_squared": True, "teacher_temperature": 2.0},
        ValueError,
        "t_squared.*temperature",
    ),
    ("t_squared an int", {"t_squared": 1}, TypeError, "t_squared.*True or False.*int"),
    ("mask float", {"mask": ROWS}, TypeError, "mask.*bool.*float32"),
    ("mask of 2", {"mask": 2 * ROWS.long()}, ValueError, "mask must be bool, or integers 0 and 1, got 2"),
    ("mask a list", {"mask": [True]}, TypeError, "mask.*tensor.*list"),
    ("mask of the wrong shape", {"mask": ROWS[0].bool()}, ValueError, r"mask.*\(2, 3\).*\(3,\)"),
    ("mask with V", {"mask": S.bool()}, ValueError, r"mask.*\(2, 3, 8\)"),
    ("mask elsewhere", {"mask": ROWS.bool().to("meta")}, ValueError, "mask.*cpu.*meta"),
    ("labels float", {"labels": ROWS}, TypeError, "labels.*integer.*float32"),
    (
        "labels bool",
        {"labels": ROWS.bool()},
        TypeError,
        "labels.*int8 to int64 or uint8 to uint64.*torch.bool",
    ),
    ("labels of the wrong shape", {"labels": ROWS.long().T}, ValueError, r"labels.*\(2, 3\).*\(3, 2\)"),
    (
        "labels shifted by hand",
        {"labels": ROWS[:, 1:].long(), "shift": True},
        ValueError,
        r"labels.*\(2, 2\)",
    ),
    ("ignore_index float", {"ignore_index": -100.0}, TypeError, "ignore_index.*int.*float"),
    ("weight int", {"weight": ROWS.long()}, TypeError, "weight.*floating.*int64"),
    ("weight a float", {"weight": 0.5}, TypeError, "weight.*tensor.*float"),
    ("weight of the wrong shape", {"weight": ROWS[:1]}, ValueError, r"weight.*\(2, 3\).*\(1, 3\)"),
    (
        "shift of 2-D",
        {"shift": True, "student_logits": S[0], "teacher_logits": T[0]},
        ValueError,
        "shift.*batch",
    ),
    (
        "shift of no time",
        {"shift": True, "student_logits": S[:, :0], "teacher_logits": T[:, :0]},
        ValueError,
        "shift",
    ),
    ("shift an int", {"shift": 1}, TypeError, "shift.*True or False"),
    ("reduction unknown", {"reduction": "avg"}, ValueError, "reduction.*'mean'.*'avg'"),
    ("reduction None", {"reduction": None}, TypeError, "reduction.*string.*NoneType"),
    ("normalizer with sum", {"normalizer": 2.0, "reduction": "sum"}, ValueError, "normalizer.*mean.*sum"),
    ("normalizer 0", {"normalizer": 0}, ValueError, "normalizer.*> 0.*0"),
    ("normalizer NaN", {"normalizer": NAN}, ValueError, "normalizer.*nan"),
    ("normalizer of two", {"normalizer": torch.ones(2)}, ValueError, r"normalizer.*one element.*\(2,\)"),
    ("normalizer bool", {"normalizer": True}, TypeError, "normalizer.*bool"),
    ("normalizer a tensor below 0", {"normalizer": torch.tensor(-3)}, ValueError, "normalizer.*> 0.*-3"),
    ("normalizer a tensor of NaN", {"normalizer": torch.tensor(NAN)}, ValueError, "normalizer.*> 0.*nan"),
    ("normalizer a tensor of inf", {"normalizer": torch.tensor(INF)}, ValueError, "normalizer.*> 0.*inf"),
    ("normalizer too small", {"normalizer": 1e-300}, ValueError, "normalizer.*at least 1e-20.*1e-300"),
    (
        "normalizer too small, weighted",
        {"normalizer": 1e-300, "weight": ROWS},
        ValueError,
        "normalizer.*at least 1e-20.*1e-300",
    ),
    (
        "normalizer a tensor too small",
        {"normalizer": torch.tensor(1e-300, dtype=torch.float64)},
        ValueError,
        "normalizer.*at least 1e-20.*1e-300",
    ),
    ("normalizer past a float", {"normalizer": 10**400}, ValueError, "normalizer.*finite.*10000"),
    ("normalizer past it below 0", {"normalizer": -(10**400)}, ValueError, "normalizer.*finite.*-10000"),
    ("temperature past a float", {"temperature": 10**400}, ValueError, "^temperature.*10000"),
    ("temperature past it below 0", {"temperature": -(10**400)}, ValueError, "^temperature.*-10000"),
    (
        "teacher_temperature past a float",
        {"teacher_temperature": 10**400},
        ValueError,
        "^teacher_temp.*10000",
    ),
    ("beta past a float", {"kind": "js", "beta": 10**400}, ValueError, "^beta.*10000"),
    ("normalizer a tensor of 0", {"normalizer": torch.tensor(0)}, ValueError, "normalizer.*0.*no row counts"),
    (
        "normalizer a tensor of 0 and some rows",
        {"normalizer": torch.tensor(0.0), "mask": ROWS.cumsum(-1) == 2},
        ValueError,
        "normalizer.*0.*no row counts",
    ),
    ("normalizer a string", {"normalizer": "7"}, TypeError, "normalizer.*str"),
    ("inplace an int", {"inplace": 1}, TypeError, "inplace.*True or False"),
    ("backend unknown", {"backend": "cuda"}, ValueError, "backend.*triton.*eager.*cuda"),
    ("backend an int", {"backend": 1}, TypeError, "backend.*string.*int"),
    ("kind unknown", {"kind": "kl"}, ValueError, "kind.*forward_kl.*'kl'"),
    ("kind None", {"kind": None}, TypeError, "kind.*string"),
    ("beta where there is none", {"beta": 0.5}, ValueError, "beta.*forward_kl.*0.5"),
]


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a kernel was started")

    for name in ("value", "divergence", "value_and_gradient"):
        monkeypatch.setattr(ops, name, refuse)


@pytest.mark.parametrize(("arguments", "error", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_refused(no_kernel: None, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"student_logits": S, "teacher_logits": T} | arguments
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        kl_gpu.divergence(**call)


IDS = ROWS.long()
ONE_SIDE: dict[str, Callable[..., Any]] = {
    "token_logprobs": lambda **options: kl_gpu.token_logprobs(S, IDS, **options),
    "topk_div": lambda **options: kl_gpu.topk_div(
        S, torch.zeros(2, 3, 2), torch.tensor([0, 1]).expand(2, 3, 2), tail="renormalize", **options
    ),
    "linear_token_logprobs": lambda **options: kl_gpu.linear_token_logprobs(
        S, torch.ones(5, 8), IDS, **options
    ),
    "linear_topk_div": lambda **options: kl_gpu.linear_topk_div(
        S, torch.ones(5, 8), torch.zeros(2, 3, 2), torch.tensor([0, 1]).expand(2, 3, 2), tail="renormalize",
        **options,
    ),
}  # fmt: skip
TWO_SIDES: dict[str, Callable[..., Any]] = {
    "token_stats": lambda **options: kl_gpu.token_stats(S, T, **options),
    "linear_div": lambda **options: kl_gpu.linear_div(S, torch.ones(5, 8), T, torch.ones(5, 8), **options),
    "linear_token_stats": lambda **options: kl_gpu.linear_token_stats(
        S, torch.ones(5, 8), T, torch.ones(5, 8), **options
    ),
}
ENTRIES = ONE_SIDE | TWO_SIDES


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("value", [0.0, 9.9e-7, 1.1e9, NAN, 10**400, -(10**400)], ids=lambda x: str(x)[:8])
def test_temperatures_outside_the_range_are_refused_by_every_entry(entry: str, value: float) -> None:
    for argument in ("temperature", "teacher_temperature")[: 2 if entry in TWO_SIDES else 1]:
        with pytest.raises(ValueError, match=rf"^{argument} must be a number > 0, within \[1e-06, 1e\+09\]"):
            ENTRIES[entry](**{argument: value})
    ENTRIES[entry](temperature=1e-6)
    ENTRIES[entry](temperature=1e9)


@pytest.mark.parametrize("value", [1e-300, 0, 10**400, -(10**400), NAN], ids=lambda x: str(x)[:8])
def test_normalizers_that_divide_by_nothing_are_refused_by_every_entry(value: float) -> None:
    for name in ("topk_div", "linear_div", "linear_topk_div"):
        for options in ({}, {"weight": ROWS}, {"reduction": "mean"}):
            with pytest.raises(ValueError, match=r"^normalizer must be a"):
                ENTRIES[name](normalizer=value, **options)
    for call in (kl_gpu.kl_div, kl_gpu.js_div):
        for student in (S, S.clone().requires_grad_()):
            with pytest.raises(ValueError, match=r"^normalizer must be a"):
                call(student, T, normalizer=value)
            assert call(student, T, normalizer=1e-20, t_squared=True, temperature=1e9).isfinite()


def test_numbers_past_a_float_are_refused_by_name() -> None:
    for call in (
        lambda: kl_gpu.kl_penalty(ROWS, ROWS, "k1", clamp=10**400),
        lambda: ENTRIES["linear_div"](softcap=10**400),
        lambda: ENTRIES["linear_div"](teacher_logit_scale=10**400),
        lambda: kl_gpu.topk_logprobs(S, 1, temperature=10**400),
    ):
        with pytest.raises(ValueError, match=r"^(clamp|softcap|teacher_logit_scale|temperature) must be"):
            call()


def _nested(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():  # of nested tensors being a prototype
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.zeros(2, 8), torch.zeros(3, 8)], layout=layout)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_by_name(no_kernel: None, layout: torch.layout) -> None:
    nested = _nested(layout)
    logprobs = torch.zeros(2, 3, 2)
    ids = torch.tensor([0, 1]).expand(2, 3, 2)
    heads = torch.ones(5, 8)
    calls: dict[str, Callable[[], Any]] = {
        "student_logits": lambda: kl_gpu.kl_div(nested, nested),
        "teacher_logits": lambda: kl_gpu.token_stats(S, nested),
        "mask": lambda: kl_gpu.kl_div(S, T, mask=nested),
        "labels": lambda: kl_gpu.token_stats(S, T, nested),
        "weight": lambda: kl_gpu.linear_div(S, heads, T, heads, weight=nested),
        "normalizer": lambda: kl_gpu.kl_div(S, T, normalizer=nested),
        "logits": lambda: kl_gpu.token_logprobs(nested, IDS),
        "token_ids": lambda: kl_gpu.token_logprobs(S, nested),
        "teacher_ids": lambda: kl_gpu.topk_div(S, logprobs, nested),
        "teacher_logprobs": lambda: kl_gpu.topk_div(S, nested, ids),
        "teacher_tail_logprob": lambda: kl_gpu.topk_div(S, logprobs, ids, teacher_tail_logprob=nested),
        "student_hidden": lambda: kl_gpu.linear_div(nested, heads, T, heads),
        "teacher_weight": lambda: kl_gpu.linear_div(S, heads, T, nested),
        "policy_logprobs": lambda: kl_gpu.kl_penalty(nested, nested, "k1"),
    }
    for argument, call in calls.items():
        with pytest.raises(TypeError, match=f"^{argument} must be a dense tensor, got a nested one"):
            call()


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_good_call_does_reach_a_kernel(no_kernel: None, options: dict, requires_grad: bool) -> None:
    with pytest.raises(AssertionError, match="started"):
        kl_gpu.divergence(S.clone().requires_grad_(requires_grad), T, **options)


@pytest.mark.parametrize(
    ("direction", "error"),
    [("both", ValueError), ("forward_kl", ValueError), (None, TypeError), (1, TypeError)],
)
def test_direction(no_kernel: None, direction: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="direction"):
        kl_gpu.kl_div(S, T, direction=direction)


def test_a_near_miss_is_told_what_was_meant(no_kernel: None) -> None:
    ids = torch.arange(2).expand(len(S), 2)
    calls: list[tuple[str, Any]] = [
        ("direction must be one of 'forward', 'reverse', got 'reverse_kl'; did you mean 'reverse'?",
         lambda: kl_gpu.kl_div(S, T, "reverse_kl")),
        ("reduction must be .*, got 'batch_mean'; did you mean 'batchmean'?",
         lambda: kl_gpu.kl_div(S, T, reduction="batch_mean")),
        ("temperature != 1 needs tail='renormalize': .*; got temperature=2.0 with tail='bucket'",
         lambda: kl_gpu.topk_div(S, T[..., :2], ids, temperature=2.0)),
        ("temperature != 1 needs tail='renormalize', got temperature=2.0",
         lambda: kl_gpu.sparse_div(T[..., :2], ids, T[..., :2], ids, temperature=2.0)),
        ("kind must be .*, got 'zzz'$", lambda: kl_gpu.divergence(S, T, "zzz")),
    ]  # fmt: skip
    for message, call in calls:
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            call()
    # What belongs elsewhere and stands third, as a mask would in other libraries.
    with pytest.raises(TypeError, match=r"direction must be a string, got a tensor of torch\.bool"):
        kl_gpu.kl_div(S, T, torch.ones(2, dtype=torch.bool))


def test_unknown_option(no_kernel: None) -> None:
    with pytest.raises(TypeError, match="reduce"):
        kl_gpu.kl_div(S, T, reduce=True)


def _leaf() -> torch.Tensor:
    return torch.zeros(2, 8, requires_grad=True)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (_leaf, "leaf"),
        (lambda: _leaf()[:, :6], "leaf"),
        (lambda: (_leaf() * 1)[:1].expand(2, 8), "expanded"),
        (lambda: (torch.zeros(8, 2, requires_grad=True) * 1).T, "contiguous last dimension"),
    ],
)
def test_inplace_refused(no_kernel: None, student: Callable[[], torch.Tensor], message: str) -> None:
    logits = student()
    with pytest.raises(ValueError, match=f"inplace.*{message}"):
        kl_gpu.kl_div(logits, torch.zeros_like(logits), inplace=True)


def test_inplace_refused_where_the_teacher_shares_the_memory(no_kernel: None) -> None:
    both = torch.zeros(2, 2, 8, requires_grad=True) * 1
    with pytest.raises(ValueError, match=r"inplace.*teacher_logits"):
        kl_gpu.kl_div(both[0], both[1], inplace=True)


def test_triton_refused_on_cpu_tensors_without_the_interpreter(
    no_kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"backend='triton'.*cpu.*TRITON_INTERPRET"):
        kl_gpu.kl_div(S, T, backend="triton")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_student_and_teacher_on_two_devices(no_kernel: None) -> None:
    with pytest.raises(ValueError, match=r"one device.*cpu.*cuda"):
        kl_gpu.kl_div(S, T.cuda())

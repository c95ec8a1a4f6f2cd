"""Every refusal of linear_div: the right exception, naming the argument, before any work starts."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import kl_gpu
from kl_gpu.linear import op

H, W, B = torch.zeros(2, 3, 4), torch.ones(8, 4), torch.ones(8)
GOOD = {"student_hidden": H, "student_weight": W, "teacher_hidden": H[..., :2], "teacher_weight": W[:, :2]}

# (what is wrong, arguments that replace the good ones, exception, what the message must name)
CASES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("hidden a list", {"student_hidden": [0.0]}, TypeError, "student_hidden.*tensor.*list"),
    ("weight None", {"teacher_weight": None}, TypeError, "teacher_weight.*tensor.*NoneType"),
    ("integer weight", {"student_weight": W.long()}, TypeError, "student_weight.*float16.*int64"),
    ("two dtypes on a side", {"student_weight": W.half()}, TypeError, "student_weight.*float32.*float16"),
    ("bias of another dtype", {"student_bias": B.double()}, TypeError, "student_bias.*float32.*float64"),
    ("0-d hidden", {"student_hidden": H[0, 0, 0]}, ValueError, r"student_hidden.*\[N, H\].*\(\)"),
    ("1-d weight", {"student_weight": W[0]}, ValueError, r"student_weight.*\[V, H\].*\(4,\)"),
    ("weight the other way", {"student_weight": W.T}, ValueError, r"student_weight.*\[V, 4\].*\(4, 8\)"),
    ("another H", {"teacher_weight": W}, ValueError, r"teacher_weight.*2 columns.*\(8, 4\)"),
    ("no columns", {"teacher_weight": W[:0, :2]}, ValueError, r"teacher_weight.*\(0, 2\)"),
    ("bias of another V", {"teacher_bias": B[:7]}, ValueError, r"teacher_bias.*\[8\].*\[7\]"),
    ("bias of two dimensions", {"student_bias": W}, ValueError, r"student_bias.*\[V\].*\(8, 4\)"),
    ("another N", {"teacher_hidden": H[:1, :, :2]}, ValueError, r"leading shape.*\(2, 3, 4\).*\(1, 3, 2\)"),
    ("weight elsewhere", {"student_weight": W.to("meta")}, ValueError, "student_weight.*cpu.*meta"),
    (
        "teacher elsewhere",
        {"teacher_hidden": H[..., :2].to("meta"), "teacher_weight": W[:, :2].to("meta")},
        ValueError,
        "one device.*cpu.*meta",
    ),
    (
        "V differs",
        {"teacher_weight": W[:7, :2]},
        ValueError,
        "vocab_size.*student_weight.*8.*teacher_weight 7",
    ),
    ("vocab_size past V", {"vocab_size": 9}, ValueError, r"vocab_size.*\[1, 8\].*9"),
    ("softcap below 0", {"softcap": -1.0}, ValueError, "softcap.*> 0.*-1.0"),
    ("softcap a tensor", {"softcap": torch.ones(())}, TypeError, "softcap.*number.*tensor"),
    ("teacher_softcap NaN", {"teacher_softcap": float("nan")}, ValueError, "teacher_softcap.*nan"),
    ("logit_scale negative", {"logit_scale": -1.0}, ValueError, "logit_scale.*> 0.*-1.0"),
    ("logit_scale None", {"logit_scale": None}, TypeError, "logit_scale.*NoneType"),
    (
        "scale and temperature",
        {"teacher_logit_scale": 1e-5, "temperature": 1e5},
        ValueError,
        r"temperature over teacher_logit_scale.*1e-06.*100000\.0 over 1e-05",
    ),
    (
        "temperature of the products below the floor",
        {"logit_scale": 3.0, "temperature": 2e-6},
        ValueError,
        r"temperature over logit_scale.*1e-06.*2e-06 over 3\.0",
    ),
    ("chunk_rows 0", {"chunk_rows": 0}, ValueError, "chunk_rows.*at least 1.*0"),
    ("chunk_rows a float", {"chunk_rows": 8.0}, TypeError, "chunk_rows.*int.*float"),
    ("chunk_rows a bool", {"chunk_rows": True}, TypeError, "chunk_rows.*bool"),
    ("mask of the wrong shape", {"mask": torch.ones(3).bool()}, ValueError, r"mask.*\(2, 3\).*\(3,\)"),
    (
        "shift of 2-D",
        {"shift": True, "student_hidden": H[0], "teacher_hidden": H[0, :, :2]},
        ValueError,
        "shift.*batch",
    ),
    ("normalizer with sum", {"normalizer": 2.0, "reduction": "sum"}, ValueError, "normalizer.*mean.*sum"),
    ("t_squared with two", {"t_squared": True, "teacher_temperature": 2.0}, ValueError, "t_squared"),
    ("t_squared an int", {"t_squared": 1}, TypeError, "t_squared.*True or False.*int"),
    ("temperature 0", {"temperature": 0.0}, ValueError, "temperature.*> 0.*0.0"),
    ("reduction unknown", {"reduction": "avg"}, ValueError, "reduction.*'mean'.*'avg'"),
    ("kind unknown", {"kind": "kl"}, ValueError, "kind.*forward_kl.*'kl'"),
    ("beta where there is none", {"beta": 0.5}, ValueError, "beta.*forward_kl.*0.5"),
    ("backend unknown", {"backend": "cuda"}, ValueError, "backend.*triton.*eager.*cuda"),
    ("inplace", {"inplace": True}, TypeError, "inplace"),
    *(
        (f"{name} requires a gradient", {name: x.clone().requires_grad_()}, ValueError, f"{name}.*detach")
        for name, x in (("teacher_hidden", H[..., :2]), ("teacher_weight", W[:, :2]), ("teacher_bias", B))
    ),
]


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("work was started")

    monkeypatch.setattr(op, "linear", refuse)


@pytest.mark.parametrize(("arguments", "error", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_refused(no_work: None, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        kl_gpu.linear_div(**GOOD | arguments)


def test_the_good_call_does_start(no_work: None) -> None:
    with pytest.raises(AssertionError, match="started"):
        kl_gpu.linear_div(**GOOD)


def test_under_autocast_dtypes_of_a_side_may_differ_but_for_float64() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert kl_gpu.linear_div(**GOOD | {"student_weight": W.half()}).dtype == torch.float32
        with pytest.raises(TypeError, match=r"student_weight.*float32.*float64"):
            kl_gpu.linear_div(**GOOD | {"student_weight": W.double()})


def test_a_teacher_that_requires_a_gradient_is_fine_where_none_is_asked_for() -> None:
    teacher = GOOD["teacher_weight"].clone().requires_grad_()
    with torch.no_grad():
        kl_gpu.linear_div(**GOOD | {"teacher_weight": teacher})

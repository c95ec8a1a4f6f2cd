"""Every refusal of the entries that know one head, or no gradient: named, and before any work starts."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import kl_gpu
from kl_gpu.linear import op, split, stats

H, W, B = torch.zeros(2, 3, 4), torch.ones(8, 4), torch.ones(8)
IDS = torch.zeros(2, 3, dtype=torch.int64)
LOGPROBS, TOP = torch.full((2, 3, 2), -1.0), torch.tensor([0, 1]).expand(2, 3, 2)
LABELS = torch.zeros(2, 3, dtype=torch.int64)

GOOD: dict[str, dict[str, Any]] = {
    "linear_token_logprobs": {"hidden": H, "weight": W, "token_ids": IDS},
    "linear_topk_div": {
        "student_hidden": H, "student_weight": W, "teacher_logprobs": LOGPROBS, "teacher_ids": TOP,
    },
    "linear_token_stats": {
        "student_hidden": H, "student_weight": W, "teacher_hidden": H[..., :2], "teacher_weight": W[:, :2],
    },
}  # fmt: skip
NAN = float("nan")

# (what is wrong, what replaces the good arguments, exception, what the message must name); of the argument
# names the first has no side, see `_named`.
OF_A_HEAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("hidden a list", {"hidden": [0.0]}, TypeError, "hidden.*tensor.*list"),
    ("weight None", {"weight": None}, TypeError, "weight.*tensor.*NoneType"),
    ("integer weight", {"weight": W.long()}, TypeError, "weight.*float16.*int64"),
    ("two dtypes", {"weight": W.half()}, TypeError, "weight.*float32.*float16"),
    ("bias of another dtype", {"bias": B.double()}, TypeError, "bias.*float32.*float64"),
    ("0-d hidden", {"hidden": H[0, 0, 0]}, ValueError, r"hidden.*\[N, H\].*\(\)"),
    ("1-d weight", {"weight": W[0]}, ValueError, r"weight.*\[V, H\].*\(4,\)"),
    ("weight the other way", {"weight": W.T}, ValueError, r"weight.*\[V, 4\].*\(4, 8\)"),
    ("no columns", {"weight": W[:0]}, ValueError, r"weight.*\(0, 4\)"),
    ("bias of another V", {"bias": B[:7]}, ValueError, r"bias.*\[8\].*\[7\]"),
    ("bias of two dimensions", {"bias": W}, ValueError, r"bias.*\[V\].*\(8, 4\)"),
    ("bias a number", {"bias": 1.0}, TypeError, "bias.*tensor.*float"),
    ("weight elsewhere", {"weight": W.to("meta")}, ValueError, "weight.*cpu.*meta"),
    ("vocab_size past V", {"vocab_size": 9}, ValueError, r"vocab_size.*\[1, 8\].*9"),
    ("vocab_size 0", {"vocab_size": 0}, ValueError, r"vocab_size.*\[1, 8\].*0"),
    ("softcap negative", {"softcap": -1.0}, ValueError, "softcap.*> 0.*-1.0"),
    ("softcap a tensor", {"softcap": torch.ones(())}, TypeError, "softcap.*number.*tensor"),
    ("softcap NaN", {"softcap": NAN}, ValueError, "softcap.*nan"),
    ("logit_scale negative", {"logit_scale": -1.0}, ValueError, "logit_scale.*> 0.*-1.0"),
    ("logit_scale None", {"logit_scale": None}, TypeError, "logit_scale.*NoneType"),
    (
        "temperature of the products below the floor",
        {"logit_scale": 3.0, "temperature": 1e-6},
        ValueError,
        r"temperature.*1e-06",
    ),
    ("chunk_rows 0", {"chunk_rows": 0}, ValueError, "chunk_rows.*at least 1.*0"),
    ("chunk_rows a float", {"chunk_rows": 8.0}, TypeError, "chunk_rows.*int.*float"),
    ("chunk_rows a bool", {"chunk_rows": True}, TypeError, "chunk_rows.*bool"),
    ("mask of the wrong shape", {"mask": torch.ones(3).bool()}, ValueError, r"mask.*\(2, 3\).*\(3,\)"),
    ("shift of 2-D", {"shift": True, "hidden": H[0]}, ValueError, "shift.*batch"),
    ("shift an int", {"shift": 1}, TypeError, "shift.*True or False.*int"),
    ("temperature 0", {"temperature": 0.0}, ValueError, "temperature.*> 0.*0.0"),
    ("temperature a string", {"temperature": "1"}, TypeError, "temperature.*str"),
    ("backend unknown", {"backend": "cuda"}, ValueError, "backend.*triton.*eager.*cuda"),
    ("inplace", {"inplace": True}, TypeError, "inplace"),
]
OF_ONE: list[tuple[str, str, dict[str, Any], type[Exception], str]] = [
    ("linear_token_logprobs", "ids None", {"token_ids": None}, TypeError, "token_ids.*NoneType"),
    ("linear_token_logprobs", "float ids", {"token_ids": IDS.float()}, TypeError, "token_ids.*float32"),
    ("linear_token_logprobs", "ids of another N", {"token_ids": IDS[0]}, ValueError, r"token_ids.*\(2, 3\)"),
    ("linear_token_logprobs", "entropy an int", {"entropy": 1}, TypeError, "entropy.*True or False.*int"),
    ("linear_topk_div", "kind unknown", {"kind": "kl"}, ValueError, "kind.*forward_kl.*'kl'"),
    ("linear_topk_div", "kind of another tail",
     {"kind": "js", "tail": "truncate"}, ValueError, "kind.*truncate"),
    ("linear_topk_div", "tail unknown", {"tail": "rest"}, ValueError, "tail.*bucket.*'rest'"),
    ("linear_topk_div", "temperature", {"temperature": 2.0}, ValueError, "temperature.*renormalize.*2.0"),
    ("linear_topk_div", "logprobs of another K",
     {"teacher_logprobs": LOGPROBS[..., :1]}, ValueError, "teacher_"),
    ("linear_topk_div", "ids of another N", {"teacher_ids": TOP[0]}, ValueError, "teacher_"),
    ("linear_topk_div", "float ids", {"teacher_ids": TOP.float()}, TypeError, "teacher_ids.*float32"),
    (
        "linear_topk_div", "logprobs that ask for a gradient",
        {"teacher_logprobs": LOGPROBS.clone().requires_grad_()}, ValueError, "teacher_logprobs.*detach",
    ),
    ("linear_topk_div", "rest of renormalize",
     {"teacher_tail_logprob": LOGPROBS[..., 0], "tail": "renormalize"}, ValueError, "teacher_tail_logprob"),
    ("linear_topk_div", "reduction unknown", {"reduction": "avg"}, ValueError, "reduction.*'mean'.*'avg'"),
    ("linear_topk_div", "normalizer with sum",
     {"normalizer": 2.0, "reduction": "sum"}, ValueError, "normalizer"),
    ("linear_topk_div", "return_mass an int", {"return_mass": 1}, TypeError, "return_mass.*int"),
    ("linear_topk_div", "validate an int", {"validate": 1}, TypeError, "validate.*int"),
    ("linear_topk_div", "beta where there is none", {"beta": 0.5}, ValueError, "beta.*forward_kl.*0.5"),
    ("linear_token_stats", "another H",
     {"teacher_weight": W}, ValueError, r"teacher_weight.*2 columns.*\(8, 4\)"),
    ("linear_token_stats", "another N",
     {"teacher_hidden": H[:1, :, :2]}, ValueError, r"leading shape.*\(1, 3, 2\)"),
    ("linear_token_stats", "teacher elsewhere",
     {"teacher_hidden": H[..., :2].to("meta"), "teacher_weight": W[:, :2].to("meta")}, ValueError,
     "one device.*cpu.*meta"),
    ("linear_token_stats", "V differs", {"teacher_weight": W[:7, :2]}, ValueError,
     "vocab_size.*student_weight.*8.*teacher_weight 7"),
    ("linear_token_stats", "shift of 2-D",
     {"shift": True, "student_hidden": H[0], "teacher_hidden": H[0, :, :2]},
     ValueError, "shift.*batch"),
    ("linear_token_stats", "labels of floats", {"labels": LABELS.float()}, TypeError, "labels.*float32"),
    ("linear_token_stats", "labels of another N", {"labels": LABELS[0]}, ValueError, r"labels.*\(2, 3\)"),
    ("linear_token_stats", "a label outside", {"labels": LABELS + 8}, ValueError, "labels.*8"),
    ("linear_token_stats", "teacher_softcap", {"teacher_softcap": NAN}, ValueError, "teacher_softcap.*nan"),
    ("linear_token_stats", "teacher_temperature",
     {"teacher_temperature": -1.0}, ValueError, "teacher_temp.*-1.0"),
    ("linear_token_stats", "reduction", {"reduction": "mean"}, TypeError, "reduction"),
]  # fmt: skip


def _named(entry: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """As the entry calls its student's tensors."""
    side = "" if entry == "linear_token_logprobs" else "student_"
    return {f"{side}{x}" if x in ("hidden", "weight", "bias") else x: arguments[x] for x in arguments}


CASES = [
    (entry, what, _named(entry, arguments), error, message)
    for entry in GOOD
    for what, arguments, error, message in OF_A_HEAD
    if (entry, what) != ("linear_token_stats", "shift of 2-D")
] + OF_ONE


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("work was started")

    for module, name in ((op, "linear"), (split, "_split"), (split, "_gradient"), (stats, "fields_of_heads")):
        monkeypatch.setattr(module, name, refuse)


@pytest.mark.parametrize(
    ("entry", "arguments", "error", "message"),
    [(c[0], *c[2:]) for c in CASES],
    ids=[f"{c[0]}, {c[1]}" for c in CASES],
)
def test_refused(
    no_work: None, entry: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        getattr(kl_gpu, entry)(**GOOD[entry] | arguments)


@pytest.mark.parametrize("entry", GOOD)
def test_the_good_call_does_start(no_work: None, entry: str) -> None:
    with pytest.raises(AssertionError, match="started"):
        getattr(kl_gpu, entry)(**GOOD[entry])


@pytest.mark.parametrize("outside", [8, -1])
def test_ids_outside_are_refused_on_the_cpu(outside: int) -> None:
    with pytest.raises(ValueError, match=rf"token_ids.*\[0, 8\).*{outside}"):
        kl_gpu.linear_token_logprobs(H, W, IDS + outside)
    with pytest.raises(ValueError, match=rf"token_ids.*\[0, 5\).*{7}"):
        kl_gpu.linear_token_logprobs(H, W, IDS + 7, vocab_size=5)
    # Of a teacher's ids −1 is one that is not there.
    with pytest.raises(ValueError, match=rf"teacher_ids.*{8 if outside > 0 else -2}"):
        kl_gpu.linear_topk_div(H, W, LOGPROBS, TOP + (outside if outside > 0 else -2), tail="renormalize")
    # A row that does not count may hold any.
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert (kl_gpu.linear_token_logprobs(H, W, IDS + outside, mask=mask) == 0).all()


def test_under_autocast_dtypes_of_a_side_may_differ_but_for_float64() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert kl_gpu.linear_token_logprobs(H, W.half(), IDS).dtype == torch.float32
        with pytest.raises(TypeError, match=r"weight.*float32.*float64"):
            kl_gpu.linear_token_logprobs(H, W.double(), IDS)

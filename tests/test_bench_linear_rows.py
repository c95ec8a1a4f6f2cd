"""`python -m bench linear-rows`: every entry is timed beside its products, and checked in float64."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

SIZES = ["--rows", "12", "--hidden", "8", "--columns", "90", "--k", "4", "--repeats", "2", "--checked", "5"]


@pytest.fixture
def bench() -> Any:
    return pytest.importorskip("bench.__main__").main


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_every_entry_beside_its_products(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setitem(sys.modules, "trl.kernels", None)
    file = tmp_path / "new" / "rows.json"
    only = ["--threads", "1", "--dtype", "fp32", "--memory-rows", "24", "--json", str(file)]
    assert bench(["linear-rows", *SIZES, *only]) == 0
    record = json.loads(file.read_text())
    assert "trl" in record["left_out"]
    timed = [row for row in record["found"] if "ms" in row]
    assert [row["entry"] for row in timed] == list(importlib.import_module("bench.linear_rows").ENTRIES)
    for row in timed:
        assert min(row["ms"], row["of_products"], row["cpu_of_products"], row["peak_extra_bytes"]) > 0
        assert 0 < row["value_error"] < 1e-4
    assert all(0 < row["hidden_gradient_error"] < 1e-5 for row in timed[:2])
    assert [row["rows"] for row in record["found"] if "ms" not in row] == [24] * 3
    assert "× the products" in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
def test_trl_takes_turns_where_it_is_installed(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its function by its signature; what it needs of DeepSpeed is not there, and not missed."""

    class Function:
        @staticmethod
        def apply(
            hidden: Tensor, weight: Tensor, bias: None, ids: Tensor, temperature: float, tile: int,
            cap: None, scale: float, outputs: tuple[str, ...],
        ) -> tuple[Tensor | None, ...]:  # fmt: skip
            assert (bias, temperature, cap, scale, outputs) == (None, 1.0, None, 1.0, ("entropy",))
            from trl.trainer.utils import maybe_gather_lm_head_ctx

            with maybe_gather_lm_head_ctx(weight, bias):
                log_q = (hidden @ weight.t()).float().log_softmax(-1)
            # Off by a tenth, for the check to find.
            return 1.1 * log_q.gather(1, ids[:, None])[:, 0], -(log_q.exp() * log_q).sum(-1), None, None, None

    library, kernels = ModuleType("trl"), ModuleType("trl.kernels")
    kernels.ChunkedLogProbFunction = Function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trl", library)
    monkeypatch.setitem(sys.modules, "trl.kernels", kernels)
    monkeypatch.delitem(sys.modules, "trl.trainer.utils", raising=False)
    baselines = importlib.import_module("bench.harness.baselines")
    monkeypatch.setattr(baselines, "version", lambda package: "1.16.0")
    file = tmp_path / "rows.json"
    only = ["--threads", "1", "--dtype", "fp32", "--entry", "linear_token_logprobs", "--json", str(file)]
    try:
        assert bench(["linear-rows", *SIZES, *only]) == 0
    finally:
        sys.modules.pop("trl.trainer.utils", None)
    record = json.loads(file.read_text())
    assert record["trl"] == "1.16.0"
    errors = {row["contestant"]: row["value_error"] for row in record["found"]}
    assert errors["trl"] == pytest.approx(0.1, rel=1e-2)
    assert errors["kl_gpu"] < 1e-4

"""`python -m bench suite` at a tiny size: it ends, its JSON is complete, and its figures agree."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kl_gpu

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).parents[1]
PASSES = {"value": 2, "value_grad": 3, "forward_backward": 5}
ITEMSIZE = {"fp32": 4, "bf16": 2}
ROWS, VOCAB = 6, 1000
TINY = ["--device", "cpu", "--rows", str(ROWS), "--vocab", str(VOCAB), "--repeats", "2"]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", "suite", *arguments]
    # One thread: no figure matters here, and it does not wait for cores that other tests are using.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The terminal's text and the JSON of one run."""
    out = tmp_path_factory.mktemp("bench")
    done = bench(*TINY, "--systems", "kl_gpu", "torch", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.iterdir()
    assert file.suffixes == [".json"]  # and not .partial.json
    return done.stdout, json.loads(file.read_text())


def test_json_is_complete(run: tuple[str, dict[str, Any]]) -> None:
    _, report = run
    assert list(report) == ["device", "date", "torch", "triton", "driver", "copy_gbps", "rows"]
    assert report["torch"] == torch.__version__
    assert report["driver"] is None
    cases = {(row["system"], row["kind"], row["work"], row["dtype"]) for row in report["rows"]}
    assert cases == {
        (system, kind, work, dtype)
        for system in ("kl_gpu", "torch")
        for kind in ("forward_kl", "reverse_kl")
        for work in PASSES
        for dtype in ITEMSIZE
    }
    assert len(report["rows"]) == len(cases)
    for row in report["rows"]:
        assert list(row) == [
            *("system", "kind", "work", "dtype", "N", "V", "ms", "bytes", "gbps", "share_of_copy"),
            *("peak_extra_bytes", "max_rel_error"),
        ]
        assert (row["N"], row["V"]) == (ROWS, VOCAB)


def test_json_is_honest(run: tuple[str, dict[str, Any]]) -> None:
    _, report = run
    for row in report["rows"]:
        tensor = ROWS * VOCAB * ITEMSIZE[row["dtype"]]
        assert row["bytes"] == PASSES[row["work"]] * tensor
        assert row["gbps"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
        assert 0 < row["gbps"] / row["share_of_copy"] <= report["copy_gbps"] * (1 + 1e-9)
        # The gradient is part of the peak; plain PyTorch holds at least both log-softmaxes in fp32 beside.
        floor = 0 if row["work"] == "value" else tensor
        if row["system"] == "torch":
            floor = max(floor, 2 * ROWS * VOCAB * 4)
        assert floor <= row["peak_extra_bytes"] < 100 * tensor
        assert 0 <= row["max_rel_error"] <= (5e-6 if row["system"] == "kl_gpu" else 1e-3)
    # An error of exactly 0 throughout would mean that nothing was compared.
    assert max(row["max_rel_error"] for row in report["rows"]) > 0


def test_table_shows_every_case(run: tuple[str, dict[str, Any]]) -> None:
    shown, report = run
    for row in report["rows"]:
        assert f"{row['kind']} {row['dtype']} N={ROWS} V={VOCAB}" in shown
        assert f"{row['work']} {PASSES[row['work']]}U" in shown


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """The command inside this process. `bench` is not installed, so it is importable only from the root."""
    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda *arguments: importlib.import_module("bench.__main__").main(["suite", *arguments])
    torch.set_num_threads(threads)


class _TooSteep(torch.autograd.Function):
    """The identity, with a gradient 1 % too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.01


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    p = teacher.log_softmax(-1)
    return (p.exp() * (p - student.log_softmax(-1))).sum(-1)


def stale() -> Callable[[Tensor, Tensor], Tensor]:
    """Returns its first result for ever, as a kernel does that writes nothing into reused memory."""
    first: list[Tensor] = []

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        first.append(plain(student, teacher))
        return first[0]

    return divergence


@pytest.mark.parametrize(
    ("fault", "work", "complaint"),
    [
        (lambda s, t: plain(s, t) * 1.01, "value", "value off by"),
        (lambda s, t: plain(s, t) * float("nan"), "value", "value off by"),
        (lambda s, t: plain(s, t)[:-1], "value", "value of shape"),
        (lambda s, t: torch.cat([plain(s, t)[:-1], plain(s, t)[:1]]), "value", "value off by"),
        (stale(), "value", "value off by"),
        (lambda s, t: plain(_TooSteep.apply(s), t), "value_grad", "gradient off by"),
        (lambda s, t: plain(_TooSteep.apply(s), t), "forward_backward", "gradient off by"),
    ],
    ids=["value", "nan", "shape", "last row", "stale", "gradient of mean", "gradient per row"],
)
def test_wrong_output_stops_the_run(
    fault: Callable[[Tensor, Tensor], Tensor],
    work: str,
    complaint: str,
    main: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(importlib.import_module("bench.harness.systems").PLAIN, "forward_kl", fault)
    only = ["--systems", "torch", "--kind", "forward_kl", "--dtype", "fp32", "--work", work]
    status = main(*TINY, *only, "--out", str(tmp_path))
    assert status == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert f"torch is wrong: {work}, forward_kl fp32 N={ROWS} V={VOCAB}: {complaint}" in shown
    assert all(file.name.endswith(".partial.json") for file in tmp_path.iterdir())


def test_steps_are_timed_in_processes_of_their_own(tmp_path: Path) -> None:
    steps = importlib.import_module("bench.__main__").main
    tiny = ["--rows", "4", "--columns", "300", "--threads", "1", "--dtype", "bf16"]
    few = ["--processes", "1", "--repeats", "1", "--system", "kernel", "kl_div, inplace"]
    assert steps(["steps", *tiny, *few, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["found"]
    assert [row["system"] for row in found] == ["kernel", "kl_div, inplace"]
    assert all(row["ms"] > 0 and row["cpu_ms"] > 0 for row in found)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--device", "tpu9"], "--device: 'tpu9' is not a device"),
        (["--device", "meta"], "--device: 'meta' cannot be timed"),
        (["--device", "cuda:99"], "--device: 'cuda:99': PyTorch sees"),
        (["--vocab", "1"], "--vocab: '1' is not a whole number of at least 2"),
        (["--rows", "0"], "--rows: '0' is not a whole number of at least 1"),
        (["--repeats", "2.5"], "--repeats: '2.5' is not a whole number"),
        (["--dtype", "fp8"], "--dtype: invalid choice: 'fp8'"),
        (["--kind", "kl"], "--kind: invalid choice: 'kl'"),
        (["--work", "backward"], "--work: invalid choice: 'backward'"),
        (["--device", "cpu", "--systems", "torhc"], "--systems: 'torhc' is not one of kl_gpu,"),
        (["--device", "cpu", "--out", __file__], "--out: "),
    ],
)
def test_bad_options(
    arguments: list[str], complaint: str, main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(*arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_accuracy_covers_every_entry_and_kind(shared_folder: Path) -> None:
    pytest.importorskip("filelock")
    accuracy = importlib.import_module("bench.accuracy")
    realistic = importlib.import_module("realistic")
    model = realistic.trained(shared_folder)
    rows = 2 * (len(realistic.CASES) - 1)
    found = accuracy.measure(model, rows, realistic.MODEL_VOCAB, ["eager"], torch.device("cpu"))
    report = accuracy.document(found, {"rows": rows})
    calls = {(worst["entry"], worst["kind"]) for worst in report["worst"]}
    assert {("divergence", kind) for kind in kl_gpu.KINDS} <= calls
    assert {("token_stats", name) for name in kl_gpu.TokenStats._fields[:7]} <= calls
    topk = {f"{tail}, {kind}" for tail, kinds in accuracy.TAIL_KINDS.items() for kind in kinds}
    assert {("topk_div", name) for name in topk} | {("token_logprobs", "entropy")} <= calls
    for worst in report["worst"]:
        assert worst["rows"] > 0
        # Errors of exactly 0 in every number but the agreement would mean that nothing was compared.
        assert (worst["kind"] == "top1_agree") == (worst["share_of_promise"] == 0)
        assert worst["share_of_promise"] < 0.1
    # A fault shows, NaN included.
    for got in (1.1, float("nan")):
        wrong = accuracy.Worst("native", "divergence", "js")
        wrong.add("case", *(torch.tensor([x]).numpy() for x in (abs(got - 1), 1.0, 5e-6)))
        assert not wrong.share_of_promise < 1


@np.errstate(invalid="ignore")
def test_accuracy_loses_no_nan() -> None:
    accuracy, nan, one = importlib.import_module("bench.accuracy"), float("nan"), np.ones(1)
    for errors in ((nan, 1e-7), (1e-7, nan), (1e-7, nan, 1e-3)):
        found = accuracy.Findings()
        for error in errors:
            found.of("native", "divergence", "js").add(f"{error}", error * one, one, 5e-6 * one)
            found.add_by_size("kl_gpu", "js", one, error * one)
        worst = found.of("native", "divergence", "js")
        assert np.isnan([worst.max_rel_error, worst.share_of_promise]).all()
        assert worst.case == "nan"
        (result,) = accuracy.document(found, {})["results"]
        assert np.isnan(result["max_rel_error"])


def test_the_figures_of_the_documentation(tmp_path: Path) -> None:
    """Drawn from the stored results alone; those committed have the same names, and are small."""
    pytest.importorskip("matplotlib")
    from bench.figures import FIGURES, draw

    drawn = draw(tmp_path)
    assert {path.name for path in drawn} == {path.name for path in FIGURES.glob("*.svg")}
    for path in drawn:
        text = path.read_text()
        assert text.count("<path") + text.count("<rect") >= 6, path.name
        assert (FIGURES / path.name).stat().st_size < 100_000

"""The examples, run as a user runs them, on models and text small enough for seconds."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("rich")
image = pytest.importorskip("matplotlib.image")

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXT = Path(json.__file__).parent  # a package of the standard library: real text, and little of it
TINY = ["--text", str(TEXT), "--steps", "12", "--batch", "4", "--sequence", "32", "--device", "cpu"]

Main = Callable[[list[str]], int]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Main]:
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    import distill

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # work this small waits for its threads more than it gains by them
    yield distill.main
    torch.set_num_threads(threads)


def figures(out: Path) -> dict[str, Any]:
    return json.loads((out / "distill.json").read_text())


def numbers(tree: Any) -> Iterator[float]:
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from [value] if isinstance(value, (int, float)) else numbers(value)


def refused(main: Main, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which `arguments` are refused."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert error.startswith("distill.py: error: ")
    return error


def test_distils_and_repeats(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--out", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out.splitlines()
    found = figures(tmp_path / "a")

    runs = found["figures"]
    for run in runs.values():
        assert len(run["curve"]) == run["steps"]
        assert run["held_out"][str(run["steps"])]["perplexity"] < run["held_out"]["0"]["perplexity"]
    assert [run["steps"] for run in runs.values()] == [24, 12, 12]
    alone, distilled = runs["student, labels alone"]["held_out"], runs["student, kl_gpu"]["held_out"]
    assert alone["0"] == distilled["0"]
    assert 0 < distilled["12"]["kl"] < alone["12"]["kl"]
    assert all(math.isfinite(number) for number in numbers(found))

    ours, plain = found["cost"]["kl_gpu"], found["cost"]["PyTorch"]
    logits = 4 * found["setup"]["columns"] * 1024  # bytes: the loss is measured on 1024 tokens
    assert ours["value"] == pytest.approx(plain["value"], rel=1e-4)
    # Beyond the logits at least the gradient, and for the usual way both log_softmaxes too.
    assert ours["peak_bytes"] >= logits
    assert plain["peak_bytes"] >= 3 * 0.9 * logits
    assert min(ours["seconds"], plain["seconds"]) > 0

    plot = tmp_path / "a" / "distill.png"
    assert printed[-1] == str(plot)
    assert image.imread(plot).std() > 0.05

    assert main([*TINY, "--out", str(tmp_path / "b")]) == 0
    assert figures(tmp_path / "b")["figures"] == runs
    assert main([*TINY, "--steps", "1", "--seed", "1", "--out", str(tmp_path / "c")]) == 0
    assert figures(tmp_path / "c")["figures"]["teacher"]["held_out"]["0"] != runs["teacher"]["held_out"]["0"]


def test_fused_loss_is_the_usual_one(main: Main) -> None:
    """And so is its gradient to every parameter: what each trains from there is the optimiser's affair."""
    import _language_models as lm
    from distill import Distillation

    documents, others = lm.read(TEXT)
    tokeniser = lm.trained_tokeniser(documents, 512)
    rows = lm.spread(lm.windows(tokeniser, others, 32), 3)
    # In float64 the two round nowhere near the bounds below.
    teacher, student = (lm.small_llama((32, 1), len(tokeniser), 32, seed).double() for seed in (0, 1))
    teacher.requires_grad_(False)
    found = []
    for fused in (False, True):
        settings = argparse.Namespace(temperature=2.0, backend=None, fused_linear=fused)
        loss = Distillation(settings, teacher).distillation_loss(student, rows)
        found.append([loss, *torch.autograd.grad(loss, list(student.parameters()))])
    for usual, ours in zip(*found, strict=True):
        assert usual.norm() > 0
        assert (ours - usual).norm() <= 1e-10 * usual.norm()


def test_fused_distillation_learns_in_less_memory(main: Main, tmp_path: Path) -> None:
    assert main([*TINY, "--sequence", "64", "--fused-linear", "--out", str(tmp_path)]) == 0
    found = figures(tmp_path)
    held_out = found["figures"]["student, kl_gpu"]["held_out"]
    assert 0 < held_out["12"]["kl"] < held_out["0"]["kl"]
    costs = found["cost"]
    assert costs["kl_gpu, fused"]["value"] == pytest.approx(costs["PyTorch"]["value"], rel=1e-4)
    assert (
        costs["kl_gpu, fused"]["peak_bytes"] < costs["kl_gpu"]["peak_bytes"] < costs["PyTorch"]["peak_bytes"]
    )


def test_windows_hold_all_the_text_and_leave_out_padding(main: Main) -> None:
    import _language_models as lm

    documents, others = lm.read(TEXT)
    tokeniser = lm.trained_tokeniser(documents)
    rows = lm.windows(tokeniser, others, 32)
    assert rows[0, 0] == tokeniser.bos_token_id
    assert (rows[-1] == -100).any()
    real = rows != -100
    assert tokeniser.decode(rows[real], skip_special_tokens=True) == "".join(others)
    assert lm.predicted(rows) == real[:, 1:].sum()
    # A label that is padding counts in no loss, whatever stands in its place.
    model = lm.small_llama((32, 1), len(tokeniser), 32, 0)
    logits = lm.forward(model, rows).logits[:, :-1][real[:, 1:]].log_softmax(-1)
    expected = -logits.gather(-1, rows[:, 1:][real[:, 1:]][:, None]).mean()
    torch.testing.assert_close(lm.label_loss(model, rows), expected)


def test_batches_are_shuffles_without_gaps(main: Main) -> None:
    import _language_models as lm

    rows = torch.arange(5)[:, None]
    found = torch.cat(list(lm.batches(rows, 2, 5, 0))).flatten()
    assert len(found) == 10
    for shuffle in found.split(5):
        assert sorted(shuffle.tolist()) == [0, 1, 2, 3, 4]
    assert found[:5].tolist() != found[5:].tolist()
    again, others = (torch.cat(list(lm.batches(rows, 2, 5, seed))).flatten() for seed in (0, 1))
    assert found.equal(again)
    assert not found.equal(others)


def test_refuses_what_cannot_work(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "word.txt").write_text("word")
    for arguments, reason in [
        (["--text", str(tmp_path / "none")], "no UTF-8 text"),
        (["--text", str(tmp_path / "empty")], "no UTF-8 text"),
        (["--text", str(tmp_path / "word.txt")], "too short"),
        (["--out", str(tmp_path / "word.txt")], "--out: cannot write"),
        (["--device", "abacus"], "--device"),
        (["--backend", "abacus"], "--backend"),
        (["--steps", "0"], "at least 1"),
        (["--steps", "few"], "--steps: invalid"),
        (["--sequence", "1"], "at least 2"),
        (["--temperature", "nan"], "at least 1e-06"),
        (["--seed", "-1"], "at least 0"),
        (["--colour", "red"], "unrecognized arguments"),
    ]:
        assert reason in refused(main, [*TINY, "--out", str(tmp_path / "out"), *arguments], capsys)


@pytest.mark.parametrize("form", ["topk", "hidden", "logits"])
def test_distils_from_a_recording(
    form: str, main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import _language_models as lm
    import distill_offline

    from kl_gpu.compare import Model, cut, record

    torch.manual_seed(0)
    teacher = lm.small_llama((32, 1), 64, 16, 0)
    # Far from a student's even distribution: otherwise there is nothing to learn in a few steps.
    torch.nn.init.normal_(teacher.lm_head.weight, std=0.5)
    windows = cut(torch.randint(64, (6 * 16,)), 16, "all")
    record(Model("teacher", teacher), windows, tmp_path / "teacher", form, k=8)
    lm.small_llama((32, 1), 64, 16, 1).save_pretrained(tmp_path / "student")
    out = tmp_path / "out"
    arguments = [str(tmp_path / "teacher"), str(tmp_path / "student"), "--steps", "60", "--out", str(out)]
    if form == "logits":
        with pytest.raises(SystemExit) as stop:
            distill_offline.main(arguments)
        assert stop.value.code == 2
        assert "error: 'logits' (wanted: a recording --as topk or hidden" in capsys.readouterr().err
        return
    assert distill_offline.main(arguments) == 0
    *steps, last = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[2]) for line in steps]
    assert len(losses) == 60
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])
    assert last == str(out)
    assert (out / "model.safetensors").exists()


# Stands in for an import that takes seconds, and says when it has begun.
SLOW_TORCH = """
import pathlib, time
pathlib.Path(__file__).with_name("begun").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["distill.py", "rlhf_kl.py", "distill_tp.py", "distill_offline.py"])
def test_interrupt_while_imports_take_their_time(name: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(SLOW_TORCH)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(EXAMPLES / name)]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        while not (tmp_path / "begun").exists():
            assert run.poll() is None
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        _, error = run.communicate(timeout=50)
    finally:
        run.kill()
    assert (run.returncode, error) == (130, "Interrupted.\n")


def test_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-u",
        str(EXAMPLES / "distill.py"),
        *TINY,
        "--steps",
        "100000",
        "--out",
        str(tmp_path),
    ]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    try:
        while "step 0" not in run.stdout.readline():
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        printed, error = run.communicate(timeout=300)
    finally:
        run.kill()
    assert run.returncode == 130, error
    assert "Traceback" not in error
    assert "Interrupted" in printed
    assert printed.splitlines()[-1] == str(tmp_path / "distill.png")
    assert figures(tmp_path)["figures"]["teacher"]["held_out"]["0"]["perplexity"] > 1

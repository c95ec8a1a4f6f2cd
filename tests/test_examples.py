"""The examples, run as a user runs them, on models and text small enough for seconds."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
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
    import _report
    import distill

    for name in _report.ENVIRONMENT:
        monkeypatch.setenv(name, os.environ.get(name, ""))  # the example sets them, and pytest puts them back
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
        assert len(run["loss"]) == run["steps"]
        assert run["held_out"][str(run["steps"])]["perplexity"] < run["held_out"]["0"]["perplexity"]
    assert [run["steps"] for run in runs.values()] == [24, 12, 12]
    alone, distilled = runs["student, labels alone"]["held_out"], runs["student, kl_gpu"]["held_out"]
    assert alone["0"] == distilled["0"]
    assert 0 < distilled["12"]["kl"] < alone["12"]["kl"]
    assert all(math.isfinite(number) for number in numbers(found))

    ours, plain = found["cost"]["costs"]["kl_gpu"], found["cost"]["costs"]["PyTorch"]
    assert ours["value"] == pytest.approx(plain["value"], rel=1e-4)
    # Beyond the logits at least the gradient, and for the usual way both log_softmaxes too.
    assert ours["peak_bytes"] >= found["cost"]["student_bytes"]
    assert plain["peak_bytes"] >= 3 * 0.9 * found["cost"]["student_bytes"]
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
    import _language_models
    from _language_models import Size
    from distill import Distillation, completed

    text = _language_models.read(TEXT)
    tokeniser = _language_models.trained_tokeniser(text.training, 512)
    batch = _language_models.windows(tokeniser, text.held_out, 32).spread(3)
    size = Size(32, 1)
    # In float64 the two round nowhere near the bounds below.
    teacher, student = (_language_models.small_llama(size, 520, 32, seed).double() for seed in (0, 1))
    found = []
    for fused in (False, True):
        settings = completed(
            teacher=None, student=None, text=None, steps=None, batch=None, sequence=32, rate=None,
            temperature=2.0, seed=0, device="cpu", backend=None, out=Path(), fused_linear=fused,
        )  # fmt: skip
        loss = Distillation(settings, teacher, batch, len(tokeniser)).distillation_loss(student, batch)
        found.append([loss, *torch.autograd.grad(loss, list(student.parameters()))])
    for usual, ours in zip(*found, strict=True):
        assert usual.norm() > 0
        assert (ours - usual).norm() <= 1e-10 * usual.norm()


def test_fused_distillation_learns_in_less_memory(main: Main, tmp_path: Path) -> None:
    assert main([*TINY, "--sequence", "64", "--fused-linear", "--out", str(tmp_path)]) == 0
    found = figures(tmp_path)
    held_out = found["figures"]["student, kl_gpu"]["held_out"]
    assert 0 < held_out["12"]["kl"] < held_out["0"]["kl"]
    costs = found["cost"]["costs"]
    assert costs["kl_gpu, fused"]["value"] == pytest.approx(costs["PyTorch"]["value"], rel=1e-4)
    assert (
        costs["kl_gpu, fused"]["peak_bytes"] < costs["kl_gpu"]["peak_bytes"] < costs["PyTorch"]["peak_bytes"]
    )


def test_windows_leave_out_starts_and_padding(main: Main) -> None:
    import _language_models

    text = _language_models.read(TEXT)
    tokeniser = _language_models.trained_tokeniser(text.training)
    rows = _language_models.windows(tokeniser, text.held_out, 32)
    assert rows.labels[0, 0] == -100
    assert (rows.labels[-1] == -100).any()
    counted = rows.labels != -100
    assert (rows.labels[counted] == rows.ids[counted]).all()
    assert tokeniser.decode(rows.ids[counted]) == "".join(text.held_out)
    assert rows.predicted == counted[:, 1:].sum()


@pytest.fixture
def folders(main: Main, tmp_path: Path) -> dict[str, str]:
    """A teacher and a student padded to other sizes of the same tokeniser, and a student with another one."""
    import _language_models
    from _language_models import Size

    text = _language_models.read(TEXT)
    tokeniser = _language_models.trained_tokeniser(text.training)
    other = _language_models.trained_tokeniser(text.held_out)
    plan = {"teacher": (tokeniser, 128), "student": (tokeniser, 64), "stranger": (other, 64)}
    for seed, (name, (its, padding)) in enumerate(plan.items()):
        model = _language_models.small_llama(Size(32, 1), len(its) + padding, 32, seed)
        model.save_pretrained(tmp_path / name)
        its.save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in plan} | {"columns": str(len(tokeniser) + 64)}


def test_models_from_folders(main: Main, folders: dict[str, str], tmp_path: Path) -> None:
    given = ["--teacher", folders["teacher"], "--student", folders["student"], "--rate", "3e-3"]
    assert main([*TINY, *given, "--temperature", "2", "--out", str(tmp_path)]) == 0
    found = figures(tmp_path)
    assert found["setup"]["columns_compared"] == int(folders["columns"])
    assert found["figures"]["teacher"]["loss"] == []
    # Each comes closer to what it is trained on: measured on the same held-out text, not on its batches.
    for name, measure in (("student, labels alone", "perplexity"), ("student, kl_gpu", "kl")):
        held_out = found["figures"][name]["held_out"]
        assert held_out["12"][measure] < held_out["0"][measure]


def test_refuses_what_cannot_work(
    main: Main, folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "word.txt").write_text("word")
    teacher = ["--teacher", folders["teacher"]]
    for arguments, reason in [
        ([*teacher, "--student", folders["stranger"]], "tokenisers of --teacher and --student differ"),
        ([*teacher, "--student", str(tmp_path / "none")], "--student: cannot load"),
        (["--teacher", str(tmp_path / "none")], "--teacher: cannot load"),
        ([*teacher, "--sequence", "64"], "has 32 positions, got 64"),
        (["--student", folders["student"]], "--student needs --teacher"),
        (["--text", str(tmp_path / "none")], "does not exist"),
        (["--text", str(tmp_path / "empty")], "no UTF-8 text"),
        (["--text", str(tmp_path / "word.txt")], "too short"),
        (["--out", str(tmp_path / "word.txt")], "--out: cannot write"),
        (["--device", "abacus"], "--device"),
        (["--backend", "abacus"], "--backend"),
        (["--steps", "0"], "at least 1"),
        (["--steps", "few"], "--steps: invalid"),
        (["--sequence", "1"], "at least 2"),
        (["--temperature", "nan"], "above 0"),
        (["--seed", "-1"], "at least 0"),
        (["--colour", "red"], "unrecognized arguments"),
    ]:
        assert reason in refused(main, [*TINY, "--out", str(tmp_path / "out"), *arguments], capsys)


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

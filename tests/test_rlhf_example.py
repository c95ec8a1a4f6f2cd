"""The policy-gradient example, run as a user runs it, on models and text small enough for seconds."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("rich")
image = pytest.importorskip("matplotlib.image")

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXT = Path(json.__file__).parent  # a package of the standard library: real text, and little of it
TINY = ["--text", str(TEXT), "--pretraining", "20", "--steps", "4", "--prompts", "4", "--held-out", "16"]
TINY += ["--prompt", "8", "--tokens", "12", "--rate", "3e-3"]

Main = Callable[[list[str]], int]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Main]:
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    import rlhf_kl

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # work this small waits for its threads more than it gains by them
    yield rlhf_kl.main
    torch.set_num_threads(threads)


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "rlhf_kl.json").read_text())


def test_reward_is_the_share_of_finished_lines_that_parse(main: Main) -> None:
    from _language_models import line_parses, share_that_parses

    for line in [
        "x = f(1)", "  return x", "for i in x:", "elif x:", "else:", "try:", "except E as e:  # why",
        "finally:", "@f", "class A(B):", "with a as b: pass", "async def f(x, *, y): return y", "'\\d'",
    ]:  # fmt: skip
        assert line_parses(line), line
    for line in ["x = ", "f(1", "def f:", "one two", "'", "if x", ")", "\0", "(" * 1000, "return = 1"]:
        assert not line_parses(line), line

    assert share_that_parses("a\nx = ", "1\ny y\n") == 0.5
    assert share_that_parses("x ", "= 1\nz = \nf(2)\n\n  # no achievement\ng(3)\n") == 0.75
    assert share_that_parses("x = ", "1\nnot finished") == 1.0
    assert share_that_parses("x = 1", "") == 0.0
    assert share_that_parses("", "\n\n# nothing\n") == 0.0


def test_sampling_draws_from_the_model(main: Main) -> None:
    from _language_models import drawn_tokens

    logits = torch.randn(7, generator=torch.Generator().manual_seed(1)) * 1.5
    logits[3] = -math.inf
    count = 40_000
    drawn = drawn_tokens(logits.expand(count, -1), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn.flatten(), minlength=7) / count
    expected = logits.softmax(-1)
    assert shares[3] == 0
    assert ((shares - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all()


def _tree(first: Tensor, second: Tensor, tokens: Tensor) -> Tensor:
    """Logits `[sequences, 2, V]` of a model of two tokens, the second's depending on the first."""
    return torch.stack([first.expand(len(tokens), -1), second[tokens[:, 0]]], 1)


def test_gradient_of_each_form_over_all_completions(main: Main) -> None:
    """What each form trains on average, with no sampling: every completion, weighted by its probability."""
    from rlhf_kl import FORMS, penalty, token_logprobs

    generator = torch.Generator().manual_seed(0)
    policy, reference = (
        [torch.randn(s, generator=generator, dtype=torch.float64) for s in (4, (4, 4))] for _ in range(2)
    )
    policy[1] *= torch.arange(4)[:, None]  # so that the second token's KL hangs on the first token
    for logits in policy:
        logits.requires_grad_()
    tokens = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    logits, ref_logits = _tree(*policy, tokens), _tree(*reference, tokens)
    chances = token_logprobs(logits, tokens).sum(1).exp()

    def gradient(value: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, policy, retain_graph=True)])

    def trained(form: str) -> Tensor:
        later, kl = penalty(form, logits, ref_logits, tokens)
        surrogate = later * token_logprobs(logits, tokens) + kl
        return gradient((chances.detach() * surrogate.sum(1)).sum() + 0 * logits.sum())

    def at_each_token(a: Tensor, b: Tensor) -> Tensor:
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    log_ratio = token_logprobs(logits, tokens).sum(1) - token_logprobs(ref_logits, tokens).sum(1)
    whole = gradient((chances * log_ratio).sum())
    states_fixed = gradient((chances.detach() * at_each_token(logits, ref_logits).sum(1)).sum())
    opposite = gradient((chances.detach() * at_each_token(ref_logits, logits).sum(1)).sum())
    expected = {"none": 0 * whole, "exact": whole, "k1": whole, "k2": states_fixed, "k3": opposite}
    assert set(expected) == set(FORMS)
    for form, right in expected.items():
        torch.testing.assert_close(trained(form), right, rtol=1e-6, atol=1e-7)
    for one, other in [(whole, states_fixed), (whole, opposite), (states_fixed, opposite)]:
        assert (one - other).norm() > 0.1 * whole.norm()

    # In the reward alone, what the exact KL trains at the first of the two tokens is not its own gradient.
    detached = penalty("exact", logits, ref_logits, tokens)[1].detach()
    at_once = (chances.detach()[:, None] * detached * token_logprobs(logits, tokens)).sum()
    assert gradient(at_once).norm() < 1e-6 * whole.norm()


def test_compares_the_forms_and_repeats(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import rlhf_kl

    # A reward that differs among any few completions: so small a model may write no line that parses, and of
    # rewards all alike nothing is learnt.
    monkeypatch.setattr(rlhf_kl, "share_that_parses", lambda _, text: text.count("e") / max(1, len(text)))
    assert main([*TINY, "--out", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out.splitlines()
    found = results(tmp_path / "a")

    runs = found["figures"]
    pretraining = runs.pop("reference")
    assert list(runs) == ["none", "exact", "k1", "k2", "k3"]
    start = runs["none"]["held_out"]["0"]
    for run in runs.values():
        assert run["held_out"]["0"] == start
        assert [*run["held_out"]] == ["0", "1", "2", "3", "4"]
        assert len(run["curve"]) == 4
        assert all(0 <= reward <= 1 for reward in run["curve"])
        assert min(run["held_out"]["4"]["kl"], run["held_out"]["4"]["kl_error"]) > 0
    assert start["kl"] == start["kl_error"] == 0.0
    assert len({run["held_out"]["4"]["kl"] for run in runs.values()}) == 5
    perplexity = [measured["perplexity"] for measured in pretraining["held_out"].values()]
    assert perplexity[-1] < perplexity[0]

    plot = tmp_path / "a" / "rlhf_kl.png"
    assert printed[-1] == str(plot)
    assert image.imread(plot).std() > 0.05

    assert main([*TINY, "--out", str(tmp_path / "b")]) == 0
    again = results(tmp_path / "b")
    assert again["figures"] == {"reference": pretraining, **runs}
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == ["rlhf_kl.json", "rlhf_kl.png"]


def test_refuses_what_cannot_work(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "word.txt").write_text("word")
    for arguments, reason in [
        (["--text", str(tmp_path / "none")], "no UTF-8 text"),
        (["--text", str(tmp_path / "word.txt")], "too short"),
        (["--out", str(tmp_path / "word.txt")], "--out: cannot write"),
        (["--backend", "abacus"], "--backend"),
        (["--samples", "1"], "at least 2"),
        (["--tokens", "few"], "--tokens: invalid"),
        (["--coefficient", "-1"], "at least 1e-09"),
        (["--colour", "red"], "unrecognized arguments"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main([*TINY, "--out", str(tmp_path / "out"), *arguments])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.count("\n") == 1
        assert error.startswith("rlhf_kl.py: error: ")
        assert reason in error


def test_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-u", str(EXAMPLES / "rlhf_kl.py"), *TINY]
    command += ["--pretraining", "1", "--steps", "100000"]
    run = subprocess.Popen(
        [*command, "--out", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    try:
        while "none, step 0" not in run.stdout.readline():
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        printed, error = run.communicate(timeout=300)
    finally:
        run.kill()
    assert run.returncode == 130, error
    assert "Traceback" not in error
    assert "Interrupted" in printed
    assert printed.splitlines()[-1] == str(tmp_path / "rlhf_kl.png")
    assert results(tmp_path)["figures"]["none"]["held_out"]["0"]["kl"] == 0.0

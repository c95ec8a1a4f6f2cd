"""`kl-gpu compare`, as a user runs it."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from kl_gpu import reference
from kl_gpu.compare import compare, open_side
from kl_gpu.compare.figures import figures as of_model

CTX, BATCH = 64, 2
# A product's last bits may depend on the number of threads, and torchrun gives its ranks one.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
Run = subprocess.CompletedProcess


def kl_gpu(*arguments: object, launch: tuple[str, ...] = (), **options: Any) -> Run[str]:
    command = [sys.executable, *launch, "-m", "kl_gpu.compare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=ONE_THREAD, **options)


def figures(out: Path, model: int = 0) -> dict[str, dict[str, Any]]:
    table = json.loads((out / "report.json").read_text())["models"][model]["figures"]
    return {row["name"]: row for row in table}


@pytest.fixture(scope="module")
def live(models: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("live")
    found = kl_gpu(
        "compare", models["base"], models["near"], f"noisy={models['far']}", "--text", text, "--ctx", CTX,
        "--batch", BATCH, "--out", out, "--noise-floor",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip().endswith(str(out / "report.html"))
    return out


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(input_ids=ids).logits[:, CTX // 2 : -1]


@pytest.fixture(scope="module")
def ids(models: dict[str, Path], text: Path) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["base"])
    found = torch.tensor(tokenizer(text.read_text())["input_ids"])
    return found[: len(found) // CTX * CTX].reshape(-1, CTX)


def test_figures_against_float64(live: Path, models: dict[str, Path], ids: torch.Tensor) -> None:
    p, q = (logits_of(models[name], ids).double().log_softmax(-1) for name in ("base", "far"))
    labels, rows = ids[:, CTX // 2 + 1 :, None], CTX - 1 - CTX // 2
    kl = (p.exp() * (p - q)).sum(-1).numpy()
    base, model = (-x.gather(-1, labels)[..., 0].numpy() for x in (p, q))
    got = figures(live, 1)
    windows = len(ids)

    def check(name: str, value: float, error: float | None = None) -> None:
        assert got[name]["value"] == pytest.approx(value, rel=2e-5), name
        if error is not None:
            assert got[name]["error"] == pytest.approx(error, rel=1e-3), name

    def over_windows(x: np.ndarray) -> float:
        # Windows of one length: the error of a mean of means.
        return float(x.mean(1).std(ddof=1)) / math.sqrt(windows)

    assert got["Tokens"]["value"] == windows * rows
    assert got["Tokens with a NaN or an infinity"]["value"] == 0
    check("Mean KLD", kl.mean(), over_windows(kl))
    assert got["Mean KLD"]["error_if_tokens_were_independent"] == pytest.approx(
        kl.std(ddof=1) / math.sqrt(kl.size), rel=1e-3
    )
    for name, percent in (("Maximum", 100), ("99.9%", 99.9), ("Median", 50), ("5.0%", 5), ("Minimum", 0)):
        check(f"{name} KLD", np.percentile(kl, percent))
    check("Mean reverse KL", float((q.exp() * (q - p)).sum(-1).mean()))
    middle = ((p.exp() + q.exp()) / 2).log()
    js = (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1) / 2
    check("Mean JS", float(js.mean()))
    check("Mean acceptance (1 - TV)", float(torch.minimum(p, q).exp().sum(-1).mean()))
    ppl, base_ppl = math.exp(model.mean()), math.exp(base.mean())
    check("Mean PPL(Q)", ppl, ppl * over_windows(model))
    check("Mean PPL(base)", base_ppl, base_ppl * over_windows(base))
    check("Mean PPL(Q)-PPL(base)", ppl - base_ppl, over_windows(ppl * model - base_ppl * base))
    check("Mean ln(PPL(Q)/PPL(base))", (model - base).mean(), over_windows(model - base))
    check("Cor(ln(PPL(Q)), ln(PPL(base)))", np.corrcoef(model.ravel(), base.ravel())[0, 1])
    delta = np.exp(-model) - np.exp(-base)
    check("RMS Δp", math.sqrt(np.square(delta).mean()))
    check("25.0% Δp", np.percentile(delta, 25))
    check("Same top p", float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    tops = zip(
        p.topk(5).indices.reshape(-1, 5).tolist(), q.topk(5).indices.reshape(-1, 5).tolist(), strict=True
    )
    check("Top-5 agreement", float(np.mean([len(set(a) & set(b)) / 5 for a, b in tops])))
    assert 1e-4 < kl.mean() < 10


def test_groups_differences_and_the_noise_floor(live: Path) -> None:
    found = json.loads((live / "report.json").read_text())
    assert [model["model"] for model in found["models"]] == ["near", "noisy", "base again"]
    near, noisy, again = (figures(live, i) for i in range(3))
    assert noisy["Mean KLD"]["value"] > 100 * near["Mean KLD"]["value"]
    # Rounding alone.
    assert 0 <= again["Mean KLD"]["value"] < 1e-9 < near["Mean KLD"]["value"]
    for groups in found["models"][1]["mean_kl_by"].values():
        tokens = sum(row["tokens"] for row in groups)
        assert tokens == noisy["Tokens"]["value"]
        whole = sum(row["tokens"] * row["mean_kl"] for row in groups if row["tokens"]) / tokens
        assert whole == pytest.approx(noisy["Mean KLD"]["value"], rel=1e-9)
    pair = found["differences"][0]
    assert (pair["first"], pair["second"]) == ("near", "noisy")
    apart = near["Mean KLD"]["value"] - noisy["Mean KLD"]["value"]
    assert pair["mean_difference_of_kl"] == pytest.approx(apart, rel=1e-9)
    assert pair["error"] > 0


def test_the_page_needs_no_network(live: Path) -> None:
    page = (live / "report.html").read_text()
    assert len(page) < 5 << 20
    assert "src=" not in page
    assert "@import" not in page
    assert 'href="http' not in page.replace("http://www.w3.org/", "")
    data = json.loads(page.split('id="data">')[1].split("</script>")[0].replace("<\\/", "</"))
    assert len(data["tokens"]) == min(2000, figures(live)["Tokens"]["value"])
    assert [len(data["base"][0]), len(data["models"][0]["top"][0])] == [5, 5]
    assert data["models"][1]["worst"][0]["kl"] == pytest.approx(
        figures(live, 1)["Maximum KLD"]["value"], rel=1e-2
    )


def test_interrupted_and_resumed_the_same_bits(
    live: Path, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    command = (
        "compare", models["base"], models["near"], f"noisy={models['far']}", "--text", text, "--ctx", CTX,
        "--batch", BATCH, "--out", tmp_path, "--noise-floor",
    )  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "kl_gpu.compare", *map(str, command)],
        stderr=subprocess.PIPE, text=True, env=ONE_THREAD,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("parts/model*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert "goes on" in error
    found = kl_gpu(*command)
    assert found.returncode == 0, found.stderr
    ours, theirs = (json.loads((out / "report.json").read_text()) for out in (tmp_path, live))
    assert ours == theirs


def test_two_ranks_give_the_table_of_one(
    live: Path, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    launch = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--no-python",
        sys.executable,
    )
    found = kl_gpu(
        "compare", models["base"], models["near"], f"noisy={models['far']}", "--text", text, "--ctx", CTX,
        "--batch", BATCH, "--out", tmp_path, "--noise-floor", launch=launch,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    ours, theirs = (json.loads((out / "report.json").read_text()) for out in (tmp_path, live))
    assert ours == theirs


def test_recorded_logits_give_the_live_figures(
    live: Path, models: dict[str, Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    for name in ("base", "far"):
        save_file(
            {"ids": ids, "logits": logits_of(models[name], ids).contiguous()},
            tmp_path / f"{name}.safetensors",
        )
    found = kl_gpu(
        "compare", tmp_path / "base.safetensors", tmp_path / "far.safetensors", "--out", tmp_path / "out"
    )
    assert found.returncode == 0, found.stderr
    ours, theirs = figures(tmp_path / "out"), figures(live, 1)
    for name in ("Mean KLD", "99.0% KLD", "Mean PPL(Q)", "RMS Δp", "Mean JS"):
        assert ours[name]["value"] == pytest.approx(theirs[name]["value"], rel=1e-4)


def kld_file(path: Path, ids: torch.Tensor, logits: torch.Tensor) -> None:
    """As llama.cpp writes it: 16 nats below a row's largest logit, in 65535 steps."""
    windows, _, columns = logits.shape
    head = np.array([ids.shape[1], columns, windows], np.int32)
    with path.open("wb") as file:
        file.write(b"_logits_" + head.tobytes() + ids.numpy().astype(np.int32).tobytes())
        for row in logits.reshape(-1, columns).numpy():
            lowest = max(row.min(), row.max() - 16)
            normaliser = np.log(np.exp(row - row.max(), dtype=np.float32).sum(dtype=np.float64)) + row.max()
            scale = np.float32((row.max() - lowest) / 65535)
            codes = np.clip((np.maximum(row, lowest) - lowest) / scale + 0.5, 0, 65535).astype(np.uint16)
            scalars = np.array([scale, lowest - normaliser], np.float32)
            file.write(scalars.tobytes() + codes.tobytes() + b"\0\0" * (columns % 2))


def test_a_kld_file_by_llama_cpps_rule(models: dict[str, Path], ids: torch.Tensor, tmp_path: Path) -> None:
    base, model = (logits_of(models[name], ids) for name in ("base", "far"))
    kld_file(tmp_path / "base.kld", ids, base)
    found = kl_gpu("compare", tmp_path / "base.kld", models["far"], "--out", tmp_path / "out")
    assert found.returncode == 0, found.stderr
    log_p, log_q = (x.double().log_softmax(-1) for x in (base, model))
    kept = torch.where(log_p > -16, log_p.exp() * (log_p - log_q), 0.0).sum(-1)
    got = figures(tmp_path / "out")
    # A code is a step of 16/65535 nats.
    assert got["Mean KLD"]["value"] == pytest.approx(float(kept.mean()), abs=3e-4)
    assert float(kept.mean()) > 1e-3
    assert got["Mean reverse KL"]["value"] is None
    labels = ids[:, CTX // 2 + 1 :, None]
    assert got["Mean PPL(base)"]["value"] == pytest.approx(
        math.exp(-log_p.gather(-1, labels).mean()), rel=1e-3
    )
    assert got["Mean PPL(Q)"]["value"] == pytest.approx(math.exp(-log_q.gather(-1, labels).mean()), rel=1e-5)


def llama_cpp(
    file: Path, logits: torch.Tensor, labels: torch.Tensor
) -> dict[str, tuple[float, float | None]]:
    """What the tool prints of a file and a model: (value, error), in the order and by the rules of
    `kl_divergence` of its tools/perplexity/perplexity.cpp, numbers of a token in float32 as there."""
    _, columns, chunks = np.fromfile(file, np.int32, 3, offset=8)
    rows = 2 * ((columns + 1) // 2) + 4
    codes = np.fromfile(file, np.uint16, offset=20 + 4 * chunks * CTX).reshape(-1, rows)
    scale, lowest = np.split(np.ascontiguousarray(codes[:, :4]).view(np.float32), 2, axis=1)
    base = scale * codes[:, 4 : 4 + columns] + lowest
    q, at = logits.flatten(0, 1).numpy(), labels.numpy().ravel()
    tokens, n = np.arange(len(at)), len(at)
    top = q.max(1, keepdims=True)
    lse = np.log(np.exp(q - top).sum(1, dtype=np.float64)).astype(np.float32)[:, None] + top
    nll, nll_base = lse[:, 0] - q[tokens, at], -base[tokens, at]
    kld = np.where(base > -16, np.exp(base) * (base - q + lse), 0).sum(1, dtype=np.float64)
    delta = np.exp(-nll) - np.exp(-nll_base)
    same = (q.argmax(1) == base.argmax(1)).astype(float)

    def mean(x: np.ndarray) -> tuple[float, float]:
        x = x.astype(float)
        return x.mean(), math.sqrt((np.square(x).mean() - x.mean() ** 2) / (n - 1))

    (model, error), (of_base, base_error) = mean(nll), mean(nll_base)
    covariance = ((nll.astype(float) * nll_base).mean() - model * of_base) / (n - 1)
    apart = math.sqrt(error**2 + base_error**2 - 2 * covariance)
    ppl, base_ppl, ratio = math.exp(model), math.exp(of_base), math.exp(model - of_base)
    difference = (ppl * error) ** 2 + (base_ppl * base_error) ** 2 - 2 * ppl * base_ppl * covariance
    square, square_error = mean(np.square(delta))
    found: dict[str, tuple[float, float | None]] = {
        "Mean PPL(Q)": (ppl, ppl * error),
        "Mean PPL(base)": (base_ppl, base_ppl * base_error),
        "Cor(ln(PPL(Q)), ln(PPL(base)))": (covariance / (error * base_error), None),
        "Mean ln(PPL(Q)/PPL(base))": (model - of_base, apart),
        "Mean PPL(Q)/PPL(base)": (ratio, ratio * apart),
        "Mean PPL(Q)-PPL(base)": (ppl - base_ppl, math.sqrt(difference)),
        "Mean KLD": mean(kld),
    }
    percents = (100, 99.9, 99, 95, 90, 50, 10, 5, 1, 0.1, 0)
    names = {100: "Maximum", 50: "Median", 0: "Minimum"}
    for percent in percents:
        found[f"{names.get(percent, f'{percent:.1f}%')} KLD"] = (float(np.percentile(kld, percent)), None)
    found["Mean Δp"] = mean(delta)
    for percent in (*percents[:5], 75, 50, 25, *percents[6:]):
        found[f"{names.get(percent, f'{percent:.1f}%')} Δp"] = (float(np.percentile(delta, percent)), None)
    rms = math.sqrt(square)
    return found | {
        "RMS Δp": (rms, 0.5 / rms * square_error),
        "Same top p": (same.mean(), math.sqrt(same.mean() * (1 - same.mean()) / (n - 1))),
    }


def test_every_line_of_llama_cpps_table(models: dict[str, Path], ids: torch.Tensor, tmp_path: Path) -> None:
    # Weights a step away from the base's, as a quantised copy's are, and a model that is far off.
    for name in ("near", "far"):
        kld_file(tmp_path / "base.kld", ids, logits_of(models["base"], ids))
        side = open_side(str(tmp_path / "base.kld"))
        assert side.windows is not None
        model = open_side(str(models[name]), device="cpu")
        compared = compare(side, [(name, lambda model=model: model)], side.windows, tmp_path / name)
        got = {" ".join(x.name.split()): x for x in of_model(compared.models[0], compared.window_of.numpy())}
        labels = ids[:, CTX // 2 + 1 :]
        printed = llama_cpp(tmp_path / "base.kld", logits_of(models[name], ids), labels)
        assert list(printed) == list(got)[: len(printed)]
        for line, (value, error) in printed.items():
            # Six digits behind the point, of percentages three: 1e-6 and 1e-5. A large perplexity is of
            # float32 numbers there as here.
            digits = 5e-6 if "Δp" in line or line == "Same top p" else 5e-7
            assert got[line].value == pytest.approx(value, rel=3e-6, abs=digits), line
            if error is not None:
                assert got[line].token_error == pytest.approx(error, rel=1e-4, abs=digits), line


def bad_inputs(models: dict[str, Path], text: Path, tmp: Path) -> dict[str, tuple[list[object], str]]:
    base, near, with_text = models["base"], models["near"], ["--text", text, "--ctx", CTX]
    (tmp / "short.txt").write_text("too short")
    (tmp / "empty.txt").write_text(" \n")
    (tmp / "no.kld").write_bytes(b"something else, and long enough to have a head")
    (tmp / "cut.kld").write_bytes(b"_logits_" + np.array([64, 300, 10], np.int32).tobytes() + bytes(100))
    nothing = tmp / "nothing"
    (tmp / "file").write_text("")
    bare = tmp / "bare"
    shutil.copytree(base, bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    return {
        "no model": ([nothing, near, *with_text], "nothing: no such file or folder"),
        "no gguf": ([tmp / "a.gguf", near, *with_text], "a.gguf: no such file"),
        "no text": ([base, near], "--text"),
        "a missing text": ([base, near, "--text", nothing], "nothing: no such file or folder"),
        "an empty text": ([base, near, "--text", tmp / "empty.txt"], "no text in it"),
        "a short text": ([base, near, "--text", tmp / "short.txt"], "less than one window of 512"),
        "another tokenizer": ([base, models["other"], *with_text], "different tokenizers"),
        "no tokenizer": ([bare, near, *with_text], "no tokenizer"),
        "a foreign .kld": ([tmp / "no.kld", near], "not a file of llama.cpp"),
        "a .kld cut short": ([tmp / "cut.kld", near], "cut short, 120 bytes of"),
        "a folder that is a file": ([base, near, *with_text, "--out", tmp / "file"], "file"),
        "a window of 2": ([base, near, "--text", text, "--ctx", 2], "at least 4 tokens"),
        "a wrong score": ([base, near, *with_text, "--score", "third"], "half, all"),
        "no windows": ([base, near, *with_text, "--windows", 0], "--windows must be at least 1"),
    }  # fmt: skip


def test_bad_input_is_one_line(
    models: dict[str, Path],
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kl_gpu.compare import cli

    for name, (arguments, message) in bad_inputs(models, text, tmp_path).items():
        out = [] if "--out" in arguments else ["--out", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", ["kl-gpu", "compare", *map(str, [*arguments, *out])])
        with pytest.raises(SystemExit) as ended:
            cli.app()
        printed = capsys.readouterr().err
        assert ended.value.code == 2, name
        assert message in printed, (name, printed)
        assert "Traceback" not in printed


def test_another_comparisons_folder_is_refused(live: Path, models: dict[str, Path], text: Path) -> None:
    before = (live / "report.json").read_bytes()
    found = kl_gpu("compare", models["base"], models["near"], "--text", text, "--ctx", 32, "--out", live)
    assert found.returncode == 2
    assert "another comparison" in found.stderr
    assert (live / "report.json").read_bytes() == before


def test_reference_agrees_on_a_row(models: dict[str, Path], ids: torch.Tensor, live: Path) -> None:
    # The judge on rows that went through two processes, files and a table.
    base, far = (logits_of(models[name], ids)[0].double().numpy() for name in ("base", "far"))
    from safetensors.torch import load_file

    kept = load_file(live / "parts" / "model01-000000.safetensors")["forward_kl"]
    want = reference.divergence(far, base, "forward_kl")
    np.testing.assert_allclose(kept[: len(base)].numpy(), want, rtol=2e-4)

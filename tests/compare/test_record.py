"""`kl-gpu record`, what it leaves, and who reads it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from kl_gpu import divergence, linear_div, topk_div
from kl_gpu.compare import ComparisonError, Model, Recording, Windows, compare, cut, open_side, record
from kl_gpu.compare import recorded as sides
from kl_gpu.compare.figures import figures
from kl_gpu.compare.scores import NUMBERS
from kl_gpu.compare.windows import read_texts

CTX, K = 64, 8


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A product's last bits may depend on the number of threads, and torchrun gives its ranks one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(models: dict[str, Path]) -> Model:
    found = open_side(str(models["base"]), device="cpu")
    assert isinstance(found, Model)
    return found


@pytest.fixture(scope="module")
def windows(base: Model, text: Path) -> Windows:
    ids = torch.tensor(base.encode(read_texts(text)[0][1]))
    return cut(ids, CTX, "all").few(24)


@pytest.fixture(scope="module")
def recordings(base: Model, windows: Windows, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recordings")
    forms = ("hidden", "logits", "topk")
    return {x: record(base, windows, folder / x, x, k=K, batch=2, shard=4) for x in forms}


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(input_ids=ids).logits[:, :-1]


def tokens_of(found: Any) -> dict[str, torch.Tensor]:
    return found.models[0].tokens


def test_hidden_states_and_head_give_the_live_figures(
    base: Model, windows: Windows, models: dict[str, Path], recordings: dict[str, Path], tmp_path: Path
) -> None:
    far = [("far", lambda: open_side(str(models["far"]), device="cpu"))]
    side = sides.opened(recordings["hidden"])
    assert side is not None
    # What scores more than is asked for will do: the second halves of windows that were recorded whole.
    half = windows.narrowed(CTX // 2)
    live = compare(base, far, half, tmp_path / "live", batch=2)
    again = compare(side, far, half, tmp_path / "again", batch=2)
    for name in NUMBERS:
        torch.testing.assert_close(
            tokens_of(again)[name], tokens_of(live)[name], rtol=1e-5, atol=1e-7, msg=name
        )
    assert tokens_of(live)["forward_kl"].min() > 1e-3
    window = live.window_of.numpy()
    for ours, theirs in zip(figures(again.models[0], window), figures(live.models[0], window), strict=True):
        assert ours.value == pytest.approx(theirs.value, rel=1e-5, abs=1e-7), ours.name


def test_logits_lose_what_sixteen_bits_lose(
    windows: Windows, models: dict[str, Path], recordings: dict[str, Path]
) -> None:
    live, recording = logits_of(models["base"], windows.ids), Recording(recordings["logits"])
    for i in (0, 23):
        kept = recording.recorded(i)
        assert kept["logits"].dtype == torch.float16
        assert kept["logits"].equal(live[i].half())
        # Of the logits before they were rounded.
        torch.testing.assert_close(kept["normalizer"], live[i].logsumexp(-1), rtol=1e-6, atol=0)


def test_top_k_is_the_divergence_of_its_outcomes(
    windows: Windows, models: dict[str, Path], recordings: dict[str, Path], tmp_path: Path
) -> None:
    p, q = (
        logits_of(models[name], windows.ids).double().softmax(-1).flatten(0, 1) for name in ("base", "far")
    )
    ids = p.topk(K).indices
    outcomes = [torch.cat([x.gather(1, ids), 1 - x.gather(1, ids).sum(1, keepdim=True)], 1) for x in (p, q)]
    kl = (outcomes[0] * (outcomes[0] / outcomes[1]).log()).sum(1)
    side = sides.opened(recordings["topk"])
    assert side is not None
    far = [("far", lambda: open_side(str(models["far"]), device="cpu"))]
    found = tokens_of(compare(side, far, windows, tmp_path, batch=2))
    torch.testing.assert_close(found["forward_kl"].double(), kl, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(
        found["acceptance"].double(), torch.minimum(*outcomes).sum(1), rtol=1e-5, atol=1e-6
    )
    assert (kl < (p * (p / q).log()).sum(1)).all()
    # Recorded beside the best: whatever came is known.
    labels = windows.labels.reshape(-1, 1)
    torch.testing.assert_close(
        found["base_logprob"].double(), p.gather(1, labels)[:, 0].log(), rtol=1e-5, atol=1e-6
    )
    assert found["base_entropy"].isnan().all()


def test_batches_fit_the_losses(
    windows: Windows, models: dict[str, Path], recordings: dict[str, Path]
) -> None:
    student = transformers.AutoModelForCausalLM.from_pretrained(models["far"], dtype=torch.float32)
    teacher = logits_of(models["base"], windows.ids)
    for form, folder in recordings.items():
        recording = Recording(folder)
        assert len(recording) == len(windows.ids)
        loader = DataLoader(recording, batch_size=3, num_workers=2 if form == "hidden" else 0)
        for i, batch in enumerate(loader):
            rows = slice(3 * i, 3 * i + 3)
            assert batch["input_ids"].equal(windows.ids[rows])
            assert (batch["labels"][:, 0] == -100).all()
            assert batch["labels"][:, 1:].equal(windows.ids[rows, 1:])
            hidden = student.model(input_ids=batch["input_ids"]).last_hidden_state[:, recording.positions]
            logits, of_teacher = student.lm_head(hidden), recording.teacher(batch)
            want = divergence(logits, teacher[rows])
            if form == "hidden":
                got = linear_div(hidden, student.lm_head.weight, **of_teacher)
                assert got.item() == pytest.approx(want.item(), rel=1e-5)
            elif form == "logits":
                assert divergence(logits, **of_teacher).item() == pytest.approx(want.item(), rel=1e-4)
            else:
                got = topk_div(logits, **of_teacher)
                assert 0.2 * want.item() < got.item() < want.item()
        assert i == 7


def contents(folder: Path) -> dict[str, bytes]:
    return {x.name: x.read_bytes() for x in folder.iterdir() if x.is_file()}


def test_interrupted_and_resumed_the_same_bits(
    base: Model, windows: Windows, recordings: dict[str, Path], tmp_path: Path
) -> None:
    def stops(name: str, done: int, total: int) -> None:
        if done > 8 * windows.rows:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(base, windows, tmp_path, "topk", k=K, batch=2, shard=4, progress=stops)
    assert len(list(tmp_path.glob("shard-*"))) == 2
    with pytest.raises(ComparisonError, match=r"4 of 6 shards are missing, the first is shard-000002"):
        Recording(tmp_path)
    part, whole = Recording(tmp_path, incomplete=True), Recording(recordings["topk"])
    assert len(part) == 8
    assert part[7]["logprobs"].equal(whole[7]["logprobs"])
    record(base, windows, tmp_path, "topk", k=K, batch=2, shard=4)
    assert contents(tmp_path) == contents(recordings["topk"])


def test_two_ranks_leave_the_files_of_one(
    models: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = [*arguments_of(models, text, tmp_path / "one"), "--as", "topk"]
    assert ended(arguments, monkeypatch, capsys)[0] == 0
    arguments[arguments.index("--out") + 1] = str(tmp_path / "two")
    launch = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"
    found = subprocess.run(
        [sys.executable, *launch, sys.executable, "-m", "kl_gpu.compare", *arguments],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("504 predictions in 0.") == 1
    one = contents(tmp_path / "one")
    assert len(one) == 6
    assert contents(tmp_path / "two") == one


def test_torn_and_foreign_files_are_named(recordings: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "hidden"
    shutil.copytree(recordings["hidden"], folder)
    shard, second = folder / "shard-000001.safetensors", folder / "shard-000002.safetensors"
    whole = shard.read_bytes()
    for spoilt, message in (
        (whole[:-1], "shard-000001.safetensors: torn"),
        (b"", "shard-000001.safetensors: torn"),
        ((recordings["logits"] / shard.name).read_bytes(), "shard-000001.safetensors: belongs to another"),
        (second.read_bytes(), "shard-000001.safetensors: belongs to another"),
    ):
        shard.write_bytes(spoilt)
        with pytest.raises(ComparisonError, match=message):
            Recording(folder)
        assert shard.read_bytes() == spoilt
    shard.write_bytes(whole)
    shutil.copy(recordings["logits"] / "windows.safetensors", folder / "windows.safetensors")
    with pytest.raises(ComparisonError, match=r"windows\.safetensors: belongs to another"):
        Recording(folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ComparisonError, match=r"manifest\.json: not the manifest of a recording"):
        Recording(folder)


def arguments_of(models: dict[str, Path], text: Path, out: Path) -> list[str]:
    given = [
        "record",
        models["base"],
        "--text",
        text,
        "--ctx",
        CTX,
        "--windows",
        8,
        "--shard",
        2,
        "--out",
        out,
    ]
    return [str(x) for x in given]


def ended(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The exit status and what stood on stderr."""
    from kl_gpu.compare import cli

    monkeypatch.setattr(sys, "argv", ["kl-gpu", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.app()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return stop.value.code, error


def test_a_full_disk_and_ctrl_c_keep_what_there_is(
    models: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from kl_gpu.compare import cli, files

    arguments, shards = arguments_of(models, text, tmp_path), []

    def full(file: int) -> None:
        # Windows, head, manifest and two shards fit.
        shards.append(file)
        if len(shards) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as some:
        some.setattr(files.os, "fsync", full)
        status, error = ended(arguments, some, capsys)
    assert status == 2
    assert error.splitlines()[-1].endswith("shard-000002.safetensors: No space left on device")
    names = [x.name for x in tmp_path.glob("shard-*")]
    assert sorted(names) == ["shard-000000.safetensors", "shard-000001.safetensors"]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as some:
        some.setattr(cli._Progress, "_step", interrupted)
        status, error = ended(arguments, some, capsys)
    assert status == 130
    assert error.splitlines()[-1] == "kl-gpu: interrupted; the same command goes on from here"
    assert ended(arguments, monkeypatch, capsys)[0] == 0
    assert len(Recording(tmp_path)) == 8


def test_bad_input_is_one_line(
    models: dict[str, Path], text: Path, recordings: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("")
    usual, topk, far = (
        arguments_of(models, text, tmp_path / "out"),
        str(recordings["topk"]),
        str(models["far"]),
    )
    two = json.dumps({"input_ids": [1, 2], "prompt_logprobs": [None]})
    for name, content in (
        ("empty", ""), ("nothing", '{"text": "a"}\n'), ("short", two), ("broken", '{"prompt_logprobs": '),
        ("large", '{"input_ids": [1, 2], "prompt_logprobs": [null, {"2": -1.0, "300": -2.0}]}'),
        ("unknown", '{"input_ids": [1, 2], "prompt_logprobs": [null, null]}'),
    ):  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text(content)
    half = record_of_halves(models, text, tmp_path / "half")
    for arguments, message in (
        ([*usual, "--as", "words"], "--as must be one of hidden, logits, topk, got 'words'"),
        ([*usual, "--as", "topk", "-k", "301"], "k must lie between 1 and 300, got 301"),
        ([*usual, "--store", "float16"], "a choice for logits only"),
        ([*usual, "--as", "logits", "--store", "int8"], "must be one of float32, bfloat16, float16"),
        ([*usual, "--shard", "0"], "shard must be at least 1"),
        ([*usual[:-1], str(tmp_path / "file" / "under")], "Not a directory"),
        ([*usual[:-1], topk], "holds another recording"),
        (["record", topk, "--text", str(text)], "topk is a recording already"),
        (["compare", far, topk, "--text", str(text)], "name it first, as the base"),
        (["compare", topk, far, "--noise-floor"], "is not a model that runs"),
        (["compare", topk, far, "--text", str(text)], "was recorded on its own tokens"),
        (["compare", str(half), far, "--score", "all"], "from position 32 on, not from 0"),
        (["compare", topk, far, "--vocab-size", "301"], "vocab_size must lie between 1 and 300, got 301"),
        (["compare", str(tmp_path / "large.jsonl"), far], "large names token 300, past the 300 columns"),
        *(
            (["compare", str(tmp_path / f"{name}.jsonl"), far], message)
            for name, message in (
                ("empty", "no rows in it"),
                ("nothing", "row 1 has neither prompt_logprobs nor target_logprobs"),
                ("short", "row 1 has 2 tokens and 1 entries; entry i describes token i"),
                ("broken", "broken.jsonl: Expecting value"),
                ("unknown", "no entry that counts behind a text's first token"),
            )
        ),
    ):
        if "--out" not in arguments:
            arguments += ["--out", str(tmp_path / "out")]
        status, error = ended(arguments, monkeypatch, capsys)
        assert (status, message in error) == (2, True), (arguments, error)


def record_of_halves(models: dict[str, Path], text: Path, out: Path) -> Path:
    model = open_side(str(models["base"]), device="cpu")
    assert isinstance(model, Model)
    ids = torch.tensor(model.encode(read_texts(text)[0][1]))
    return record(model, cut(ids, CTX).few(2), out, "topk", k=2)


def entries(p: torch.Tensor, k: int) -> list[dict[int, float]]:
    best = p.log().topk(k)
    return [
        dict(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def test_what_vllm_and_axolotl_left(models: dict[str, Path], windows: Windows, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    lengths = (20, 12)
    ids = [windows.ids[i, :length] for i, length in enumerate(lengths)]
    p, q = (
        [logits_of(models[name], x[None]).double().softmax(-1)[0] for x in ids] for name in ("base", "far")
    )
    vllm, axolotl = [], []
    for tokens, of_base in zip(ids, p, strict=True):
        # Entry i describes token i: what stands before the first describes nothing.
        known = [{}, *entries(of_base, K)]
        for i in range(1, len(tokens)):
            known[i].setdefault(int(tokens[i]), float(of_base[i - 1, tokens[i]].log()))
        words = [
            {str(t): {"logprob": x, "rank": 1, "decoded_token": "a"} for t, x in row.items()} or None
            for row in known
        ]
        vllm.append({"prompt_token_ids": tokens.tolist(), "prompt_logprobs": words})
        best = [dict.fromkeys(range(K), 0.0), *entries(of_base, K)]
        mask = [[0] * K] * 4 + [[1] * K] * (len(tokens) - 4)
        logprobs = [[float("-inf")] * K, *(list(x.values()) for x in best[1:])]
        axolotl.append({
            "input_ids": tokens.tolist(), "target_token_ids": [list(x) for x in best],
            "target_logprobs": logprobs, "target_mask": mask,
        })  # fmt: skip
    (tmp_path / "vllm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in vllm))
    parquet.write_table(pyarrow.Table.from_pylist(axolotl), tmp_path / "axolotl.parquet")
    far = [("far", lambda: open_side(str(models["far"]), device="cpu"))]

    for name, skipped in (("vllm.jsonl", 1), ("axolotl.parquet", 4)):
        side = sides.opened(tmp_path / name)
        assert side is not None
        assert side.windows is not None
        found = compare(side, far, side.windows, tmp_path / f"{name}.out")
        want = []
        for row, tokens, of_base, of_model in zip(vllm, ids, p, q, strict=True):
            for i in range(skipped, len(tokens)):
                columns = sorted(entries(of_base[i - 1 : i], K)[0])
                if name == "vllm.jsonl":
                    columns = sorted(int(t) for t in row["prompt_logprobs"][i])
                pair = [x[i - 1, columns] for x in (of_base, of_model)]
                both = [torch.cat([x, 1 - x.sum(0, keepdim=True)]) for x in pair]
                want.append((both[0] * (both[0] / both[1]).log()).sum())
        tokens = tokens_of(found)
        assert len(want) == sum(lengths) - 2 * skipped
        torch.testing.assert_close(
            tokens["forward_kl"].double(), torch.stack(want), rtol=1e-4, atol=1e-6, msg=name
        )
        assert found.window_of.tolist() == [0] * (20 - skipped) + [1] * (12 - skipped)
        assert found.place_of.tolist() == [*range(skipped, 20), *range(skipped, 12)]
        assert tokens["reverse_kl"].isnan().all()
    # vLLM names the text's own token, so its probability is known.
    labels = torch.cat([x[torch.arange(len(t) - 1), t[1:]] for x, t in zip(p, ids, strict=True)]).log()
    vllms = tokens_of(compare(sides.opened(tmp_path / "vllm.jsonl"), far, *with_windows(tmp_path)))
    torch.testing.assert_close(vllms["base_logprob"].double(), labels, rtol=1e-5, atol=1e-6)


def with_windows(folder: Path) -> tuple[Windows, Path]:
    side = sides.opened(folder / "vllm.jsonl")
    assert side is not None
    assert side.windows is not None
    return side.windows, folder / "vllm.jsonl.out"


@pytest.mark.parametrize("family", ["Gemma2", "Cohere", "Granite", "Phi"])
def test_heads_of_other_families(family: str, tmp_path: Path) -> None:
    """Caps, scales and biases behind the head's product."""
    more = {
        "Gemma2": {"final_logit_softcapping": 3.0, "head_dim": 16},
        "Cohere": {"logit_scale": 0.25},
        "Granite": {"logits_scaling": 4.0},
        "Phi": {},
    }[family]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, initializer_range=0.3, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    if family == "Phi":
        torch.nn.init.normal_(model.lm_head.bias)
    ids = torch.randint(97, (2, 16))
    recording = Recording(record(Model(family, model), cut(ids.flatten(), 16, "all"), tmp_path))
    with torch.no_grad():
        want = model(input_ids=ids).logits[:, :-1]
    for i in range(2):
        got = recording.head.logits(recording.recorded(i)["hidden"])
        torch.testing.assert_close(got, want[i], rtol=1e-5, atol=1e-5)


def test_a_model_that_does_more_with_its_logits_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, *arguments: Any, **more: Any) -> Any:
            found = super().forward(*arguments, **more)
            found.logits[..., 7] += 0.5
            return found

    model = Model("shifted", Shifted.from_pretrained(models["base"], dtype=torch.float32))
    with pytest.raises(ComparisonError, match=r"not its LM head's products .* \(off by 0\.5\)"):
        record(model, cut(torch.arange(32), 16, "all"), tmp_path)

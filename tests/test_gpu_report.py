"""What is made of a run: targets met or missed, plots, and their table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.gpu.plots import read
from bench.gpu.targets import NOT_MEASURED, TARGETS, table, worded
from bench.harness.traffic import PASSES

COPY = 3000.0  # GB/s


def row(system: str, work: str, V: int, share: float, **more: Any) -> dict[str, Any]:
    """A row that agrees with itself, at this share of a copy of 3000 GB/s."""
    N = more.pop("N", 8192)
    moved = PASSES[work] * N * V * 2
    found = {
        "system": system, "kind": "forward_kl", "work": work, "dtype": "bf16", "N": N, "V": V,
        "ms": moved / (share * COPY) / 1e6, "bytes": moved, "gbps": share * COPY, "share_of_copy": share,
        "peak_extra_bytes": N * V * 2, "max_rel_error": 1e-7,
    }  # fmt: skip
    return found | more


def document(
    device: str = "GPU X", date: str = "2026-05-06T07:08:09+00:00", share: float = 0.96
) -> dict[str, Any]:
    rows = [
        row("kl_gpu", work, V, share, kind=kind)
        for work in PASSES
        for V in (32000, 128256)
        for kind in ("forward_kl", "reverse_kl")
    ]
    rows.append(row("torch", "value_grad", 128256, share / 12, peak_extra_bytes=5 * 8192 * 128256 * 2))
    rows.append(row("torch.compile", "value_grad", 128256, share / 4))
    rows.append(row("kl_gpu", "value", 128256, 0.02, N=1, ms=0.012))
    return {
        "device": device, "date": date, "torch": "2.0", "triton": "3.0", "driver": "500.1",
        "copy_gbps": COPY, "rows": rows,
    }  # fmt: skip


def figures(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {target.work: worded(target, rows) for target in TARGETS}


def test_every_target_reads_its_rows() -> None:
    found = figures(document()["rows"])
    assert list(found.values()) == [
        "96 to 96 %", "96 to 96 %", "96 to 96 %", "4.0 × (missed)", "12.0 ×", "0.20 of it", NOT_MEASURED,
        "1.00 × at worst", "12.0 µs",
    ]  # fmt: skip


def test_a_missed_target_says_so() -> None:
    rows = [*document()["rows"], row("kl_gpu", "value", 50257, 0.5)]
    found = figures(rows)
    assert found["value, bf16, V ≥ 32k"] == "50 to 96 % (missed)"
    assert found["time per byte against the neighbouring V"] == "1.92 × at worst (missed)"


def test_nothing_measured_is_not_a_figure() -> None:
    assert set(figures([]).values()) == {NOT_MEASURED}


def test_a_baseline_is_compared_at_its_own_number_of_rows() -> None:
    rows = [
        row("kl_gpu", "value_grad", 128256, 0.9),
        row("kl_gpu", "value_grad", 128256, 0.9, N=4096),
        row("torch", "value_grad", 128256, 0.09, N=4096),
    ]
    assert figures(rows)["the same against plain PyTorch"] == "10.0 ×"


def store(folder: Path, name: str, what: dict[str, Any]) -> Path:
    path = folder / name
    path.write_text(json.dumps(what))
    return path


def test_the_table_of_a_run_without_rows() -> None:
    lines = table([]).splitlines()
    assert len(lines) == 2 + len(figures([]))
    assert all(line.endswith(f"| {NOT_MEASURED} |") for line in lines[2:])


def test_plots_of_a_stored_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("matplotlib.image")
    path = store(tmp_path, "run.json", document())
    assert main(["plots", str(path), "--out", str(tmp_path / "out")]) == 0
    drawn = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in drawn] == ["run-bandwidth.png", "run-memory.png", "run-rows.png"]
    for file in drawn:
        pixels = image.imread(file)
        assert pixels.shape[1] > 1000
        assert pixels.std() > 0.05  # not an empty page
    capsys.readouterr()


@pytest.mark.parametrize(
    ("content", "arguments", "complaint"),
    [
        (None, [], "run.json"),
        ({"rows": []}, [], "is not a run's JSON"),
        (document(), ["--kind", "tv"], "no rows of kind 'tv'"),
    ],
)
def test_plots_refuse(
    tmp_path: Path, content: Any, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        store(tmp_path, "run.json", content)
    with pytest.raises(SystemExit) as stopped:
        main(["plots", str(path), *arguments])
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_read_names_what_a_run_must_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="copy_gbps"):
        read(store(tmp_path, "run.json", {"device": "x"}))

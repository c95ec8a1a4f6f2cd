"""Texts and ids, cut into windows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kl_gpu.compare import ComparisonError, cut
from kl_gpu.compare.windows import of_texts, read_ids, read_texts

ROWS = [{"body": "first", "kind": "a"}, {"body": "second", "kind": "b"}, {"body": "third", "kind": "a"}]


def test_windows_as_llama_cpp_cuts_them() -> None:
    windows = cut(torch.arange(35), 10)
    assert windows.ids.tolist() == torch.arange(30).reshape(3, 10).tolist()
    # Of ten tokens, positions 5 to 8 are scored: each has a next token, and at least five before it.
    assert (windows.first, windows.rows) == (5, 4)
    assert windows.labels[0].tolist() == [6, 7, 8, 9]
    whole = cut(torch.arange(35), 10, "all")
    assert (whole.first, whole.rows) == (0, 9)
    assert whole.labels[1].tolist() == list(range(11, 20))
    assert windows.fingerprint != whole.fingerprint != cut(torch.arange(1, 36), 10, "all").fingerprint


def test_columns_and_categories(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        found = read_texts(tmp_path / name, "body", "kind")
        assert found == [("a", "first"), ("b", "second"), ("a", "third")]
        with pytest.raises(ComparisonError, match=f"{name}: no column 'text'"):
            read_texts(tmp_path / name)
    windows = of_texts(found, lambda text: list(text.encode()), 5, "half")
    # "first\n\nthird" has 12 tokens and two windows, "second" one.
    assert windows.categories == ["a", "a", "b"]
    assert bytes(windows.ids[2].tolist()) == b"secon"
    with pytest.raises(ComparisonError, match="category 'b' has 6 tokens, less than one window of 8"):
        of_texts(found, lambda text: list(text.encode()), 8, "half")


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md"):
        (tmp_path / name).write_text(name)
    assert read_texts(tmp_path) == [("", "a.md"), ("", "b.txt")]
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ComparisonError, match=r"c\.txt: 'utf-8'"):
        read_texts(tmp_path)


def test_ids(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(7, dtype=np.uint16))
    assert read_ids(tmp_path / "ids.npy").tolist() == list(range(7))
    np.save(tmp_path / "floats.npy", np.zeros(7))
    with pytest.raises(ComparisonError, match=r"expected integers \[T\], got float64 \[7\]"):
        read_ids(tmp_path / "floats.npy")
    with pytest.raises(ComparisonError, match=r"none\.npy"):
        read_ids(tmp_path / "none.npy")

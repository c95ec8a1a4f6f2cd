"""The kernel that sums a formula over a shard as GPUs run it, compiled without one."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from test_machine_code import run


@pytest.fixture(scope="module")
def audits(shared_folder: Path) -> list[dict]:
    return run("shards_code.py", shared_folder)


def test_nothing_spills_and_loads_are_128_bits_wide(audits: list[dict]) -> None:
    assert len(audits) == 3 * 3
    for a in audits:
        assert a["spill_bytes"] == 0, a
        assert a["load_bits"] == 128, a
        assert a["ex2_per_element"] >= 1, a

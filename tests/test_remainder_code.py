"""The kernels behind token_logprobs and topk_div as GPUs run them, compiled without one."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from test_machine_code import owners_are_equal, run


@pytest.fixture(scope="module")
def audits(shared_folder: Path) -> list[dict]:
    return run("remainder_code.py", shared_folder)


def test_each_was_compiled(audits: list[dict]) -> None:
    assert len(audits) == 2 * 2 * 7
    for a in audits:
        width = 16 if a["V_class"] == "unaligned" else 32
        assert a["load_bits"] >= width, a
        assert (a["store_bits"] >= width) == (a["kernel"] == "gradient"), a
        assert a["ex2_per_element"] >= 1, a


def test_nothing_spills(audits: list[dict]) -> None:
    assert [a for a in audits if a["spill_bytes"]] == []


def test_who_owns_a_column_does_not_depend_on_alignment(audits: list[dict]) -> None:
    owners_are_equal(audits)


def test_accesses_in_the_main_loop_are_128_bits_wide(audits: list[dict]) -> None:
    aligned = [a for a in audits if a["V_class"] == "aligned"]
    assert [a for a in aligned if a["load_bits"] != 128] == []
    assert [a for a in aligned if a["kernel"] == "gradient" and a["store_bits"] != 128] == []


def test_memory_stays_the_limit(audits: list[dict]) -> None:
    # Of 132 SMs with 4 issue slots at 1.7 GHz and 3.0 TB/s: 20 slots a column in bf16 that is read, 40 where
    # one is written too, and twice that in fp32.
    for a in audits:
        if a["arch"].startswith("sm_"):
            budget = 20 * a["tensors"] * (2 if a["dtype"] == "fp32" else 1)
            assert 5 < a["instructions_per_element"] <= budget, a

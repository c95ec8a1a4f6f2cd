"""The kernels as GPUs run them, compiled here without one: spills, load width, instructions per pair.

A part of what `make audit` compiles; tests/test_audit.py holds the committed whole.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

pytest.importorskip("triton")

from bench.audit.classes import V_CLASSES

# All in one process: another would wait for its compilations, five minutes, with other tests left to run.
pytestmark = pytest.mark.xdist_group("machine code")

ROOT = Path(__file__).parent.parent
# H200 has 132 SMs with 4 issue slots at about 1.7 GHz, and 4.3 TB/s: 2 × 2 bytes a pair leave 26.7 slots in
# bf16 for the value, 2 × 3 bytes 40 for the gradient and for both in one launch, and twice that in fp32.
# Statistics, which read what the value reads, pass that in 16 bits, where arithmetic is their limit there:
# TIGHT holds what they take.
BUDGET = {"value": 26.7, "gradient": 40, "value_grad": 40, "token_stats": 26.7}
TIGHT = {("token_stats", "both kl"): 45}
# The other families pass the slots of value and value_grad: these hold what the fast path gained (js took 206
# and 286). float32 adds the rounding errors of b − a, sm_80 and sm_100 differ by a few.
FAMILY_BUDGET = {
    ("value", "jeffreys"): 61, ("gradient", "jeffreys"): 22, ("value_grad", "jeffreys"): 83,
    ("value", "js"): 67, ("gradient", "js"): 24, ("value_grad", "js"): 89,
    ("value", "skew"): 67, ("gradient", "skew"): 27, ("value_grad", "skew"): 93,
    ("value", "tv"): 55, ("gradient", "tv"): 19, ("value_grad", "tv"): 72,
    # Without a fast path of its own; lk's sums take tv's.
    ("value", "nla"): 92, ("gradient", "nla"): 30, ("value_grad", "nla"): 134,
    ("value", "lk"): 55, ("gradient", "lk"): 38, ("value_grad", "lk"): 107,
}  # fmt: skip


def run(program: str, folder: Path) -> list[dict]:
    """The JSON lines of a program that needs the kernels as the compiler takes them.

    They are kept in `folder`: where several processes share the tests, one of them compiles.
    """
    kept = folder / f"{program}.jsonl"
    with FileLock(folder / f"{program}.lock"):
        if not kept.exists():
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            environment["PYTHONPATH"] = str(ROOT)
            done = subprocess.run(
                [sys.executable, str(ROOT / "tests" / program)],
                capture_output=True, text=True, check=False, env=environment,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-2000:]
            kept.write_text(done.stdout)
    return [json.loads(line) for line in kept.read_text().splitlines()]


@pytest.fixture(scope="module")
def audits(shared_folder: Path) -> list[dict]:
    return run("machine_code.py", shared_folder)


@pytest.fixture(scope="module")
def aligned(audits: list[dict]) -> list[dict]:
    """NVIDIA's, in rows that are multiples of 16 bytes: what is promised to be as fast as memory."""
    return [a for a in audits if a["V_class"] == "aligned" and a["arch"].startswith("sm_")]


def owners_are_equal(audits: list[dict]) -> None:
    """Threads reduce the same elements in the same order, however rows of one V are aligned."""
    pairs = 0
    found = {
        tuple(a[name] for name in ("kernel", "kind", "dtype", "arch", "V_class")): a["reductions"]
        for a in audits
    }
    for (*variant, V_class), reductions in found.items():
        plain = found.get((*variant, {"unaligned": "aligned", "odd, words": "odd"}.get(V_class)))
        if plain is not None:
            assert reductions == plain, (*variant, V_class)
            pairs += len(plain) > 0
    assert pairs > 0


def test_a_hundred_betas_temperatures_and_row_counts_compile_each_kernel_once(shared_folder: Path) -> None:
    (found,) = run("compile_keys.py", shared_folder)
    assert found["formulas"] == 3
    assert found["keys"] == {
        "pair_kernel": 9,
        "formula_sums_kernel": 3,
        "token_stats_splits_kernel": 1,
        "token_stats_merge_kernel": 1,
        "complement_kernel": 1,
        "complement_gradient_kernel": 1,
    }


def test_rows_that_are_loaded_alike_share_what_is_compiled(shared_folder: Path) -> None:
    (found,) = run("compile_keys.py", shared_folder)
    assert found["layouts"] == {"aligned": 1, "odd": 1, "odd, in words": 1, "unaligned": 1}


def test_no_launch_lets_the_compiler_fuse_sums_of_products(shared_folder: Path) -> None:
    # It fuses by how far a product lies from its sum: rows would have other bits in other layouts.
    (found,) = run("compile_keys.py", shared_folder)
    assert found["fp_fusion"] == [False]


def test_no_compilation_of_the_audit_is_fused_where_launches_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.audit import compiled
    from bench.audit.kernels import entries

    given = []

    def note(source: object, target: object, options: dict[str, object]) -> None:
        given.append(options)
        raise NotImplementedError

    monkeypatch.setattr(compiled, "triton_compile", note)
    for arch in ("sm_90", "gfx942"):
        with pytest.raises(NotImplementedError):
            compiled.compile_entry(next(entries()), "bf16", arch, "aligned")
    assert [options["enable_fp_fusion"] for options in given] == [False, False]


def test_kernels_write_themselves_what_a_compiler_would_fuse(shared_folder: Path) -> None:
    found = run("fused_code.py", shared_folder)
    assert len(found) == 4
    for kernel in found:
        # An expression that is not fused takes an instruction of every column.
        assert kernel["as written"] - kernel["fused"] < 0.5, kernel


def test_every_kernel_dtype_and_architecture_compiles(audits: list[dict]) -> None:
    families = ("kl", "jeffreys", "js", "skew", "tv", "nla", "lk")
    kernels = ("value", "gradient", "value_grad")
    variants = [
        ("bf16", "sm_90", "aligned"),
        ("fp32", "sm_80", "aligned"),
        ("bf16", "sm_100", "aligned"),
        ("bf16", "gfx942", "aligned"),
        ("bf16", "sm_90", "odd"),
    ]
    # Every kernel of every family, every kernel on every architecture, and every family there.
    expected = {(kernel, family, *variants[0]) for kernel in kernels for family in families}
    expected |= {(kernel, "kl", *variant) for kernel in kernels for variant in variants}
    expected |= {("value_grad", family, *variant) for family in families for variant in variants}
    expected |= {("token_stats", "both kl", *variant) for variant in variants}
    expected |= {(kernel, "kl", "fp32", "sm_90", "aligned") for kernel in kernels}
    expected |= {("value", "kl", "fp16", "sm_90", "aligned")}
    found = {(a["kernel"], a["kind"].split(",")[0], a["dtype"], a["arch"], a["V_class"]) for a in audits}
    assert found >= expected


def test_nothing_spills(audits: list[dict]) -> None:
    assert {a["V_class"] for a in audits} == set(V_CLASSES)
    assert [a for a in audits if a["spill_bytes"]] == []


def test_who_owns_a_column_does_not_depend_on_alignment(audits: list[dict]) -> None:
    # Bits would: Triton's own choice of layouts goes by what divides addresses and strides.
    owners_are_equal(audits)


def test_every_load_was_found(audits: list[dict]) -> None:
    # A count of nothing would pass every bound below.
    for a in audits:
        width = 16 if a["V_class"] == "unaligned" and a["dtype"] != "fp32" else 32
        assert a["load_bits"] >= width, a
        assert (a["store_bits"] >= width) == ("grad" in a["kernel"]), a
        assert a["ex2_per_element"] >= 1, a
        assert a["instructions_per_element"] > 10, a


def test_accesses_in_the_main_loop_are_128_bits_wide(aligned: list[dict]) -> None:
    assert [a for a in aligned if a["load_bits"] != 128] == []
    assert [a for a in aligned if "grad" in a["kernel"] and a["store_bits"] != 128] == []


def test_rows_of_any_alignment_take_few_instructions_more(audits: list[dict]) -> None:
    # Pairs that lie in two words are loaded twice and shifted together; gradients' words are their own. Runs
    # that are not aligned are loaded 16 bits at a time, and their gradients stored so.
    variants = {
        V_class: {
            (a["kernel"], a["kind"]): a["instructions_per_element"]
            for a in audits
            if (a["dtype"], a["arch"], a["V_class"]) == ("bf16", "sm_90", V_class)
        }
        for V_class in V_CLASSES
    }
    for V_class, most in (("odd", 1.25), ("odd, words", 1.2), ("unaligned", 1.25)):
        assert variants[V_class]
        for variant, instructions in variants[V_class].items():
            assert instructions <= variants["aligned"][variant] * most, (variant, V_class)


def test_memory_stays_the_limit(aligned: list[dict]) -> None:
    for a in aligned:
        if not a["kind"].startswith(("kl", "both kl")):
            budget = FAMILY_BUDGET[a["kernel"], a["kind"].split(",")[0]]
            budget *= 1.35 if a["dtype"] == "fp32" else 1
            budget *= 1.7 if a["kind"].endswith("to both") else 1
            assert a["instructions_per_element"] <= budget, a
            assert 1 <= a["ex2_per_element"] <= 9, a
            continue
        budget = BUDGET[a["kernel"]] * (2 if a["dtype"] == "fp32" else 1)
        if a["dtype"] != "fp32":
            budget = TIGHT.get((a["kernel"], a["kind"]), budget)
        if a["kind"].endswith("to both"):
            budget *= 4 / 3  # a fourth tensor's bytes
        assert a["instructions_per_element"] <= budget, a
        # 16 exponentials a clock and SM allow 3.3 a pair in bf16 where two tensors are read at that speed,
        # 5 where three are moved.
        assert 1 <= a["ex2_per_element"] <= 5, a

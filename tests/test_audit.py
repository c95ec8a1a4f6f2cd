"""The audit without a compiler: paths through literal code, the model by hand, the committed figures."""

from __future__ import annotations

import dataclasses
import json

import pytest

pytest.importorskip("triton")

from bench import model_docs
from bench.audit import RESULTS, Row, load
from bench.compiled import ARCHITECTURES
from bench.gpu_model import Counts, bound, lines, resident_programs
from bench.gpus import GPUS, Gpu, Known, gpu
from bench.kernels import DTYPES, V_CLASSES, entries, steps
from bench.machine_code import main_paths, mix, parse_gcn, parse_sass

# A masked row leaves early; the loop has a rare branch (L_x_2) that is longer than the jump over it, and the
# loop is left by the predicated CALL that ptxas makes of such jumps; a second, careful loop follows.
SASS = """
        /*0000*/                   LDG.E.U8 R2, desc[UR6][R2.64] ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
        /*0020*/                   ULDC UR4, c[0x0][0x10] ;
.L_x_1:
        /*0030*/                   LDG.E.128 R4, desc[UR6][R26.64] ;
        /*0040*/                   LDG.E.U16 R8, desc[UR6][R28.64] ;
        /*0050*/                   SHFL.BFLY PT, R3, R2, 0x10, 0x1f ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/               @P1 BRA `(.L_x_2) ;
        /*0080*/                   MUFU.RCP R9, R9 ;
        /*0090*/                   FADD R9, R9, R8 ;
        /*00a0*/                   FADD R9, R9, R8 ;
.L_x_2:
        /*00b0*/                   FFMA R9, R9, R8, R7 ;
        /*00c0*/                   FFMA2 R10, R9, R8, R7 ;
        /*00d0*/                   FSEL R9, R9, R8, P0 ;
        /*00e0*/                   MUFU.EX2 R9, R9 ;
        /*00f0*/               @P2 CALL.REL.NOINC `(.L_x_3) ;
        /*0100*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0110*/                   DADD R2, R2, R4 ;
        /*0120*/               @P0 BRA `(.L_x_5) ;
.L_x_4:
        /*0130*/                   LDG.E R4, desc[UR6][R26.64] ;
        /*0140*/                   MUFU.EX2 R9, R9 ;
        /*0150*/               @P2 BRA `(.L_x_4) ;
.L_x_5:
        /*0160*/                   STG.E.64 desc[UR6][R2.64], R4 ;
        /*0170*/                   EXIT ;
.L_x_0:
        /*0180*/                   EXIT ;
.L_x_6:
        /*0190*/                   BRA `(.L_x_6) ;
"""

# The loop's head (LBB0_3) stands below a part of its body (LBB0_2), as LLVM lays rotated loops out.
GCN = """
_kernel:                                ; @_kernel
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_cbranch_vccz .LBB0_9
	s_branch .LBB0_3
.LBB0_1:                                ; rare
	v_add_f32_e32 v1, v1, v2
	v_add_f32_e32 v1, v1, v2
.LBB0_2:
	.loc	1 2 3                           ; a comment, s_nop 0
	v_exp_f32_e32 v1, v1
	s_cbranch_scc0 .LBB0_8
.LBB0_3:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v[0:3], v4, s[4:7], 0 offen
	global_load_ushort v5, v[0:1], off
	s_barrier
	v_cmp_gt_f32_e64 s[0:1], v1, v2
	s_cbranch_vccnz .LBB0_2
	s_branch .LBB0_1
.LBB0_8:
	s_and_saveexec_b64 s[0:1], vcc
	s_cbranch_execz .LBB0_9
	global_store_short v[0:1], v2, off
.LBB0_9:
	s_endpgm
"""


def opcodes(path: list) -> list[str]:
    return [here.opcode for here in path]


def test_sass_loop_by_its_usual_path() -> None:
    paths = main_paths(parse_sass(SASS.splitlines()))
    (body,), overhead = paths.bodies, paths.overhead
    assert opcodes(body) == [
        *("LDG.E.128", "LDG.E.U16", "SHFL.BFLY", "BAR.SYNC.DEFER_BLOCKING", "BRA"),
        *("FFMA", "FFMA2", "FSEL", "MUFU.EX2", "CALL.REL.NOINC", "BRA"),
    ]
    assert opcodes(overhead) == ["LDG.E.U8", "BRA", "ULDC", "DADD", "BRA", "STG.E.64", "EXIT"]
    found = mix(body)
    assert (found.instructions, found.ex2, found.special, found.alu) == (11, 1, 1, 1)
    assert found.fma == 3  # FFMA2 does the work of two
    assert found.lsu == 4 + 1 + 1  # four words, half a word, a shuffle
    assert found.exchanges == 2
    assert (found.load_bits, found.store_bits) == (128, 0)


def test_sass_without_a_loop_counts_the_way_that_computes() -> None:
    sass = """
        /*0000*/              @!P0 BRA `(.L_x_0) ;
        /*0010*/                   LDG.E.U16 R4, desc[UR6][R26.64] ;
        /*0020*/                   MUFU.EX2 R9, R9 ;
        /*0030*/                   F2FP.BF16.F32.PACK_AB R9, R9, R8 ;
        /*0040*/                   STG.E.64 desc[UR6][R2.64], R4 ;
        /*0050*/                   EXIT ;
.L_x_0:
        /*0060*/                   EXIT ;
    """
    paths = main_paths(parse_sass(sass.splitlines()))
    (body,), overhead = paths.bodies, paths.overhead
    assert opcodes(body) == ["BRA", "LDG.E.U16", "MUFU.EX2", "F2FP.BF16.F32.PACK_AB", "STG.E.64", "EXIT"]
    assert overhead == []
    assert (mix(body).load_bits, mix(body).store_bits, mix(body).alu) == (16, 64, 1)


def test_what_the_last_program_of_a_row_does_is_apart() -> None:
    sass = """
.L_x_1:
        /*0000*/                   LDG.E.128 R4, desc[UR6][R26.64] ;
        /*0010*/                   MUFU.EX2 R9, R9 ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   STG.E R4, desc[UR6][R26.64] ;
        /*0040*/               @P1 EXIT ;
        /*0050*/                   DADD R2, R2, R4 ;
        /*0060*/                   EXIT ;
    """
    paths = main_paths(parse_sass(sass.splitlines()))
    assert [opcodes(body) for body in paths.bodies] == [["LDG.E.128", "MUFU.EX2", "BRA"]]
    assert opcodes(paths.overhead) == ["STG.E", "EXIT"]
    assert opcodes(paths.finish) == ["DADD", "EXIT"]


def test_gcn_loop_laid_out_backwards() -> None:
    paths = main_paths(parse_gcn(GCN.splitlines()))
    (body,), overhead = paths.bodies, paths.overhead
    assert set(opcodes(body)) == {
        *("buffer_load_dwordx4", "global_load_ushort", "s_barrier", "v_cmp_gt_f32_e64", "s_cbranch_vccnz"),
        *("v_exp_f32_e32", "s_cbranch_scc0"),
    }
    assert len(body) == 7
    found = mix(body)
    assert (found.ex2, found.special, found.alu, found.fma) == (1, 1, 1, 0)
    assert (found.exchanges, found.load_bits) == (1, 128)
    # What a store's lanes all skip is rare: the way out goes through the store.
    assert opcodes(overhead)[-1] == "s_endpgm"
    assert "global_store_short" in opcodes(overhead)


def test_exchanges_that_do_not_wait_for_one_another_count_once() -> None:
    sass = """
        /*0000*/                   SHFL.BFLY PT, R2, R1, 0x10, 0x1f ;
        /*0010*/                   SHFL.BFLY PT, R4, R3, 0x10, 0x1f ;
        /*0020*/                   FADD R5, R2, R4 ;
        /*0030*/                   SHFL.BFLY PT, R6, R5, 0x8, 0x1f ;
        /*0040*/                   STS [R7], R6 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   SHFL.BFLY PT, R8, R1, 0x10, 0x1f ;
        /*0070*/                   SHFL.BFLY PT, R9, R3, 0x10, 0x1f ;
        /*0080*/                   EXIT ;
    """
    # One of the first two, the third, the barrier, one of the last two.
    assert mix(parse_sass(sass.splitlines())).exchanges == 4


def counts(**changed: object) -> Counts:
    """64 columns of 2 bytes in tiles of 16, by programs of 2 warps of 4: a lane has 2 columns of a tile."""
    plain = Counts(
        itemsize=2, V=64, aligned=True, columns=16, warps=2, warp=4, registers=20, shared_bytes=0,
        store_bits=0, instructions=30.0, fma=10.0, alu=8.0, special=2.0, lsu=1.0, exchanges=3,
        overhead_instructions=100, finish_instructions=40, reads=2, writes=0, l2_reads=0, programs=1, ahead=0,
    )  # fmt: skip
    return dataclasses.replace(plain, **changed)


def toy() -> Gpu:
    """One core at 1 GHz, 8 lanes of issue, 4 of the others, 1 of ex2; memory moves 1 byte a ns, the L2 2."""
    figures = {
        "cores": 1, "ghz": 1.0, "copy_tbps": 1e-3, "l2_tbps": 2e-3, "issue": 8, "fma": 4, "alu": 4,
        "special": 1, "lsu": 4, "registers": 4 * 24 * 4 * 3, "warps": 16, "programs": 32, "shared_kb": 100,
        "latency_ns": 50, "clocks_alone": 2, "clocks_exchange": 10,
    }  # fmt: skip
    return Gpu("toy", "sm_0", **{name: Known(value, "made up") for name, value in figures.items()})


def test_lines_by_hand() -> None:
    found = lines(counts(), toy(), rows=12)
    # 12 rows of 64 columns of 2 × 2 bytes are 3072 bytes; 4 tiles a row, 768 elements; 8 threads of
    # overhead, and of what the last program of a row does at its end.
    expected = {
        "memory": 3072.0,
        "L2": 3072 / 2,
        "issue": (768 * 30 + 12 * (100 + 40) * 8) / 8,
        "fma": 768 * 10 / 4,
        "alu": 768 * 8 / 4,
        "ex2": 768 * 2.0,
        "lsu": 768 * 1 / 4,
        # 20 registers round to 24; 3 warps a scheduler, 12 a core, 6 programs: 2 waves. A program takes
        # 50 + 200 for its overhead, and 50 + (2 · 30 · 2 + 3 · 10) for each of 4 tiles.
        "latency": 2 * (250 + 4 * 200.0),
    }
    assert {name: seconds * 1e9 for name, seconds in found.items()} == pytest.approx(expected)
    assert bound(counts(), toy()) == ("issue", pytest.approx(3072 / 4560))


def test_ragged_rows_cost_whole_tiles() -> None:
    found = lines(counts(V=65), toy(), rows=12)
    assert found["ex2"] == pytest.approx(12 * 5 * 16 * 2e-9)
    assert found["memory"] == pytest.approx(12 * 65 * 4e-9)


def test_a_tile_ahead_hides_the_wait() -> None:
    # own = 150: with one tile ahead (50 + 150) / 2 = 100 is below it.
    assert lines(counts(ahead=1), toy(), rows=6)["latency"] == pytest.approx((250 + 4 * 150) * 1e-9)


def test_programs_that_share_a_row() -> None:
    # One a tile: 12 · 4 programs in ⌈48/6⌉ waves of one tile; two a row: ⌈24/6⌉ waves of two.
    assert lines(counts(programs=4), toy(), rows=12)["latency"] == pytest.approx(8 * 450e-9)
    assert lines(counts(programs=2), toy(), rows=12)["latency"] == pytest.approx(4 * 650e-9)
    assert lines(counts(programs=2), toy(), rows=12)["issue"] == pytest.approx(
        (768 * 30 + (24 * 100 + 12 * 40) * 8) / 8 * 1e-9
    )


def test_writes_and_second_reads() -> None:
    found = lines(counts(writes=1, l2_reads=2, store_bits=64, aligned=False), toy(), rows=12)
    assert found["memory"] == pytest.approx(3 * 1536e-9)
    # 4 lanes of 64 bits span 32 bytes: two sectors where one would do.
    assert found["L2"] == pytest.approx((2 + 2 + 2) * 1536e-9 / 2)


def test_a_unit_without_a_known_limit_has_no_line() -> None:
    assert "fma" not in lines(counts(), dataclasses.replace(toy(), fma=Known(0, "made up")))


@pytest.mark.parametrize(
    ("name", "registers", "warps", "warp", "shared", "programs"),
    [
        # 112 · 32 registers, 16384 a scheduler: 4 warps each, 16 in all.
        ("H100 SXM", 108, 4, 32, 16, 4),
        ("H100 SXM", 64, 4, 32, 0, 8),
        ("H100 SXM", 16, 1, 32, 0, 32),  # program slots
        ("H100 SXM", 16, 4, 32, 0, 16),  # 64 warps
        ("H100 SXM", 16, 4, 32, 75 * 1024, 3),  # 228 KB, 76 each with the system's
        ("H100 SXM", 255, 16, 32, 0, 0),  # 2 warps a scheduler: 8 of 16
        # 512 registers of a lane: 80 fit 6 times, 24 waves of a compute unit.
        ("MI300X", 78, 4, 64, 512, 6),
    ],
)
def test_resident_programs(
    name: str, registers: int, warps: int, warp: int, shared: int, programs: int
) -> None:
    one = counts(registers=registers, warps=warps, warp=warp, shared_bytes=shared)
    assert resident_programs(one, gpu(name)) == programs


def test_every_figure_has_an_origin() -> None:
    for one in GPUS:
        for field in dataclasses.fields(one):
            known = getattr(one, field.name)
            if isinstance(known, Known):
                assert known.value >= 0
                assert known.origin, (one.name, field.name)


def test_committed_audit_is_complete() -> None:
    document = json.loads(RESULTS.read_text())
    assert list(document) == ["triton", "date", "rows"]
    named = {
        (row["kernel"], row["kind"], row["dtype"], row["arch"], row["V_class"]) for row in document["rows"]
    }
    assert len(named) == len(document["rows"])
    assert named == {
        (entry.kernel, entry.kind, dtype, arch, V_class)
        for entry in entries()
        for dtype in DTYPES
        for arch in ARCHITECTURES
        for V_class in V_CLASSES
    }
    assert [row for row in document["rows"] if row["spill_bytes"]] == []


def test_committed_predictions_follow_from_the_committed_counts() -> None:
    stored = [Row(**row) for row in json.loads(RESULTS.read_text())["rows"]]
    assert stored == [row.predicted() for row in stored]
    assert {row.bound for row in stored} <= {"memory", "L2", "issue", "fma", "alu", "ex2", "lsu", "latency"}
    assert all(0 < row.predicted_share_of_copy <= 1 for row in stored)


def test_docs_hold_the_committed_figures() -> None:
    page = model_docs.PAGE.read_text()
    found = model_docs.regions()
    assert page == model_docs.fill(page, found), "python -m bench.audit --docs"
    for name, text in found.items():
        assert f"<!-- audit:{name} -->\n{text}\n<!-- end -->" in page
    assert "not measured" in page


def test_a_stale_figure_in_the_docs_is_replaced() -> None:
    page = "before\n<!-- audit:x -->\nold\n<!-- end -->\nafter\n"
    assert model_docs.fill(page, {"x": "new"}) == "before\n<!-- audit:x -->\nnew\n<!-- end -->\nafter\n"
    with pytest.raises(KeyError):
        model_docs.fill(page, {"y": "new"})


def test_works_are_made_of_audited_kernels() -> None:
    assert steps("reverse_kl", "value") == [("value", "kl")]
    assert steps("reverse_kl", "value_grad") == [("value_grad", "kl, to a")]
    assert steps("skew_forward_kl", "forward_backward") == [("value", "skew"), ("gradient", "skew, to b")]
    _, rows = load()
    one = gpu("H100 SXM")
    (value,) = [
        row for row in rows
        if (row.kernel, row.kind, row.dtype, row.arch, row.V_class)
        == ("value", "kl", "bf16", "sm_90", "aligned")
    ]  # fmt: skip
    # 2 U at 3.0 TB/s, from the sizes alone.
    assert lines(value.counts(), one)["memory"] == pytest.approx(2 * 8192 * 128256 * 2 / 3.0e12)

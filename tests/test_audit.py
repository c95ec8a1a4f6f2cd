"""The audit without a compiler: paths through literal code, occupancy by hand, the committed figures."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from bench.audit import docs, rows
from bench.audit.classes import V_CLASSES
from bench.audit.kernels import Entry, entries
from bench.audit.machine_code import main_loops, mix, parse_gcn, parse_sass
from bench.audit.matrix import Case, whole
from bench.audit.occupancy import CORES, budget, resident_programs
from bench.audit.rows import RESULTS, Row, load, name_of
from bench.audit.sources import hash_of

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
    (body,) = main_loops(parse_sass(SASS.splitlines()))
    assert opcodes(body) == [
        *("LDG.E.128", "LDG.E.U16", "SHFL.BFLY", "BAR.SYNC.DEFER_BLOCKING", "BRA"),
        *("FFMA", "FFMA2", "FSEL", "MUFU.EX2", "CALL.REL.NOINC", "BRA"),
    ]
    found = mix(body)
    assert (found.instructions, found.ex2) == (11, 1)
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
    (body,) = main_loops(parse_sass(sass.splitlines()))
    assert opcodes(body) == ["BRA", "LDG.E.U16", "MUFU.EX2", "F2FP.BF16.F32.PACK_AB", "STG.E.64", "EXIT"]
    assert (mix(body).load_bits, mix(body).store_bits) == (16, 64)


def test_gcn_loop_laid_out_backwards() -> None:
    (body,) = main_loops(parse_gcn(GCN.splitlines()))
    assert set(opcodes(body)) == {
        *("buffer_load_dwordx4", "global_load_ushort", "s_barrier", "v_cmp_gt_f32_e64", "s_cbranch_vccnz"),
        *("v_exp_f32_e32", "s_cbranch_scc0"),
    }
    assert len(body) == 7
    found = mix(body)
    assert (found.ex2, found.load_bits) == (1, 128)


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "programs"),
    [
        # 112 · 32 registers, 16384 a scheduler: 4 warps each, 16 in all.
        ("sm_90", 108, 4, 16, 4),
        ("sm_90", 64, 4, 0, 8),
        ("sm_90", 16, 1, 0, 32),  # program slots
        ("sm_90", 16, 4, 0, 16),  # 64 warps
        ("sm_90", 16, 4, 75 * 1024, 3),  # 228 KB, 76 each with the system's
        ("sm_90", 255, 16, 0, 0),  # 2 warps a scheduler: 8 of 16
        # 512 registers of a lane: 80 fit 6 times, 24 waves of a compute unit.
        ("gfx942", 78, 4, 512, 6),
    ],
)
def test_resident_programs(arch: str, registers: int, warps: int, shared: int, programs: int) -> None:
    assert resident_programs(CORES[arch], registers, warps, shared) == programs


def test_the_budget_is_what_the_issue_slots_leave() -> None:
    assert (budget(2, 2), budget(3, 2), budget(3, 4)) == (26.7, 40.1, 80.2)


def row_of(case: Case, source: str) -> Row:
    return Row(*name_of(case), 128256, 100, 0, 0, 128, 0, 20.0, 2.0, 2, 26.7, 4, 1024, 4, source)


def test_what_is_unchanged_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(whole())[:6]
    compiled: list[tuple[str, ...]] = []

    class Pool:
        def __init__(self, **_: object) -> None: ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...
        def map(self, _: object, *columns: tuple[object, ...]) -> list[Row]:
            found = [row_of(Case(*case), "") for case in zip(*columns, strict=True)]
            compiled.extend(row.name for row in found)
            return found

    monkeypatch.setattr(rows, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(rows, "hash_of", lambda case: f"now {case.V_class}")
    earlier = [row_of(case, f"now {case.V_class}") for case in cases]
    earlier[1] = replace(earlier[1], source="before")
    found = list(rows.audit(cases, earlier[:5]))
    assert compiled == [name_of(cases[1]), name_of(cases[5])]
    assert [row.name for row in found] == list(map(name_of, cases))
    assert [row.source for row in found] == [f"now {case.V_class}" for case in cases]
    assert list(rows.audit(cases, found)) == found
    assert len(compiled) == 2


def test_another_kernel_or_case_is_another_source(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = list(whole())[:2]
    found = []
    for code in ("one", "other", "one"):
        kernel = SimpleNamespace(cache_key=code, arg_names=["a_ptr", "V"])
        monkeypatch.setattr(Entry, "function", kernel)
        found.append((hash_of(first), hash_of(second)))
    assert found[0] == found[2]
    assert len({*found[0], *found[1]}) == 4


def test_a_whole_audit_has_every_kernel_class_and_architecture() -> None:
    cases = list(whole())
    assert len(set(map(name_of, cases))) == len(cases)
    for entry in entries():
        own = {case[1:] for case in cases if case.entry == entry}
        classes = [name for name in V_CLASSES if ("bf16", "sm_90", name) in own]
        # Rows of one tensor in words are read as any others.
        assert classes == [name for name in V_CLASSES if name != "odd, words" or len(classes) == 4]
        assert {("bf16", arch, name) for arch in ("sm_80", "sm_90", "sm_100") for name in classes} <= own
        assert {("fp32", "sm_90", name) for name in ("aligned", "unaligned")} <= own
        assert ("bf16", "gfx942", "aligned") in own
        fp32 = {arch for dtype, arch, _ in own if dtype == "fp32"}
        assert fp32 == (
            {"sm_80", "sm_90", "sm_100"} if entry.kernel in ("value_grad", "token_stats") else {"sm_90"}
        )


def test_committed_audit_is_complete() -> None:
    document = json.loads(RESULTS.read_text())
    assert list(document) == ["triton", "date", "rows"]
    keys = "kernel", "kind", "dtype", "arch", "V_class"
    named = [tuple(row[key] for key in keys) for row in document["rows"]]
    classes = {V_class for *_, V_class in named}
    assert {"aligned", "odd"} <= classes
    assert sorted(named) == sorted(name_of(case) for case in whole() if case.V_class in classes)
    assert [row for row in document["rows"] if row["spill_bytes"]] == []


def test_committed_occupancy_follows_from_the_committed_counts() -> None:
    for row in load()[1]:
        core = CORES[row.arch]
        assert row.programs_per_core == resident_programs(core, row.registers, row.warps, row.shared_bytes)
        assert row.programs_per_core > 0


def test_docs_hold_the_committed_figures() -> None:
    page = docs.PAGE.read_text()
    found = docs.regions()
    assert page == docs.fill(page, found), "python -m bench audit --docs"
    for name, text in found.items():
        assert f"<!-- audit:{name} -->\n{text}\n<!-- end -->" in page
    assert "not measured" in page


def test_a_stale_figure_in_the_docs_is_replaced() -> None:
    page = "before\n<!-- audit:x -->\nold\n<!-- end -->\nafter\n"
    assert docs.fill(page, {"x": "new"}) == "before\n<!-- audit:x -->\nnew\n<!-- end -->\nafter\n"
    with pytest.raises(KeyError):
        docs.fill(page, {"y": "new"})

"""Counts of what is executed: classes of PTX, and machine instructions inferred from its lines."""

from __future__ import annotations

import pytest

from bench.audit import executed
from bench.audit.classes import V_CLASSES
from bench.audit.kernels import entries
from bench.audit.sass_of_ptx import blocks, executed_instructions, numbered
from tests.ptx.counts import access_of, class_of
from tests.ptx.parser import Statement

CLASSES = {
    "ld.global.v4.b32": ("global load", 128),
    "st.global.b16": ("global store", 16),
    "ld.global.gpu.acquire.b32": ("global load", 32),
    "atom.global.gpu.acq_rel.add.f32": ("global atomic", 32),
    "st.shared.v2.b32": ("shared store", 64),
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16": ("shared load", 128),
    "ld.param.b64": ("parameter load", None),
    "bar.sync": ("barrier", None),
    "redux.sync.max.s32": ("exchange", None),
    "shfl.sync.bfly.b32": ("exchange", None),
    "bra.uni": ("branch", None),
    "setp.lt.f32": ("comparison and choice", None),
    "mov.b64": ("move", None),
    "cvt.rn.bf16x2.f32": ("conversion", None),
    "cvt.f64.f32": ("float64", None),
    "fma.rn.f64": ("float64", None),
    "fma.rn.ftz.f32": ("float32", None),
    "ex2.approx.ftz.f32": ("approximation", None),
    "div.full.f32": ("approximation", None),
    "mad.wide.s32": ("integer", None),
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_instructions(name: str) -> None:
    statement = Statement(1, name, None, False, [])
    of, bits = CLASSES[name]
    assert class_of(statement) == of
    assert access_of(statement) == (None if bits is None else (of, bits))


SASS = """
	//## File "/tmp/x/kernel.ptx", line 10
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   IADD3 R1, R1, 0x1, RZ ;
	//## File "/tmp/x/kernel.ptx", line 12
        /*0030*/                   FFMA R4, R4, R4, R4 ;
        /*0040*/                   FADD R4, R4, R4 ;
	//## File "/tmp/x/kernel.ptx", line 10
        /*0050*/                   MUFU.EX2 R4, R4 ;
	//## File "/tmp/x/kernel.ptx", line 13
        /*0060*/              @P1  BRA `(.L_x_1) ;
.L_x_0:
        /*0070*/                   EXIT ;
"""


def test_blocks_execute_what_most_of_their_instructions_say() -> None:
    found = blocks(SASS)
    assert [[opcode for _, opcode in block] for block in found] == [
        ["MOV", "BRA"],
        ["IADD3", "FFMA", "FADD", "MUFU.EX2", "BRA"],
        ["EXIT"],
    ]
    # One instruction has been moved into the loop, and one belongs to no line.
    assert executed_instructions(found, {10: 4, 12: 100, 13: 100}) == 2 * 4 + 5 * 100 + 0


def test_every_instruction_is_numbered_and_nothing_else() -> None:
    ptx = """.version 8.7
.entry x()
{
.reg .b32 %r<3>;
.loc 1 7 3 // x.py
add.s32 %r1, %r1, 1;
@%p0 bra $L;
$L:
ret;
}
"""
    body = numbered(ptx + '.section .debug_info { .b8 1 }\n.file 1 "x.py"\n')
    assert [line for line in body.split("\n") if line.startswith(".loc")] == [
        ".loc 1 6 0",
        ".loc 1 7 0",
        ".loc 1 9 0",
    ]
    assert "debug_info" not in body
    assert "x.py" not in body


def test_an_executed_row_takes_more_than_its_loops() -> None:
    (entry,) = (x for x in entries() if (x.kernel, x.kind) == ("value", "kl"))
    assert V_CLASSES["aligned"].V > 16384
    found = executed.execute(entry, "bf16", "sm_90", 32_000)
    # Two bytes a column of both tensors, read about once; nothing but states and statistics is stored.
    assert 4 <= found.loaded < 6
    assert found.reads < 1.5
    assert found.stored < 0.1
    # ptxas makes about as many instructions as it is given, and an exponential stays one.
    assert 0.7 < found.sass / found.ptx < 1.3
    assert found.counts.instructions["approximation"] * 32 / (executed.ROWS * 32_000) > 2
    assert found.barriers > 8

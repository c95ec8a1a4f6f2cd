"""What lanes, warps and blocks do together: exchanges, barriers, shared memory, divergent ways, atomics."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.parser import Unsupported
from tests.ptx.program import ExecutionError, Settings
from tests.ptx.snippets import element, run

SEEDS = range(20)


def words(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, n, np.uint32)


def per_thread(body: str, source: np.ndarray, **options: object) -> np.ndarray:
    """%r0 is this thread's word of `source`, %r1 what comes back."""
    out = np.zeros_like(source)
    begin = element(0, 4, "%rd40") + "  ld.global.b32 %r0, [%rd40];\n"
    end = "\n" + element(1, 4, "%rd41") + "  st.global.b32 [%rd41], %r1;\n"
    run(begin + body + end, [source, out], **options)
    return out


@pytest.mark.parametrize("by", [1, 2, 4, 8, 16])
def test_butterflies(by: int) -> None:
    x = words(32)
    got = per_thread(f"shfl.sync.bfly.b32 %r1, %r0, {by}, 31, -1;", x)
    np.testing.assert_array_equal(got, x[np.arange(32) ^ by])


def test_shuffles_by_index_and_distance() -> None:
    x, lane = words(32), np.arange(32)
    np.testing.assert_array_equal(per_thread("shfl.sync.idx.b32 %r1, %r0, 5, 31, -1;", x), np.full(32, x[5]))
    up = per_thread("shfl.sync.up.b32 %r1, %r0, 3, 0, -1;", x)
    np.testing.assert_array_equal(up, x[np.where(lane >= 3, lane - 3, lane)])
    down = per_thread("shfl.sync.down.b32 %r1, %r0, 3, 31, -1;", x)
    np.testing.assert_array_equal(down, x[np.where(lane + 3 < 32, lane + 3, lane)])
    # Segments of eight lanes: 32 - 8 in the upper bits.
    within = per_thread(f"shfl.sync.down.b32 %r1, %r0, 3, {24 << 8 | 31}, -1;", x)
    np.testing.assert_array_equal(within, x[np.where(lane % 8 + 3 < 8, lane + 3, lane)])
    valid = per_thread("shfl.sync.down.b32 %r2|%p1, %r0, 3, 31, -1;\n selp.b32 %r1, 1, 0, %p1;", x)
    np.testing.assert_array_equal(valid, lane + 3 < 32)


REDUCTIONS = {
    "add.s32": lambda x: x.sum(dtype=np.uint32),
    "add.u32": lambda x: x.sum(dtype=np.uint32),
    "max.s32": lambda x: x.view(np.int32).max(),
    "min.s32": lambda x: x.view(np.int32).min(),
    "max.u32": lambda x: x.max(),
    "min.u32": lambda x: x.min(),
    "and.b32": lambda x: np.bitwise_and.reduce(x | 1),
    "or.b32": lambda x: np.bitwise_or.reduce(x & 7),
    "xor.b32": np.bitwise_xor.reduce,
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_of_a_warp(name: str) -> None:
    x = words(32)
    prepare = {"and.b32": "or.b32 %r0, %r0, 1;", "or.b32": "and.b32 %r0, %r0, 7;"}.get(name, "")
    got = per_thread(f"{prepare} redux.sync.{name} %r1, %r0, 0xffffffff;", x)
    assert set(got.tolist()) == {int(REDUCTIONS[name](x)) % 2**32}


def test_votes() -> None:
    x = words(32)
    got = per_thread("setp.gt.s32 %p0, %r0, 0;\n vote.sync.ballot.b32 %r1, %p0, -1;", x)
    assert set(got.tolist()) == {sum(int(v) << n for n, v in enumerate(x.view(np.int32) > 0))}


def test_registers_are_packed_and_unpacked() -> None:
    x = words(32)
    got = per_thread("mov.b32 {%rs0, %rs1}, %r0;\n mov.b32 %r1, {%rs1, %rs0};", x)
    np.testing.assert_array_equal(got, x << 16 | x >> 16)
    got = per_thread(
        "mov.b64 %rd50, {%r0, 7};\n { .reg .b32 tmp; mov.b64 {tmp, %r2}, %rd50; }\n add.s32 %r1, %r2, %r0;", x
    )
    np.testing.assert_array_equal(got, x + np.uint32(7))


def test_predicated_lanes_keep_what_they_had() -> None:
    x = words(32)
    got = per_thread(
        "mov.b32 %r1, 5;\n setp.lt.s32 %p0, %r0, 0;\n @%p0 add.s32 %r1, %r0, 1;\n @!%p0 sub.s32 %r1, %r1, 1;",
        x,
    )
    np.testing.assert_array_equal(got, np.where(x.view(np.int32) < 0, x + np.uint32(1), np.uint32(4)))


def test_divergent_loops_meet_again() -> None:
    # Each lane halves its number until it is odd; the reduction behind the loop needs all of them.
    x = words(32) | 1 << 31
    x = (x >> np.arange(32).astype(np.uint32)) << np.arange(32).astype(np.uint32)
    body = """
      mov.b32 %r1, %r0;
    $again:
      and.b32 %r2, %r1, 1;
      setp.ne.b32 %p0, %r2, 0;
      @%p0 bra $odd;
      shr.u32 %r1, %r1, 1;
      bra.uni $again;
    $odd:
      redux.sync.or.b32 %r1, %r1, 0xffffffff;
    """
    odd = [v // (v & -v) for v in x.tolist()]
    assert set(per_thread(body, x).tolist()) == {int(np.bitwise_or.reduce(np.array(odd, np.uint32)))}


def test_an_exchange_of_lanes_on_different_ways_is_an_error() -> None:
    body = """
      setp.lt.u32 %p0, %r61, 16;
      @%p0 bra $half;
      shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;
    $half:
    """
    with pytest.raises(ExecutionError, match=r"only lanes ffff0000 reach .* together"):
        per_thread(body, words(32))


TRANSPOSE = """
  mov.b32 %r10, global_smem;
  shl.b32 %r11, %r61, 2;
  add.s32 %r11, %r10, %r11;
  st.shared.b32 [%r11], %r0;
  {barrier}
  sub.s32 %r12, 127, %r61;
  shl.b32 %r12, %r12, 2;
  add.s32 %r12, %r10, %r12;
  ld.shared.b32 %r1, [%r12];
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_warps_exchange_through_shared_memory(seed: int) -> None:
    x = words(128)
    settings = Settings(seed=seed, quantum=3)
    got = per_thread(TRANSPOSE.format(barrier="bar.sync 0;"), x, warps=4, shared_bytes=512, settings=settings)
    np.testing.assert_array_equal(got, x[::-1])


def test_a_missing_barrier_is_found() -> None:
    for seed in SEEDS:
        with pytest.raises(ExecutionError, match=r"shared byte \d+: read (before|without a barrier)"):
            per_thread(
                TRANSPOSE.format(barrier=""),
                words(128),
                warps=4,
                shared_bytes=512,
                settings=Settings(seed=seed, quantum=3),
            )


def test_a_missing_barrier_gives_a_wrong_answer_where_nothing_looks() -> None:
    found = 0
    x = words(128)
    for seed in SEEDS:
        settings = Settings(seed=seed, quantum=3, hazards=False)
        got = per_thread(TRANSPOSE.format(barrier=""), x, warps=4, shared_bytes=512, settings=settings)
        found += not np.array_equal(got, x[::-1])
    assert found > len(SEEDS) / 2


def test_a_barrier_that_some_lanes_reach_is_an_error() -> None:
    with pytest.raises(ExecutionError, match="a barrier that only lanes 0000ffff reach"):
        per_thread("setp.lt.u32 %p0, %r61, 16;\n @%p0 bar.sync 0;", words(32))


def test_shared_memory_has_an_end() -> None:
    settings = Settings(hazards=False)
    with pytest.raises(ExecutionError, match=r"lane 16: load of 4 shared bytes at 64 of 64"):
        per_thread(
            "shl.b32 %r2, %r61, 2;\n ld.shared.b32 %r1, [%r2];", words(32), shared_bytes=64, settings=settings
        )


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_from_shared_memory(transposed: bool) -> None:
    # Every lane stores a word; row r of the matrix lies at lane r's address.
    x = words(32)
    way = ".trans" if transposed else ""
    body = f"""
      shl.b32 %r11, %r61, 2;
      st.shared.b32 [%r11], %r0;
      bar.warp.sync 0xffffffff;
      and.b32 %r12, %r61, 7;
      shl.b32 %r12, %r12, 4;
      ldmatrix.sync.aligned.m8n8.x1{way}.shared.b16 {{%r1}}, [%r12];
    """
    matrix = x.view(np.uint16).reshape(8, 8)
    want = (matrix.T if transposed else matrix).copy().view(np.uint32).reshape(32)
    np.testing.assert_array_equal(per_thread(body, x, shared_bytes=128), want)
    stored = body.replace("st.shared.b32 [%r11], %r0;", "").replace(
        f"ldmatrix.sync.aligned.m8n8.x1{way}.shared.b16 {{%r1}}, [%r12];",
        f"stmatrix.sync.aligned.m8n8.x1{way}.shared.b16 [%r12], {{%r0}};\n ld.shared.b32 %r1, [%r11];",
    )
    np.testing.assert_array_equal(per_thread(stored, x, shared_bytes=128), want)


ATOMICS = {
    "add.u32": lambda old, x: old + x.sum(dtype=np.uint32),
    "max.s32": lambda old, x: max(int(old.view(np.int32)), int(x.view(np.int32).max())) % 2**32,
    "min.s32": lambda old, x: min(int(old.view(np.int32)), int(x.view(np.int32).min())) % 2**32,
    "or.b32": lambda old, x: old | np.bitwise_or.reduce(x),
    "and.b32": lambda old, x: old & np.bitwise_and.reduce(x),
}


@pytest.mark.parametrize("name", ATOMICS)
def test_atomics(name: str) -> None:
    x = words(128)
    total = np.array([words(1, seed=9)[0]], np.uint32)
    want = ATOMICS[name](total[0], x)
    body = (
        element(0, 4, "%rd40") + f"ld.global.b32 %r0, [%rd40];\n red.global.gpu.relaxed.{name} [%rd1], %r0;"
    )
    run(body, [x, total], blocks=2, warps=2)
    assert int(total[0]) == int(want)


def test_atomic_sums_of_floats_and_what_was_there_before() -> None:
    tickets, total = np.zeros(64, np.float32), np.zeros(1, np.float32)
    body = (
        element(0, 4, "%rd40")
        + "atom.global.gpu.relaxed.add.f32 %r0, [%rd1], 0f3F800000;\n st.global.b32 [%rd40], %r0;"
    )
    run(body, [tickets, total], blocks=2)
    assert total[0] == 64
    assert sorted(tickets.tolist()) == list(range(64))


def test_exchange_and_compare() -> None:
    cell, found = np.array([3], np.uint32), np.zeros(32, np.uint32)
    body = (
        element(1, 4, "%rd40")
        + "atom.global.gpu.relaxed.cas.b32 %r0, [%rd0], 3, 9;\n st.global.b32 [%rd40], %r0;"
    )
    run(body, [cell, found])
    assert cell[0] == 9
    assert sorted(found.tolist()) == [3] + [9] * 31
    run("atom.global.gpu.relaxed.exch.b32 %r0, [%rd0], 4;", [cell, found])
    assert cell[0] == 4


# Block 0 writes a number and raises a flag; the others wait for the flag and read the number.
MESSAGE = """
  setp.ne.b32 %p0, %r62, 0;
  @%p0 bra $reader;
  st.global.b32 [%rd0], 42;
  red.global.gpu.{raise_}.add.u32 [%rd1], 1;
  bra.uni $end;
$reader:
  atom.global.gpu.{wait}.add.u32 %r0, [%rd1], 0;
  setp.lt.u32 %p1, %r0, 32;
  @%p1 bra $reader;
  ld.global.b32 %r1, [%rd0];
  mad.wide.u32 %rd40, %r62, 4, %rd2;
  st.global.b32 [%rd40], %r1;
$end:
"""


def message(raise_: str, wait: str, **settings: object) -> np.ndarray:
    number, flag, found = np.zeros(1, np.uint32), np.zeros(1, np.uint32), np.zeros(4, np.uint32)
    run(
        MESSAGE.format(raise_=raise_, wait=wait),
        [number, flag, found],
        blocks=4,
        settings=Settings(**settings),
    )
    return found[1:]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_release_publishes_what_came_before_it(seed: int) -> None:
    assert (message("release", "acquire", seed=seed, weak=True, races=True, quantum=5) == 42).all()


def test_without_a_release_the_number_may_come_late() -> None:
    found = [message("relaxed", "acquire", seed=seed, weak=True, quantum=5) for seed in SEEDS]
    assert sum((x != 42).any() for x in found) > 2


@pytest.mark.parametrize(
    ("raise_", "wait"), [("relaxed", "acquire"), ("release", "relaxed"), ("relaxed", "relaxed")]
)
@pytest.mark.parametrize("weak", [False, True])
def test_a_relaxed_flag_is_a_race(raise_: str, wait: str, weak: bool) -> None:
    for seed in SEEDS:
        with pytest.raises(
            ExecutionError, match=r"race: nothing orders this (load|store) of byte 0 of buffer 0"
        ):
            message(raise_, wait, seed=seed, weak=weak, races=True)


@pytest.mark.parametrize("barrier", ["bar.sync 0;", ""])
def test_a_barrier_orders_the_global_accesses_of_a_block(barrier: str) -> None:
    body = f"""
      {element(0, 4, "%rd40")} st.global.b32 [%rd40], %r61;
      {barrier}
      xor.b32 %r2, %r61, 32;
      mad.wide.u32 %rd41, %r2, 4, %rd0;
      ld.global.b32 %r1, [%rd41];
    """
    place = [np.zeros(64, np.uint32)]
    if barrier:
        run(body, place, warps=2, settings=Settings(races=True))
    else:
        with pytest.raises(ExecutionError, match="race: nothing orders this"):
            run(body, place, warps=2, settings=Settings(races=True))


def test_many_loads_of_one_address_are_no_race_and_a_store_beside_them_is() -> None:
    place = [np.zeros(2, np.uint32)]
    run("ld.global.b32 %r1, [%rd0];", place, blocks=4, warps=2, settings=Settings(races=True))
    body = "ld.global.b32 %r1, [%rd0];\n setp.eq.b32 %p0, %r63, 128;\n @%p0 st.global.b32 [%rd0], 1;"
    with pytest.raises(ExecutionError, match=r"race: nothing orders this (load|store)"):
        run(body, place, blocks=4, warps=2, settings=Settings(races=True))


def test_neighbouring_halves_of_a_word_are_no_race() -> None:
    place = [np.zeros(128, np.uint16)]
    run(
        f"{element(0, 2, '%rd40')} st.global.b16 [%rd40], 1;",
        place,
        blocks=2,
        warps=2,
        settings=Settings(races=True),
    )
    assert (place[0] == 1).all()


def test_waiting_for_what_never_comes_is_a_deadlock() -> None:
    wait = (
        "$again:\n ld.global.gpu.acquire.b32 %r0, [ %rd0 + 0 ];\n setp.eq.b32 %p0, %r0, 0;\n @%p0 bra $again;"
    )
    with pytest.raises(ExecutionError, match="deadlock: 2 blocks have run"):
        run(wait, [np.zeros(1, np.uint32)], blocks=2, settings=Settings(patience=10_000))


def test_a_block_waits_for_one_that_is_not_resident() -> None:
    # Every block waits for its successor, but for the last.
    body = """
      setp.eq.b32 %p2, %r62, 7;
      @%p2 bra $ready;
    $again:
      ld.global.gpu.acquire.b32 %r0, [ %rd0 + 0 ];
      setp.eq.b32 %p0, %r0, 0;
      @%p0 bra $again;
    $ready:
      red.global.gpu.release.add.u32 [%rd0], 1;
    """
    run(body, [np.zeros(1, np.uint32)], blocks=8, settings=Settings(resident=8, patience=10_000))
    with pytest.raises(ExecutionError, match="deadlock: 7 blocks"):
        run(body, [np.zeros(1, np.uint32)], blocks=8, settings=Settings(resident=7, patience=10_000))


@pytest.mark.parametrize(
    ("what", "instruction"),
    [("load", "ld.global.b32 %r0, [%rd40+4];"), ("store", "st.global.b32 [%rd40+4], 1;")],
)
def test_an_access_past_the_end(what: str, instruction: str) -> None:
    place = [np.zeros(32, np.uint32), np.zeros(4, np.uint32)]
    with pytest.raises(
        ExecutionError,
        match=rf"lane 31: {what} of 4 bytes outside every buffer, at byte 128 of buffer 0, which has 128",
    ):
        run(element(0, 4, "%rd40") + instruction, place)


def test_a_misaligned_access() -> None:
    with pytest.raises(ExecutionError, match="lane 0: misaligned access of 8 bytes"):
        run("ld.global.v2.b32 {%r0, %r1}, [%rd0+4];", [np.zeros(8, np.uint64)])


def test_a_store_into_what_is_read_only() -> None:
    constant = np.zeros(4, np.uint32)
    constant.flags.writeable = False
    with pytest.raises(ExecutionError, match="store into buffer 0, which is read-only"):
        run("st.global.b32 [%rd0], 1;", [constant])


@pytest.mark.parametrize(
    "line",
    [
        "tanh.approx.f32 %r0, %r1;",
        "bar.sync 1, 64;",
        "fma.rz.f32 %r0, %r1, %r2, %r3;",
        "atom.global.cta.relaxed.add.u32 %r0, [%rd0], 1;",
        "ld.local.b32 %r0, [%rd0];",
        "ld.volatile.global.b32 %r0, [%rd0];",
        "cp.async.wait_all;",
        "fence.acq_rel.gpu;",
    ],
)
def test_what_it_does_not_know_is_named(line: str) -> None:
    name = line.split()[0].rstrip(";")
    with pytest.raises(Unsupported, match=rf"PTX line \d+: {name.replace('.', '[.]')}"):
        run(line, [np.zeros(1, np.uint32)])


def test_parameters_are_extended_as_they_are_read() -> None:
    # The lower word of a pointer, with a sign and without.
    place = np.zeros(3, np.uint64)
    body = """
      ld.param.s32 %rd40, [p0];
      ld.param.u32 %rd41, [p0];
      ld.param.b32 %r1, [p0];
      cvt.u64.u32 %rd42, %r1;
      st.global.b64 [%rd0], %rd40;
      st.global.b64 [%rd0+8], %rd41;
      st.global.b64 [%rd0+16], %rd42;
    """
    run(body, [place])
    low = place.ctypes.data % 2**32
    assert place.tolist() == [(low - 2**32 if low >= 2**31 else low) % 2**64, low, low]


def test_executions_and_traffic_are_counted() -> None:
    # Half of the lanes load each word twice; two blocks of one warp.
    x, out = words(64), np.zeros(64, np.uint32)
    body = f"""
      {element(0, 4, "%rd40")} setp.lt.u32 %p0, %r61, 16;
      @%p0 ld.global.b32 %r0, [%rd40];
      ld.global.b32 %r0, [%rd40];
      {element(1, 4, "%rd41")} st.global.b32 [%rd41], %r0;
    """
    report = run(body, [x, out], blocks=2, counted=True)
    assert report.instructions == int(report.warps.sum())
    assert report.traffic.tolist() == [[4 * (64 + 32), 0, 4 * 64, 0], [0, 4 * 64, 0, 4 * 64]]
    assert sorted(set(report.lanes[report.warps > 0].tolist())) == [32, 64]


def test_a_seed_repeats_a_run() -> None:
    def order(seed: int) -> list[int]:
        tickets, total = np.zeros(256, np.uint32), np.zeros(1, np.uint32)
        body = (
            element(0, 4, "%rd40")
            + "atom.global.gpu.relaxed.add.u32 %r0, [%rd1], 1;\n st.global.b32 [%rd40], %r0;"
        )
        run(body, [tickets, total], blocks=8, settings=Settings(seed=seed, quantum=4, shuffle=True))
        return tickets.tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)

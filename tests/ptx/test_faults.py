"""Faults planted in a copy of the kernels, one at a time: each must be noticed, by what was built for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import kl_gpu
from kl_gpu.backends.interface import RowPair
from kl_gpu.kinds import KINDS
from support import pair
from tests.ptx.backend import executed
from tests.ptx.driver import Driver
from tests.ptx.faults import Place, places, planted
from tests.ptx.program import ExecutionError

# Two splits, the last of them ragged: what is shared, at half the cost of three.
VOCAB = 16384 + 4001
SEEDS = range(4)


def forward_kl(rows: int = 3) -> tuple[torch.Tensor, ...]:
    """Value and the teacher's gradient, from one queue."""
    from kl_gpu.backends import triton

    student, teacher = pair(1, rows, VOCAB, dtype=torch.bfloat16)
    p = RowPair.of(student, teacher, None, *KINDS["forward_kl"].at(None), 1.0, 1.0)
    grad = torch.empty_like(p.a)
    value, _ = triton.value_and_gradient(p, torch.ones(rows), grad, None)
    return value, grad


def tokens() -> tuple[torch.Tensor, ...]:
    """Log-probabilities of several tokens a row, and their gradient."""
    logits = pair(3, 2055)[0].requires_grad_()
    teacher, ids = torch.log_softmax(pair(3, 2055)[1], -1).topk(5)
    value = kl_gpu.topk_div(logits, teacher, ids, backend="triton", reduction="none")
    value.sum().backward()
    return value.detach(), logits.grad


CALLS: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {"pair.py": forward_kl, "complement.py": tokens}


def must_end(driver: Driver, call: Callable[..., object], message: str) -> None:
    """An error of this kind ends the call, whatever the seed."""
    driver.settings.races = True
    for driver.settings.seed in SEEDS:
        with pytest.raises(ExecutionError, match=message):
            call()


def ordered_atomics() -> list[Place]:
    return [place for file in CALLS for place in places(file, r'sem="(acq_rel|release|acquire)"')]


@pytest.mark.parametrize("place", ordered_atomics(), ids=str)
def test_a_relaxed_atomic_is_a_race(place: Place, tmp_path: Path) -> None:
    with executed("sm_90", planted(tmp_path, place, 'sem="relaxed"')) as driver:
        must_end(driver, CALLS[place.file], "race: nothing orders")


# Others of the source stand where the compiler would set one anyway.
NEEDED = (
    r"(?<=True, IDS, R, VEC, LAYOUT\)\n            )tl\.debug_barrier\(\)",
    r"tl\.debug_barrier\(\)(?=  # the picked columns)",
)


def barriers() -> list[Place]:
    return [place for pattern in NEEDED for place in places("complement.py", pattern)]


@pytest.mark.parametrize("place", barriers(), ids=str)
def test_a_dropped_barrier_is_a_race(place: Place, tmp_path: Path) -> None:
    with executed("sm_90", planted(tmp_path, place, "pass")) as driver:
        must_end(driver, tokens, "race: nothing orders")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_barriers_that_the_compiler_has_set_are_missed(arch: str) -> None:
    """One bar.sync less at a time: an error, or one of a pair, and then the bits are the same."""
    with executed(arch) as driver:
        torch.manual_seed(0)
        want = tokens()
        driver.counted = True
        torch.manual_seed(0)
        tokens()
        # What is launched first; what it executes, and half of that.
        program, report = driver.launches[0].program, driver.launches[0].report
        reached = [n for n, x in enumerate(program.statements) if x.name == "bar.sync" and report.warps[n]]
        driver.counted = False
        # Some of them are the source's own, and order global memory.
        driver.settings.races = True
        missed = 0
        for n in reached[::2]:
            line = program.statements[n].line

            def without(ptx: str, line: int = line) -> str:
                lines = ptx.split("\n")
                if ptx == program.ptx:
                    lines[line - 1] = ""
                return "\n".join(lines)

            driver.rewrite = without
            torch.manual_seed(0)
            try:
                found = tokens()
            except ExecutionError:
                missed += 1
            else:
                assert all(map(torch.equal, found, want))
    assert missed >= len(reached[::2]) / 3


# Ragged tiles of pairs, whose second column may lie behind the row: loads, and stores of the gradient.
PAST_THE_ROW = [
    *places("device_math.py", r"first \+ 1 < last"),
    *places("device_math.py", r"column \+ 1 < last"),
]


@pytest.mark.parametrize("place", PAST_THE_ROW, ids=str)
def test_an_access_past_the_row_is_out_of_bounds(place: Place, tmp_path: Path) -> None:
    with executed("sm_90", planted(tmp_path, place, place.text.replace("<", "<="))) as driver:
        must_end(
            driver,
            forward_kl,
            r"(load|store) of 2 bytes outside every buffer|race: nothing orders this store",
        )


@pytest.mark.parametrize("place", places("pair.py", r"- stage \* launch\.lag"), ids=str)
def test_waiting_for_work_with_a_larger_number_is_a_deadlock(place: Place, tmp_path: Path) -> None:
    with executed("sm_90", planted(tmp_path, place, place.text.replace("-", "+"))) as driver:
        driver.settings.resident = 2
        driver.settings.patience = 2_000_000
        must_end(driver, lambda: forward_kl(rows=9), "deadlock")


def test_there_is_something_to_plant() -> None:
    """A pattern that the source no longer holds would test nothing."""
    assert len(ordered_atomics()) >= 3
    assert len(barriers()) == len(NEEDED)
    assert len(PAST_THE_ROW) == 2
    assert places("pair.py", r"- stage \* launch\.lag")


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_kernels_as_they_are_have_none_of_these_faults(
    call: Callable[..., tuple[torch.Tensor, ...]],
) -> None:
    with executed("sm_90") as driver:
        driver.settings.races = driver.settings.weak = True
        for driver.settings.seed in SEEDS:
            assert all(x.isfinite().all() for x in call())

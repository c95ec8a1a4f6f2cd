"""Logits shared among real processes, against the float64 reference on the whole rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kl_gpu
from distributed_world import World
from kl_gpu.backends import registry
from realistic import trained
from support import DEVICE, is_slow
from tests.ptx.fixtures import is_executed

# One process of the test run holds the process groups.
pytestmark = [
    pytest.mark.xdist_group("distributed"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
]


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(request.param)
    yield world
    world.close()


@pytest.fixture
def backend(backend: str, world: World) -> str:
    if is_executed():
        pytest.skip("ranks are processes of their own, whose kernels are interpreted")
    if world.ranks > 2 and backend != registry.resolve(None, torch.device(DEVICE)):
        pytest.skip("what ranks exchange is not the backend's affair, and two ranks try them all")
    return backend


def same_on_all_ranks(answers: list[object]) -> None:
    assert len(answers) > 1
    assert len(answers[0]) > 0
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize(
    ("dtype", "spread"),
    [("float32", 1.0), ("float32", 1e-3), ("float32", 1e-5), ("bfloat16", 1.0), ("float64", 1e-5)],
)
def test_within_the_bounds_of_the_dense_call(
    world: World, kind: str, backend: str, dtype: str, spread: float
) -> None:
    if is_slow(backend) and (dtype, spread) not in (("float32", 1.0), ("float32", 1e-3)):
        pytest.skip("Triton's interpreter is slow")
    columns = 90 if is_slow(backend) else 5000
    same_on_all_ranks(
        world.run("dense", kind=kind, backend=backend, dtype=dtype, spread=spread, columns=columns)
    )


def test_unequal_temperatures(world: World, kind: str, backend: str) -> None:
    same_on_all_ranks(
        world.run(
            "dense", kind=kind, backend=backend, dtype="float32", spread=0.1, columns=90, temperature=1.7,
            teacher_temperature=0.9,
        )
    )  # fmt: skip


def test_temperatures_of_each_row(world: World, backend: str) -> None:
    same_on_all_ranks(world.run("row_temperatures", backend=backend))


def test_edges(world: World, kind: str, backend: str) -> None:
    same_on_all_ranks(world.run("edges", kind=kind, backend=backend))


def test_reductions(world: World, kind: str, backend: str) -> None:
    if is_slow(backend) and kind not in ("forward_kl", "js"):
        pytest.skip("Triton's interpreter is slow, and reductions are not its affair")
    same_on_all_ranks(world.run("reductions", kind=kind, backend=backend))


def test_which_rows_count_and_what_divides(world: World, backend: str) -> None:
    world.run("row_arguments", backend=backend)


def test_nested_tensors_and_dtensors_are_refused_by_name(world: World) -> None:
    world.run("kinds_of_tensors")


def test_penalties_of_dtensors(world: World) -> None:
    world.run("penalties_of_dtensors")


def test_where_nothing_counts(world: World, kind: str, backend: str) -> None:
    world.run("nothing_counts", kind=kind, backend=backend)


def test_options(world: World, backend: str) -> None:
    if is_slow(backend):
        pytest.skip("half a minute in Triton's interpreter")
    world.run("options", backend=backend)


def test_the_same_bits_on_every_rank_and_run(world: World, kind: str) -> None:
    same_on_all_ranks(world.run("repeats", kind=kind))


def test_bytes_on_the_wire(world: World, kind: str) -> None:
    # 64 rows of so many bytes: the KLs and jeffreys in one collective, the others in two.
    expected = {"forward_kl": [24], "reverse_kl": [24], "jeffreys": [32], "lk": [24, 24]}.get(kind, [16, 24])
    for forward, backward in world.run("traffic", kind=kind):
        assert [size / 64 for _, size in forward] == expected, forward
        assert backward == []


def test_ranks_that_disagree_are_told_about_what(world: World) -> None:
    world.run("disagreements")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_token_stats(world: World, backend: str, dtype: str) -> None:
    same_on_all_ranks(world.run("token_stats", backend=backend, dtype=dtype))


def test_token_logprobs(world: World, backend: str) -> None:
    same_on_all_ranks(world.run("token_logprobs", backend=backend))


def test_realistic_rows(world: World, kind: str, backend: str, shared_folder: Path) -> None:
    pytest.importorskip("filelock")
    if is_slow(backend) and kind not in ("forward_kl", "reverse_kl", "js"):
        pytest.skip("Triton's interpreter is slow")
    trained(shared_folder)
    rows = 1 if is_slow(backend) else 6
    same_on_all_ranks(
        world.run("realistic", kind=kind, backend=backend, folder=str(shared_folder), rows=rows)
    )


def test_tokens_of_realistic_rows(world: World, backend: str, shared_folder: Path) -> None:
    pytest.importorskip("filelock")
    trained(shared_folder)
    rows = 1 if is_slow(backend) else 40
    same_on_all_ranks(world.run("realistic_tokens", backend=backend, folder=str(shared_folder), rows=rows))


@pytest.mark.parametrize("kind", ["forward_kl", "js"])
@pytest.mark.parametrize("tail", kl_gpu.TAILS)
def test_topk(world: World, backend: str, tail: str, kind: str) -> None:
    if tail in ("student_full", "truncate") and kind != "forward_kl":
        pytest.skip("forward KL only")
    if is_slow(backend) and tail != "bucket":
        pytest.skip("Triton's interpreter is slow")
    same_on_all_ranks(world.run("topk", tail=tail, kind=kind, backend=backend))


@pytest.mark.parametrize(("kind", "tail"), [("reverse_kl", "student_full"), ("jeffreys", "truncate")])
def test_topk_div_of_a_probability_outside(world: World, kind: str, tail: str) -> None:
    options = {"backend": "native", "outside_logprob": -9.0}
    same_on_all_ranks(world.run("topk", tail=tail, kind=kind, **options))


def test_kept_sets_and_several_tokens(world: World, backend: str) -> None:
    same_on_all_ranks(world.run("kept_sets", backend=backend))


def test_a_mean_over_ranks_is_that_of_one_process(world: World) -> None:
    world.run("means")


@pytest.mark.parametrize("kind", ["forward_kl", "jeffreys", "js"])
def test_dtensors_stay_where_they_are(world: World, kind: str) -> None:
    world.run("dtensors", kind=kind)


def test_linear_div_within_the_bounds_of_explicit_logits(world: World, kind: str, backend: str) -> None:
    same_on_all_ranks(world.run("linear.dense", kind=kind, backend=backend, chunk_rows=3))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float64", "reduction": "sum"},
        {"reduction": "none", "masked": True},
        {"sequence_dim": 1, "masked": True, "chunk_rows": 5},
        {"softcap": 4.0, "teacher_softcap": 5.0, "logit_scale": 2.0, "temperature": 1.5},
        {"vocab_size": 41},
    ],
    ids=lambda options: ", ".join(map(str, options)),
)
def test_linear_div_options(world: World, backend: str, options: dict[str, object]) -> None:
    if is_slow(backend) and "sequence_dim" not in options:
        pytest.skip("Triton's interpreter is slow, and options are not its affair")
    for kind in ("forward_kl", "js"):
        same_on_all_ranks(world.run("linear.dense", kind=kind, backend=backend, **options))


@pytest.mark.parametrize(
    "options",
    [{"reduction": "none"}, {"vocab_size": 41}, {"softcap": 4.0, "logit_scale": 2.0, "t_squared": True}],
    ids=lambda options: ", ".join(map(str, options)),
)
def test_linear_div_with_labels(world: World, backend: str, options: dict[str, object]) -> None:
    if is_slow(backend) and "vocab_size" not in options:
        pytest.skip("Triton's interpreter is slow, and options are not its affair")
    same_on_all_ranks(world.run("linear.hard_labels", backend=backend, **options))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_div_repeats_and_is_that_of_one_process(world: World, dtype: str) -> None:
    same_on_all_ranks(world.run("linear.repeats", dtype=dtype))


def test_linear_div_on_the_wire(world: World) -> None:
    # The chunks' sizes, two chunks of 32 rows; the gradient of 64 rows of 6 hidden states, in float32.
    for forward, backward in world.run("linear.traffic"):
        assert [size for _, size in forward] == [16, 32 * 24, 32 * 24], forward
        assert [size for _, size in backward] == [64 * 6 * 4], backward


def test_linear_div_refuses_what_the_ranks_disagree_on(world: World) -> None:
    world.run("linear.disagreements")


OF_HEADS = [
    {},
    {"dtype": "float64", "masked": True, "chunk_rows": 3},
    {"sequence_dim": 1, "masked": True, "chunk_rows": 5},
    {"softcap": 4.0, "logit_scale": 2.0, "chunk_rows": 100},
    {"vocab_size": 41},
    {"shift": True},
]


@pytest.mark.parametrize("options", OF_HEADS, ids=lambda options: ", ".join(map(str, options)) or "plain")
def test_linear_token_logprobs(world: World, backend: str, options: dict[str, object]) -> None:
    if is_slow(backend) and "sequence_dim" not in options:
        pytest.skip("Triton's interpreter is slow, and options are not its affair")
    for entropy in (False, True):
        same_on_all_ranks(world.run("linear.token_logprobs", backend=backend, entropy=entropy, **options))


@pytest.mark.parametrize("options", OF_HEADS, ids=lambda options: ", ".join(map(str, options)) or "plain")
@pytest.mark.parametrize("tail", kl_gpu.TAILS)
def test_linear_topk_div(world: World, backend: str, tail: str, options: dict[str, object]) -> None:
    if is_slow(backend) and (tail != "bucket" or "sequence_dim" not in options):
        pytest.skip("Triton's interpreter is slow, and options are not its affair")
    for kind in ("forward_kl",) if tail in ("student_full", "truncate") else ("forward_kl", "js"):
        options = options | {"reduction": "none", "rest": tail == "bucket"}
        same_on_all_ranks(world.run("linear.topk_div", backend=backend, tail=tail, kind=kind, **options))


def test_linear_topk_div_of_a_probability_outside(world: World) -> None:
    options = {"backend": "native", "tail": "student_full", "outside_logprob": -9.0, "reduction": "none"}
    for kind in ("forward_kl", "jeffreys"):
        same_on_all_ranks(world.run("linear.topk_div", kind=kind, masked=True, **options))


@pytest.mark.parametrize("options", OF_HEADS, ids=lambda options: ", ".join(map(str, options)) or "plain")
def test_linear_token_stats(world: World, backend: str, options: dict[str, object]) -> None:
    if is_slow(backend) and "sequence_dim" not in options:
        pytest.skip("Triton's interpreter is slow, and options are not its affair")
    for labelled in (False, True):
        same_on_all_ranks(world.run("linear.token_stats", backend=backend, labelled=labelled, **options))


@pytest.mark.parametrize(
    ("entry", "forward", "backward"),
    [
        # One collective of all rows; in backward the hidden states' gradient, 6 float32 a row.
        ("token_logprobs", [64 * 16], [64 * 6 * 4]),
        ("entropy", [64 * 24], [64 * 6 * 4]),
        ("topk_div", [64 * 8 * (5 + 1)], [64 * 6 * 4]),
        # The chunks' sizes, two chunks of 32 rows.
        ("token_stats", [16, *[32 * 104, 32 * 24] * 2], []),
    ],
)
def test_entries_from_hidden_states_on_the_wire(
    world: World, entry: str, forward: list[int], backward: list[int]
) -> None:
    for there, back in world.run("linear.row_traffic", entry=entry):
        assert [size for _, size in there] == forward, there
        assert [size for _, size in back] == backward, back


def test_hidden_states_without_a_gradient_cost_no_collective(world: World) -> None:
    assert world.run("linear.frozen_hidden") == [[]] * world.ranks


def test_entries_from_hidden_states_refuse_what_the_ranks_disagree_on(world: World) -> None:
    world.run("linear.row_disagreements")

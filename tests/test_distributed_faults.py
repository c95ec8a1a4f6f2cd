"""A rank that dies ends the others, with an error that says in which collective."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distributed_world import free_port

ROOT = Path(__file__).parent.parent
TIMEOUT = 300  # of a collective: far more than any step takes, on a slow and busy machine too

pytestmark = [
    pytest.mark.xdist_group("distributed"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
]

LOOP = """
import sys, torch
sys.path.insert(0, "tests")
import torch.distributed as dist
from distributed_world import join
from kl_gpu.distributed import vocab_parallel_div

rank = int(sys.argv[1])
dist_port, seconds = int(sys.argv[2]), float(sys.argv[3])
join(rank, 2, dist_port, seconds)
device = "cuda" if torch.cuda.is_available() else "cpu"
for step in range(10**6):
    vocab_parallel_div(torch.randn(4, 50, device=device), torch.randn(4, 50, device=device), KIND)
    if step == 3:
        print("step 3", flush=True)
"""


def environment(rank: int, port: int) -> dict[str, str]:
    of_group = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return os.environ | of_group | path


def killed_mid_run(commands: list[list[str]], said: str) -> tuple[int, str, float]:
    """Exit code, stderr and seconds of rank 0 after rank 1 was killed, once rank 0 said so much."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [part.replace("PORT", str(port)) for part in command], cwd=ROOT, text=True,
            env=environment(rank, port), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank, command in enumerate(commands)
    ]  # fmt: skip
    try:
        assert ranks[0].stdout is not None
        while said not in (line := ranks[0].stdout.readline()):
            assert line, ranks[0].communicate()[1]
        ranks[1].send_signal(signal.SIGKILL)
        start = time.monotonic()
        error = ranks[0].communicate(timeout=TIMEOUT + 30)[1]
        return ranks[0].returncode, error, time.monotonic() - start
    finally:
        for process in ranks:
            process.kill()
            process.wait()


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="NCCL wants a GPU for each rank")
@pytest.mark.parametrize("kind", ["forward_kl", "js"])
def test_a_dead_rank_ends_the_other(kind: str) -> None:
    code = f"KIND = {kind!r}\n{LOOP}"
    commands = [[sys.executable, "-c", code, str(rank), "PORT", str(TIMEOUT)] for rank in (0, 1)]
    status, error, seconds = killed_mid_run(commands, "step 3")
    assert status not in (0, None)
    assert f"RuntimeError: kl_gpu: the all_gather of {kind}'s row s" in error  # its states, or its sums
    assert "failed on rank 0" in error
    assert seconds < TIMEOUT


EXAMPLE = ROOT / "examples" / "distill_tp.py"
# A package of the standard library: real text, and little of it.
TINY = ["--text", str(Path(json.__file__).parent), "--sequence", "32"]


def test_the_example_repeats_the_losses_of_one_process() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(EXAMPLE), *TINY, "--steps", "12", "--rate", "3e-3",
        ],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first, last = (float(x) for x in done.stdout.split("fell from ")[1].split(" nats")[0].split(" to "))
    assert last < first
    apart = float(done.stdout.split("largest difference of the losses: ")[1].split()[0])
    # The optimiser's eps keeps last bits from growing: weights 1e-6 apart leave the losses 1e-6 apart.
    assert apart <= 1e-5
    assert done.stdout.count("step ") > 12


def test_the_example_ends_when_a_rank_is_killed() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    command = [
        sys.executable, "-u", str(EXAMPLE), *TINY, "--steps", "100000", "--timeout", str(TIMEOUT),
        "--skip-alone",
    ]  # fmt: skip
    status, error, seconds = killed_mid_run([command, command], "step 3")
    assert status == 1
    assert "distill_tp.py: rank 0 of 2 ends: " in error
    assert "Traceback" not in error
    assert seconds < TIMEOUT

"""Runs a command that ends in time, by coreutils' `timeout`: it is asked to stop, and then it is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_GRACE = 15.0  # seconds between asking and killing: enough for pytest to write its summary
_OVER = (124, -signal.SIGKILL)  # of `timeout`: the command was asked to stop, and both were killed
_UNKILLABLE = 10.0  # seconds after which a command that even killing does not end is left behind


@dataclass(frozen=True)
class Finished:
    """What became of a command. `code` is None where even killing it did not end it."""

    code: int | None
    timed_out: bool
    output: str


def run(
    command: Sequence[str], limit: float, log: Path, cwd: Path, environment: Mapping[str, str]
) -> Finished:
    """Runs `command` for at most `limit` seconds; what it prints is added to `log`.

    A process of its own: a kernel that never returns, or that leaves the device's context broken, ends there.
    """
    grace = min(_GRACE, limit / 4)
    timeout = ["timeout", "--signal=INT", f"--kill-after={grace:.2f}", f"{limit - grace:.2f}"]
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(command)}\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            [*timeout, *command], cwd=cwd, env=dict(environment), stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(limit + _UNKILLABLE)
        # `timeout` leads the command's group. Helpers left behind would disturb what comes next.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.poll()
    with log.open("rb") as file:
        file.seek(start)
        output = file.read().decode(errors="replace")
    return Finished(code, code is None or code in _OVER, output)

"""A command that ends in time: it is asked to stop, and then it is stopped, with all it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_GRACE = 15.0  # seconds between asking and killing: enough for pytest to write its summary


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
    end = time.monotonic() + limit
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(command)}\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            command, cwd=cwd, env=dict(environment), stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_can_be_asked_to_stop,
        )  # fmt: skip
        timed_out = False
        try:
            if not _ends(process, end - min(_GRACE, limit / 4) - time.monotonic()):
                timed_out = True
                process.send_signal(signal.SIGINT)
                _ends(process, end - time.monotonic())
        finally:
            # The whole group, also after a regular end: a helper left behind would disturb what comes next.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            _ends(process, 5.0)
    with log.open("rb") as file:
        file.seek(start)
        output = file.read().decode(errors="replace")
    return Finished(process.poll(), timed_out, output)


def _can_be_asked_to_stop() -> None:
    """Under nohup, or behind a shell's &, SIGINT comes ignored, and a child would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _ends(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return False
    return True

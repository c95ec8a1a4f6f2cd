"""Ends this process where it hangs, be it in a call into the driver that never returns."""

from __future__ import annotations

import faulthandler
import os
import sys


def end_after(seconds: float) -> None:
    """Leaves, with status 1 and every thread's traceback, unless called again or off in time."""
    where = sys.__stderr__
    faulthandler.dump_traceback_later(seconds, exit=True, file=os.dup(2) if where is None else where)


def off() -> None:
    faulthandler.cancel_dump_traceback_later()

"""Ctrl-C between steps, not amid one."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class StopBetweenSteps:
    """Holds the first Ctrl-C until `check`, which then raises KeyboardInterrupt; a second one acts at once.

    Raised wherever the interpreter happens to be, it can land in a callback that the autograd engine or a
    destructor runs, where Python prints it and goes on: the run would never end.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous: signal.Handlers | object = None

    def __enter__(self) -> StopBetweenSteps:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True

    def check(self) -> None:
        if self._requested:
            raise KeyboardInterrupt

"""What the console shows while a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from rich import progress
from rich.console import Console
from rich.table import Column


class Followed(Protocol):
    """A run as its bar sees it."""

    steps: int

    @property
    def done(self) -> int: ...

    @property
    def state(self) -> str:
        """What the latest step came to; asked for once there was one."""
        ...

    @property
    def news(self) -> str | None:
        """What was measured after the latest step, if anything."""
        ...


class Progress:
    """A bar for each run; where the output is no terminal, a line each time something was measured."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=20),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[state]}"),
            progress.TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def follow(self, name: str, run: Followed) -> Callable[[], None]:
        """Shows `run` from now on; the function it returns says that `run` went on."""
        task = self._bars.add_task(name, total=run.steps, state="", visible=run.steps > 0)

        def notify() -> None:
            if run.done:
                self._bars.update(task, completed=run.done, state=run.state)
            if not self._console.is_terminal and (news := run.news):
                say(self._console, f"{name}, step {run.done} of {run.steps}: {news}")

        return notify


def say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False)


def right(heading: str) -> Column:
    return Column(heading, justify="right")

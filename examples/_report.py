"""What the examples share of command lines and reports: options, one-line errors, Ctrl-C, tables, plots."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

# Read when torch is first imported.
ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # makes cuBLAS give the same bits again
    "KINETO_LOG_LEVEL": "99",  # keeps the profiler from writing between the tables
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait halve the speed on a busy machine
}


class BadInput(Exception):
    """Something the user gave cannot work; the message is one line that says what and why."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def whole(low: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if low <= (number := int(text)) < 2**31:
            return number
        expected = f"a whole number of at least {low} and below 2**31"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")

    return whole_number


def positive_number(text: str) -> float:
    if 0 < (number := float(text)) < float("inf"):
        return number
    raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text}")


def add_common_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--text", metavar="PATH", type=Path, help="a file, or a folder of *.py, *.md and *.txt")
    add("--seed", metavar="N", type=whole(0), default=0, help="same seed, same run; default: %(default)s")
    add("--backend", metavar="NAME", help="of kl_gpu; default: its own choice")
    add("--out", metavar="PATH", type=Path, default=Path("out"), help="for the results; default: %(default)s")


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Ends the program with one line instead of a traceback, where the user can do something about it."""
    try:
        yield
    except BadInput as error:
        Parser(program).error(str(error))
    except ModuleNotFoundError as error:
        Parser(program).error(f"{error.name} is not installed: pip install 'kl_gpu[demo]'")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


@contextmanager
def imports(program: str, parse: Callable[[], object], module: str) -> Iterator[None]:
    """Around imports that take seconds: a bad option is refused before them, Ctrl-C is clean in them."""
    if module == "__main__":
        parse()
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    with one_line_errors(program):
        yield


with one_line_errors(Path(sys.argv[0]).name):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich import progress
    from rich.console import Console
    from rich.table import Column, Table

CHECKPOINTS = 4  # of each run, besides its start
console = Console()


@dataclass
class Run:
    """The training of one model; `held_out` maps steps done to what was measured then."""

    objective: str
    steps: int
    quantity: str = "loss"
    names: str = "objective"  # what the record calls `objective`
    curve: list[float] = field(default_factory=list)  # of `quantity`, at each step
    held_out: dict[int, Any] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def figures(self) -> dict[str, Any]:
        """What comes out the same again from the same seed."""
        measured = {step: asdict(one) for step, one in self.held_out.items()}
        curves = {"steps": self.steps, self.quantity: self.curve, "held_out": measured}
        return {self.names: self.objective, **curves}

    def each_step(self, measure: Callable[[], Any], notify: Callable[[], None]) -> Iterator[None]:
        """Yields for each step, which the caller takes, and measures in between.

        The first Ctrl-C is held until a step's end; a second one acts at once. Raised wherever the
        interpreter happens to be, it can land in a callback that the autograd engine or a destructor runs,
        where Python prints it and goes on: the run would never end.
        """
        requested = False

        def request(number: int, frame: object) -> None:
            nonlocal requested
            if requested:
                raise KeyboardInterrupt
            requested = True

        previous = signal.signal(signal.SIGINT, request)
        try:
            for step in range(self.steps + 1):
                if step > 0:
                    start = time.perf_counter()
                    yield
                    self.seconds += time.perf_counter() - start
                if step in {round(self.steps * part / CHECKPOINTS) for part in range(CHECKPOINTS + 1)}:
                    self.held_out[step] = measure()
                notify()
                if requested:
                    raise KeyboardInterrupt
        finally:
            signal.signal(signal.SIGINT, previous)


@dataclass(frozen=True)
class HeldOut:
    kl: float | None  # KL(teacher‖model), nats a token; None for the teacher
    perplexity: float

    def __str__(self) -> str:
        kl = "" if self.kl is None else f", KL(teacher‖model) {self.kl:.4f}"
        return f"held-out perplexity {self.perplexity:,.1f}{kl}"


@dataclass(frozen=True)
class Completions:
    """Of completions of held-out prompts: means, and the standard errors of those."""

    reward: float
    reward_error: float
    kl: float  # KL(policy‖reference), exact at every token; nats a completion
    kl_error: float
    sample: str  # one of the prompts and its completion

    def __str__(self) -> str:
        return f"held-out reward {self.reward:.3f}, KL(policy‖reference) {self.kl:.3f}"


class Progress(progress.Progress):
    """A bar for each run; where the output is no terminal, a line each time something was measured."""

    def __init__(self) -> None:
        super().__init__(
            progress.TextColumn("{task.description}"), progress.BarColumn(bar_width=20),
            progress.MofNCompleteColumn(), progress.TextColumn("{task.fields[state]}"),
            progress.TimeRemainingColumn(compact=True), console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def follow(self, name: str, run: Run) -> Callable[[], None]:
        """Shows `run` from now on; the function it returns says that `run` went on."""
        task = self.add_task(name, total=run.steps, state="", visible=run.steps > 0)

        def notify() -> None:
            if done := len(run.curve):
                speed = f"  {run.tokens_per_second:,.0f} tokens/s" if run.tokens else ""
                self.update(task, completed=done, state=f"{run.quantity} {run.curve[-1]:.3f}{speed}")
            if not console.is_terminal and done in run.held_out:
                say(f"{name}, step {done} of {run.steps}: {run.held_out[done]}")

        return notify


def say(text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False)


def say_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(headings[0], *(Column(heading, justify="right") for heading in headings[1:]))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def label(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


@contextmanager
def until_interrupted(runs: dict[str, Run]) -> Iterator[SimpleNamespace]:
    """Ctrl-C ends early what is within; what was measured until then is reported all the same."""
    outcome, start = SimpleNamespace(code=0, seconds=0.0), time.perf_counter()
    try:
        yield outcome
    except KeyboardInterrupt:
        say("[yellow]Interrupted. What was measured until now is kept.[/]")
        outcome.code = 130
        if not any(run.held_out for run in runs.values()):
            say("Nothing was measured yet.")
            sys.exit(outcome.code)
    outcome.seconds = time.perf_counter() - start


def save(
    name: str, settings: Any, setup: dict[str, Any], runs: dict[str, Run], plot: Figure,
    timing: dict[str, Any], **more: Any,
) -> None:  # fmt: skip
    """Writes what was found into NAME.json, the plot into NAME.png, and names the plot last."""
    figures, path = {run_name: run.figures for run_name, run in runs.items()}, settings.out / name
    record = {"settings": vars(settings), "setup": setup, "figures": figures, **more, "timing": timing}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1, default=str))
    plot.savefig(path.with_suffix(".png"), dpi=150)
    print(f"{timing['total_seconds']:.0f} s in all. All figures: {path.with_suffix('.json')}")
    print(path.with_suffix(".png"))


def show_models(runs: dict[str, Run]) -> Figure:
    """Prints what the models of `distill.py` came to, and draws how."""
    rows = [
        (name, str(step), "" if last.kl is None else f"{last.kl:.4f}", f"{last.perplexity:,.1f}")
        for name, run in runs.items()
        for step, last in sorted(run.held_out.items())[-1:]
    ]
    say_table(("model", "steps", "KL(teacher‖model), nats/token", "perplexity"), rows)
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, kl, perplexity = figure.subplots(1, 3)
    for (name, run), colour in zip(runs.items(), ("tab:gray", "tab:orange", "tab:blue"), strict=True):
        steps, found = list(run.held_out), list(run.held_out.values())
        loss.plot(run.curve, color=colour, linewidth=0.9, label=f"{name}: {run.objective}")
        perplexity.plot(steps, [one.perplexity for one in found], "o-", color=colour, label=name)
        if name != "teacher":
            kl.plot(steps, [one.kl for one in found], "o-", color=colour, label=name)
    label(loss, "training loss", "step", "nats a token")
    label(kl, "held-out KL(teacher‖student)", "step", "nats a token")
    label(perplexity, "held-out perplexity", "step", "")
    perplexity.set_yscale("log")
    return figure


def say_costs(cost: dict[str, Any]) -> None:
    def mib(size: int) -> str:
        return f"{size / 2**20:,.1f} MiB"

    takes, shape = cost["takes"], " × ".join(map(str, cost["shape"]))
    say(f"\nThe loss on {takes} of the held-out text, {shape}, {mib(cost['student_bytes'])} the student's:")
    rows = [
        (name, f"{one['value']:.6f}", f"{one['seconds'] * 1e3:,.1f} ms", mib(one["peak_bytes"]))
        for name, one in cost["costs"].items()
    ]
    say_table(("loss", "value", "time", "peak extra memory"), rows)
    say(f"Time: forward and backward, median of {cost['repeats']}, interleaved.")
    say(f"Memory: beyond the {takes}, gradients included; {cost['memory_method']}.")


def show_policies(runs: dict[str, Run], beta: float) -> Figure:
    """Prints what the policies of `rlhf_kl.py` came to, and draws how."""
    titles = {form: f"{form}: {run.objective}" if run.objective else form for form, run in runs.items()}
    found = [(titles[form], *max(run.held_out.items())) for form, run in runs.items() if run.held_out]
    rows = [
        (
            title, str(step), f"{last.reward:.3f} ± {last.reward_error:.3f}",
            f"{last.kl:.2f} ± {last.kl_error:.2f}", f"{last.reward - beta * last.kl:.3f}",
        )
        for title, step, last in [("the reference", "", runs["none"].held_out[0]), *found]
    ]  # fmt: skip
    say_table(("penalty", "steps", "reward", "KL(policy‖ref)", "objective"), rows)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    styles = {"s-": "tab:gray", "o-": "tab:blue", "^-": "tab:orange", "v-": "tab:green", "D-": "tab:red"}
    for (form, run), (marker, colour) in zip(runs.items(), styles.items(), strict=True):
        if points := run.held_out.values():
            kl, reward = [point.kl for point in points], [point.reward for point in points]
            axes.plot(kl, reward, marker, color=colour, label=titles[form])
    title = f"Reward against exact KL while training, β = {beta:g}"
    label(axes, title, "held-out KL(policy‖reference), nats a completion", "held-out reward")
    return figure

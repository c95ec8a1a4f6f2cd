"""What the examples share of command lines and reports: options, one-line errors, Ctrl-C, tables, plots."""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

# The imports below take seconds, and some swallow a KeyboardInterrupt: until `one_line_errors` begins.
if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"Interrupted.\n") and 130))

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

STARTED = time.perf_counter()
CHECKPOINTS = 4  # of each run, besides its start
console = Console(highlight=False, soft_wrap=True)
say = console.print
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at torch's import: cuBLAS repeats its bits
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler from writing between the tables
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin halve a busy machine's speed


class BadInput(Exception):
    """Something the user gave cannot work; the message is one line that says what and why."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def at_least(low: float, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        if low <= (value := kind(text)) < 2**31:
            return value
        raise argparse.ArgumentTypeError(f"expected a number of at least {low} and below 2**31, got {text}")

    return number


def add_common_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--text", metavar="PATH", type=Path, help="a file, or a folder of *.py, *.md and *.txt")
    add("--seed", metavar="N", type=at_least(0), default=0, help="same seed, same run; default: %(default)s")
    add("--backend", metavar="NAME", help="of kl_gpu; default: its own choice")
    add("--out", metavar="PATH", type=Path, default=Path("out"), help="for the results; default: %(default)s")


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Ends the program with one line instead of a traceback, where the user can do something about it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except BadInput as error:
        Parser(program).error(str(error))
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


def say_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(headings[0], *(Column(heading, justify="right") for heading in headings[1:]))
    for row in rows:
        table.add_row(*row)
    console.print(table)


@dataclass
class Run:
    """The training of one model."""

    name: str
    objective: str
    steps: int
    measurement: str  # a format string for what is measured
    curve: list[float] = field(default_factory=list)  # the loss, or the reward, at each step
    held_out: dict[int, dict[str, Any]] = field(default_factory=dict)  # what was measured, by the steps done

    def each_step(self, measure: Callable[[], dict[str, Any]]) -> Iterator[None]:
        """Yields for each step, which the caller takes, and measures in between.

        The first Ctrl-C is held until a step's end: in a callback of the autograd engine it would be lost.
        """
        requests = []

        def request(number: int, frame: object) -> None:
            requests.append(number)
            signal.signal(signal.SIGINT, signal.default_int_handler)

        previous = signal.signal(signal.SIGINT, request)
        steps = track(range(self.steps + 1), self.name, console=console, disable=not console.is_terminal)
        try:
            for step in steps:
                if step > 0:
                    yield
                if step in {round(self.steps * part / CHECKPOINTS) for part in range(CHECKPOINTS + 1)}:
                    self.held_out[step] = measure()
                    found = self.measurement.format(**self.held_out[step])
                    say(f"{self.name}, step {step} of {self.steps}: {found}")
                if requests:
                    raise KeyboardInterrupt
        finally:
            signal.signal(signal.SIGINT, previous)


@contextmanager
def until_interrupted(runs: Iterable[Run]) -> Iterator[None]:
    """Ctrl-C ends early what is within; what was measured until then is reported all the same."""
    try:
        yield
    except KeyboardInterrupt:
        say("[yellow]Interrupted. What was measured until now is kept.[/]")
        if not any(run.held_out for run in runs):
            say("Nothing was measured yet.")
            sys.exit(130)


def save(name: str, settings: Any, runs: Iterable[Run], plot: Figure, **more: Any) -> None:
    """Writes what was found into NAME.json, the plot into NAME.png, and names the plot last."""
    path, seconds = settings.out / name, time.perf_counter() - STARTED
    record = {"settings": vars(settings), "seconds": seconds, **more}
    record["figures"] = {run.name: vars(run) for run in runs}  # what comes out the same from the same seed
    path.with_suffix(".json").write_text(json.dumps(record, indent=1, default=str))
    plot.savefig(path.with_suffix(".png"), dpi=150)
    print(f"{seconds:.0f} s in all. All figures: {path.with_suffix('.json')}\n{path.with_suffix('.png')}")


def label(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def show_models(runs: Sequence[Run]) -> Figure:
    """Prints what the models of `distill.py` came to, and draws how."""
    rows = [
        (run.name, str(step), f"{found['kl']:.4f}" if "kl" in found else "", f"{found['perplexity']:,.1f}")
        for run in runs
        for step, found in list(run.held_out.items())[-1:]
    ]
    say_table(("model", "steps", "KL(teacher‖model), nats/token", "perplexity"), rows)
    figure = Figure(figsize=(9, 4), layout="constrained")
    kl, perplexity = figure.subplots(1, 2)
    for run, colour in zip(runs, ("tab:gray", "tab:orange", "tab:blue"), strict=True):
        steps, found = list(run.held_out), list(run.held_out.values())
        perplexity.plot(steps, [one["perplexity"] for one in found], "o-", color=colour, label=run.name)
        if run.name != "teacher":
            kl.plot(steps, [one["kl"] for one in found], "o-", color=colour, label=run.name)
    label(kl, "held-out KL(teacher‖student)", "step", "nats a token")
    label(perplexity, "held-out perplexity", "step", "")
    perplexity.set_yscale("log")
    return figure


def say_costs(cost: dict[str, dict[str, float]], takes: str, student: Any) -> None:
    shape, mib = " × ".join(map(str, student.shape)), student.nbytes / 2**20
    say(f"\nThe loss on {takes} of the held-out text, {shape}, {mib:,.1f} MiB the student's:")
    rows = [
        (name, f"{value:.6f}", f"{seconds * 1e3:,.1f} ms", f"{peak / 2**20:,.1f} MiB")
        for name, (value, seconds, peak) in ((name, one.values()) for name, one in cost.items())
    ]
    say_table(("loss", "value", "time", "peak extra memory"), rows)
    say(f"Time: forward and backward, median of 7. Memory: beyond the {takes}, gradients included.")


def show_policies(runs: Sequence[Run], beta: float) -> Figure:
    """Prints what the policies of `rlhf_kl.py` came to, and draws how."""
    last = [("the reference", "", runs[0].held_out[0])]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for run, style in zip(runs, ("s-", "o-", "^-", "v-", "D-"), strict=True):
        title = f"{run.name}: {run.objective}" if run.objective else run.name
        kl, reward = ([found[what] for found in run.held_out.values()] for what in ("kl", "reward"))
        axes.plot(kl, reward, style, label=title)
        last += [(title, str(step), found) for step, found in list(run.held_out.items())[-1:]]
    rows = [
        (
            title, step, f"{found['reward']:.3f} ± {found['reward_error']:.3f}",
            f"{found['kl']:.2f} ± {found['kl_error']:.2f}", f"{found['reward'] - beta * found['kl']:.3f}",
        )
        for title, step, found in last
    ]  # fmt: skip
    say_table(("penalty", "steps", "reward", "KL(policy‖ref)", "objective"), rows)
    title = f"Reward against exact KL while training, β = {beta:g}"
    label(axes, title, "held-out KL(policy‖reference), nats a completion", "held-out reward")
    return figure

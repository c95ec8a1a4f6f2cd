"""What a run found: kept as it comes, then printed, drawn and saved."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _cost import Comparison
from _show import right, say
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

TEACHER, LABELS_ALONE, DISTILLED = "teacher", "student, labels alone", "student, kl_gpu"

_COLOURS = {TEACHER: "tab:gray", LABELS_ALONE: "tab:orange", DISTILLED: "tab:blue"}


@dataclass(frozen=True)
class HeldOut:
    kl: float | None  # KL(teacher‖model), nats a token; None for the teacher
    perplexity: float


@dataclass
class Run:
    """The training of one model; `held_out` maps steps done to what was measured then."""

    objective: str
    steps: int
    loss: list[float] = field(default_factory=list)
    held_out: dict[int, HeldOut] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def done(self) -> int:
        return len(self.loss)

    @property
    def state(self) -> str:
        return f"loss {self.loss[-1]:.3f}  {self.tokens_per_second:,.0f} tokens/s"

    @property
    def news(self) -> str | None:
        if not (measured := self.held_out.get(self.done)):
            return None
        kl = "" if measured.kl is None else f", KL(teacher‖model) {measured.kl:.4f}"
        return f"held-out perplexity {measured.perplexity:,.1f}{kl}"


@dataclass
class Record:
    settings: dict[str, Any]
    setup: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    cost: Comparison | None = None
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """What the clock says stands apart: `figures` comes out the same again from the same seed."""
        return {
            "settings": self.settings,
            "setup": self.setup,
            "figures": {
                name: {key: value for key, value in asdict(run).items() if key not in ("tokens", "seconds")}
                for name, run in self.runs.items()
            },
            "cost": asdict(self.cost) if self.cost else None,
            "timing": {
                "total_seconds": self.seconds,
                "tokens_per_second": {name: run.tokens_per_second for name, run in self.runs.items()},
            },
        }


def introduction(setup: dict[str, Any]) -> str:
    teacher, student = setup["teacher_parameters"] / 1e6, setup["student_parameters"] / 1e6
    return (
        f"{setup['text']}: {setup['training_tokens']:,} tokens to train on, "
        f"{setup['held_out_tokens']:,} held out.\n"
        f"A teacher of {teacher:,.1f} M parameters, students of {student:,.1f} M, "
        f"{setup['columns_compared']:,} columns, on {setup['device']}."
    )


def present(record: Record, console: Console, folder: Path) -> None:
    """Prints the tables, saves the figures and the plot, and names the plot last."""
    if not any(run.held_out for run in record.runs.values()):
        console.print("Nothing was measured yet.")
        return
    say(console, f"\nOn {record.setup['held_out_tokens']:,} tokens held out from training:")
    console.print(_models_table(record))
    if record.cost:
        _present_cost(record.cost, console)
    figures = folder / "distill.json"
    figures.write_text(json.dumps(record.as_json(), indent=1))
    plot = folder / "distill.png"
    _drawn(record).savefig(plot, dpi=150)
    print(f"{record.seconds:.0f} s in all. All figures: {figures}")
    print(plot)


def _models_table(record: Record) -> Table:
    table = Table("model", *(right(h) for h in ("steps", "KL(teacher‖model), nats/token", "perplexity")))
    for name, run in record.runs.items():
        if run.held_out:
            step, latest = max(run.held_out.items())
            kl = "" if latest.kl is None else f"{latest.kl:.4f}"
            table.add_row(name, str(step), kl, f"{latest.perplexity:,.1f}")
    return table


def _present_cost(cost: Comparison, console: Console) -> None:
    shape = " × ".join(map(str, cost.shape))
    size = _mib(cost.student_bytes)
    say(console, f"\nThe loss on {cost.takes} of the held-out text, {shape}, {size} the student's:")
    table = Table("loss", *(right(h) for h in ("value", "time", "peak extra memory")))
    for name, one in cost.costs.items():
        table.add_row(name, f"{one.value:.6f}", f"{one.seconds * 1e3:,.1f} ms", _mib(one.peak_bytes))
    console.print(table)
    say(console, f"Time: forward and backward, median of {cost.repeats}, interleaved.")
    say(console, f"Memory: beyond the {cost.takes}, gradients included; {cost.memory_method}.")


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _drawn(record: Record) -> Figure:
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, kl, perplexity = figure.subplots(1, 3)
    for name, run in record.runs.items():
        colour = _COLOURS[name]
        loss.plot(run.loss, color=colour, linewidth=0.9, label=f"{name}: {run.objective}")
        steps, measured = list(run.held_out), list(run.held_out.values())
        perplexity.plot(steps, [m.perplexity for m in measured], "o-", color=colour, label=name)
        if name != TEACHER:
            kl.plot(steps, [m.kl for m in measured], "o-", color=colour, label=name)
    _label(loss, "training loss", "nats a token")
    _label(kl, "held-out KL(teacher‖student)", "nats a token")
    _label(perplexity, "held-out perplexity", "")
    perplexity.set_yscale("log")
    return figure


def _label(axes: Axes, title: str, unit: str) -> None:
    axes.set(title=title, xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")

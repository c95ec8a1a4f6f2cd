"""What the forms of the penalty came to: kept as it comes, then printed, drawn and saved."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _penalties import FORMS
from _report import Run
from _show import right, say
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

_STYLES = {
    "none": ("tab:gray", "s"),
    "exact": ("tab:blue", "o"),
    "k1": ("tab:orange", "^"),
    "k2": ("tab:green", "v"),
    "k3": ("tab:red", "D"),
}


@dataclass(frozen=True)
class HeldOut:
    """Completions of held-out prompts: means, and the standard errors of those."""

    reward: float
    reward_error: float
    kl: float  # KL(policy‖reference), exact at every token; nats a completion
    kl_error: float
    sample: str  # one of the prompts and its completion


@dataclass
class PolicyRun:
    """The training of one policy; `held_out` maps steps done to what was measured then."""

    applied: str  # where the penalty goes
    steps: int
    reward: list[float] = field(default_factory=list)  # of each step's own completions
    held_out: dict[int, HeldOut] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def done(self) -> int:
        return len(self.reward)

    @property
    def state(self) -> str:
        return f"reward {self.reward[-1]:.3f}"

    @property
    def news(self) -> str | None:
        if not (measured := self.held_out.get(self.done)):
            return None
        return f"held-out reward {measured.reward:.3f}, KL(policy‖reference) {measured.kl:.3f}"


@dataclass
class RlhfRecord:
    settings: dict[str, Any]
    setup: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, PolicyRun] = field(default_factory=dict)
    pretraining: Run | None = None
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """What the clock says stands apart: `figures` comes out the same again from the same seed."""
        return {
            "settings": self.settings,
            "setup": self.setup,
            "reference": _without_clock(self.pretraining) if self.pretraining else None,
            "figures": {name: _without_clock(run) for name, run in self.runs.items()},
            "timing": {
                "total_seconds": self.seconds,
                "pretraining_seconds": self.pretraining.seconds if self.pretraining else 0.0,
                "policy_seconds": {name: run.seconds for name, run in self.runs.items()},
            },
        }


def _without_clock(run: Run | PolicyRun) -> dict[str, Any]:
    return {key: value for key, value in asdict(run).items() if key != "seconds"}


def present(record: RlhfRecord, console: Console, folder: Path) -> None:
    """Prints the table, saves the figures and the plot, and names the plot last."""
    runs = {name: run for name, run in record.runs.items() if run.held_out}
    if not runs:
        console.print("Nothing was measured yet.")
        return
    count, tokens = record.setup["held_out_prompts"], record.settings["tokens"]
    say(console, f"\nCompletions of {count} held-out prompts, {tokens} tokens each; ± is a standard error:")
    coefficient = record.settings["coefficient"]
    console.print(_table(runs, coefficient))
    say(console, f"KL in nats a completion, exact at every token; objective: reward − {coefficient:g} KL.")
    figures = folder / "rlhf_kl.json"
    figures.write_text(json.dumps(record.as_json(), indent=1))
    plot = folder / "rlhf_kl.png"
    _drawn(runs, coefficient).savefig(plot, dpi=150)
    print(f"{record.seconds:.0f} s in all. All figures: {figures}")
    print(plot)


def _table(runs: dict[str, PolicyRun], coefficient: float) -> Table:
    headings = ("steps", "reward", "KL(policy‖ref)", "objective")
    table = Table("penalty", *(right(h) for h in headings))
    table.add_row("the reference", "", *_cells(next(iter(runs.values())).held_out[0], coefficient))
    for name, run in runs.items():
        step, latest = max(run.held_out.items())
        table.add_row(_label(name), str(step), *_cells(latest, coefficient))
    return table


def _cells(measured: HeldOut, coefficient: float) -> tuple[str, str, str]:
    reward = f"{measured.reward:.3f} ± {measured.reward_error:.3f}"
    kl = f"{measured.kl:.2f} ± {measured.kl_error:.2f}"
    return reward, kl, f"{measured.reward - coefficient * measured.kl:.3f}"


def _label(form: str) -> str:
    return f"{form}: {FORMS[form]}" if FORMS[form] else form


def _drawn(runs: dict[str, PolicyRun], coefficient: float) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        colour, marker = _STYLES[name]
        measured = [one for _, one in sorted(run.held_out.items())]
        kl, reward = [m.kl for m in measured], [m.reward for m in measured]
        axes.plot(kl, reward, marker + "-", color=colour, label=_label(name))
    axes.set(
        title=f"Reward against exact KL while training, β = {coefficient:g}",
        xlabel="held-out KL(policy‖reference), nats a completion",
        ylabel="held-out reward",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure

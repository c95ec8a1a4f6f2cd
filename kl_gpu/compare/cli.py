"""`kl-gpu`: two models, one report."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from . import report
from .errors import ComparisonError
from .run import Comparison, Opens, Progress, compare, noise_floor
from .sides import Model, Side, named, open_side
from .windows import SCORED, Windows, cut, of_texts, read_ids, read_texts

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.table import Table
except ImportError:
    sys.exit("kl-gpu: needs typer and rich; pip install 'kl_gpu[compare]'")

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)


@contextmanager
def _told() -> Iterator[None]:
    """What went wrong through no fault of the program is a line; it ends with 2, an interruption with 130."""
    try:
        yield
    except ComparisonError as error:
        print(f"kl-gpu: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("kl-gpu: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


@app.callback()
def _kl_gpu() -> None:
    """Exact divergences between language models."""


@app.command("compare")
@_told()
def _compare(
    base: Annotated[str, typer.Argument(help="a model's folder or name, .gguf, .kld, .safetensors")],
    models: Annotated[list[str], typer.Argument(help="what is compared with it; NAME=model gives it a name")],
    text: Annotated[Path | None, typer.Option(help="a file or folder; .parquet, .jsonl by --column")] = None,
    ids: Annotated[Path | None, typer.Option(help="token ids instead: a .npy file of integers")] = None,
    column: Annotated[str, typer.Option(help="where .parquet and .jsonl have the text")] = "text",
    category: Annotated[str | None, typer.Option(help="a column that names each text's category")] = None,
    ctx: Annotated[int, typer.Option(help="tokens of a window")] = 512,
    score: Annotated[str, typer.Option(help=f"of a window: {' or '.join(SCORED)}")] = "half",
    windows: Annotated[int | None, typer.Option(help="compare on the first so many windows only")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="columns to compare if they differ")] = None,
    dtype: Annotated[str, typer.Option(help="of the weights: float32, bfloat16, float16")] = "float32",
    device: Annotated[str | None, typer.Option(help="default: a GPU, else the CPU")] = None,
    batch: Annotated[int, typer.Option(help="windows that go through a model together")] = 1,
    out: Annotated[Path, typer.Option(help="the report's folder")] = Path("kl-gpu-report"),
    noise: Annotated[bool, typer.Option("--noise-floor", help="the base against itself, too")] = False,
    fresh: Annotated[bool, typer.Option(help="begin anew where the folder holds an interrupted run")] = False,
) -> None:  # fmt: skip
    """Compare models with a base on a text, token by token: KL, perplexities, and where they differ.

    Interrupted, the same command goes on where it stopped. Under torchrun, ranks share the windows.
    """
    opened = open_side(base, dtype, device)
    given = _windows_of(opened, text, ids, column, category, ctx, score)
    if windows is not None:
        if windows < 1:
            raise ComparisonError(f"--windows must be at least 1, got {windows}")
        categories = None if given.categories is None else given.categories[:windows]
        given = given._replace(ids=given.ids[:windows], categories=categories)
    sides: list[tuple[str, Opens]] = [(named(x)[0], partial(open_side, x, dtype, device)) for x in models]
    if noise:
        sides.append(noise_floor(opened))
    about = {"dtype": dtype, "text": str(text or ids or base), "specs": [base, *models]}
    options: dict[str, Any] = {"vocab_size": vocab_size, "batch": batch, "fresh": fresh, "about": about}
    first = os.environ.get("RANK", "0") == "0"
    with _Progress(Console(stderr=True), first) as progress:
        found = compare(opened, sides, given, out, progress=progress, **options)
    if first:
        _print(found)
        encoder = opened.encoder if isinstance(opened, Model) else None
        decode = None if encoder is None else lambda token: str(encoder.decode([token]))
        print(report.write(found, out, decode))


def _windows_of(
    base: Side, text: Path | None, ids: Path | None, column: str, category: str | None, ctx: int, score: str
) -> Windows:
    if (text is not None) + (ids is not None) + (base.windows is not None) != 1:
        raise ComparisonError(
            f"{base.name} was recorded on its own tokens: leave --text and --ids away"
            if base.windows is not None
            else "name the text with --text, or token ids with --ids"
        )
    if base.windows is not None:
        return base.windows
    if ids is not None:
        return cut(read_ids(ids), ctx, score)
    assert text is not None
    if not isinstance(base, Model):
        raise ComparisonError(f"{base.name} has no tokenizer, so a text cannot be read with it")
    return of_texts(read_texts(text, column, category), base.encode, ctx, score)


class _Progress:
    """A bar with tokens a second and the time left."""

    def __init__(self, console: Console, visible: bool) -> None:
        rate = TextColumn("{task.fields[rate]}")
        columns = TextColumn("{task.description}"), BarColumn(), rate, TimeRemainingColumn()
        self.bar = Bar(*columns, console=console, transient=True, disable=not visible)
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        self.bar.start()
        return self._step

    def _step(self, name: str, done: int, total: int) -> None:
        task = self.tasks.get(name)
        if task is None:
            task = self.tasks[name] = self.bar.add_task(name, total=total, rate="")
        speed = self.bar.tasks[task].speed
        rate = f"{speed:.0f} tokens/s" if speed else ""
        self.bar.update(task, completed=done, total=total, rate=rate)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


def _print(found: Comparison) -> None:
    console = Console()
    for heading, rows in report.sections(found):
        table = Table("", *(scores.name for scores in found.models), title=heading, title_justify="left")
        for name, cells in rows:
            table.add_row(name, *cells)
        console.print(table)
    console.print(report.error_note(found))

"""`kl-gpu`: two models, one report; and a model's predictions on disk."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

from . import report
from .errors import ComparisonError
from .ranks import rank_and_world
from .recording import FORMS, record
from .rounding import rounded
from .run import Comparison, Opens, Progress, compare, noise_floor
from .sides import DTYPES, Model, Side, named, open_side
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


def _opened(spec: str, dtype: str, device: str | None) -> Side:
    """A side, without the bars of transformers beside ours."""
    with suppress(ImportError):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    return open_side(spec, dtype, device)


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


_Text = Annotated[Path | None, typer.Option(help="a file or folder; .parquet, .jsonl by --column")]
_Ids = Annotated[Path | None, typer.Option(help="token ids instead: a .npy file of integers")]
_Column = Annotated[str, typer.Option(help="where .parquet and .jsonl have the text")]
_Category = Annotated[str | None, typer.Option(help="a column that names each text's category")]
_Ctx = Annotated[int, typer.Option(help="tokens of a window")]
_Windows = Annotated[int | None, typer.Option(help="take the first so many windows only")]
_Dtype = Annotated[str, typer.Option(help=f"of the weights: {', '.join(DTYPES)}")]
_Device = Annotated[str | None, typer.Option(help="default: a GPU, else the CPU")]
_Batch = Annotated[int, typer.Option(help="windows that go through a model together")]
_Fresh = Annotated[bool, typer.Option(help="begin anew where the folder holds an interrupted run")]


@app.command("compare")
@_told()
def _compare(
    base: Annotated[
        str, typer.Argument(help="a model's folder or name, a recording's folder, .gguf, .kld, .safetensors, "
                            "or top-k log-probabilities in .jsonl or .parquet")
    ],
    models: Annotated[
        list[str] | None, typer.Argument(help="what is compared with it; NAME=side gives it a name")
    ] = None,
    text: _Text = None, ids: _Ids = None, column: _Column = "text", category: _Category = None,
    ctx: _Ctx = 512,
    score: Annotated[
        str | None, typer.Option(help=f"of a window: {' or '.join(SCORED)}; default: half, where it is known")
    ] = None,
    windows: _Windows = None,
    vocab_size: Annotated[int | None, typer.Option(help="columns to compare if they differ")] = None,
    dtype: _Dtype = "float32", device: _Device = None, batch: _Batch = 1,
    out: Annotated[Path, typer.Option(help="the report's folder")] = Path("kl-gpu-report"),
    rtn: Annotated[
        list[int] | None, typer.Option(help="also the base's own copy, its matrices rounded to so many bits")
    ] = None,
    noise: Annotated[bool, typer.Option("--noise-floor", help="the base against itself, too")] = False,
    fresh: _Fresh = False,
) -> None:  # fmt: skip
    """Compare models with a base on a text, token by token: KL, perplexities, and where they differ.

    Interrupted, the same command goes on where it stopped. Under torchrun, ranks share the windows.
    """
    opened = _opened(base, dtype, device)
    given = _few(_windows_of(opened, text, ids, column, category, ctx, score), windows)
    sides: list[tuple[str, Opens]] = [(named(x)[0], partial(_opened, x, dtype, device)) for x in models or []]
    sides += _rounded(opened, rtn or [])
    if noise and not isinstance(opened, Model):
        raise ComparisonError(
            f"--noise-floor runs the base again, and {opened.name} is not a model that runs"
        )
    if noise:
        sides.append(noise_floor(opened))
    about = {"dtype": dtype, "text": str(text or ids or base), "specs": [base, *(models or [])]}
    options: dict[str, Any] = {"vocab_size": vocab_size, "batch": batch, "fresh": fresh, "about": about}
    rank, _ = rank_and_world()
    with _Progress(Console(stderr=True), rank == 0) as progress:
        found = compare(opened, sides, given, out, progress=progress, **options)
    if rank == 0:
        _print(found)
        encoder = opened.encoder
        decode = None if encoder is None else lambda token: str(encoder.decode([token]))
        print(report.write(found, out, decode))


@app.command("record")
@_told()
def _record(
    model: Annotated[str, typer.Argument(help="a folder, a name or .gguf; NAME=model gives it a name")],
    text: _Text = None, ids: _Ids = None, column: _Column = "text", category: _Category = None,
    ctx: _Ctx = 512,
    score: Annotated[str, typer.Option(help=f"what to keep of a window: {' or '.join(SCORED)}")] = "all",
    windows: _Windows = None,
    form: Annotated[
        str, typer.Option("--as", help="hidden: hidden states and the LM head, small and exact; logits: in "
                          "16 bits, with each row's log-sum-exp; topk: the likeliest tokens and the rest")
    ] = "hidden",
    k: Annotated[int, typer.Option("-k", "--k", help="tokens of a row that --as topk keeps")] = 64,
    store: Annotated[
        str | None, typer.Option(help=f"of --as logits: {', '.join(DTYPES)}; default: the model's or float16")
    ] = None,
    dtype: _Dtype = "float32", device: _Device = None, batch: _Batch = 1,
    out: Annotated[Path, typer.Option(help="the recording's folder")] = Path("kl-gpu-recording"),
    shard: Annotated[int | None, typer.Option(help="windows of a file; default: up to 64 MiB")] = None,
    fresh: _Fresh = False,
) -> None:  # fmt: skip
    """Keep what a model says of a text, to compare others with it or to train from it without the model.

    Interrupted, the same command goes on where it stopped. Under torchrun, ranks share the windows.
    """
    if form not in FORMS:
        raise ComparisonError(f"--as must be one of {', '.join(FORMS)}, got {form!r}")
    opened = _opened(model, dtype, device)
    if not isinstance(opened, Model):
        raise ComparisonError(f"{opened.name} is a recording already")
    given = _few(_windows_of(opened, text, ids, column, category, ctx, score), windows)
    source = text or ids
    about = {"text": str(source), "text_sha256": None if source is None else _sha256(source)}
    rank, _ = rank_and_world()
    with _Progress(Console(stderr=True), rank == 0) as progress:
        options: dict[str, Any] = {"k": k, "store": store, "batch": batch, "shard": shard, "fresh": fresh}
        record(opened, given, out, form, about=about, progress=progress, **options)
    if rank == 0:
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        tokens = len(given.ids) * given.rows
        print(f"{tokens} predictions in {size / 2**20:.1f} MiB\n{out}")


def _rounded(base: Side, rtn: list[int]) -> list[tuple[str, Opens]]:
    """Copies that are made when their turn comes."""
    if rtn and not isinstance(base, Model):
        raise ComparisonError(f"--rtn rounds the base's weights, and {base.name} is not a model that runs")
    return [(f"{base.name} rtn{bits}", partial(rounded, cast(Model, base), bits)) for bits in rtn]


def _few(windows: Windows, count: int | None) -> Windows:
    if count is None:
        return windows
    if count < 1:
        raise ComparisonError(f"--windows must be at least 1, got {count}")
    return windows.few(count)


def _sha256(path: Path) -> str:
    """Of a file, or of all files of a folder in the order of their names."""
    found = hashlib.sha256()
    for file in sorted(x for x in path.rglob("*") if x.is_file()) if path.is_dir() else [path]:
        found.update(file.read_bytes())
    return found.hexdigest()


def _windows_of(
    base: Side, text: Path | None, ids: Path | None, column: str, category: str | None, ctx: int,
    score: str | None,
) -> Windows:  # fmt: skip
    if (text is not None) + (ids is not None) + (base.windows is not None) != 1:
        raise ComparisonError(
            f"{base.name} was recorded on its own tokens: leave --text and --ids away"
            if base.windows is not None
            else "name the text with --text, or token ids with --ids"
        )
    if score not in (None, *SCORED):
        raise ComparisonError(f"--score must be one of {', '.join(SCORED)}, got {score!r}")
    if base.windows is not None:
        return _part_of(base.name, base.windows, score)
    if ids is not None:
        return cut(read_ids(ids), ctx, score or "half")
    assert text is not None
    if not isinstance(base, Model):
        raise ComparisonError(f"{base.name} has no tokenizer, so a text cannot be read with it")
    return of_texts(read_texts(text, column, category), base.encode, ctx, score or "half")


def _part_of(name: str, known: Windows, score: str | None) -> Windows:
    """What of recorded windows is compared: texts of unequal lengths have no second half."""
    half = known.ids.shape[1] // 2
    if score is None:
        return known.narrowed(half) if known.first == 0 and known.counts is None else known
    first = half if score == "half" else 0
    if first < known.first:
        raise ComparisonError(f"{name} knows what follows from position {known.first} on, not from {first}")
    return known.narrowed(first)


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
    for note in report.notes(found):
        console.print(note, markup=False)

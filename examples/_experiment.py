"""The whole run: a teacher, two students from the same start, what came of them, and what the loss cost."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _models
import torch
from _checks import check_backend, check_folder
from _corpus import Text, Windows, read, trained_tokeniser, windows
from _cost import compare
from _report import DISTILLED, LABELS_ALONE, TEACHER, Record, Run, introduction, present
from _settings import BadInput, Settings
from _show import Progress
from _training import Bench, train
from rich.console import Console

_TEACHER_STEPS = 2  # for each step of a student
_SAMPLE = 20_000  # characters that two tokenisers must cut alike


def study(settings: Settings) -> int:
    """Returns the exit code. Ctrl-C ends it early; what was measured until then is reported all the same."""
    console = Console()
    check_folder(settings.out)
    check_backend(settings.backend, settings.device)
    record = Record({name: str(v) if isinstance(v, Path) else v for name, v in asdict(settings).items()})
    start = time.perf_counter()
    code = 0
    try:
        _run(settings, record, console)
    except KeyboardInterrupt:
        console.print("[yellow]Interrupted. What was measured until now is kept.[/]")
        code = 130
    except torch.OutOfMemoryError as error:
        raise BadInput(f"{settings.device} is out of memory: try a smaller --batch or --sequence") from error
    record.seconds = time.perf_counter() - start
    present(record, console, settings.out)
    return code


def _run(settings: Settings, record: Record, console: Console) -> None:
    if settings.device != "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        # This would fill every new tensor, and so slow what is timed.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    with console.status("Reading the text …"):
        text = read(settings.text)
        teacher, student, tokeniser = _cast(settings, text)
        training = windows(tokeniser, text.training, settings.sequence)
        held_out = windows(tokeniser, text.held_out, settings.sequence)
    columns = min(_models.columns(teacher), _models.columns(student))
    if (largest := int(max(training.ids.max(), held_out.ids.max()))) >= columns:
        raise BadInput(f"the text has a token of id {largest}, but the models share only {columns} columns")
    held_out = held_out.spread(max(1, settings.scale.held_out_tokens // settings.sequence))
    bench = Bench(settings, teacher.to(settings.device), held_out.to(settings.device), columns)
    record.setup = {
        "text": text.source,
        "training_tokens": training.ids.numel(),
        "held_out_tokens": held_out.predicted,
        "tokens_in_vocabulary": len(tokeniser),
        "columns_compared": bench.vocab_size,
        "teacher_parameters": teacher.num_parameters(),
        "student_parameters": student.num_parameters(),
        "device": settings.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backend": settings.backend or "kl_gpu's choice",
    }
    console.print(introduction(record.setup), soft_wrap=True, highlight=False)
    _train_all(bench, student, training, record, console)


def _train_all(bench: Bench, student: Any, training: Windows, record: Record, console: Console) -> None:
    settings = bench.settings
    record.runs = {
        TEACHER: Run("cross-entropy", 0 if settings.teacher else _TEACHER_STEPS * settings.steps),
        LABELS_ALONE: Run("cross-entropy", settings.steps),
        DISTILLED: Run("KL(teacher‖student)", settings.steps),
    }
    with Progress(console) as progress:
        notify = {name: progress.follow(name, run) for name, run in record.runs.items()}
        # Of no steps, this only measures.
        train(bench.teacher, bench.label_loss, bench, training, record.runs[TEACHER], notify[TEACHER])
        for name, objective in ((LABELS_ALONE, bench.label_loss), (DISTILLED, bench.distillation_loss)):
            model = copy.deepcopy(student).to(settings.device)
            train(model, objective, bench, training, record.runs[name], notify[name])
    console.print(
        "Measuring what the loss costs …"
    )  # with no spinner, which would take time from what is timed
    takes = "hidden states" if settings.fused_linear else "logits"
    record.cost = compare(takes, *bench.rivals(model))  # the last, so the distilled one


def _cast(settings: Settings, text: Text) -> tuple[Any, Any, Any]:
    """The teacher, the student and the tokeniser they share."""
    scale, seed, sequence = settings.scale, settings.seed, settings.sequence
    if not settings.teacher:
        tokeniser = trained_tokeniser(text.training)
        teacher = _models.small_llama(scale.teacher, len(tokeniser), sequence, seed)
        return teacher, _models.small_llama(scale.student, len(tokeniser), sequence, seed + 1), tokeniser
    teacher = _models.pretrained("--teacher", settings.teacher, sequence)
    tokeniser = _models.pretrained_tokeniser("--teacher", settings.teacher)
    if not settings.student:
        columns = _models.columns(teacher)
        return teacher, _models.small_llama(scale.student, columns, sequence, seed), tokeniser
    # In float32 whatever the file holds: an optimiser's small steps vanish in 16 bits.
    student = _models.pretrained("--student", settings.student, sequence).float()
    other = _models.pretrained_tokeniser("--student", settings.student)
    _models.check_same_tokens(tokeniser, other, text.training[0][:_SAMPLE])
    return teacher, student, tokeniser

"""The whole run: a reference model, a policy from it for each form of the penalty, and what came of them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import _models
import torch
from _checks import check_backend, check_folder
from _corpus import IGNORED, Windows, read, trained_tokeniser, windows
from _penalties import FORMS
from _policy import Game, improve
from _report import Run
from _rlhf_report import PolicyRun, RlhfRecord, present
from _rlhf_settings import RlhfSettings
from _settings import BadInput, Settings, Size
from _show import Progress, say
from _training import Bench, train
from rich.console import Console

_REFERENCE = Size(128, 2)
# Of 32 000 tokens, half a minute of pretraining would teach only the most frequent.
_VOCABULARY = 2_048
_PRETRAINING_BATCH = 16
_PRETRAINING_RATE = 3e-3
_PERPLEXITY_WINDOWS = 32


def study(settings: RlhfSettings) -> int:
    """Returns the exit code. Ctrl-C ends it early; what was measured until then is reported all the same."""
    console = Console()
    check_folder(settings.out)
    check_backend(settings.backend, "cpu")
    record = RlhfRecord({name: str(v) if isinstance(v, Path) else v for name, v in asdict(settings).items()})
    start = time.perf_counter()
    code = 0
    try:
        _run(settings, record, console)
    except KeyboardInterrupt:
        console.print("[yellow]Interrupted. What was measured until now is kept.[/]")
        code = 130
    record.seconds = time.perf_counter() - start
    present(record, console, settings.out)
    return code


def _run(settings: RlhfSettings, record: RlhfRecord, console: Console) -> None:
    sequence = settings.prompt + settings.tokens
    with console.status("Reading the text …"):
        text = read(settings.text)
        tokeniser = trained_tokeniser(text.training, _VOCABULARY)
        training = windows(tokeniser, text.training, sequence)
        held_out = windows(tokeniser, text.held_out, sequence)
        prompts, asked = (
            _prompts(rows, settings.prompt) for rows in (training, held_out.spread(settings.held_out))
        )
    reference = _models.small_llama(_REFERENCE, len(tokeniser), sequence, settings.seed)
    record.setup = {
        "text": text.source,
        "training_tokens": training.ids.numel(),
        "held_out_prompts": len(asked),
        "tokens_in_vocabulary": len(tokeniser),
        "parameters": reference.num_parameters(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backend": settings.backend or "kl_gpu's choice",
    }
    say(console, _introduction(record))
    game = Game(settings, reference, tokeniser, prompts, asked)
    record.runs = {form: PolicyRun(FORMS[form], settings.steps) for form in FORMS}
    with Progress(console) as progress:
        pretraining = Run("cross-entropy", settings.pretraining)
        notify = progress.follow("reference", pretraining)
        following = {form: progress.follow(form, run) for form, run in record.runs.items()}
        record.pretraining = pretraining
        _pretrain(game, training, held_out.spread(_PERPLEXITY_WINDOWS), pretraining, notify)
        for form, run in record.runs.items():
            policy = copy.deepcopy(reference).requires_grad_()
            improve(policy, form, game, run, following[form])


def _pretrain(game: Game, training: Windows, held_out: Windows, run: Run, notify: Callable[[], None]) -> None:
    """The distillation example's teacher, with fewer tokens to choose from; frozen from then on."""
    settings, reference = game.settings, game.reference
    options = Settings.choose(
        teacher=None,
        student=None,
        text=settings.text,
        steps=run.steps,
        batch=_PRETRAINING_BATCH,
        sequence=settings.prompt + settings.tokens,
        rate=_PRETRAINING_RATE,
        temperature=1.0,
        seed=settings.seed,
        device="cpu",
        backend=settings.backend,
        out=settings.out,
    )
    bench = Bench(options, reference, held_out, len(game.tokeniser))
    train(reference, bench.label_loss, bench, training, run, notify)
    reference.eval().requires_grad_(False)


def _prompts(rows: Windows, length: int) -> torch.Tensor:
    """The rows' first tokens, where none of those is padding."""
    whole = (rows.labels[:, 1:length] != IGNORED).all(1)
    if whole.sum() < 2:  # of one, there is no standard error
        raise BadInput(f"the text is too short for prompts of {length} tokens")
    return rows.ids[whole, :length]


def _introduction(record: RlhfRecord) -> str:
    setup, settings = record.setup, record.settings
    return (
        f"{setup['text']}: {setup['training_tokens']:,} tokens to train on.\n"
        f"A reference of {setup['parameters'] / 1e6:,.1f} M parameters, "
        f"{setup['tokens_in_vocabulary']:,} columns; a policy for each penalty, "
        f"{settings['steps']} steps of {settings['prompts']} prompts × {settings['samples']} completions.\n"
        "Reward: the share of the lines written that parse as Python."
    )

"""The two losses, the loop that trains by either, and the measure of a model on held-out text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _corpus import IGNORED, Windows
from _cost import Loss
from _fused import cut, fused_kl
from _interrupt import StopBetweenSteps
from _report import HeldOut, Run
from _settings import Settings
from torch import Tensor

from kl_gpu import kl_div

Objective = Callable[[Any, Windows], Tensor]  # (the model that trains, a batch) -> loss

_CHECKPOINTS = 4
_WARM_UP = 0.1  # of all steps
_LAST_RATE = 0.1  # of the peak


def autocast(batch: Windows) -> torch.autocast:
    return torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=batch.ids.is_cuda)


def logits_of(model: Any, batch: Windows) -> Tensor:
    # No attention mask: the padding stands behind the text, where a causal model does not look.
    with autocast(batch):
        return model(input_ids=batch.ids, use_cache=False).logits


@dataclass(frozen=True)
class Bench:
    """What all runs are held against: the teacher, held-out text, and the columns both vocabularies share."""

    settings: Settings
    teacher: Any
    held_out: Windows
    vocab_size: int

    def kl(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """KL(teacher‖student) over the positions that have a label."""
        return kl_div(
            student_logits,
            teacher_logits,
            direction="forward",
            labels=labels,
            shift=True,
            vocab_size=self.vocab_size,
            backend=self.settings.backend,
            **options,
        )

    def cross_entropy(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        # The labels are shifted and not the logits: a slice of those could not be flattened without a copy.
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        logits = logits[..., : self.vocab_size].flatten(0, 1).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction=reduction)

    def label_loss(self, model: Any, batch: Windows) -> Tensor:
        return self.cross_entropy(logits_of(model, batch), batch.labels)

    def distillation_loss(self, model: Any, batch: Windows) -> Tensor:
        options: dict[str, Any] = {"temperature": self.settings.temperature, "t_squared": True}
        if self.settings.fused_linear:
            with autocast(batch):
                with torch.no_grad():
                    teacher = cut(self.teacher, batch)
                options |= {"vocab_size": self.vocab_size, "backend": self.settings.backend}
                return fused_kl(cut(model, batch), teacher, batch.labels, **options)
        with torch.no_grad():
            teacher_logits = logits_of(self.teacher, batch)
        return self.kl(logits_of(model, batch), teacher_logits, batch.labels, **options)

    @torch.no_grad()
    def measure(self, model: Any) -> HeldOut:
        model.eval()
        is_teacher = model is self.teacher
        surprise = divergence = 0.0
        for batch in self.held_out.batches(self.settings.batch):
            logits = logits_of(model, batch)
            surprise += self.cross_entropy(logits, batch.labels, "sum").item()
            if not is_teacher:
                teacher_logits = logits_of(self.teacher, batch)
                divergence += self.kl(logits, teacher_logits, batch.labels, reduction="sum").item()
        tokens = self.held_out.predicted
        return HeldOut(None if is_teacher else divergence / tokens, math.exp(surprise / tokens))

    @torch.no_grad()
    def rivals(self, student: Any) -> tuple[dict[str, Loss], Tensor, Tensor]:
        """The distillation loss, ours and as it is usually written, and what they take of held-out text.

        That is logits, or hidden states where the heads are part of the loss.
        """
        batch = self.held_out.first(max(1, self.settings.scale.cost_tokens // self.settings.sequence))
        options: dict[str, Any] = {"temperature": self.settings.temperature, "labels": batch.labels}
        ours = partial(self.kl, t_squared=True, **options)
        plain = partial(_plain_kl, vocab_size=self.vocab_size, **options)
        losses: dict[str, Loss] = {"kl_gpu": ours, "PyTorch": plain}
        if not self.settings.fused_linear:
            return losses, logits_of(student, batch), logits_of(self.teacher, batch)
        with autocast(batch):
            cuts = cut(student, batch), cut(self.teacher, batch)

        def on_hidden(loss: Callable[..., Tensor], whole: bool) -> Loss:
            def of(student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
                with autocast(batch):
                    sides = cuts[0]._replace(hidden=student_hidden), cuts[1]._replace(hidden=teacher_hidden)
                    if not whole:
                        return loss(*sides)
                    with torch.no_grad():
                        teacher_logits = sides[1].logits()
                    return loss(sides[0].logits(), teacher_logits)

            return of

        fused = partial(
            fused_kl, t_squared=True, vocab_size=self.vocab_size, backend=self.settings.backend, **options
        )
        on_logits = {name: on_hidden(loss, True) for name, loss in losses.items()}
        return {"kl_gpu, fused": on_hidden(fused, False)} | on_logits, cuts[0].hidden, cuts[1].hidden


def _plain_kl(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, vocab_size: int
) -> Tensor:
    log_q = F.log_softmax(student[:, :-1, :vocab_size] / temperature, -1, dtype=torch.float32)
    log_p = F.log_softmax(teacher[:, :-1, :vocab_size] / temperature, -1, dtype=torch.float32)
    rows = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    counts = labels[:, 1:] != IGNORED
    return (rows * counts).sum() / counts.sum().clamp_min(1) * temperature**2


def train(
    model: Any, objective: Objective, bench: Bench, training: Windows, run: Run, notify: Callable[[], None]
) -> None:
    """Trains `model` for `run.steps` steps and writes its curves into `run` as they come."""
    settings = bench.settings
    # What a model draws while it trains (dropout, where it has some) is the same in every run.
    torch.manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_share_of_rate, steps=run.steps))
    checkpoints = {round(run.steps * part / _CHECKPOINTS) for part in range(_CHECKPOINTS + 1)}
    with StopBetweenSteps() as interrupt:
        run.held_out[0] = bench.measure(model)
        notify()
        for batch in training.shuffled(settings.batch, run.steps, settings.seed):
            interrupt.check()
            start = time.perf_counter()
            batch = batch.to(bench.held_out.ids.device)
            model.train()
            loss = objective(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            run.loss.append(loss.item())
            run.seconds += time.perf_counter() - start
            run.tokens += batch.ids.numel()
            if len(run.loss) in checkpoints:
                run.held_out[len(run.loss)] = bench.measure(model)
            notify()


def _share_of_rate(step: int, steps: int) -> float:
    """A linear start, then a cosine down."""
    warm_up = max(1.0, _WARM_UP * steps)
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    done = (step - warm_up) / max(1.0, steps - warm_up)
    return _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * done)) / 2

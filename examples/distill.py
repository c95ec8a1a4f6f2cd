"""Distil one language model into another through `kl_gpu`, and measure what that buys.

    python examples/distill.py

trains a small Llama-style teacher on the sources of Python's standard library, then two students from the
same start, with the same batches: one on the labels alone, one through

    kl_gpu.kl_div(student_logits, teacher_logits, direction="forward", temperature=T,
                  labels=labels, shift=True, t_squared=True)

(with --fused-linear through kl_gpu.linear_div, which makes the logits itself, a few rows at a time).
It prints how close each came to the teacher on text none of them saw, and what this loss costs beside plain
PyTorch's on the same logits. With models of your own, from a hub or a folder:

    python examples/distill.py --teacher Qwen/Qwen2.5-1.5B --student Qwen/Qwen2.5-0.5B --text notes/
"""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import _report as report
from _report import BadInput, Parser, add_common_options, positive_number, whole


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="distill.py",
        description="Distil a teacher into a student through kl_gpu, and the same student by labels alone. "
        "Without --teacher, small models are made here. What has no default below depends on the device.",
    )
    add = parser.add_argument
    add("--teacher", metavar="NAME", help="hub name or folder of a causal language model; it is not trained")
    add("--student", metavar="NAME", help="the same for the student; needs --teacher")
    add("--steps", metavar="N", type=whole(1), help="of each student; the teacher takes twice as many")
    add("--batch", metavar="N", type=whole(1), help="windows of text a step")
    add("--sequence", metavar="N", type=whole(2), help="tokens a window")
    add("--rate", metavar="R", type=positive_number, help="peak learning rate")
    add("--temperature", metavar="T", type=positive_number, default=1.0, help="default: %(default)s")
    fused = "distil through kl_gpu.linear_div, from hidden states and LM heads: the logits never exist"
    add("--fused-linear", action="store_true", help=fused)
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N; default: cuda where there is one")
    add_common_options(parser)
    options = parser.parse_args(arguments)
    if options.student and not options.teacher:
        parser.error("--student needs --teacher: one trained here would have a tokeniser of its own")
    return options


with report.imports("distill.py", parsed, __name__):
    import _language_models as lm
    import torch
    from torch import Tensor

    from kl_gpu import kl_div, linear_div

SUITED: dict[str, dict[str, Any]] = {  # by device; on the CPU three minutes on two cores
    "cpu": {"steps": 200, "batch": 2, "sequence": 128, "rate": 3e-3},
    "cuda": {"steps": 600, "batch": 16, "sequence": 512, "rate": 1e-3},
}
# Of teacher and student.
SIZES = {"cpu": (lm.Size(192, 3), lm.Size(96, 2)), "cuda": (lm.Size(768, 8), lm.Size(384, 4))}
HELD_OUT_TOKENS, COST_TOKENS = {"cpu": 4_096, "cuda": 65_536}, {"cpu": 1_024, "cuda": 8_192}


def completed(**options: Any) -> argparse.Namespace:
    """The user's options, completed by what suits the device."""
    device = options["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    suited = SUITED[lm.device_type(device)] | {"device": device}
    if options["student"]:
        suited["rate"] = 2e-5  # for one that somebody trained before
    return argparse.Namespace(**options | {name: v for name, v in suited.items() if options[name] is None})


@dataclass(frozen=True)
class Distillation:
    """What all runs are held against: the teacher, held-out text, and the columns both vocabularies share."""

    settings: Any
    teacher: Any
    held_out: lm.Windows
    vocab_size: int

    def kl(self, student: Tensor, teacher: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """KL(teacher‖student) from logits, over the positions that have a label."""
        return kl_div(
            student, teacher, direction="forward", labels=labels, shift=True, vocab_size=self.vocab_size,
            backend=self.settings.backend, **options,
        )  # fmt: skip

    def losses(self, model: Any, batch: lm.Windows) -> dict[str, lm.Loss]:
        """What trains `model`, then the same done in other ways; each takes both models' `states`."""
        labels, temperature, vocab_size = batch.labels, self.settings.temperature, self.vocab_size
        head, teacher_head = lm.Head.of(model), lm.Head.of(self.teacher).detach()

        def from_logits(student: Tensor, teacher: Tensor) -> Tensor:
            return self.kl(student, teacher, labels, temperature=temperature, t_squared=True)

        def in_pytorch(student: Tensor, teacher: Tensor) -> Tensor:
            return lm.plain_kl(student, teacher, labels, temperature, vocab_size)

        def from_hidden_states(student: Tensor, teacher: Tensor) -> Tensor:
            return linear_div(
                student, head.weight, teacher, teacher_head.weight, labels=labels, shift=True,
                temperature=temperature, t_squared=True, vocab_size=vocab_size, backend=self.settings.backend,
                student_bias=head.bias, softcap=head.softcap, logit_scale=head.scale,
                teacher_bias=teacher_head.bias, teacher_softcap=teacher_head.softcap,
                teacher_logit_scale=teacher_head.scale,
            )  # fmt: skip

        losses: dict[str, lm.Loss] = {"kl_gpu": from_logits, "PyTorch": in_pytorch}
        if not self.settings.fused_linear:
            return losses
        on_heads = {name: lm.behind_heads(loss, head, teacher_head) for name, loss in losses.items()}
        losses = {"kl_gpu, fused": from_hidden_states, **on_heads}
        return {name: lm.autocast(batch)(loss) for name, loss in losses.items()}

    def states(self, model: Any, batch: lm.Windows) -> Tensor:
        """Logits, or hidden states where the heads are part of the loss."""
        if not self.settings.fused_linear:
            return lm.logits_of(model, batch)
        with lm.autocast(batch):
            return model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state

    def distillation_loss(self, model: Any, batch: lm.Windows) -> Tensor:
        with torch.no_grad():
            teacher = self.states(self.teacher, batch)
        loss, *_ = self.losses(model, batch).values()
        return loss(self.states(model, batch), teacher)

    def measure(self, model: Any) -> report.HeldOut:
        def kl(logits: Tensor, batch: lm.Windows) -> Tensor:
            return self.kl(logits, lm.logits_of(self.teacher, batch), batch.labels, reduction="sum")

        against = None if model is self.teacher else kl
        return lm.measured(model, self.held_out, self.settings.batch, self.vocab_size, against)


def study(settings: argparse.Namespace) -> int:
    """Returns the exit code. Ctrl-C ends it early; what was measured until then is reported all the same."""
    device, sequence, kind = settings.device, settings.sequence, torch.device(settings.device).type
    lm.check(settings.out, settings.backend, device)
    cost = None
    runs = {
        "teacher": report.Run("cross-entropy", 0 if settings.teacher else 2 * settings.steps),
        "student, labels alone": report.Run("cross-entropy", settings.steps),
        "student, kl_gpu": report.Run("KL(teacher‖student)", settings.steps),
    }
    with report.until_interrupted(runs) as outcome:
        with report.console.status("Reading the text …"):
            text = lm.read(settings.text)
            teacher, student, tokeniser = lm.teacher_and_student(settings, SIZES[kind], text)
            training = lm.windows(tokeniser, text.training, sequence, device)
            held_out = lm.windows(tokeniser, text.held_out, sequence, device)
        columns = min(lm.columns_of(teacher), lm.columns_of(student))
        if (top := int(max(training.ids.max(), held_out.ids.max()))) >= columns:
            raise BadInput(f"the text has a token of id {top}, but the models share only {columns} columns")
        held_out = held_out.spread(max(1, HELD_OUT_TOKENS[kind] // sequence))
        sizes = {"teacher": teacher.num_parameters(), "student": student.num_parameters()}
        report.say(
            f"{text.source}: {training.ids.numel():,} tokens to train on, {held_out.predicted:,} held out.\n"
            f"A teacher of {sizes['teacher'] / 1e6:,.1f} M parameters, students of "
            f"{sizes['student'] / 1e6:,.1f} M, {columns:,} columns, on {device}."
        )
        distillation = Distillation(settings, teacher.to(device), held_out, columns)
        label_loss = partial(lm.label_loss, vocab_size=columns)
        objectives: list[lm.Objective] = [label_loss, label_loss, distillation.distillation_loss]
        with report.Progress() as progress:
            notify = [progress.follow(name, run) for name, run in runs.items()]
            for i, (run, objective) in enumerate(zip(runs.values(), objectives, strict=True)):
                model = copy.deepcopy(student).to(device) if i else teacher
                lm.train(run, model, objective, training, settings, distillation.measure, notify[i])
        # With no spinner, which would take time from what is timed.
        report.say("Measuring what the loss costs …")
        batch = held_out[: max(1, COST_TOKENS[kind] // sequence)]
        with torch.no_grad():  # the last model is the distilled one
            states = [distillation.states(each, batch) for each in (model, teacher)]
        takes = "hidden states" if settings.fused_linear else "logits"
        cost = lm.compared(takes, distillation.losses(model, batch), *states)

    report.say(f"\nOn {held_out.predicted:,} tokens held out from training:")
    plot = report.show_models(runs)
    if cost:
        report.say_costs(cost)
    setup = lm.setup_of(
        text, training, tokeniser, settings, held_out_tokens=held_out.predicted, columns_compared=columns,
        device=device, **{f"{name}_parameters": size for name, size in sizes.items()},
    )  # fmt: skip
    speeds = {name: run.tokens_per_second for name, run in runs.items()}
    timing = {"total_seconds": outcome.seconds, "tokens_per_second": speeds}
    report.save("distill", settings, setup, runs, plot, cost=cost, timing=timing)
    return outcome.code


@report.one_line_errors("distill.py")
def main(arguments: list[str] | None = None) -> int:
    settings = completed(**vars(parsed(arguments)))
    try:
        return study(settings)
    except torch.OutOfMemoryError as error:
        text = f"{settings.device} is out of memory: try a smaller --batch or --sequence"
        raise BadInput(text) from error


if __name__ == "__main__":
    sys.exit(main())

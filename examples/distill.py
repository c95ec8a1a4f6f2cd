"""Distil one language model into another through `kl_gpu`, and measure what that buys.

    python examples/distill.py

trains a small Llama-style teacher on the sources of Python's standard library, then two students from the
same start, with the same batches: one on the labels alone, one through `kl_gpu.kl_div` (with --fused-linear
through `kl_gpu.linear_div`, which makes the logits itself, a few rows at a time). It prints how close each
came to the teacher on text none of them saw, and what this loss costs beside plain PyTorch's.
"""

import argparse
import copy
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import _language_models as lm
import _report as report
import torch
import torch.nn.functional as F
from _report import BadInput, Parser, add_common_options, at_least
from torch import Tensor

from kl_gpu import kl_div, linear_div


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    what = "Distil a teacher into a student. What has no default below depends on the device."
    parser = Parser(prog="distill.py", description=what)
    add = parser.add_argument
    add("--steps", metavar="N", type=at_least(1), help="of each student; the teacher takes twice as many")
    add("--batch", metavar="N", type=at_least(1), help="windows of text a step")
    add("--sequence", metavar="N", type=at_least(2), help="tokens a window")
    add("--rate", metavar="R", type=at_least(1e-9, float), help="peak learning rate")
    add("--temperature", metavar="T", type=at_least(1e-6, float), default=1.0, help="default: %(default)s")
    add("--fused-linear", action="store_true", help="distil through kl_gpu.linear_div, without logits")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N; default: cuda where there is one")
    add_common_options(parser)
    return parser.parse_args(arguments)


SUITED: dict[str, dict[str, Any]] = {  # by device; on the CPU three minutes on two cores
    "cpu": {"steps": 200, "batch": 2, "sequence": 128, "rate": 3e-3},
    "cuda": {"steps": 600, "batch": 16, "sequence": 512, "rate": 1e-3},
}
# Of teacher and student, (hidden, layers).
SIZES = {"cpu": ((192, 3), (96, 2)), "cuda": ((768, 8), (384, 4))}
HELD_OUT_TOKENS, COST_TOKENS = {"cpu": 4_096, "cuda": 65_536}, {"cpu": 1_024, "cuda": 8_192}


def completed(options: argparse.Namespace) -> argparse.Namespace:
    """The user's options, completed by what suits the device."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = device.partition(":")[0]
    if kind not in SUITED:
        raise BadInput(f"--device: expected cpu, cuda or cuda:N, got {device!r}")
    given = {name: value for name, value in vars(options).items() if value is not None}
    return argparse.Namespace(**vars(options) | {"device": device} | SUITED[kind] | given)


@dataclass(frozen=True)
class Distillation:
    """The losses against a frozen teacher."""

    settings: Any
    teacher: Any

    def states(self, model: Any, rows: Tensor) -> Tensor:
        """Logits, or hidden states where the heads are part of the loss."""
        if self.settings.fused_linear:
            return lm.forward(model.model, rows).last_hidden_state
        return lm.forward(model, rows).logits

    def losses(self, model: Any, rows: Tensor) -> dict[str, lm.Loss]:
        """What trains `model`, then the same done in other ways; each takes both models' `states`."""
        temperature, backend = self.settings.temperature, self.settings.backend

        def from_logits(student: Tensor, teacher: Tensor) -> Tensor:
            return kl_div(
                student, teacher, direction="forward", temperature=temperature, labels=rows, shift=True,
                t_squared=True, backend=backend,
            )  # fmt: skip

        def in_pytorch(student: Tensor, teacher: Tensor) -> Tensor:
            log_q = F.log_softmax(student[:, :-1] / temperature, -1, dtype=torch.float32)
            log_p = F.log_softmax(teacher[:, :-1] / temperature, -1, dtype=torch.float32)
            divergences = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            return divergences[rows[:, 1:] != lm.IGNORED].mean() * temperature**2

        def from_hidden_states(student: Tensor, teacher: Tensor) -> Tensor:
            return linear_div(
                student, model.lm_head.weight, teacher, self.teacher.lm_head.weight, temperature=temperature,
                labels=rows, shift=True, t_squared=True, backend=backend,
            )  # fmt: skip

        def behind_heads(loss: lm.Loss) -> lm.Loss:
            return lambda student, teacher: loss(model.lm_head(student), self.teacher.lm_head(teacher))

        if not self.settings.fused_linear:
            return {"kl_gpu": from_logits, "PyTorch": in_pytorch}
        losses = {"kl_gpu": behind_heads(from_logits), "PyTorch": behind_heads(in_pytorch)}
        losses = {"kl_gpu, fused": from_hidden_states, **losses}
        autocast = torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.is_cuda)
        return {name: autocast(loss) for name, loss in losses.items()}

    def distillation_loss(self, model: Any, rows: Tensor) -> Tensor:
        loss, *_ = self.losses(model, rows).values()
        return loss(self.states(model, rows), self.states(self.teacher, rows))

    def kl(self, logits: Tensor, rows: Tensor) -> Tensor:
        """KL(teacher‖model), given the model's logits, summed over the positions that have a label."""
        teacher, backend = lm.forward(self.teacher, rows).logits, self.settings.backend
        return kl_div(logits, teacher, labels=rows, shift=True, reduction="sum", backend=backend)


def study(settings: argparse.Namespace) -> int:
    """Returns the exit code. Ctrl-C ends it early; what was measured until then is reported all the same."""
    device, sequence, seed = settings.device, settings.sequence, settings.seed
    kind = device.partition(":")[0]
    lm.check(settings.out, settings.backend, device)
    cost = None
    perplexity, kl = "held-out perplexity {perplexity:,.1f}", ", KL(teacher‖model) {kl:.4f}"
    runs = [
        report.Run("teacher", "cross-entropy", 2 * settings.steps, perplexity),
        report.Run("student, labels alone", "cross-entropy", settings.steps, perplexity + kl),
        report.Run("student, kl_gpu", "KL(teacher‖student)", settings.steps, perplexity + kl),
    ]
    with report.until_interrupted(runs):
        with report.console.status("Reading the text …"):
            documents, others = lm.read(settings.text)
            tokeniser = lm.trained_tokeniser(documents)
            training = lm.windows(tokeniser, documents, sequence, device)
            held_out = lm.windows(tokeniser, others, sequence, device)
        held_out = lm.spread(held_out, max(1, HELD_OUT_TOKENS[kind] // sequence))
        columns, tokens = len(tokeniser), lm.predicted(held_out)
        teacher, student = (
            lm.small_llama(size, columns, sequence, seed + i).to(device) for i, size in enumerate(SIZES[kind])
        )
        report.say(
            f"{settings.text or lm.LIBRARY}: {training.numel():,} tokens to train on, {tokens:,} held out.\n"
            f"A teacher of {teacher.num_parameters() / 1e6:,.1f} M parameters, students of "
            f"{student.num_parameters() / 1e6:,.1f} M, {columns:,} columns, on {device}."
        )
        distillation = Distillation(settings, teacher)
        models = [teacher, copy.deepcopy(student), student]
        objectives = [lm.label_loss, lm.label_loss, distillation.distillation_loss]
        for run, model, objective in zip(runs, models, objectives, strict=True):
            against = None if model is teacher else distillation.kl
            measure = partial(lm.measured, model, held_out, settings.batch, against)
            lm.train(run, model, objective, training, settings, measure)
            teacher.requires_grad_(False)
        report.say("Measuring what the loss costs …")
        rows = held_out[: max(1, COST_TOKENS[kind] // sequence)]
        states = [distillation.states(each, rows).detach() for each in (student, teacher)]
        cost = lm.costs(distillation.losses(student, rows), *states)

    report.say(f"\nOn {tokens:,} tokens held out from training:")
    plot = report.show_models(runs)
    if cost:
        report.say_costs(cost, "hidden states" if settings.fused_linear else "logits", states[0])
    setup = {"training_tokens": training.numel(), "held_out_tokens": tokens, "columns": columns}
    report.save("distill", settings, runs, plot, setup=setup, cost=cost)
    return 0 if cost else 130


@report.one_line_errors("distill.py")
def main(arguments: list[str] | None = None) -> int:
    return study(completed(parsed(arguments)))


if __name__ == "__main__":
    sys.exit(main())

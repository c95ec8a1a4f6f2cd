"""Train a small language model by policy gradient, with the KL penalty in five forms, and compare them.

    python examples/rlhf_kl.py

pretrains a small Llama on the sources of Python's standard library, and from this reference trains one policy
for each form of the penalty, with the same prompts, noise, steps and coefficient. The reward is the share of
the lines written that parse as Python. The forms are

    none; kl_gpu.kl_div(policy_logits, ref_logits, direction="reverse"), exact at every token;
    kl_gpu.kl_penalty(policy_logprobs, ref_logprobs, "k1"), in the reward; "k2" and "k3", as a loss.

It prints the reward and the exact KL of each on held-out prompts, and draws one against the other.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, make_dataclass
from functools import partial
from typing import Any, NamedTuple

import _report as report
from _report import Parser, add_common_options, positive_number, whole

OPTIONS = {
    "pretraining": (whole(1), 300, "steps of the reference"),
    "steps": (whole(1), 32, "of each policy"),
    "prompts": (whole(1), 16, "a step"),
    "samples": (whole(2), 4, "completions of each prompt"),
    "prompt": (whole(2), 24, "tokens of a prompt"),
    "tokens": (whole(1), 40, "of a completion"),
    "held_out": (whole(2), 128, "prompts to measure on"),
    "rate": (positive_number, 5e-4, "learning rate of the policies"),
    "coefficient": (positive_number, 0.02, "the penalty's: reward per nat of a completion's KL"),
}
Settings = make_dataclass("Settings", [*OPTIONS, "text", "seed", "backend", "out"], frozen=True)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    what = "Train a policy for each form of the KL penalty, from the same reference, and compare "
    parser = Parser(prog="rlhf_kl.py", description=what + "reward and KL. On the CPU.")
    for name, (kind, default, meaning) in OPTIONS.items():
        option, metavar = "--" + name.replace("_", "-"), "N" if isinstance(default, int) else "R"
        meaning += "; default: %(default)s"
        parser.add_argument(option, metavar=metavar, type=kind, default=default, help=meaning)
    add_common_options(parser)
    return parser.parse_args(arguments)


with report.imports("rlhf_kl.py", parsed, __name__):
    import _language_models as lm
    import torch
    from _language_models import share_that_parses, token_logprobs
    from torch import Tensor

    from kl_gpu import kl_div, kl_penalty

# Each with where it goes: k1 in the reward, as in PPO for language models; k3 in the loss, as in GRPO; and k2
# like k3, because in the reward neither has the KL's gradient.
FORMS = {"none": "", "exact": "loss and reward", "k1": "reward", "k2": "loss", "k3": "loss"}
VOCABULARY = 2_048  # of 32 000 tokens, half a minute of pretraining would teach only the most frequent


class Penalty(NamedTuple):
    """Of a batch of completions, each `[batch, time]`, in nats."""

    later: Tensor  # to take from the reward of the token at t; no gradient
    loss: Tensor  # to differentiate


def exact_kl(policy_logits: Tensor, ref_logits: Tensor, backend: str | None) -> Tensor:
    """KL(policy‖reference) at every token, `[batch, time]`, of logits `[batch, time, V]`."""
    return kl_div(policy_logits, ref_logits, direction="reverse", reduction="none", backend=backend)


def penalty(form: str, policy: Tensor, reference: Tensor, tokens: Tensor, backend: Any = None) -> Penalty:
    """Of both models' logits, `[batch, time, V]`; `tokens`, `[batch, time]`, were drawn from the policy's.

    Detached in the reward, the KL at a token trains only what leads there; as a loss, only what the policy
    does there. The exact form uses it as both, which is the whole gradient: docs/rlhf.md has each form's.
    """
    nothing = torch.zeros(tokens.shape, dtype=policy.dtype)
    if form == "none":
        return Penalty(nothing, nothing)
    if form == "exact":
        kl = exact_kl(policy, reference, backend)
        return Penalty(to_go(kl.detach()) - kl.detach(), kl)
    estimate = kl_penalty(token_logprobs(policy, tokens), token_logprobs(reference, tokens), form)
    return Penalty(to_go(estimate.detach()), nothing) if form == "k1" else Penalty(nothing, estimate)


def to_go(values: Tensor) -> Tensor:
    """At each t the sum of `values`, `[batch, time]`, from t on."""
    return values.flip(1).cumsum(1).flip(1)


@dataclass(frozen=True)
class Game:
    """What every form of the penalty is tried on: a reference, prompts, and a reward."""

    settings: Any
    reference: Any
    tokeniser: Any
    prompts: Tensor  # [count, time], to train on
    held_out: Tensor  # the same, to measure on

    def rewards(self, ids: Tensor) -> Tensor:
        """Of rows of prompt and completion, [batch, time]: [batch]."""
        prompts, completions = map(self.tokeniser.batch_decode, ids.tensor_split([self.settings.prompt], 1))
        return torch.tensor([share_that_parses(*texts) for texts in zip(prompts, completions, strict=True)])

    def logits(self, model: Any, ids: Tensor) -> Tensor:
        """For each token of the completions, the logits it was drawn from: [batch, tokens, V], a view."""
        return model(input_ids=ids, use_cache=False).logits[:, self.settings.prompt - 1 : -1]

    def loss(self, policy: Any, form: str, ids: Tensor, rewards: Tensor) -> Tensor:
        """Its gradient estimates that of −E[reward] + β KL(policy‖reference); `policy` has drawn `ids`."""
        tokens, beta = ids[:, self.settings.prompt :], self.settings.coefficient
        logits = self.logits(policy, ids)
        with torch.no_grad():
            ref_logits = self.logits(self.reference, ids)
        kl = penalty(form, logits, ref_logits, tokens, self.settings.backend)
        # Less the mean of the prompt's other completions: less variance, and the gradient's mean stays.
        returns = (rewards[:, None] - beta * kl.later).unflatten(0, (-1, self.settings.samples))
        others = (returns.sum(1, keepdim=True) - returns) / (self.settings.samples - 1)
        advantages = (returns - others).flatten(0, 1)
        return (-advantages * token_logprobs(logits, tokens) + beta * kl.loss).sum(1).mean()

    @torch.no_grad()
    def measure(self, policy: Any) -> report.Completions:
        generator = torch.Generator().manual_seed(self.settings.seed)
        rewards, divergences, sample = [], [], ""
        for prompts in self.held_out.split(64):  # not all at once, so that the logits stay small
            ids = lm.complete(policy, prompts, self.settings.tokens, generator)
            logits, ref_logits = self.logits(policy, ids), self.logits(self.reference, ids)
            rewards.append(self.rewards(ids))
            divergences.append(exact_kl(logits, ref_logits, self.settings.backend).sum(1))
            sample = sample or self.tokeniser.decode(ids[0])
        return report.Completions(*mean_and_error(rewards), *mean_and_error(divergences), sample)


def mean_and_error(batches: list[Tensor]) -> tuple[float, float]:
    values = torch.cat(batches).double()
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def improve(policy: Any, form: str, game: Game, run: report.Run, notify: Callable[[], None]) -> None:
    """Trains `policy` for `run.steps` steps and writes its curves into `run` as they come."""
    settings = game.settings
    generator = torch.Generator().manual_seed(settings.seed)  # the same prompts and noise for every form
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings.rate)
    policy.eval()
    for _ in run.each_step(partial(game.measure, policy), notify):
        chosen = torch.randint(len(game.prompts), (settings.prompts,), generator=generator)
        prompts = game.prompts[chosen].repeat_interleave(settings.samples, 0)
        ids = lm.complete(policy, prompts, settings.tokens, generator)
        rewards = game.rewards(ids)
        game.loss(policy, form, ids, rewards).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.curve.append(rewards.mean().item())


def study(settings: Any) -> int:
    """Returns the exit code. Ctrl-C ends it early; what was measured until then is reported all the same."""
    lm.check(settings.out, settings.backend)
    pretraining = report.Run("cross-entropy", settings.pretraining)
    runs = {form: report.Run(applied, settings.steps, "reward", "applied") for form, applied in FORMS.items()}
    sequence = settings.prompt + settings.tokens
    with report.until_interrupted(runs) as outcome:
        with report.console.status("Reading the text …"):
            text = lm.read(settings.text)
            tokeniser = lm.trained_tokeniser(text.training, VOCABULARY)
            training = lm.windows(tokeniser, text.training, sequence)
            held_out = lm.windows(tokeniser, text.held_out, sequence)
            prompts = training.prompts(settings.prompt)
            asked = held_out.spread(settings.held_out).prompts(settings.prompt)
        columns = len(tokeniser)
        reference = lm.small_llama(lm.Size(128, 2), columns, sequence, settings.seed)
        report.say(
            f"{text.source}: {training.ids.numel():,} tokens to train on.\n"
            f"A reference of {reference.num_parameters() / 1e6:,.1f} M parameters, {columns:,} columns; "
            f"a policy for each penalty, {settings.steps} steps of {settings.prompts} prompts × "
            f"{settings.samples} completions.\nReward: the share of the lines written that parse as Python."
        )
        with report.Progress() as progress:
            notify = progress.follow("reference", pretraining)
            following = {form: progress.follow(form, run) for form, run in runs.items()}
            options = argparse.Namespace(batch=16, rate=3e-3, seed=settings.seed)
            measure = partial(lm.measured, held_out=held_out.spread(32), batch=16, columns=columns)
            lm.train(pretraining, reference, lm.label_loss, training, options, measure, notify)
            game = Game(settings, reference.eval().requires_grad_(False), tokeniser, prompts, asked)
            for form, run in runs.items():
                improve(copy.deepcopy(reference).requires_grad_(), form, game, run, following[form])

    beta, each = settings.coefficient, f"{settings.tokens} tokens each"
    report.say(f"\nCompletions of {len(asked)} held-out prompts, {each}; ± is a standard error:")
    plot = report.show_policies(runs, beta)
    report.say(f"KL in nats a completion, exact at every token; objective: reward − {beta:g} KL.")
    setup = lm.setup_of(text, training, tokeniser, settings)
    setup |= {"held_out_prompts": len(asked), "parameters": reference.num_parameters()}
    timing: dict[str, Any] = {"total_seconds": outcome.seconds, "pretraining_seconds": pretraining.seconds}
    timing["policy_seconds"] = {form: run.seconds for form, run in runs.items()}
    start = pretraining.figures | {"tokens": pretraining.tokens}
    report.save("rlhf_kl", settings, setup, runs, plot, reference=start, timing=timing)
    return outcome.code


@report.one_line_errors("rlhf_kl.py")
def main(arguments: list[str] | None = None) -> int:
    return study(Settings(**vars(parsed(arguments))))


if __name__ == "__main__":
    sys.exit(main())
